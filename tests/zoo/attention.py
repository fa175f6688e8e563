"""Attention of torch itself: `nn.MultiheadAttention` in every form, and the transformers made of it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, tokens


class SelfAttention(nn.Module):
    """One attention module between linear layers; ``call`` are the arguments of its forward."""

    def __init__(self, call: dict[str, Any], heads: int = 3, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.attn = nn.MultiheadAttention(12, heads, **options)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.attn(x, x, x, **self.call)[0])


class ReturnsWeights(nn.Module):
    """The attention weights, averaged over heads, are an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y, weights = self.attn(x, x, x)
        return self.head(y), weights


class CrossAttention(nn.Module):
    """Keys and values have widths of their own; some of the keys are padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(5, 10), nn.Linear(5, 8)
        self.attn = nn.MultiheadAttention(12, 3, kdim=10, vdim=8, batch_first=True, **options)
        self.norm, self.fc, self.head = nn.LayerNorm(12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        x = self.q(x)
        y, _ = self.attn(x, self.k(memory), self.v(memory), key_padding_mask=padding, need_weights=False)
        return self.head(F.gelu(self.fc(self.norm(x + y))))


class Encoder(nn.Module):
    """Two layers of `nn.TransformerEncoder`, tokens looked up, some of them padding."""

    def __init__(self, norm_first: bool, padded: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 3)
        layer = nn.TransformerEncoderLayer(12, 4, 18, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=packed)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0 if self.padded else None
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding))


class Decoder(nn.Module):
    """Two layers of `nn.TransformerDecoder`, causal, over a memory of the same width."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.stem, self.memory, self.head = nn.Linear(6, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        layer = nn.TransformerDecoderLayer(12, 3, 18, 0.1, batch_first=True, norm_first=norm_first)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.decoder(self.stem(x), self.memory(memory), tgt_mask=mask, tgt_is_causal=True))


class Whole(nn.Module):
    """`nn.Transformer` with encoder and decoder."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that tokens before a norm are not packed
            self.transformer = nn.Transformer(12, 4, 1, 2, 18, 0.1, batch_first=True, norm_first=norm_first)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(source), self.embed(target)))


def _ids(length: int = 5) -> Tensor:
    return torch.randint(1, 20, (2, length))


def _padded_ids() -> Tensor:
    ids = _ids()
    ids[1, 3:] = 0
    return ids


def _padded_memory() -> dict[str, Tensor]:
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 2:] = True
    return {"x": torch.randn(2, 5, 6), "memory": torch.randn(2, 4, 5), "padding": padding}


def _target_and_memory() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 6), torch.randn(2, 4, 5)


_FIRST = {"batch_first": True}

# Heads leave together with their channels of the stream: the module has one width for both. Under a norm that is for
# wide=True.
ATTENTION: dict[str, Case] = {
    "mha": Case(lambda: SelfAttention({}, **_FIRST), tokens(6), 15),
    "mha_fused": Case(lambda: SelfAttention({"need_weights": False}, bias=False), tokens(6), 15),
    "mha_every_weight": Case(
        lambda: SelfAttention({"average_attn_weights": False}, dropout=0.1, **_FIRST), tokens(6), 15
    ),
    "mha_more_keys": Case(
        lambda: SelfAttention({"need_weights": False}, add_bias_kv=True, add_zero_attn=True, **_FIRST), tokens(6), 15
    ),
    "mha_more_keys_by_hand": Case(lambda: SelfAttention({}, add_bias_kv=True, add_zero_attn=True), tokens(6), 15),
    "mha_causal": Case(
        lambda: SelfAttention({"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True}, **_FIRST),
        tokens(6),
        15,
    ),
    "mha_returns_weights": Case(ReturnsWeights, tokens(6), 12),
    "mha_cross": Case(CrossAttention, _padded_memory, 27, wide=30),
    "mha_cross_more_keys": Case(lambda: CrossAttention(add_bias_kv=True, bias=False), _padded_memory, 27, wide=30),
    "encoder_norm_last": Case(lambda: Encoder(False), _ids, 36, wide=40),
    "encoder_norm_first": Case(lambda: Encoder(True), _ids, 36, wide=40),
    "encoder_padded": Case(lambda: Encoder(False, padded=True), _padded_ids, 36, wide=40),
    "decoder_norm_last": Case(lambda: Decoder(False), _target_and_memory, 36, wide=39),
    "decoder_norm_first": Case(lambda: Decoder(True), _target_and_memory, 36, wide=39),
    "transformer_norm_last": Case(lambda: Whole(False), lambda: (_ids(), _ids(4)), 54, wide=58),
    "transformer_norm_first": Case(lambda: Whole(True), lambda: (_ids(), _ids(4)), 54, wide=58),
}
