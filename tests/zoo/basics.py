"""Small networks, one per structure: layers, attention, norms, and what Python code does around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, images, tokens


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNet(nn.Module):
    """conv, batch norm, pool, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(torch.flatten(x, 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.bn(self.b(F.relu(self.a(x))))))


class Concat(nn.Module):
    """Two branches, and the input itself, side by side before one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.bn, self.out = nn.BatchNorm2d(14), nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.bn(torch.cat([self.a(x), x, self.b(x)], 1))))


class Grouped(nn.Module):
    """A depthwise, a grouped and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x)))))))))


class Multiplier(nn.Module):
    """A depthwise convolution that makes two channels of one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(F.relu(self.stem(x)))))


class SqueezeExcite(nn.Module):
    """A sigmoid gate is not zero at a removed channel, what it multiplies is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


class Softplus(nn.Module):
    """A removed unit is the constant ln 2: the columns that read it have to be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.softplus(self.fc1(x)))


class Gated(nn.Module):
    """One linear layer makes value and gate."""

    def __init__(self, sections: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class GLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.glu(self.fc1(x), dim=-1))


class Shuffle(nn.Module):
    """Channel shuffle between grouped convolutions, and a pixel shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1)
        self.up = nn.Conv2d(4, 12, 1)
        self.mid = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        x = F.pixel_shuffle(F.relu(self.mid(F.relu(self.b(x)))), 2)
        return self.up(x)


class FusedAttention(nn.Module):
    """One linear layer makes queries, keys and values; a float scale stays at the full head-dim."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim)
        return self.head(x + self.proj(y))


class GroupedQuery(nn.Module):
    """Rotary grouped-query attention under an RMS norm, as in Llama."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2, head_dim: int = 6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.stem, self.norm = nn.Linear(8, width), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k = nn.Linear(width, heads * head_dim), nn.Linear(width, kv_heads * head_dim)
        self.v, self.o = nn.Linear(width, kv_heads * head_dim), nn.Linear(heads * head_dim, width)
        self.head = nn.Linear(width, 3)
        angle = torch.arange(32.0)[:, None] * torch.logspace(0, -2, head_dim // 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1), persistent=False)
        self.scaling = head_dim**-0.5

    def rotate(self, x: Tensor) -> Tensor:
        n = x.shape[-2]
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos[:n] + torch.cat([-b, a], -1) * self.sin[:n]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        b, n, _ = y.shape
        q, k, v = (layer(y).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True, scale=self.scaling
        )
        return self.head(x + self.o(y.transpose(1, 2).reshape(b, n, -1)))


class TorchAttention(nn.Module):
    """`nn.TransformerEncoderLayer`: heads are tied to the width by its own code, the MLP is free."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class WindowedAttention(nn.Module):
    """Attention over 5-d tensors is composed of smaller operators; its scale is still that of the head-dim."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 6
        self.stem, self.qkv, self.head = nn.Linear(8, 10), nn.Linear(10, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(self.stem(x)).reshape(b, n // 2, 2, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(y.permute(0, 2, 3, 1, 4).reshape(b, n, -1))


class NormedStream(nn.Module):
    """A residual stream under a layer norm and a group norm: exact when the norms remember the width."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), norm()
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))


class HandRMSNorm(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class LiteralRMSNorm(HandRMSNorm):
    """Its eps is a number in its code."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        del self.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 3e-4) * self.weight


class LiteralLayerNorm(LiteralRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 2e-5) * self.weight


class ScaledRMSNorm(HandRMSNorm):
    """Multiplies by 1 + weight first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.weight)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OffsetLayerNorm(nn.LayerNorm):
    """Stores its weight minus 1."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class MaskedGroupNorm(nn.GroupNorm):
    """Takes a mask, which it does not always need."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(input)
        return out if mask is None else out * mask


class MaskedGroupNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 12, 3), MaskedGroupNorm(3, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stem(x), mask=None))).mean((2, 3))


class ActiveGroupNorm(nn.GroupNorm):
    """Goes on with an activation of its own."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels)
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class ActiveLayerNorm(nn.LayerNorm):
    """Goes on with an activation of its own."""

    def __init__(self) -> None:
        super().__init__(16)
        self.act = nn.GELU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class ActiveGroupNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 12, 3), ActiveGroupNorm(3, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x))).mean((2, 3))


