"""What each ATen operator does to dims: a registry, and one file per family of operators.

A rule is a function of a `Context` and a `Node`. It reads the labels of the node's inputs, states what the
operator needs to be true of them, and sets the labels of its outputs::

    @rule("aten.mm")
    def mm(c: Context, node: Node) -> None:
        a, b = c.tensors(node)
        c.contract(node, (a, 1), (b, 0))
        c.set(node, [c.dim(a, 0), c.dim(b, 1)])

An operator without a rule freezes what it touches; nothing is guessed.
"""

from __future__ import annotations

import importlib

from .registry import Context, Rule, registered, rule

_FAMILIES = (
    "pointwise",
    "shape",
    "contraction",
    "attention",
    "norm",
    "reduce",
    "spatial",
    "lookup",
    "experts",
    "recurrent",
    "fourier",
)

for _family in _FAMILIES:
    importlib.import_module(f"{__name__}.{_family}")

__all__ = ["Context", "Rule", "registered", "rule"]
