"""Recurrent layers, linear attention and state-space models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .case import Case, tokens

# ---------------------------------------------------------------- recurrent layers of torch


class Layer(nn.Module):
    """A recurrent layer between two linear ones; ``read`` says what of its output and states goes on."""

    def __init__(self, layer: nn.Module, read: Callable[[Any, Any], Tensor], width: int = 8) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 6), layer, nn.Linear(width, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(*self.layer(torch.tanh(self.stem(x)))))


def every_step(out: Tensor, state: Any) -> Tensor:
    return out


def last_step(out: Tensor, state: Any) -> Tensor:
    return out[:, -1]


def both_ends(out: Tensor, state: Any) -> Tensor:
    """The last state of the last layer forward and backward, side by side."""
    h, c = state
    return torch.cat([h[-2], h[-1]], dim=-1) + torch.cat([c[-2], c[-1]], dim=-1)


def all_states(out: Tensor, state: Any) -> Tensor:
    """``(layers, batch, hidden)`` as ``(batch, layers * hidden)``."""
    return state.transpose(0, 1).flatten(1)


class SummedDirections(nn.Module):
    """Both directions, added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(self.stem(x))
        n = self.layer.hidden_size
        return self.head(y[..., :n] + y[..., n:])


class Packed(nn.Module):
    """Sequences of different length."""

    def __init__(self, layer: nn.Module, filled: float) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 6), layer, nn.Linear(16, 3)
        self.filled = filled

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 3, 4])
        packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, padding_value=self.filled)
        return self.head(torch.tanh(y))


class LearnedStart(nn.Module):
    """The states that a sequence starts from are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 6), nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)
        self.h, self.c = nn.Parameter(torch.randn(2, 1, 8)), nn.Parameter(torch.randn(2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        start = tuple(state.expand(-1, x.shape[0], -1).contiguous() for state in (self.h, self.c))
        return self.head(self.layer(self.stem(x), start)[0])


class GivenStart(nn.Module):
    """The state that a sequence starts from is an input: its width stays, what reads the sequence does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x), start)[0])


class Translation(nn.Module):
    """The state of an encoder starts a decoder, which attends to what the encoder read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.encoder, self.decoder = nn.GRU(6, 8, batch_first=True), nn.GRU(6, 8, batch_first=True)
        self.query, self.key, self.score = nn.Linear(8, 7), nn.Linear(8, 7), nn.Linear(7, 1)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, state = self.encoder(self.words(source))
        y, _ = self.decoder(self.words(target), state)
        scores = self.score(torch.tanh(self.query(y)[:, :, None] + self.key(read)[:, None])).squeeze(-1)
        return self.head(torch.cat([y, scores.softmax(-1) @ read], dim=-1))


class LanguageModel(nn.Module):
    """Two layers in a row, dropout between, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.first, self.second = nn.LSTM(6, 10, batch_first=True), nn.LSTM(10, 6, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.first(self.embed(ids))
        y, _ = self.second(self.dropout(y))
        return self.head(y)


class Cells(nn.Module):
    """Three cells, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(9, 3)
        self.a, self.b, self.c = nn.LSTMCell(6, 8), nn.GRUCell(8, 7), nn.RNNCell(7, 9, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = b = c = None
        made = []
        for t in range(x.shape[1]):
            a = self.a(x[:, t], a)
            b = self.b(a[0], b)
            c = self.c(b, c)
            made.append(c)
        return self.head(torch.stack(made, dim=1))


class ConvLSTM(nn.Module):
    """Gates by one convolution over input and state, on images."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(2 + width, 4 * width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, channels, height, width)
        h = c = x.new_zeros(x.shape[0], self.width, *x.shape[3:])
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], dim=1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


def _three_sequences() -> Tensor:
    return torch.randn(3, 5, 5)


_IN = {"batch_first": True}

