"""Attention over images: windows, relative positions, learned queries, sampled keys, diffusion transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, images, tokens


def windows(x: Tensor, size: int) -> Tensor:
    """(batch, height, width, channels) -> (batch * windows, size * size, channels)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def unwindows(x: Tensor, size: int, h: int, w: int) -> Tensor:
    b = x.shape[0] // (h * w // size // size)
    x = x.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


def relative_index(size: int) -> Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    away = grid[:, :, None] - grid[:, None] + size - 1
    return away[0] * (2 * size - 1) + away[1]


class ShiftedWindows(nn.Module):
    """Swin: windows of a rolled image, a table of relative positions with a column per head, a mask between windows."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.heads, self.head_dim = 2, 3, 4
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 12, 1), nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Parameter(torch.randn(9, 3) * 0.5)
        self.register_buffer("index", relative_index(2))
        self.register_buffer("mask", torch.zeros(4, 4, 4).index_fill(0, torch.tensor([3]), -3.0))
        self.fc1, self.fc2, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 2)
        self.scale = self.head_dim**-0.5

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        weights = weights + bias.unsqueeze(0)
        count = self.mask.shape[0]
        weights = weights.view(b // count, count, self.heads, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
        weights = weights.view(-1, self.heads, n, n).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        _, h, w, _ = x.shape
        y = windows(torch.roll(self.norm1(x), (-1, -1), (1, 2)), self.size)
        x = x + torch.roll(unwindows(self.attend(y), self.size, h, w), (1, 1), (1, 2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean((1, 2)))


class CosineWindows(nn.Module):
    """Swin v2: queries and keys of length one, a temperature per head, a small network makes the table."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.stem, self.q, self.k, self.v = (nn.Linear(a, 12) for a in (8, 12, 12, 12))
        self.temperature = nn.Parameter(torch.zeros(3, 1, 1))
        self.hidden, self.table = nn.Linear(2, 10), nn.Linear(10, 3, bias=False)
        self.proj, self.head = nn.Linear(12, 8), nn.Linear(8, 2)
        self.register_buffer("index", relative_index(2))
        places = torch.stack(torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="ij"), -1)
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        weights = weights * self.temperature.clamp(max=4.6).exp()
        table = self.table(F.relu(self.hidden(self.places))).view(-1, self.heads)
        bias = 16 * table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().sigmoid()
        weights = (weights + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return self.head(F.gelu(y).mean(1))


class DecomposedPositions(nn.Module):
    """SAM and MViT v2: relative positions along height and width, each dotted with the query."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 8, 1), nn.Linear(8, 24), nn.Linear(8, 8)
        self.rows, self.columns = nn.Parameter(torch.randn(5, 4) * 0.5), nn.Parameter(torch.randn(5, 4) * 0.5)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        tall = self.rows[torch.arange(h)[:, None] - torch.arange(h) + h - 1]
        wide = self.columns[torch.arange(w)[:, None] - torch.arange(w) + w - 1]
        y = self.norm(x).permute(0, 2, 3, 1)
        qkv = self.qkv(y).reshape(b, h * w, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * self.heads, h * w, self.head_dim).unbind(0)
        weights = (q * self.scale) @ k.transpose(-2, -1)
        pixels = q.reshape(b * self.heads, h, w, self.head_dim)
        up, side = torch.einsum("bhwc,hkc->bhwk", pixels, tall), torch.einsum("bhwc,wkc->bhwk", pixels, wide)
        weights = weights.view(-1, h, w, h, w) + up[..., :, None] + side[..., None, :]
        weights = weights.view(-1, h * w, h * w).softmax(-1)
        y = (weights @ v).view(b, self.heads, h, w, self.head_dim).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)
        return self.head(x + self.proj(y).permute(0, 3, 1, 2))


class LearnedQueries(nn.Module):
    """DETR and Perceiver: a table of queries attends to itself and then to the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem, self.queries = nn.Conv2d(3, 10, 2, stride=2), nn.Embedding(3, 8)
        self.q, self.k, self.v, self.proj = nn.Linear(8, 12), nn.Linear(10, 12), nn.Linear(10, 6), nn.Linear(6, 8)
        self.position = nn.Parameter(torch.randn(1, 4, 10) * 0.3)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.classes, self.boxes = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x)).flatten(2).transpose(1, 2)
        b = x.shape[0]
        query = self.queries.weight.unsqueeze(0).repeat(b, 1, 1)
        q, k, v = self.q(query), self.k(x + self.position), self.v(x)
        q, k, v = (t.view(b, t.shape[1], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.norm(query + self.proj(y))
        y = y + self.fc2(F.relu(self.fc1(y)))
        return {"logits": self.classes(y), "boxes": self.boxes(y).sigmoid()}


class DeformableAttention(nn.Module):
    """Each head of each query reads a few places of every level, weighed by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.levels, self.points = 2, 2, 3
        self.stem, self.query = nn.Conv2d(3, 8, 1), nn.Linear(4, 8)
        self.value, self.proj = nn.Linear(8, 12), nn.Linear(12, 8)
        self.offsets, self.weights = nn.Linear(8, 2 * 2 * 3 * 2), nn.Linear(8, 2 * 2 * 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        queries = self.query(queries)
        b, n, _ = queries.shape
        places = self.offsets(queries).tanh().view(b, n, self.heads, self.levels, self.points, 2)
        weights = self.weights(queries).view(b, n, self.heads, self.levels * self.points).softmax(-1)
        read = []
        for level, map in enumerate((x, F.avg_pool2d(x, 2))):
            h, w = map.shape[-2:]
            value = self.value(map.flatten(2).transpose(1, 2)).view(b, h * w, self.heads, -1)
            value = value.flatten(2).transpose(1, 2).reshape(b * self.heads, -1, h, w)
            grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)
            read.append(F.grid_sample(value, grid, align_corners=False))
        weights = weights.transpose(1, 2).reshape(b * self.heads, 1, n, self.levels * self.points)
        y = (torch.stack(read, dim=-2).flatten(-2) * weights).sum(-1).view(b, -1, n).transpose(1, 2)
        return self.head(queries + self.proj(y))


class AxialAttention(nn.Module):
    """Along rows, then along columns, with one set of layers for each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.qkv, self.proj = (
            nn.ModuleList(nn.Conv1d(8, 24, 1) for _ in range(2)),
            nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2)),
        )

    def along(self, x: Tensor, axis: int) -> Tensor:
        b, n, _ = x.shape[0], x.shape[2], x.shape[1]
        q, k, v = self.qkv[axis](x).view(b, 3, self.heads, -1, n).unbind(1)
        weights = torch.einsum("bhci,bhcj->bhij", q, k).mul(0.5).softmax(-1)
        return self.proj[axis](torch.einsum("bhij,bhcj->bhci", weights, v).reshape(b, -1, n))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        rows = self.along(x.permute(0, 2, 1, 3).reshape(b * h, c, w), 0).view(b, h, c, w).permute(0, 2, 1, 3)
        columns = self.along(x.permute(0, 3, 1, 2).reshape(b * w, c, h), 1).view(b, w, c, h).permute(0, 2, 3, 1)
        return self.head(F.relu(x + rows + columns))


