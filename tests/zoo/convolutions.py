"""Convolutions of every kind, what shuffles and gates their channels, and how blocks share them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, images


class GroupedLines(nn.Module):
    """Grouped and transposed grouped convolutions over lines."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.up, self.head = nn.ConvTranspose1d(12, 8, 4, stride=2, padding=1, groups=4), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.grouped(F.relu(self.stem(x)))))))


class GroupedVolumes(nn.Module):
    """The same over volumes, with a depthwise and a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 6, 3, stride=2, padding=1, groups=6)
        self.norm, self.point = nn.BatchNorm3d(6), nn.Conv3d(6, 8, 1)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2, groups=8)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(self.norm(self.depthwise(F.relu(self.stem(x))))))
        return self.head(F.relu(self.up(x)))


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half go through a branch; then both are shuffled (ShuffleNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.point, self.depthwise = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.out, self.head = nn.Conv2d(5, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        right = F.relu(self.out(self.depthwise(F.relu(self.point(right)))))
        x = torch.cat((left, right), dim=1)
        b, c, h, w = x.shape
        return self.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w))


class PixelShuffles(nn.Module):
    """Blocks of pixels become channels at the start and pixels again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.a, self.b = nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.up, self.shuffle, self.head = nn.Conv2d(6, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(self.down(x)))))
        return self.head(F.relu(self.shuffle(self.up(x))))


class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle = nn.Conv2d(3, 18, 1), nn.ChannelShuffle(3)
        self.b, self.head = nn.Conv2d(18, 9, 1, groups=3), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.shuffle(F.relu(self.a(x))))))


class UnfoldFold(nn.Module):
    """Patches through a linear layer and back to an image (T2T, soft split)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unfold = nn.Conv2d(3, 4, 1), nn.Unfold(2, stride=2)
        self.inner, self.outer = nn.Linear(16, 10), nn.Linear(10, 20)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        patches = self.unfold(F.relu(self.stem(x))).transpose(1, 2)
        patches = self.outer(F.gelu(self.inner(patches))).transpose(1, 2)
        return self.head(F.fold(patches, size, 2, stride=2))


class Involution(nn.Module):
    """Kernels are made for every pixel and shared by a group of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.kernel = 2, 3
        self.stem, self.reduce = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.span, self.head = nn.Conv2d(5, 9 * 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        weight = self.span(F.relu(self.reduce(x))).view(b, self.groups, 1, self.kernel**2, h, w)
        patches = F.unfold(x, self.kernel, padding=1).view(b, self.groups, c // self.groups, self.kernel**2, h, w)
        return self.head((weight * patches).sum(3).view(b, c, h, w))


class ChannelAndSpatialGate(nn.Module):
    """CBAM: one shared MLP gates channels, mean and maximum over the channels gate pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(4, 8)
        self.space, self.hidden, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def gate(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = self.gate(F.adaptive_avg_pool2d(x, 1)) + self.gate(F.adaptive_max_pool2d(x, 1))
        x = x * gate.sigmoid()[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(F.relu(self.hidden(x * self.space(seen).sigmoid())))


class NeighbourGate(nn.Module):
    """ECA: a convolution over the channels, whose neighbours therefore stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.hidden, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv(x.mean((2, 3)).unsqueeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.head(F.relu(self.hidden(x * y.sigmoid().expand_as(x))))


class SqueezeVariants(nn.Module):
    """Gates over channels and over pixels side by side, a hard sigmoid, and views of the pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.fc = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 8, bias=False), nn.Hardsigmoid())
        self.pixels, self.head = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, _, _ = x.size()
        channels = x * self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return self.head(torch.max(channels, x * self.pixels(x).sigmoid()))


class GlobalContext(nn.Module):
    """A softmax over pixels pools them, two layers around a layer norm transform the result (GCNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mask = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1)
        self.down, self.norm, self.up = nn.Conv2d(8, 4, 1), nn.LayerNorm([4, 1, 1]), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.size()
        mask = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return self.head(x + self.up(F.relu(self.norm(self.down(context)))))


class NonLocal(nn.Module):
    """Every pixel attends to every pixel, embedded by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.theta, self.phi = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.g, self.out, self.norm = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        weights = (theta.transpose(1, 2) @ phi).softmax(-1)
        y = (weights @ g.transpose(1, 2)).transpose(1, 2).view(x.shape[0], -1, *x.shape[2:])
        return self.head(x + self.norm(self.out(y)))


class BlurPool(nn.Module):
    """A fixed filter per channel, kept as a buffer, and the coordinates as two more channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.coordinates, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1)
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", (line[:, None] * line / 16)[None, None].repeat(6, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filter, stride=2, groups=x.shape[1])
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.head(F.relu(self.coordinates(torch.cat([x, rows, columns], 1))))


class SelectiveKernel(nn.Module):
    """Two branches are weighed against each other, channel by channel, by a softmax over the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=2, dilation=2)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.ModuleList(nn.Conv2d(4, 8, 1) for _ in range(2))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([F.relu(self.small(x)), F.relu(self.large(x))], dim=1)
        squeezed = F.relu(self.down(branches.sum(1).mean((2, 3), keepdim=True)))
        gates = torch.stack([up(squeezed) for up in self.up], dim=1).softmax(1)
        return self.head((branches * gates).sum(1))


class SplitAttention(nn.Module):
    """One grouped convolution makes both branches, and one layer the gates of both (ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 2
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.down, self.up, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(x))))
        b, c, h, w = x.shape
        x = x.reshape(b, self.radix, c // self.radix, h, w)
        gates = self.up(F.relu(self.down(x.sum(1).mean((2, 3), keepdim=True))))
        gates = gates.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, self.radix, -1, 1, 1)
        return self.head((x * gates).sum(1))