class UnbiasedRMSNorm(HandRMSNorm):
    """Has no bias and says so in an ordinary attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.bias is None else x + self.bias


class WeightlessRMSNorm(nn.Module):
    """Its weight is there for others to see, and never read."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width), persistent=False)
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class PowerRMSNorm(HandRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon, -0.5) * self.weight


class HandLayerNorm(nn.Module):
    """Without a bias, the mean taken away twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) * torch.rsqrt(variance + self.eps))


class HandLayerNorm2d(nn.Module):
    """Over the channels of an image, with a root and a division."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class NormedImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), HandLayerNorm2d()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.stem(x))))


class HalfNorm(HandLayerNorm):
    """No norm that is known: the mean is that of something else."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - 0.5 * mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) * torch.rsqrt(variance + self.eps))


class GroupNorms(nn.Module):
    """Whole norm groups leave; inside a group the count has to be remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.b, self.norm_b = nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))))


class InstanceNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.act, self.head = nn.PReLU(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.a(x))))


class PlainBatchNorm(nn.Module):
    """A batch norm without weight and bias turns a zero channel into a constant: the reader has to be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x)))


class LayerScale(nn.Module):
    """A bare parameter scales a branch; a positional table is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.gamma, self.position = nn.Parameter(torch.full((12,), 0.5)), nn.Parameter(torch.randn(1, 5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        return self.head(x + self.gamma * F.gelu(self.fc(x)))


class WeightNorm(nn.Module):
    """A weight norm of zero is 0 / 0: only its gain may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))
        self.fc2 = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Embedded(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.fc2(F.relu(self.fc1(x))))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class CustomFunction(nn.Module):
    """Inside of an autograd function the operators are seen as anywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_Double.apply(self.fc1(x)))


class UnknownOperator(nn.Module):
    """Singular values have no rule: what they touch freezes, the rest does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.square, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.hidden, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.square(self.fc1(x))
        y = y * torch.linalg.svdvals(y).sum()
        return self.out(F.relu(self.hidden(self.fc2(y))))


class DataBranch(nn.Module):
    """Which of two layers runs is decided by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.a(x) if x.sum() > 1e9 else self.b(x)
        return self.head(x)


class DataBranches(DataBranch):
    """One decision behind another, beside a check that raises."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        x = F.relu(self.stem(x))
        y = self.b(x)
        if x.sum() > 1e9:
            y = y * 2
            if y.sum() > 1e9:
                y = y + self.a(x)
        return self.head(y)


class DataCount(DataBranch):
    """How often a layer runs is read from the data."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(int(x.sum() * 1e-9)):
            x = self.a(x)
        return self.head(self.b(x))


class Noise(nn.Module):
    """Adds noise, of the shape of one tensor and of the width of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.free = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        x = self.stem(x)
        x = self.mid(x + torch.randn_like(x))
        x = x + torch.rand(1, x.shape[1])
        return self.head(F.relu(self.free(x)))


class ConstantCount(DataBranch):
    """How often a layer runs is computed from no data: it is the same always."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(int(torch.zeros(len(x)).sum())):
            x = self.a(x)
        return self.head(self.b(x))


class RandomCount(DataBranch):
    """How often a layer runs is drawn."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(int(torch.rand(()) * 1e-3)):
            x = self.a(x)
        return self.head(self.b(x))


class WrittenCount(DataBranch):
    """How often a layer runs starts as a constant, and data are written into it."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        total += x.sum() * 1e-9
        x = F.relu(self.stem(x))
        for _ in range(int(total)):
            x = self.a(x)
        return self.head(self.b(x))


class DataFailure(DataBranch):
    """What would run on other data is not known: the example is too small for it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if x.sum() > 1e9:
            x = self.a(x[:, :4].reshape(-1, 8) + x)
        return self.head(self.b(x))


class WrittenBranch(DataBranch):
    """What decides starts as a constant, and data are written into it."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        total += x.sum()
        x = F.relu(self.stem(x))
        x = self.a(x) if total > 1e9 else self.b(x)
        return self.head(x)


class Reused(nn.Module):
    """One module runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.tanh(self.shared(x))
        return self.head(x)


class Unused(nn.Module):
    """A parameter and a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.never = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 10)
        self.spare = nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class TrainOnly(nn.Module):
    """An auxiliary head runs in training only, and reads what is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.aux = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.fc1(x))
        return (self.fc2(x), self.aux(x)) if self.training else self.fc2(x)


class FrozenLayer(nn.Module):
    """A layer that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.fc2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class HardView(nn.Module):
    """The size after the convolution is written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).view(-1, 5 * 16))


class InPlace(nn.Module):
    """In-place operators, one of them through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.mul_(0.5)
        y += self.b(x)
        y[:, :, 0].fill_(0.0)
        return self.head(y.relu_())


