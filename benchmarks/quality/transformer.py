"""Transformer blocks whose numbers of heads follow from their weights, so that any pruner can cut them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Heads of a fixed dim; how many there are is read from the weights."""

    def __init__(self, width: int, heads: int, head_dim: int, causal: bool = False, rotary: bool = False) -> None:
        super().__init__()
        self.head_dim, self.causal, self.bias = head_dim, causal, not rotary
        inner = heads * head_dim
        self.q, self.k = nn.Linear(width, inner, bias=self.bias), nn.Linear(width, inner, bias=self.bias)
        self.v, self.out = nn.Linear(width, inner, bias=self.bias), nn.Linear(inner, width, bias=self.bias)
        self.rotary = rotary
        if rotary:
            frequencies = 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)
            self.register_buffer("frequencies", torch.cat([frequencies, frequencies]))
            self.register_buffer("signs", torch.cat([-torch.ones(head_dim // 2), torch.ones(head_dim // 2)]))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        batch, tokens = x.shape[:2]
        q, k, v = (
            layer(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.rotary:
            angles = torch.arange(tokens, device=x.device)[:, None] * self.frequencies
            cos, sin = angles.cos(), angles.sin()
            sin = sin * self.signs  # halves change places with a roll: Torch-Pruning loses track of a chunk and a cat
            q, k = (t * cos + t.roll(self.head_dim // 2, -1) * sin for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Layer norms before attention and a GELU MLP, as in GPT-2 and in vision transformers."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim, causal)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class RootMeanSquare(nn.Module):
    """RMS norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class GatedBlock(nn.Module):
    """RMS norms before rotary attention and a gated MLP, as in Llama."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RootMeanSquare(width), RootMeanSquare(width)
        self.attention = Attention(width, heads, head_dim, causal=True, rotary=True)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def attention_layers(model: nn.Module) -> Mapping[nn.Module, int]:
    """Layers that make queries, keys and values -> number of heads."""
    return {
        layer: layer.out_features // m.head_dim
        for m in model.modules()
        if isinstance(m, Attention)
        for layer in (m.q, m.k, m.v)
    }