class Scales(nn.Module):
    """Equal parts of the channels, each convolved after the last was added (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3
        self.stem = nn.Conv2d(3, 9, 1)
        self.convs, self.norms = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)), nn.BatchNorm2d(9)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.stem(x)), self.width, 1)
        made = [parts[0]]
        for part, conv in zip(parts[1:], self.convs, strict=True):
            made.append(F.relu(conv(part + made[-1] if len(made) > 1 else part)))
        return self.head(F.relu(self.norms(torch.cat(made, 1))))


class Ghost(nn.Module):
    """Half of the channels are cheap copies of the other half; what is too many is cut off (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = 8
        self.primary, self.cheap = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.primary(x))
        x = torch.cat([x, F.relu(self.cheap(x))], dim=1)
        return self.head(x[:, : self.outputs])


class PartialConv(nn.Module):
    """Only the first channels are convolved, the others pass (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved, self.untouched = 2, 6
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.fc1, self.fc2, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        head, tail = torch.split(x, [self.convolved, self.untouched], dim=1)
        y = torch.cat((self.conv(head), tail), 1)
        return self.head(x + self.fc2(F.relu(self.fc1(y))))


class Maxout(nn.Module):
    """The larger one of each two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(6, 10), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2).mean((2, 3))
        left, right = self.fc(x).chunk(2, -1)
        return self.head(torch.max(left, right))