class CrossCovariance(nn.Module):
    """XCiT: channels attend to channels of their head, so positions inside heads stay, for a softmax counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.stem, self.qkv, self.proj = nn.Linear(8, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.temperature, self.gamma = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.full((12,), 0.5))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        y = (weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, -1)
        return self.head(x + self.gamma * self.proj(y))


class PooledAttention(nn.Module):
    """MViT: queries, keys and values are convolved and pooled as images, the pooled query is added."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.stem, self.norm = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)
        self.qkv, self.proj = nn.Linear(10, 24), nn.Linear(8, 6)
        self.pools = nn.ModuleList(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def pool(self, x: Tensor, part: int, h: int, w: int) -> Tensor:
        b, heads, _, d = x.shape
        x = x.reshape(b * heads, h, w, d).permute(0, 3, 1, 2)
        x = self.pools[part](x)
        return self.norms[part](x.reshape(b, heads, d, -1).transpose(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        b, _, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, self.heads, self.head_dim)
        q, k, v = (self.pool(t, i, h, w) for i, t in enumerate(qkv.permute(2, 0, 3, 1, 4).unbind(0)))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5) + q
        return self.head(F.gelu(self.proj(y.transpose(1, 2).flatten(2))))


class ReducedKeys(nn.Module):
    """PVT: a strided convolution makes fewer keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 5
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.q, self.kv, self.proj = nn.Linear(8, 10), nn.Linear(8, 20), nn.Linear(10, 8)
        self.reduce, self.norm_reduced = nn.Conv2d(8, 8, 2, stride=2), nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        q = self.q(y).reshape(b, -1, self.heads, self.head_dim).transpose(1, 2)
        small = self.reduce(y.transpose(1, 2).unflatten(2, (h, w))).flatten(2).transpose(1, 2)
        kv = self.kv(self.norm_reduced(small)).reshape(b, -1, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, h * w, -1)
        return self.head(x + self.proj(y))


class TalkingHeads(nn.Module):
    """CaiT: layers mix the weights of all heads, before and after the softmax.

    What the softmax makes of a head is never 0, so the rows that read it have to be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.qkv, self.proj = nn.Linear(8, 12), nn.Linear(12, 36), nn.Linear(12, 10)
        self.before, self.after, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        weights = self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.gelu(self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))))


