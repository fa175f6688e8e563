"""Networks whose result has places: detectors, segmentation decoders, super-resolution, diffusion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, images


class Stages(nn.Module):
    """Three resolutions, as a backbone gives them."""

    def __init__(self, widths: tuple[int, int, int] = (6, 8, 10)) -> None:
        super().__init__()
        a, b, c = widths
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, a), (a, b), (b, c)))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [F.relu(self.a(x))]
        found.append(F.relu(self.b(found[-1])))
        return [*found, F.relu(self.c(found[-1]))]


class FPN(nn.Module):
    """Lateral convolutions, added from the top down; one head, with group norm, for all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.lateral = nn.ModuleList(nn.Conv2d(w, 8, 1) for w in (6, 8, 10))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(3))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        levels = [layer(y) for layer, y in zip(self.lateral, self.stages(x), strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        towers = [self.tower(layer(y)) for layer, y in zip(self.smooth, levels, strict=True)]
        return [(self.classes(y), F.relu(self.boxes(y) * s)) for y, s in zip(towers, self.scales, strict=True)]


class BiFPN(nn.Module):
    """Levels are mixed by learned weights that are made positive and divided by their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.lateral = nn.ModuleList(nn.Conv2d(w, 8, 1) for w in (6, 8, 10))
        self.up, self.down = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False) for _ in range(2))
        self.point = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, middle, top = (layer(y) for layer, y in zip(self.lateral, self.stages(x), strict=True))
        up, down = F.relu(self.up), F.relu(self.down)
        up = up / (up.sum() + 1e-4)
        y = up[0] * middle + up[1] * F.interpolate(top, scale_factor=2.0)
        y = self.norms[0](self.point[0](self.depthwise[0](F.silu(y))))
        down = down / (torch.sum(down, dim=0) + 1e-4)
        z = down[0] * top + down[1] * F.max_pool2d(y, 2) + down[2] * F.avg_pool2d(middle, 2)
        return self.head(self.norms[1](self.point[1](self.depthwise[1](F.silu(z)))))


class ConvUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class C2f(nn.Module):
    """One convolution is split in two; every block adds its result to the list that is concatenated."""

    def __init__(self, inputs: int, outputs: int, blocks: int = 2) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = ConvUnit(inputs, 2 * self.c), ConvUnit((2 + blocks) * self.c, outputs)
        self.m = nn.ModuleList(nn.Sequential(ConvUnit(self.c, 3, 3), ConvUnit(3, self.c, 3)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SplitC2f(C2f):
    """The same with sizes as numbers of the block."""

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(block(y[-1]) for block in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """The same pooling again and again, all results side by side."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = ConvUnit(inputs, hidden), ConvUnit(4 * hidden, outputs), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Bins(nn.Module):
    """The distance to each side is the mean of a distribution over fixed bins, by a convolution that does not train."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins, self.conv = bins, nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.bins, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class Yolo(nn.Module):
    """C2f, SPPF, a path up with concatenation, and heads without anchors, classes apart from boxes."""

    def __init__(self, block: type[C2f] = C2f) -> None:
        super().__init__()
        self.bins, self.classes = 4, 3
        self.stem, self.block1, self.down = ConvUnit(3, 6, 3, 2), block(6, 8), ConvUnit(8, 8, 3, 2)
        self.pool, self.block2 = SPPF(8, 4, 10), block(18, 6)
        self.boxes = nn.ModuleList(nn.Sequential(ConvUnit(w, 7, 3), nn.Conv2d(7, 16, 1)) for w in (6, 10))
        self.labels = nn.ModuleList(nn.Sequential(ConvUnit(w, 5, 3), nn.Conv2d(5, 3, 1)) for w in (6, 10))
        self.dfl = Bins(4)

    def forward(self, x: Tensor) -> Tensor:
        small = self.block1(self.stem(x))
        large = self.pool(self.down(small))
        small = self.block2(torch.cat([F.interpolate(large, scale_factor=2.0), small], 1))
        found = [torch.cat((b(y), c(y)), 1) for b, c, y in zip(self.boxes, self.labels, (small, large), strict=True)]
        flat = torch.cat([y.view(y.shape[0], self.bins * 4 + self.classes, -1) for y in found], 2)
        box, label = flat.split((self.bins * 4, self.classes), 1)
        return torch.cat((self.dfl(box), label.sigmoid()), 1)


class RepBlock(nn.Module):
    """Three branches that add up, one of them a norm of the input: they leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.large, self.small = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3)), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.norms[0](self.large(x)) + self.norms[1](self.small(x)) + self.norms[2](x)))