LAYERS: dict[str, Case] = {
    "lstm": Case(lambda: Layer(nn.LSTM(6, 8, **_IN), every_step), tokens(5), 14),
    "lstm_time_first": Case(lambda: Layer(nn.LSTM(6, 8, bias=False), every_step), tokens(5), 14),
    "lstm_both_ends": Case(
        lambda: Layer(nn.LSTM(6, 8, 2, dropout=0.1, bidirectional=True, **_IN), both_ends, 16), tokens(5), 14
    ),
    "lstm_projected": Case(
        lambda: Layer(nn.LSTM(6, 9, 2, bidirectional=True, proj_size=4, **_IN), every_step),
        tokens(5),
        10,
        "has to stay larger than the projection at aten.lstm in layer (LSTM)",
    ),
    "gru": Case(lambda: Layer(nn.GRU(6, 8, **_IN), last_step), tokens(5), 14),
    "gru_all_states": Case(lambda: Layer(nn.GRU(6, 8, 3, bias=False), all_states, 24), tokens(5), 14),
    "rnn_tanh": Case(lambda: Layer(nn.RNN(6, 8, **_IN), last_step), tokens(5), 14),
    "rnn_relu": Case(
        lambda: Layer(nn.RNN(6, 8, 2, nonlinearity="relu", bidirectional=True), every_step, 16), tokens(5), 14
    ),
    "summed_directions": Case(SummedDirections, tokens(5), 14),
    "packed_lstm": Case(lambda: Packed(nn.LSTM(6, 8, bidirectional=True, **_IN), 0.0), _three_sequences, 14),
    "packed_gru": Case(lambda: Packed(nn.GRU(6, 16, 2, **_IN), 2.0), _three_sequences, 22),
    "learned_start": Case(LearnedStart, tokens(5), 14),
    "given_start": Case(
        GivenStart, lambda: (torch.randn(2, 4, 5), torch.randn(1, 2, 8)), 6, "meets a dim of fixed size at aten.gru"
    ),
    "translation": Case(
        Translation, lambda: (torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 4))), 6 + 7, wide=6 + 8 + 7
    ),
    "language_model": Case(LanguageModel, lambda: torch.randint(0, 20, (2, 5)), 16),
    "cells": Case(Cells, tokens(5, 4), 6 + 8 + 7 + 9),
    "conv_lstm": Case(ConvLSTM, lambda: torch.randn(2, 3, 2, 4, 4), 6),
}

# ---------------------------------------------------------------- linear attention and matrix memories