class WrittenBuffer(nn.Module):
    """The result is put together by writing into parts of an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 2, self.a.out_features)
        y[:, 0] = self.a(x)
        y[:, 1] = torch.sigmoid(self.b(x))
        return self.head(y)


class ManyInputs(nn.Module):
    """Keyword inputs, one of them an int; a dictionary comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 10), nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, left: Tensor, right: Tensor, times: int = 1) -> dict[str, Any]:
        hidden = F.relu(self.a(left) + times * self.b(right))
        return {"scores": self.head(hidden), "extra": [hidden.mean(), {"norm": hidden.norm()}]}


class ReturnsHidden(nn.Module):
    """A hidden layer is an output as well, so its width is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(hidden))), hidden


class Reshaped(nn.Module):
    """Heads by hand with the input's width: the code only works while both widths agree."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.q, self.kv = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.proj, self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, c = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        k, v = self.kv(y).reshape(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.head(F.relu(self.fc(x + self.proj(y))))


class WidthPerHead(nn.Module):
    """The size of a head is computed from the width that comes in: no head can leave while that width stays."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.qkv = nn.Linear(6, 16), nn.Linear(16, 48)
        self.proj, self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.fc(x + self.proj(y))))


class Halves(nn.Module):
    """Two halves of one layer go separate ways; `chunk` keeps their sizes equal."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(6, 20), nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.fc(x).chunk(2, dim=-1)
        return self.a(torch.tanh(left)) + self.b(F.gelu(right))


class Spatial(nn.Module):
    """1-d and 3-d convolutions, padding, upsampling, unfolding into patches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 8, 3)
        self.c, self.fc = nn.Conv3d(8, 5, 1), nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.pad(F.relu(self.a(x)), (1, 1)), scale_factor=2.0)
        x = F.relu(self.b(x))[:, :, None, None, :]
        x = F.adaptive_avg_pool3d(F.relu(self.c(x)), (1, 2, 2)).squeeze(2)
        return self.fc(F.unfold(x, 2).squeeze(-1))


class UNet(nn.Module):
    """Down, up, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(10, 6, 2, stride=2), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        return self.head(torch.cat([skip, F.relu(self.up(F.relu(self.mid(skip))))], 1))