class ASPP(nn.Module):
    """Dilated convolutions and the pooled image, side by side, then low-level features join (DeepLab v3+)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.branches = nn.ModuleList([nn.Conv2d(10, 4, 1), nn.Conv2d(10, 4, 3, padding=2, dilation=2)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 4, 1, bias=False), nn.ReLU())
        self.project, self.low, self.head = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        low, _, high = self.stages(x)
        size = high.shape[-2:]
        pooled = F.interpolate(self.pool(high), size=size, mode="bilinear", align_corners=False)
        y = F.relu(self.project(torch.cat([*(F.relu(branch(high)) for branch in self.branches), pooled], 1)))
        y = torch.cat([F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False), self.low(low)], 1)
        return F.interpolate(self.head(F.relu(y)), size=x.shape[-2:], mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """A pyramid of pooled images on top, a feature pyramid below, everything concatenated at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(10, 4, 1)) for s in (1, 2))
        self.bottleneck = nn.Conv2d(18, 6, 3, padding=1)
        self.lateral, self.smooth = nn.ModuleList(nn.Conv2d(w, 6, 1) for w in (6, 8)), nn.Conv2d(6, 6, 3, padding=1)
        self.fuse, self.head = nn.Sequential(nn.Conv2d(18, 7, 1), nn.BatchNorm2d(7), nn.ReLU()), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        def to(y: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(y, size=like.shape[2:], mode="bilinear", align_corners=False)

        low, middle, high = self.stages(x)
        top = F.relu(self.bottleneck(torch.cat([high, *(to(F.relu(pool(high)), high) for pool in self.pools)], 1)))
        levels = [self.lateral[0](low), self.lateral[1](middle), top]
        for i in (1, 0):
            levels[i] = levels[i] + to(levels[i + 1], levels[i])
        levels[0] = self.smooth(levels[0])
        return self.head(self.fuse(torch.cat([to(y, levels[0]) for y in levels], 1)))


class BilinearUNet(nn.Module):
    """Double convolutions with norms, bilinear upsampling, padding to the size of the skip, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self.twice(3, 5), self.twice(5, 8), self.twice(13, 6)
        self.up, self.head = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(6, 2, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        y = self.up(self.b(F.max_pool2d(skip, 2)))
        tall, wide = skip.size(2) - y.size(2), skip.size(3) - y.size(3)
        y = F.pad(y, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2])
        return self.head(self.c(torch.cat([skip, y], dim=1)))


class MLPDecoder(nn.Module):
    """SegFormer: a linear layer for each level, upsampled, concatenated from the last to the first, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.linear = nn.ModuleList(nn.Linear(w, 6) for w in (6, 8, 10))
        self.fuse, self.norm, self.head = nn.Conv2d(18, 7, 1, bias=False), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        stages = self.stages(x)
        size, found = stages[0].shape[-2:], []
        for y, linear in zip(stages, self.linear, strict=True):
            b, _, h, w = y.shape
            y = linear(y.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(b, -1, h, w)
            found.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return self.head(F.relu(self.norm(self.fuse(torch.cat(found[::-1], dim=1)))))


class MaskClassification(nn.Module):
    """Masks are products of queries and pixels; masks of an earlier layer say where the next may look."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem, self.pixels, self.queries = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 10, 1), nn.Embedding(3, 6)
        self.q, self.k, self.v, self.proj = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.norm, self.classes = nn.LayerNorm(6), nn.Linear(6, 4)
        self.masks = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.stem(x))
        pixels, memory = self.pixels(features), features.flatten(2).transpose(1, 2)
        query = self.queries.weight.expand(x.shape[0], -1, -1)
        mask = torch.einsum("bqc,bchw->bqhw", self.masks(query), pixels).flatten(2)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(query), self.k(memory), self.v(memory))
        )
        away = torch.where(mask.detach().sigmoid() < 0.2, -4.0, 0.0).unsqueeze(1)
        weights = (q @ k.transpose(-2, -1) * 0.5 + away).softmax(-1)
        query = self.norm(query + self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return self.classes(query), torch.einsum("bqc,bchw->bqhw", self.masks(query), pixels)


class HighResolution(nn.Module):
    """HRNet: every branch is the sum of all, resampled and convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.mix, self.head = nn.Conv2d(14, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = F.relu(self.high(x)), F.relu(self.low(x))
        fused = F.relu(high + F.interpolate(self.up(low), scale_factor=2.0))
        small = F.relu(low + self.down(high))
        y = torch.cat([fused, F.interpolate(small, size=fused.shape[2:], mode="bilinear", align_corners=True)], 1)
        return self.head(F.relu(self.mix(y)))


class Cascade(nn.Module):
    """CARN: blocks and all before them concatenated in two levels, a mean shift around, pixels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)) for _ in range(2))
        self.points = nn.ModuleList(nn.Conv2d(12 + 6 * i, 6, 1) for i in range(2))
        self.up, self.head = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - self.mean)
        together = out = x
        for block, point in zip(self.blocks, self.points, strict=True):
            made = F.relu(out + block[1](F.relu(block[0](out))))
            together = torch.cat([together, made], 1)
            out = point(together)
        return self.head(F.pixel_shuffle(F.relu(self.up(out + x)), 2)) + self.mean


class DiffusionUNet(nn.Module):
    """Residual blocks with group norm and a time step that is added, attention at the lowest size, a skip.

    The norm behind the concatenation decides what can leave: of two groups one holds channels of both parts.
    """

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, groups: int = 2) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(groups, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
            self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
            self.time = nn.Linear(10, outputs)
            self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
            return self.skip(x) + self.conv2(F.silu(self.norm2(y)))

    def __init__(self, low: int, groups: int) -> None:
        super().__init__()
        self.time1, self.time2 = nn.Linear(6, 8), nn.Linear(8, 10)
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, low, 3, 2, 1)
        self.enter, self.middle, self.leave = self.Block(4, 4), self.Block(low, low), self.Block(low + 4, 4, groups)
        self.norm, self.qkv, self.proj = nn.GroupNorm(2, low), nn.Conv1d(low, 12, 1), nn.Conv1d(4, low, 1)
        self.out_norm, self.out = nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1)
        self.heads = 2

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).reshape(b, c, h * w)).reshape(b, 3, self.heads, -1, h * w).unbind(1)
        weights = torch.einsum("bhct,bhcs->bhts", q * 0.84, k * 0.84).softmax(-1)
        y = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(b, -1, h * w)
        return x + self.proj(y).reshape(b, c, h, w)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.exp(-math.log(100) * torch.arange(3) / 3)
        time = self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], -1))))
        skip = self.enter(self.stem(x), time)
        y = self.attend(self.middle(self.down(skip), time))
        y = self.leave(torch.cat([F.interpolate(y, scale_factor=2.0, mode="nearest"), skip], 1), time)
        return self.out(F.silu(self.out_norm(y)))


class ScaleShiftBlock(nn.Module):
    """The time step scales and shifts behind the group norm, as half and half of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.time = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Linear(5, 16)
        self.conv, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        return self.head(F.relu(self.conv(F.silu(self.norm(self.stem(x)) * (1 + scale) + shift))))


class Anchors(nn.Module):
    """Scores and boxes of every anchor, laid out place by place and level by level (RetinaNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.labels = 2, 3
        self.stages, self.tower = Stages((8, 8, 8)), nn.Conv2d(8, 6, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = [], []
        for y in self.stages(x):
            y = F.relu(self.tower(y))
            b, _, h, w = y.shape
            found = self.scores(y).view(b, -1, self.labels, h, w).permute(0, 3, 4, 1, 2)
            scores.append(found.reshape(b, -1, self.labels))
            boxes.append(self.boxes(y).view(b, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, 4))
        return torch.cat(scores, 1), torch.cat(boxes, 1)


def image_and_time() -> dict[str, Tensor]:
    return dict(x=torch.randn(2, 3, 4, 4), t=torch.rand(2) * 9)


DENSE: dict[str, Case] = {
    "fpn": Case(FPN, images(), 46),
    "bifpn": Case(BiFPN, images(), 40),
    "yolo": Case(Yolo, images(), 85),
    "yolo_split": Case(lambda: Yolo(SplitC2f), images(), 99),
    "rep_block": Case(RepBlock, images(size=4), 8),
    "aspp": Case(ASPP, images(), 45),
    "upernet": Case(UPerNet, images(), 51),
    "bilinear_unet": Case(BilinearUNet, images(), 31),
    "mlp_decoder": Case(MLPDecoder, images(), 49),
    "mask_classification": Case(MaskClassification, images(size=4), 27, wide=41),
    "high_resolution": Case(HighResolution, images(size=4), 19),
    "cascade": Case(Cascade, images(size=4), 28),
    "diffusion_unet": Case(
        lambda: DiffusionUNet(6, 2), image_and_time, 37, "every factor of this dim is fixed", wide=39
    ),
    "scale_shift_block": Case(ScaleShiftBlock, lambda: dict(x=torch.randn(2, 3, 4, 4), t=torch.randn(2, 5)), 12),
    "anchors": Case(Anchors, images(), 14),
}
