"""What an operator wants to be true of memory: rows of a certain length."""

from __future__ import annotations

from ..graph import Node
from .registry import Context

_CUTS = ("aten.slice", "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split",
         "aten.unsafe_split", "aten.unsafe_chunk", "aten.select", "aten.unbind")  # fmt: skip


def align_rows(c: Context, value: int, of: int) -> None:
    """A row of ``value``, as it lies in memory, is a multiple of ``of`` entries, and begins at one.

    The row is the dim whose entries are neighbours, the last one or (transposed) another. That of a part of a tensor is
    as far from the next as the rows of the whole are, so what it was cut from is asked for the same, and so is what
    lies before the cut. Reading the same memory in another shape changes nothing: a row of ``heads * head_dim`` is a
    multiple when the head-dim is.
    """
    _align(c, value, of)
    made = c.producers.get(value)
    while made is not None and _is_view(made):
        source = made.inputs[0]
        if made.name in _CUTS:
            _align(c, source, of)
            for d, stride in enumerate(c.value(source).strides):
                before = c.label(source, d)
                if stride == 1 and before is not None:
                    c.multiple(before.take(slice(0, _start(c, made, value, d))), of)
        value = source
        made = c.producers.get(value)


def _align(c: Context, value: int, of: int) -> None:
    for d, (size, stride) in enumerate(zip(c.shape(value), c.value(value).strides, strict=True)):
        if stride == 1 and size > 1:
            c.multiple(c.dim(value, d), of)


def _start(c: Context, cut: Node, made: int, dim: int) -> int:
    """The first index of ``dim`` that is in ``made``, where the cut is along ``dim``."""
    source = cut.inputs[0]
    if int(cut.argument("dim", 0)) % c.rank(source) != dim or c.rank(made) != c.rank(source):
        return 0
    if cut.name == "aten.slice":
        return slice(cut.argument("start"), None).indices(c.shape(source)[dim])[0]
    earlier = cut.outputs[: cut.outputs.index(made)]
    return sum(c.shape(value)[dim] for value in earlier if value is not None)


def _is_view(node: Node) -> bool:
    """Whether the first output is other names for the memory of the first input."""
    returned = node.op._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
