"""Recurrent layers, linear attention and state-space models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

RECURRENT: dict[str, Case] = {**LAYERS}
