"""Speech, graphs, Fourier mixers, time series, and weights that are computed from other weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import Case, tokens
from .fourier import FOURIER
from .weights import WEIGHTS


class GraphConv(nn.Module):
    """Messages are gathered along edges, scaled by degrees and added up at their ends (GCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.zeros(x.size(0)).scatter_add_(0, target, torch.ones(target.size(0))).clamp(min=1).rsqrt()
        weight = (degree[source] * degree[target]).unsqueeze(-1)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.relu(x))
            x = torch.zeros_like(x).index_add_(0, target, x[source] * weight)
        return x


class GraphAttention(nn.Module):
    """Heads score every edge; the softmax over the edges of a node is done with scatters (GAT)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 4
        self.linear, self.out = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.source, self.target = nn.Parameter(torch.randn(1, 2, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        nodes = x.shape[0]
        h = self.linear(x).view(-1, self.heads, self.width)
        score = (h * self.source).sum(-1)[source] + (h * self.target).sum(-1)[target]
        score = F.leaky_relu(score, 0.2)
        place = target.unsqueeze(-1).expand(-1, score.shape[1])
        highest = torch.full((nodes, score.shape[1]), -1e9).scatter_reduce(0, place, score, "amax")
        score = (score - highest[target]).exp()
        total = torch.zeros(nodes, score.shape[1]).scatter_add(0, place, score)
        share = score / (total[target] + 1e-16)
        y = torch.zeros(nodes, h.shape[1], h.shape[2]).index_add(0, target, h[source] * share.unsqueeze(-1))
        return self.out(F.elu(y.flatten(1) + self.bias))


class MessagePassing(nn.Module):
    """A network for edges reads both ends; mean and maximum of the messages join a network for nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge1, self.edge2 = nn.Linear(6, 8), nn.Linear(16, 10), nn.Linear(10, 7)
        self.node, self.head = nn.Linear(8 + 2 * 7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = F.relu(self.embed(x))
        message = F.relu(self.edge2(F.relu(self.edge1(torch.cat([x[source], x[target]], -1)))))
        place = target[:, None].expand_as(message)
        zeros = message.new_zeros(x.shape[0], message.shape[1])
        mean = zeros.scatter_reduce(0, place, message, "mean", include_self=False)
        most = zeros.scatter_reduce(0, place, message, "amax", include_self=False)
        return self.head(x + F.relu(self.node(torch.cat([x, mean, most], -1))))


def graph(nodes: int = 5) -> dict[str, Tensor]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 4], [1, 2, 3, 4, 0, 2, 0, 1]])
    return dict(x=torch.randn(nodes, 6), edges=edges)