class LinearAttention(nn.Module):
    """EfficientViT: relu keys and queries, divided by what they sum to."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 4
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, _, h, w = x.shape
        qkv = self.qkv(x).reshape(b, -1, 3 * self.dim, h * w)
        q, k, v = qkv[:, :, : self.dim], qkv[:, :, self.dim : 2 * self.dim], qkv[:, :, 2 * self.dim :]
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        y = (v @ F.relu(k).transpose(-1, -2)) @ F.relu(q)
        y = y[:, :, :-1] / (y[:, :, -1:] + 1e-6)
        return self.head(self.norm(self.proj(y.reshape(b, -1, h, w))))


class ViT(nn.Module):
    """A class token, register tokens, positions, scales of branches; the class token alone is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.token, self.registers = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 2, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.qkv, self.proj, self.scale1 = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.1))
        self.fc1, self.fc2, self.scale2 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.full((8,), 0.1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b = x.shape[0]
        x = torch.cat([self.token.expand(b, -1, -1), x], 1) + self.position
        x = torch.cat([x[:, :1], self.registers.expand(b, -1, -1), x[:, 1:]], 1)
        n = x.shape[1]
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.proj(y)
        x = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norms[1](x))))
        return self.head(self.norms[2](x)[:, 0])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiT(nn.Module):
    """Shift, scale and gate of every branch are six parts of one layer of the time step; norms have no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.patch = 2, 4, 2
        self.embed, self.time1, self.time2 = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(6, 10), nn.Linear(10, 8)
        self.labels, self.position = nn.Embedding(4, 8), nn.Parameter(torch.randn(1, 4, 8), requires_grad=False)
        self.norm1, self.norm2 = (nn.LayerNorm(8, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.final, self.modulation, self.last = (
            nn.LayerNorm(8, elementwise_affine=False),
            nn.Linear(8, 48),
            nn.Linear(8, 16),
        )
        self.qkv, self.proj, self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 12)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(b, n, -1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        angle = t[:, None] * torch.exp(-torch.arange(3) / 3.0)
        c = self.time2(F.silu(self.time1(torch.cat([angle.cos(), angle.sin()], -1)))) + self.labels(label)
        parts = self.modulation(F.silu(c)).chunk(6, dim=1)
        x = x + parts[2].unsqueeze(1) * self.attend(modulate(self.norm1(x), parts[0], parts[1]))
        y = self.fc2(F.gelu(self.fc1(modulate(self.norm2(x), parts[3], parts[4])), approximate="tanh"))
        x = x + parts[5].unsqueeze(1) * y
        shift, scale = self.last(F.silu(c)).chunk(2, dim=1)
        x = self.out(modulate(self.final(x), shift, scale))
        x = x.reshape(x.shape[0], 2, 2, self.patch, self.patch, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 3, 4, 4)


class AttentionPool(nn.Module):
    """CLIP: the mean pixel is the query of a last attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem, self.position = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.randn(5, 8) * 0.3)
        self.q, self.k, self.v, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x], 0) + self.position[:, None]
        n, b, _ = x.shape
        q = self.q(x[:1]).view(1, b, self.heads, -1).permute(1, 2, 0, 3)
        k, v = (layer(x).view(n, b, self.heads, -1).permute(1, 2, 0, 3) for layer in (self.k, self.v))
        weights = (q * 3**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).squeeze(2).flatten(1))


class Neighbourhood(nn.Module):
    """Each pixel attends to the pixels around it, which `unfold` lays out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kernel = 2, 3
        self.stem, self.q, self.k, self.v = nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.position, self.head = nn.Parameter(torch.randn(2, 9, 1) * 0.3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, _, h, w = x.shape
        q = self.q(x).view(b, self.heads, -1, 1, h * w)
        k, v = (
            F.unfold(layer(x), self.kernel, padding=1).view(b, self.heads, -1, self.kernel**2, h * w)
            for layer in (self.k, self.v)
        )
        weights = ((q * k).sum(2) + self.position).softmax(2)
        return self.head((weights.unsqueeze(2) * v).sum(3).reshape(b, -1, h, w))


def image_time_label() -> dict[str, Tensor]:
    return dict(x=torch.randn(2, 3, 4, 4), t=torch.rand(2) * 9, label=torch.tensor([1, 3]))


IMAGE_ATTENTION: dict[str, Case] = {
    "shifted_windows": Case(ShiftedWindows, images(size=4), 19, wide=35),
    "cosine_windows": Case(CosineWindows, lambda: torch.randn(3, 4, 8), 35, wide=43),
    "decomposed_positions": Case(DecomposedPositions, images(size=3), 10, wide=14),
    "learned_queries": Case(LearnedQueries, images(size=4), 26, wide=37),
    "deformable_attention": Case(
        DeformableAttention, lambda: dict(x=torch.randn(2, 3, 4, 4), queries=torch.randn(2, 5, 4)), 24
    ),
    "axial_attention": Case(AxialAttention, images(size=4), 10, wide=18),
    "cross_covariance": Case(CrossCovariance, tokens(8), 3, wide=15),
    "pooled_attention": Case(PooledAttention, images(size=4), 18, wide=22),
    "reduced_keys": Case(ReducedKeys, images(size=4), 10, wide=23),
    "talking_heads": Case(TalkingHeads, tokens(8), 30, wide=33),
    "linear_attention": Case(LinearAttention, images(size=4), 16),
    "vit": Case(ViT, images(size=4), 14, wide=26),
    "dit": Case(DiT, image_time_label, 32, wide=44),
    "attention_pool": Case(AttentionPool, images(size=4), 10, wide=18),
    "neighbourhood": Case(Neighbourhood, images(size=4), 18),
}
