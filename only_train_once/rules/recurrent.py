"""Recurrent layers and cells, each recorded as one call, and packed sequences.

[Note: the units of a recurrent layer]
A hidden unit is its row in every gate, its bias in every gate, its column in the recurrent weight and its place in the
states. It stays at 0 for good where the rows that make its new content are 0 and its state starts at 0:

    tanh, relu    h = act(new)               0 whatever the state was
    GRU           h = (1 - z) * new + z * h  0 from a state of 0
    LSTM          c = f * c + i * new        0 from a cell state of 0, and h = o * tanh(c)

A layer keeps the states of all its layers and directions in one tensor, so they lose the same units. With a projection
(LSTM) what goes on is ``h = w_hr @ (o * tanh(c))``, whose units are the rows of ``w_hr``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ..graph import Node, Ref
from ..labels import Dim, Label
from .registry import Context, rule, without_zeros

# operator -> how many gates stand in the rows of a weight, and which of them makes the new content
_GATES = {"lstm": (4, 2), "gru": (3, 2), "rnn_tanh": (1, 0), "rnn_relu": (1, 0)}


@dataclass(frozen=True)
class _Weights:
    """The tensors of one layer in one direction, as value indices.

    Attributes:
        read: (gates * hidden, input), reads what comes in.
        recur: (gates * hidden, state), reads the state.
        biases: (gates * hidden,) each.
        project: (state, hidden) or None.
    """

    read: int
    recur: int
    biases: tuple[int, ...]
    project: int | None


@rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def layers(c: Context, node: Node) -> None:
    """``input (batch, time, width)`` in either order, or ``data (steps, width)`` packed; states (layers, batch, n)."""
    x = c.tensor(node, "input")
    if x is None:
        x = c.tensor(node, "data")
    assert x is not None
    directions = 2 if node.argument("bidirectional") else 1
    weights = _weights(node, directions)
    states = _states(node)
    for index, last in ((x, c.rank(x) - 1), *((state, 2) for state in states)):
        for d in range(last):
            c.freeze(c.dim(index, d), f"is a sequence, a batch or a layer at {c.graph.where(node)}")
    hidden, state = _units(c, node, weights, states)
    width = _repeat(state, directions)
    c.set(node, [*[None] * (c.rank(x) - 1), width])
    for output, units in enumerate((state, hidden)[: len(states)], start=1):
        c.set(node, [None, None, units], output)
    made = [o for o in node.outputs if o is not None]
    for number, each in enumerate(weights):
        first = number < directions
        c.contract(node, (x if first else made[0], c.rank(x) - 1), (each.read, 1))
        for value in (made[1], states[0]):
            c.contract(node, (value, 2), (each.recur, 1))
        if each.project is not None:
            c.contract(node, (made[2], 2), (each.project, 1))


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def cell(c: Context, node: Node) -> None:
    """One step: ``input (batch, width)``, states ``(batch, hidden)``."""
    x = c.tensor(node, "input")
    assert x is not None
    states = _states(node)
    biases = tuple(b for b in (c.tensor(node, name) for name in ("b_ih", "b_hh")) if b is not None)
    read, recur = c.tensor(node, "w_ih"), c.tensor(node, "w_hh")
    assert read is not None
    assert recur is not None
    for index in (x, *states):
        c.freeze(c.dim(index, 0), f"is a sequence or a batch at {c.graph.where(node)}")
    hidden, state = _units(c, node, [_Weights(read, recur, biases, None)], states)
    for output in range(len(states)):
        c.set(node, [None, hidden if output else state], output)
    c.contract(node, (x, 1), (read, 1))
    c.contract(node, (states[0], 1), (recur, 1))


def _states(node: Node) -> list[int]:
    """The state, and for an LSTM the cell state, that the sequence starts from."""
    given: Any = node.argument("hx")
    return [state.index for state in (given if isinstance(given, (tuple, list)) else [given])]


def _weights(node: Node, directions: int) -> list[_Weights]:
    """The tensors of every layer and direction, in the order they are given."""
    given: list[Ref] = list(node.argument("params"))
    each = len(given) // (int(node.argument("num_layers")) * directions)
    biases = 2 if node.argument("has_biases") else 0
    found = []
    for start in range(0, len(given), each):
        read, recur, *rest = (ref.index for ref in given[start : start + each])
        found.append(_Weights(read, recur, tuple(rest[:biases]), rest[biases] if len(rest) > biases else None))
    return found


def _units(c: Context, node: Node, weights: list[_Weights], states: list[int]) -> tuple[Dim, Dim]:
    """What the hidden units and the state that goes on carry, zero where they stay at 0; see the note above."""
    kind = node.name.removeprefix("aten.").removesuffix("_cell")
    gates, new = _GATES[kind]

    def together(dims: Iterable[Dim]) -> Dim:
        return reduce(lambda a, b: c.tie(a, b, node), dims)

    rows = [tensor for each in weights for tensor in (each.read, each.recur, *each.biases)]
    projections = [each.project for each in weights if each.project is not None]
    hidden = together([_new_content(c, node, tensor, gates, new) for tensor in rows])
    state = together([c.dim(p, 0) for p in projections]) if projections else hidden
    first, kept = c.dim(states[0], -1), c.dim(states[-1], -1)
    c.tie(state, first, node)
    c.tie(hidden, kept, node)
    if kind in ("lstm", "gru") and isinstance(hidden, Label):
        hidden = hidden.with_zero(hidden.zero & (kept.zero if isinstance(kept, Label) else False))
    if not projections:
        return hidden, hidden
    # PyTorch tells a layer with a projection by its two states being of different size
    c.freeze(hidden, f"has to stay larger than the projection at {c.graph.where(node)}")
    return hidden, state


def _new_content(c: Context, node: Node, tensor: int, gates: int, new: int) -> Dim:
    """The rows of a weight that make the new content; those of the other gates leave with them."""
    rows = c.dim(tensor, 0)
    if not isinstance(rows, Label):
        return None
    size = len(rows) // gates
    parts = [rows.take(slice(gate * size, (gate + 1) * size)) for gate in range(gates)]
    for part in parts:
        c.tie(parts[new], part, node)
    return parts[new]


def _repeat(label: Dim, times: int) -> Dim:
    return Label(np.tile(label.ids, times), np.tile(label.zero, times)) if isinstance(label, Label) else None


@rule("aten._pack_padded_sequence")
def pack(c: Context, node: Node) -> None:
    """``(batch, time, *rest)`` in either order becomes ``(steps, *rest)``, and how many sequences each step has."""
    x, lengths = c.tensors(node)[:2]
    for index, d in ((x, 0), (x, 1), (lengths, 0)):
        c.freeze(c.dim(index, d), f"is a sequence or a batch at {c.graph.where(node)}")
    c.set(node, [None, *c.dims(x)[2:]])
    c.set(node, [None], output=1)


@rule("aten._pad_packed_sequence")
def pad(c: Context, node: Node) -> None:
    """``(steps, *rest)`` becomes ``(batch, time, *rest)`` in either order; what is filled in need not be 0."""
    data = c.tensors(node)[0]
    c.freeze(c.dim(data, 0), f"is a sequence at {c.graph.where(node)}")
    rest = c.dims(data)[1:]
    c.set(node, [None, None, *(rest if float(node.argument("padding_value")) == 0 else without_zeros(rest))])
    c.set(node, [None], output=1)