class ConvMixer(nn.Module):
    """A depthwise convolution beside its input, then a pointwise one, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norms = nn.Conv2d(3, 8, 2, stride=2), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](F.gelu(self.patch(x)))
        x = x + self.norms[1](F.gelu(self.depthwise(x)))
        x = self.norms[2](F.gelu(self.point(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PoolMixer(nn.Module):
    """MetaFormer: the average around each pixel less the pixel, and scales of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8)
        self.fc1, self.fc2, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 2, 1)
        self.scales = nn.ParameterList(nn.Parameter(torch.full((8,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.scales[0].unsqueeze(-1).unsqueeze(-1) * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return self.head(x + self.scales[1][:, None, None] * self.fc2(F.gelu(self.fc1(x))))


class GlobalResponse(nn.Module):
    """ConvNeXt v2: each channel's length over the mean length of all channels.

    The mean divides by the count of channels, which this class cannot be told: the inner width stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 12)), nn.Parameter(torch.zeros(1, 1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.fc1(self.depthwise(x).permute(0, 2, 3, 1)))
        length = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = self.gamma * (y * (length / (length.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + y
        return self.head(x.permute(0, 2, 3, 1) + self.fc2(y))


class TotalResponse(nn.Module):
    """The same against the length of all channels together, which a removed channel does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        share = length / (torch.linalg.vector_norm(length, dim=1, keepdim=True) + 1e-6)
        return self.head(x * (1 + self.gamma * share) + self.beta)


class DenseBlock(nn.Module):
    """Every layer reads all before it; a transition halves the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (6, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1, bias=False) for width in (6, 10))
        self.transition, self.head = nn.Conv2d(14, 7, 1, bias=False), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = self.transition(F.relu(self.norms[2](torch.cat(features, 1))))
        return self.head(F.relu(F.avg_pool2d(x, 2)).mean((2, 3)))


class DualPath(nn.Module):
    """One block's output is split: a part is added to a residual path, the rest joins a dense path."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = 6
        self.stem = nn.Conv2d(3, 10, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)])
        self.head = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        residual, dense = x[:, : self.residual], x[:, self.residual :]
        for block in self.blocks:
            out = block(F.relu(torch.cat([residual, dense], 1)))
            residual = residual + out[:, : self.residual]
            dense = torch.cat([dense, out[:, self.residual :]], 1)
        return self.head(F.relu(torch.cat([residual, dense], 1)))


class Octave(nn.Module):
    """Two resolutions that exchange what they know."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.hh, self.hl = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.lh, self.ll = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = F.relu(self.high(x)), F.relu(self.low(F.avg_pool2d(x, 2)))
        out = F.relu(self.hh(high) + F.interpolate(self.lh(low), scale_factor=2.0))
        small = F.relu(self.ll(low) + self.hl(F.avg_pool2d(high, 2)))
        return self.head(torch.cat([out, F.interpolate(small, scale_factor=2.0)], 1))


class DeformableConv(nn.Module):
    """Each tap of the kernel reads where a convolution says, weighed by a mask, in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offset, self.mask = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 3, padding=1), nn.Conv2d(6, 9, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6, 9) * 0.2), nn.Parameter(torch.zeros(5))
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        offset = self.offset(x).tanh().view(b, 9, 2, h, w).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        grid = torch.stack([columns, rows], -1) + offset
        taps = F.grid_sample(x, grid.reshape(b, 9 * h, w, 2), align_corners=True).view(b, c, 9, h, w)
        taps = taps * self.mask(x).sigmoid()[:, None]
        y = torch.einsum("bckhw,ock->bohw", taps, self.weight) + self.bias.view(1, -1, 1, 1)
        return self.head(F.relu(y))


CONVOLUTIONS: dict[str, Case] = {
    "grouped_lines": Case(GroupedLines, lambda: torch.randn(2, 3, 6), 11),
    "grouped_volumes": Case(GroupedVolumes, lambda: torch.randn(2, 1, 4, 4, 4), 14),
    "shuffle_unit": Case(ShuffleUnit, images(size=4), 9),
    "pixel_shuffles": Case(PixelShuffles, images(size=4), 18),
    "channel_shuffle": Case(ChannelShuffle, images(size=4), 8),
    "unfold_fold": Case(UnfoldFold, images(size=4), 19),
    "involution": Case(Involution, images(size=4), 11),
    "channel_and_spatial_gate": Case(ChannelAndSpatialGate, images(size=4), 10, "a mean divides by the count"),
    "neighbour_gate": Case(NeighbourGate, images(size=4), 6, "is a dim of space at aten.convolution in conv"),
    "squeeze_variants": Case(SqueezeVariants, images(size=4), 12),
    "global_context": Case(GlobalContext, images(size=4), 8),
    "non_local": Case(NonLocal, images(size=4), 8, wide=18),
    "blur_pool": Case(BlurPool, images(size=4), 11),
    "selective_kernel": Case(SelectiveKernel, images(size=4), 12),
    "split_attention": Case(SplitAttention, images(size=4), 16),
    "scales": Case(Scales, images(size=4), 6),
    "ghost": Case(Ghost, images(size=4), 4),
    "partial_conv": Case(PartialConv, images(size=4), 22),
    "maxout": Case(Maxout, images(size=4), 11),
    "conv_mixer": Case(ConvMixer, images(size=4), 16),
    "pool_mixer": Case(PoolMixer, images(size=4), 12, wide=20),
    "global_response": Case(GlobalResponse, images(size=4), 8, "a mean divides by the count"),
    "total_response": Case(TotalResponse, images(size=4), 8),
    "dense_block": Case(DenseBlock, images(size=4), 21),
    "dual_path": Case(DualPath, images(size=4), 14),
    "octave": Case(Octave, images(size=4), 18),
    "deformable_conv": Case(DeformableConv, images(size=4), 11),
}