class GatedNorm(nn.Module):
    """A RMS norm of what a gate leaves (Mamba 2), or gated itself (gated delta rule)."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.first = nn.Parameter(torch.ones(width)), 1e-5, first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if self.first:
            x = x * F.silu(gate)
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return x if self.first else x * F.silu(gate)


class LinearAttention(nn.Module):
    """Feature maps instead of a softmax; causal by sums over time, or over all tokens at once."""

    def __init__(self, causal: bool, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal
        self.stem, self.qkv = nn.Linear(5, 10), nn.Linear(10, 3 * heads * head_dim)
        self.proj, self.head = nn.Linear(heads * head_dim, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.causal:
            memory = torch.cumsum(k[..., :, None] * v[..., None, :], dim=2)
            y = torch.einsum("bhnd,bhnde->bhne", q, memory)
            norm = (q * k.cumsum(dim=2)).sum(-1, keepdim=True)
        else:
            y = q @ (k.transpose(-2, -1) @ v)
            norm = q @ k.sum(dim=2, keepdim=True).transpose(-2, -1)
        return self.head(x + self.proj((y / norm).transpose(1, 2).reshape(b, n, -1)))


class Retention(nn.Module):
    """Heads that forget at rates of their own, the norm over every head, and a gate."""

    def __init__(self, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        width = heads * head_dim
        self.stem, self.gate = nn.Linear(5, 10), nn.Linear(10, width)
        self.q, self.k, self.v = nn.Linear(10, width), nn.Linear(10, width), nn.Linear(10, width)
        self.norm, self.out, self.head = nn.GroupNorm(heads, width), nn.Linear(width, 10), nn.Linear(10, 3)
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(heads))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        step = torch.arange(n)
        past = step[:, None] - step
        kept = torch.exp(self.decay[:, None, None] * past) * (past >= 0)
        y = (q @ k.transpose(-2, -1) * self.scale * kept) @ v
        y = self.norm(y.transpose(1, 2).reshape(b * n, -1)).view(b, n, -1)
        return self.head(x + self.out(y * F.silu(self.gate(x))))


class TimeMix(nn.Module):
    """The average of what came, weighted by keys and age, with a bonus for what comes now (RWKV 4)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.mix = nn.Parameter(torch.rand(3, width))
        self.decay, self.bonus = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9))
        self.r, self.k, self.v = (nn.Linear(width, 9, bias=False) for _ in range(3))
        self.o, self.head = nn.Linear(9, width, bias=False), nn.Linear(width, 3)
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value = nn.Linear(width, 12, bias=False), nn.Linear(12, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        before = self.shift(y)
        r, k, v = (f(y * mix + before * (1 - mix)) for f, mix in zip((self.r, self.k, self.v), self.mix, strict=True))
        number = share = torch.zeros_like(v[:, 0])
        top = torch.full_like(number, -1e30)
        made = []
        for t in range(x.shape[1]):
            now = torch.maximum(top, self.bonus + k[:, t])
            a, b = torch.exp(top - now), torch.exp(self.bonus + k[:, t] - now)
            made.append((a * number + b * v[:, t]) / (a * share + b))
            after = torch.maximum(top - self.decay.exp(), k[:, t])
            a, b = torch.exp(top - self.decay.exp() - after), torch.exp(k[:, t] - after)
            number, share, top = a * number + b * v[:, t], a * share + b, after
        x = x + self.o(torch.sigmoid(r) * torch.stack(made, dim=1))
        return self.head(x + self.value(torch.relu(self.key(x)) ** 2))


class MatrixTimeMix(nn.Module):
    """A matrix per head that decays by data, read by receptances (RWKV 6), with low-rank mixing of tokens."""

    def __init__(self, width: int = 8, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.stem = nn.Linear(5, width)
        self.r, self.k, self.v, self.g = (nn.Linear(width, inner, bias=False) for _ in range(4))
        self.mix, self.bonus = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(heads, head_dim))
        self.decay, self.low, self.high = nn.Parameter(torch.randn(inner)), nn.Linear(width, 5), nn.Linear(5, inner)
        self.norm, self.o, self.head = nn.GroupNorm(heads, inner), nn.Linear(inner, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        y = x + (F.pad(x, (0, 0, 1, -1)) - x) * self.mix
        r, k, v = (f(y).view(b, n, self.heads, self.head_dim) for f in (self.r, self.k, self.v))
        decay = torch.exp(-torch.exp(self.decay + self.high(torch.tanh(self.low(y)))))
        decay = decay.view(b, n, self.heads, self.head_dim)
        state = x.new_zeros(b, self.heads, self.head_dim, self.head_dim)
        made = []
        for t in range(n):
            now = k[:, t, :, :, None] * v[:, t, :, None, :]
            made.append((r[:, t, :, None, :] @ (state + self.bonus[..., None] * now)).squeeze(-2))
            state = decay[:, t, :, :, None] * state + now
        y = self.norm(torch.stack(made, dim=1).view(b * n, -1)).view(b, n, -1)
        return self.head(x + self.o(y * F.silu(self.g(x))))


class DeltaRule(nn.Module):
    """A matrix per head that forgets, and overwrites what stands under a key: the gated delta rule."""

    def __init__(self, width: int = 8, heads: int = 3, key_dim: int = 4, value_dim: int = 5) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.stem = nn.Linear(5, width)
        self.q, self.k = (nn.Linear(width, heads * key_dim, bias=False) for _ in range(2))
        self.v, self.g = (nn.Linear(width, heads * value_dim, bias=False) for _ in range(2))
        self.beta, self.alpha = nn.Linear(width, heads), nn.Linear(width, heads)
        self.rate, self.bias = nn.Parameter(torch.randn(heads)), nn.Parameter(torch.randn(heads))
        self.norm, self.o = GatedNorm(value_dim, first=False), nn.Linear(heads * value_dim, width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k = (F.silu(f(x)).view(b, n, self.heads, self.key_dim) for f in (self.q, self.k))
        q, k = (z * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6) for z in (q, k))
        v = F.silu(self.v(x)).view(b, n, self.heads, self.value_dim)
        beta, keep = self.beta(x).sigmoid(), torch.exp(-self.rate.exp() * F.softplus(self.alpha(x) + self.bias))
        state = x.new_zeros(b, self.heads, self.key_dim, self.value_dim)
        made = []
        for t in range(n):
            state = state * keep[:, t, :, None, None]
            old = (state * k[:, t, :, :, None]).sum(-2)
            state = state + k[:, t, :, :, None] * ((v[:, t] - old) * beta[:, t, :, None])[..., None, :]
            made.append((state * q[:, t, :, :, None]).sum(-2))
        y = self.norm(torch.stack(made, dim=1), self.g(x).view(b, n, self.heads, self.value_dim))
        return self.head(x + self.o(y.flatten(2)))


class ScalarMemory(nn.Module):
    """A gated cell with an exponential input gate, kept in range by the largest exponent so far (sLSTM)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.gates, self.recur = nn.Linear(5, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = n = x.new_zeros(x.shape[0], self.width)
        m = x.new_zeros(x.shape[0], self.width)
        made = []
        for t in range(x.shape[1]):
            z, i, f, o = (self.gates(x[:, t]) + self.recur(h)).chunk(4, dim=-1)
            f = F.logsigmoid(f)
            top = torch.maximum(f + m, i)
            i, f, m = torch.exp(i - top), torch.exp(f + m - top), top
            c, n = f * c + i * torch.tanh(z), f * n + i
            h = torch.sigmoid(o) * c / n
            made.append(h)
        return self.head(torch.stack(made, dim=1))


class MatrixMemory(nn.Module):
    """A matrix and a normalizer per head under exponential gates (mLSTM), all steps at once."""

    def __init__(self, width: int = 8, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        inner = heads * head_dim
        self.stem, self.up = nn.Linear(5, width), nn.Linear(width, 2 * inner)
        self.q, self.k, self.v = (nn.Linear(inner, inner) for _ in range(3))
        self.i, self.f = nn.Linear(inner, heads), nn.Linear(inner, heads)
        self.norm, self.skip = nn.GroupNorm(heads, inner), nn.Parameter(torch.ones(inner))
        self.down, self.head = nn.Linear(inner, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, gate = self.up(x).chunk(2, dim=-1)
        b, n, _ = y.shape
        y = F.silu(y)
        q, k, v = (f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        i, f = self.i(y).transpose(1, 2), F.logsigmoid(self.f(y)).transpose(1, 2).cumsum(-1)
        past = torch.ones(n, n, dtype=torch.bool).tril()
        log = (f[..., :, None] - f[..., None, :] + i[..., None, :]).masked_fill(~past, float("-inf"))
        top = log.amax(-1, keepdim=True)
        weight = (q @ k.transpose(-2, -1)) * self.scale * torch.exp(log - top)
        z = weight @ v / torch.maximum(weight.sum(-1, keepdim=True).abs(), torch.exp(-top))
        z = self.norm(z.transpose(1, 2).reshape(b * n, -1)).view(b, n, -1)
        return self.head(x + self.down((z + self.skip * y) * F.silu(gate)))


class MinGRU(nn.Module):
    """Gates that do not see the state, so that all steps are sums of logarithms over time."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem, self.gates = nn.Linear(5, width), nn.Linear(width, 2 * inner, bias=False)
        self.out, self.head = nn.Linear(inner, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        new, gate = self.gates(x).chunk(2, dim=-1)
        new = torch.where(new >= 0, torch.log(F.relu(new) + 0.5), -F.softplus(-new))
        kept = -F.softplus(gate).cumsum(dim=1)
        state = torch.logcumsumexp(new - F.softplus(-gate) - kept, dim=1) + kept
        return self.head(x + self.out(state.exp()))


class QRNN(nn.Module):
    """Convolutions make gates, a product over time forgets."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(5, 3 * width, 2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(F.pad(x.transpose(1, 2), (1, 0))).chunk(3, dim=1)
        kept = torch.sigmoid(f).cumprod(dim=-1)
        c = ((1 - torch.sigmoid(f)) * torch.tanh(z) / kept).cumsum(dim=-1) * kept
        return self.head((torch.sigmoid(o) * c).transpose(1, 2))


# ---------------------------------------------------------------- state-space models


class Mamba(nn.Module):
    """Selective scan: step size, input and output matrix depend on the token."""

    def __init__(self, width: int = 8, inner: int = 10, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.stem, self.norm = nn.Linear(5, width), nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj, self.head = nn.Linear(inner, width, bias=False), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.stem(x)
        x, z = self.in_proj(self.norm(residual)).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : z.shape[1]]).transpose(1, 2)
        dt, b, c = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        dt, a = F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        state = x.new_zeros(x.shape[0], self.inner, self.state)
        made = []
        for t in range(x.shape[1]):
            keep = torch.exp(dt[:, t, :, None] * a)
            state = keep * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            made.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(made, dim=1) + x * self.D
        return self.head(residual + self.out_proj(y * F.silu(z)))


class Mamba2(nn.Module):
    """Heads with one decay each; one projection makes gate, input, both matrices and step sizes."""

    def __init__(self, norm: bool = True, width: int = 8, heads: int = 3, head_dim: int = 4, state: int = 5) -> None:
        super().__init__()
        self.heads, self.head_dim, self.state, self.inner = heads, head_dim, state, heads * head_dim
        self.stem, inner = nn.Linear(5, width), heads * head_dim
        self.in_proj = nn.Linear(width, 2 * inner + 2 * state + heads, bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * state, inner + 2 * state, 3, groups=inner + 2 * state, padding=2)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.randn(heads)) for _ in range(3))
        self.norm = GatedNorm(inner, first=True) if norm else None
        self.out_proj, self.head = nn.Linear(inner, width, bias=False), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.stem(x)
        n = x.shape[1]
        sizes = [self.inner, self.inner + 2 * self.state, self.heads]
        z, x, dt = self.in_proj(residual).split(sizes, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :n].transpose(1, 2))
        x, b, c = x.split([self.inner, self.state, self.state], dim=-1)
        x = x.view(x.shape[0], n, self.heads, self.head_dim)
        dt = F.softplus(dt + self.dt_bias)
        log = (-torch.exp(self.A_log) * dt).cumsum(dim=1).transpose(1, 2)  # (batch, heads, time)
        kept = torch.exp((log[..., :, None] - log[..., None, :]).tril()).tril()
        weight = kept * (c @ b.transpose(1, 2))[:, None]
        y = weight @ (x * dt[..., None]).transpose(1, 2)
        y = (y.transpose(1, 2) + x * self.D[:, None]).flatten(2)
        y = self.norm(y, z) if self.norm is not None else y * F.silu(z)
        return self.head(residual + self.out_proj(y))


class DiagonalSSM(nn.Module):
    """A state of complex numbers per channel, as a convolution over time by Fourier transforms (S4D)."""

    def __init__(self, width: int = 8, state: int = 4) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(5, width), nn.Linear(width, 2 * width), nn.Linear(width, 3)
        self.log_dt, self.d = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(width))
        self.log_a = nn.Parameter(torch.rand(width, state))
        self.imag = nn.Parameter(torch.arange(state * 1.0).repeat(width, 1))
        self.c = nn.Parameter(torch.randn(width, state, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(1, 2)
        n = x.shape[-1]
        step, a = torch.exp(self.log_dt), torch.complex(-torch.exp(self.log_a), self.imag)
        c = torch.view_as_complex(self.c) * (torch.exp(a * step[:, None]) - 1) / a
        powers = torch.exp((a * step[:, None])[..., None] * torch.arange(n))
        kernel = 2 * torch.einsum("cs,csl->cl", c, powers).real
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        y = F.gelu(y + self.d[:, None] * x).transpose(1, 2)
        return self.head(F.glu(self.mix(y), dim=-1))


class LinearRecurrentUnit(nn.Module):
    """One complex state for all channels, stepped one by one, with complex weights."""

    def __init__(self, width: int = 8, state: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.size, self.theta = nn.Parameter(torch.rand(state)), nn.Parameter(torch.rand(state))
        self.b = nn.Parameter(torch.randn(state, width, dtype=torch.complex64))
        self.c = nn.Parameter(torch.randn(width, state, dtype=torch.complex64))
        self.d = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        keep = torch.polar(torch.exp(-torch.exp(self.size)), self.theta)
        read = x.to(self.b.dtype) @ self.b.T
        state = torch.zeros_like(read[:, 0])
        made = []
        for t in range(x.shape[1]):
            state = keep * state + read[:, t]
            made.append((state @ self.c.T).real)
        return self.head(F.gelu(torch.stack(made, dim=1) + self.d * x))


class Hyena(nn.Module):
    """Gates around a long convolution whose filter a small network makes from positions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.short = nn.Linear(5, 3 * width), nn.Conv1d(3 * width, 3 * width, 3, 1, 2, groups=3 * width)
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, width, bias=False)
        self.decay, self.skip = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.short(self.stem(x).transpose(1, 2))[..., :n].chunk(3, dim=1)
        t = torch.linspace(0, 1, n)[:, None]
        kernel = self.b(torch.sin(self.a(torch.cat([t, torch.cos(t), torch.sin(t)], dim=-1))))
        kernel = (kernel * torch.exp(-t * self.decay.abs())).T
        y = k * v
        y = torch.fft.irfft(torch.fft.rfft(y, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        return self.head((q * (y + y * self.skip[:, None])).transpose(1, 2))


MEMORIES: dict[str, Case] = {
    "linear_attention": Case(lambda: LinearAttention(False), tokens(5), 13),
    "causal_linear_attention": Case(lambda: LinearAttention(True), tokens(5), 13),
    "retention": Case(Retention, tokens(5), 13, wide=21),
    "rwkv4": Case(TimeMix, tokens(5), 21, wide=29),
    "rwkv6": Case(MatrixTimeMix, tokens(5), 16, wide=20),
    "delta_rule": Case(DeltaRule, tokens(5), 15, wide=20),
    "slstm": Case(ScalarMemory, tokens(5), 8),
    "mlstm": Case(MatrixMemory, tokens(5), 11, wide=19),
    "min_gru": Case(MinGRU, tokens(5), 20),
    "qrnn": Case(QRNN, tokens(5), 8),
    "mamba": Case(Mamba, tokens(5), 17, wide=25),
    "mamba2": Case(Mamba2, tokens(5), 11, wide=20),
    "mamba2_without_norm": Case(lambda: Mamba2(norm=False), tokens(5), 11, wide=20),
    "s4d": Case(DiagonalSSM, tokens(5), 20),
    "lru": Case(LinearRecurrentUnit, tokens(5), 14),
    "hyena": Case(Hyena, tokens(5), 14),
}

RECURRENT: dict[str, Case] = {**LAYERS, **MEMORIES}
