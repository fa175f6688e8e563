"""Norms that a module writes out as operators: which one a mean over channels belongs to.

Such a mean divides by the count of the channels. Where the module does nothing else it can be told the full count.
"""

from __future__ import annotations

from enum import Enum

from ..graph import Node, Ref
from .registry import Context, reduced_dims


class Norm(Enum):
    """What a module computes with a mean over channels."""

    RMS = "x * rsqrt(mean(x * x) + eps)"
    LAYER = "(x - m) * rsqrt(mean((x - m) ** 2) + eps)"
    RESPONSE = "l / (mean(l) + eps), l the length of a channel over space"


def norm_of(c: Context, node: Node) -> Norm | None:
    """The norm that this mean begins, None where the module is none that is known."""
    if _is_centre(c, node):
        return Norm.LAYER
    if _is_mean_square(c, node):
        return Norm.RMS
    return Norm.RESPONSE if _is_response(c, node) else None


def _is_mean_square(c: Context, node: Node) -> bool:
    """Whether the module computes ``x * rsqrt(mean(x * x) + eps)`` and nothing else."""
    squared = c.producers.get(node.inputs[0])
    return squared is not None and _is_square(squared) and _meets_root(c, node)


def _is_centre(c: Context, node: Node) -> bool:
    """Whether this is the m of ``(x - m) * rsqrt(mean((x - m) ** 2) + eps)``, a layer norm written out."""
    readers = _readers(c, node)
    squares = [n for reader in readers for n in _readers(c, reader) if _is_square(n)]
    variances = [n for square in squares for n in _readers(c, square) if n.name == "aten.mean"]
    return bool(variances) and all(_centres(n, node) for n in readers) and all(is_variance(c, n) for n in variances)


def is_variance(c: Context, node: Node) -> bool:
    """Whether this is the mean of ``(x - m) ** 2``, m the mean of x over the same dims, and a root follows."""
    squared = c.producers.get(node.inputs[0])
    if squared is None or not _is_square(squared):
        return False
    difference = c.producers.get(squared.inputs[0])
    if difference is None or difference.name != "aten.sub" or len(difference.inputs) != 2:
        return False
    centre = c.producers.get(difference.inputs[1])
    if centre is None or centre.name != "aten.mean" or not _centres(difference, centre):
        return False
    return reduced_dims(c, node, node.inputs[0]) == reduced_dims(c, centre, centre.inputs[0]) and _meets_root(c, node)


def _centres(node: Node, centre: Node) -> bool:
    """Whether ``node`` is ``x - m``, m what ``centre`` makes of the same x."""
    return (
        node.name == "aten.sub"
        and node.module == centre.module
        and node.inputs == (centre.inputs[0], centre.outputs[0])
        and node.argument("alpha", 1) == 1
    )


def _readers(c: Context, node: Node) -> list[Node]:
    return c.consumers.get(node.outputs[0], []) if node.outputs[0] is not None else []


def _meets_root(c: Context, node: Node) -> bool:
    """Whether a module without parts adds an eps and takes the root: mean -> (+ eps) -> rsqrt, casts in between."""
    path = node.module
    if path in c.parents or not path:
        return False
    for _ in range(4):
        readers = _readers(c, node)
        if any(_is_root(n) for n in readers) and all(n.module == path for n in readers):
            return True
        if len(readers) != 1 or readers[0].name not in ("aten.add", "aten._to_copy"):
            return False  # not a clamp either: its bound would have to scale as well
        node = readers[0]
    return False


def _is_root(node: Node) -> bool:
    return node.name in ("aten.rsqrt", "aten.sqrt") or (node.name == "aten.pow" and node.args[1] in (-0.5, 0.5))


_LENGTHS = ("aten.linalg_vector_norm", "aten.norm")


def _is_response(c: Context, node: Node) -> bool:
    """Whether the module divides lengths by the mean of lengths over channels (+ eps)."""
    path, lengths = node.module, c.producers.get(node.inputs[0])
    if path in c.parents or not path or lengths is None or lengths.name not in _LENGTHS or lengths.module != path:
        return False
    readers = _readers(c, node)
    if len(readers) != 1 or readers[0].name != "aten.add" or isinstance(readers[0].args[1], Ref):
        return False
    divisions = _readers(c, readers[0])
    if not all(n.name == "aten.div" and n.inputs == (lengths.outputs[0], n.args[1].index) for n in divisions):
        return False
    return bool(divisions)


def _is_square(node: Node) -> bool:
    if node.name == "aten.pow":
        return node.args[1] == 2 and isinstance(node.args[0], Ref)
    if node.name == "aten.square":
        return True
    return node.name == "aten.mul" and node.args[0] == node.args[1]