class SpeechEncoder(nn.Module):
    """wav2vec 2: strided convolutions with norms, then a wide grouped convolution with a weight norm per tap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, 6, 4, stride=2, bias=False), nn.GroupNorm(6, 6)
        self.conv2, self.norm2, self.project = nn.Conv1d(6, 8, 3, stride=2), nn.LayerNorm(8), nn.Linear(8, 12)
        position = nn.Conv1d(12, 12, 4, padding=2, groups=3)
        self.position = nn.utils.parametrizations.weight_norm(position, name="weight", dim=2)
        self.norm3, self.fc1, self.fc2, self.head = (
            nn.LayerNorm(12),
            nn.Linear(12, 14),
            nn.Linear(14, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x[:, None])))
        x = self.project(self.norm2(F.gelu(self.conv2(x)).transpose(1, 2)))
        x = x + F.gelu(self.position(x.transpose(1, 2))[:, :, :-1]).transpose(1, 2)
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm3(x)))))


class Conformer(nn.Module):
    """Two half feed-forward steps around attention with relative positions and a gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.d_k = 2, 4
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(8, 10) for _ in range(2)),
            nn.ModuleList(nn.Linear(10, 8) for _ in range(2)),
        )
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.place = nn.Linear(8, 8, bias=False)
        self.content_bias, self.place_bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
        self.point1, self.depthwise = nn.Conv1d(8, 16, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.batch_norm, self.point2 = nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1)

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        """Row i of (batch, heads, n, 2 n - 1) is read i places further, by padding and reading as another shape."""
        b, h, n, places = x.size()
        x = torch.cat([x.new_zeros(b, h, n, 1), x], dim=-1).view(b, h, places + 1, n)
        return x[:, :, 1:].reshape(b, h, n, places)[..., : places // 2 + 1]

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.size()
        position = torch.arange(n - 1, -n, -1.0)[:, None] * torch.exp(-torch.arange(0.0, x.size(-1)) / 4)
        q, k, v = (layer(x).view(b, -1, self.heads, self.d_k) for layer in (self.q, self.k, self.v))
        p = self.place(position.sin()[None]).view(1, -1, self.heads, self.d_k).transpose(1, 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        content = (q + self.content_bias).transpose(1, 2) @ k.transpose(-2, -1)
        place = self.shift((q + self.place_bias).transpose(1, 2) @ p.transpose(-2, -1))
        weights = ((content + place) * 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(b, -1, self.heads * self.d_k))

    def convolve(self, x: Tensor) -> Tensor:
        y = F.glu(self.point1(x.transpose(1, 2)), dim=1)
        return self.point2(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.down[0](F.silu(self.up[0](self.norms[0](x))))
        x = x + self.attend(self.norms[1](x))
        x = x + self.convolve(self.norms[2](x))
        x = x + 0.5 * self.down[1](F.silu(self.up[1](self.norms[3](x))))
        return self.head(self.norms[4](x))


class Temporal(nn.Module):
    """Dilated causal convolutions: padded on both sides and cut behind, or padded before (TCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.match = nn.Conv1d(4, 8, 3, padding=2), nn.Conv1d(8, 6, 3, dilation=2), nn.Conv1d(4, 6, 1)
        self.c, self.head = nn.Conv1d(6, 6, 3, dilation=4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)[:, :, :-2].contiguous())
        x = F.relu(F.relu(self.b(F.pad(y, (4, 0)))) + self.match(x))
        x = F.relu(x + self.c(F.pad(x, (8, 0))))
        return self.head(x[:, :, -1])


class WaveNet(nn.Module):
    """Tanh times sigmoid of two halves; one convolution makes residual and skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.condition = nn.Conv1d(1, 6, 1), nn.Conv1d(3, 16, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(6, 16, 2, dilation=2**i, padding=2**i) for i in range(2))
        self.residual, self.skip = (
            nn.ModuleList(nn.Conv1d(8, 6, 1) for _ in range(2)),
            nn.ModuleList(nn.Conv1d(8, 5, 1) for _ in range(2)),
        )
        self.out, self.head = nn.Conv1d(5, 7, 1), nn.Conv1d(7, 4, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            value, gate = (dilated(x)[..., : x.shape[-1]] + self.condition(condition)).chunk(2, 1)
            y = value.tanh() * gate.sigmoid()
            x, total = x + residual(y), total + skip(y)
        return self.head(F.relu(self.out(F.relu(total))))


class Patches(nn.Module):
    """A series is normalized by its own mean and deviation, cut into windows, and each window is a token (PatchTST)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(4, 8), nn.Parameter(torch.randn(5, 8) * 0.2)
        self.norm, self.fc1, self.fc2 = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(5 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        x = ((x - mean) / deviation).permute(0, 2, 1)
        x = self.embed(x.unfold(dimension=-1, size=4, step=2)) + self.position
        b, series, n, d = x.shape
        x = x.reshape(b * series, n, d)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x.transpose(1, 2)).transpose(1, 2))))
        x = x.reshape(b, series, n, -1).transpose(-2, -1).flatten(-2)
        return self.head(x).permute(0, 2, 1) * deviation + mean


class Checkpointed(nn.Module):
    """Parts are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        return F.gelu(self.b(x)) * y.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = checkpoint(self.part, x, self.c.bias, use_reentrant=False)
        return self.head(checkpoint(self.c, x, use_reentrant=False))


class Mapped(nn.Module):
    """A submodule runs under `vmap`, once for each entry of a dim."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(torch.vmap(lambda row: torch.tanh(self.inner(row)), in_dims=1, out_dims=1)(x))


class ExitEarly(nn.Module):
    """Data decides how often a layer runs, and every layer runs on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for _ in range(4):
            x = x + torch.tanh(self.again(x))
            if x.abs().sum() > 50.0:
                break
        return self.head(x)


SIGNAL: dict[str, Case] = {
    "graph_conv": Case(GraphConv, graph, 18),
    "graph_attention": Case(GraphAttention, graph, 6),
    "message_passing": Case(MessagePassing, graph, 25),
    "speech_encoder": Case(SpeechEncoder, lambda: torch.randn(2, 22), 28, wide=35),
    "conformer": Case(Conformer, tokens(6), 30, wide=34),
    "temporal": Case(Temporal, lambda: torch.randn(2, 4, 9), 14),
    "wavenet": Case(WaveNet, lambda: dict(x=torch.randn(2, 1, 6), condition=torch.randn(2, 3, 6)), 26),
    "patches": Case(Patches, lambda: torch.randn(2, 12, 3), 20),
    "checkpointed": Case(Checkpointed, tokens(6), 18),
    "mapped": Case(Mapped, tokens(6), 18),
    "exit_early": Case(ExitEarly, tokens(6), 8),
    **WEIGHTS,
    **FOURIER,
}