class Mixer(nn.Module):
    """One MLP over channels, one over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 5)
        self.c, self.d, self.head = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x + self.d(F.gelu(self.c(x))))


BASICS: dict[str, Case] = {
    "mlp": Case(MLP, lambda: torch.randn(3, 6), 10),
    "convnet": Case(ConvNet, images(), 14),
    "residual": Case(Residual, images(), 20),
    "concat": Case(Concat, images(), 11),
    "grouped": Case(Grouped, images(), 6),
    "multiplier": Case(Multiplier, images(), 6),
    "squeeze_excite": Case(SqueezeExcite, images(), 12),
    "softplus": Case(Softplus, lambda: torch.randn(3, 6), 10),
    "gated": Case(Gated, lambda: torch.randn(3, 6), 10),
    "glu": Case(GLU, lambda: torch.randn(3, 6), 10),
    "shuffle": Case(Shuffle, images(), 8),
    "fused_attention": Case(FusedAttention, tokens(), 4, wide=8),
    "grouped_query": Case(GroupedQuery, tokens(8), 2, wide=16),
    "torch_attention": Case(TorchAttention, tokens(), 24),
    "windowed_attention": Case(WindowedAttention, tokens(8, 4), 12),
    "layer_norm": Case(lambda: NormedStream(lambda: nn.LayerNorm(16)), lambda: torch.randn(3, 6), 12, wide=28),
    "rms_norm": Case(lambda: NormedStream(lambda: nn.RMSNorm(16)), lambda: torch.randn(3, 6), 12, wide=28),
    "hand_rms_norm": Case(lambda: NormedStream(HandRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "weightless_rms_norm": Case(lambda: NormedStream(WeightlessRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "power_rms_norm": Case(lambda: NormedStream(PowerRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "hand_layer_norm": Case(lambda: NormedStream(HandLayerNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "hand_layer_norm_2d": Case(NormedImages, images(), 8),
    "half_a_norm": Case(
        lambda: NormedStream(HalfNorm), lambda: torch.randn(3, 6), 12, reason="a mean divides by the count"
    ),
    "unbiased_rms_norm": Case(lambda: NormedStream(UnbiasedRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "literal_rms_norm": Case(lambda: NormedStream(LiteralRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "literal_layer_norm": Case(lambda: NormedStream(LiteralLayerNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "scaled_rms_norm": Case(lambda: NormedStream(ScaledRMSNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "offset_layer_norm": Case(
        lambda: NormedStream(lambda: OffsetLayerNorm(16)), lambda: torch.randn(3, 6), 12, wide=28
    ),
    "active_group_norm": Case(ActiveGroupNorms, images(), 4),
    "active_layer_norm": Case(lambda: NormedStream(ActiveLayerNorm), lambda: torch.randn(3, 6), 12, wide=28),
    "masked_group_norm": Case(MaskedGroupNorms, images(), 4),
    "group_norm": Case(GroupNorms, images(), 12),
    "instance_norm": Case(InstanceNorms, images(), 8),
    "plain_batch_norm": Case(PlainBatchNorm, images(), 8),
    "layer_scale": Case(LayerScale, tokens(6), 12),
    "weight_norm": Case(WeightNorm, lambda: torch.randn(3, 6), 10),
    "tied": Case(Embedded, lambda: torch.randint(0, 20, (2, 5)), 28),
    "custom_function": Case(CustomFunction, lambda: torch.randn(3, 6), 10),
    "unknown_operator": Case(UnknownOperator, lambda: torch.randn(3, 6), 17, "no rule for this operator"),
    "data_branch": Case(DataBranch, lambda: torch.randn(3, 6), 16),
    "data_branches": Case(DataBranches, lambda: torch.randn(3, 6), 16),
    "data_count": Case(DataCount, lambda: torch.randn(3, 6), 0, "data decides at aten._local_scalar_dense"),
    "noise": Case(Noise, lambda: torch.randn(3, 6), 5, "random numbers are drawn along this dim"),
    "constant_count": Case(ConstantCount, lambda: torch.randn(3, 6), 16),
    "random_count": Case(RandomCount, lambda: torch.randn(3, 6), 0, "data decides at aten._local_scalar_dense"),
    "written_count": Case(WrittenCount, lambda: torch.randn(3, 6), 0, "data decides at aten._local_scalar_dense"),
    "data_failure": Case(DataFailure, lambda: torch.randn(3, 6), 0, "data decides at aten._local_scalar_dense"),
    "written_branch": Case(WrittenBranch, lambda: torch.randn(3, 6), 16),
    "reused": Case(Reused, lambda: torch.randn(3, 6), 8),
    "unused": Case(Unused, lambda: torch.randn(3, 6), 10),
    "train_only": Case(TrainOnly, lambda: torch.randn(3, 6), 10),
    "frozen_layer": Case(FrozenLayer, lambda: torch.randn(3, 6), 18),
    "hard_view": Case(HardView, images(), 8, "its size is written as the number 80 by view in the model"),
    "in_place": Case(InPlace, images(), 8),
    "written_buffer": Case(WrittenBuffer, lambda: torch.randn(3, 6), 8),
    "many_inputs": Case(ManyInputs, lambda: dict(left=torch.randn(3, 6), right=torch.randn(3, 4), times=2), 0, "mean"),
    "returns_hidden": Case(ReturnsHidden, lambda: torch.randn(3, 6), 8, "is a dim of the model's output 1"),
    "reshaped": Case(Reshaped, tokens(6), 24, wide=26),
    "width_per_head": Case(WidthPerHead, tokens(6), 24),
    "halves": Case(Halves, lambda: torch.randn(3, 6), 10),
    "spatial": Case(Spatial, lambda: torch.randn(2, 4, 9), 19),
    "unet": Case(UNet, images(), 22),
    "mixer": Case(Mixer, tokens(), 19),
}
