"""Matrix products with one matrix per group of rows: what experts that share a tensor compute with."""

from __future__ import annotations

from ..graph import Node
from ..labels import Dim, Label
from .registry import Context, rule

# The kernel wants rows of whole 16 bytes. Of the dtypes it takes the narrowest have 2 bytes an entry: a subnet with
# rows of 8 entries runs in every one of them, so it can be cast after it was cut.
ALIGNMENT = 16 // 2


@rule("aten._grouped_mm")
def grouped_mm(c: Context, node: Node) -> None:
    """``a`` and ``b`` in one of four forms; rows are cut into groups where ``offs`` says.

    ``(rows, k) x (groups, k, m)``, ``(groups, n, k) x (k, columns)``, ``(n, rows) x (rows, m)`` into one product per
    group, and plain ``(groups, n, k) x (groups, k, m)``. Data decides which rows belong to which group, so groups and
    rows stay. The operands' rows in memory, and those of the result's gradient, have to be whole 16 bytes.
    """
    a, b = c.tensors(node)[:2]
    flat_a, flat_b = c.rank(a) == 2, c.rank(b) == 2
    chosen = f"groups are chosen by data at {c.graph.where(node)}"
    for index in (t for t in (c.tensor(node, "offs"),) if t is not None):
        c.freeze(c.dim(index, 0), chosen)
    group: Dim = None
    if flat_a and flat_b:
        c.freeze(c.dim(a, 1), chosen)
        c.freeze(c.dim(b, 0), chosen)
    else:
        c.contract(node, (a, c.rank(a) - 1), (b, c.rank(b) - 2))
        if flat_a != flat_b:
            c.freeze(c.dim(b if flat_a else a, 0), chosen)
            c.freeze(c.dim(a, 0) if flat_a else c.dim(b, 1), chosen)
        else:
            left, right = c.dim(a, 0), c.dim(b, 0)
            group = c.tie(left, right, node)
            if isinstance(group, Label) and isinstance(left, Label) and isinstance(right, Label):
                group = group.with_zero(left.zero | right.zero)
    rows = None if flat_a and not flat_b else c.dim(a, -2)
    columns = None if flat_b and not flat_a else c.dim(b, -1)
    _align(c, a)
    _align(c, b)
    c.multiple(columns, ALIGNMENT)
    bias = c.tensor(node, "bias")
    if bias is not None:
        c.freeze(c.dim(bias, 0), chosen)
        columns = c.tie(columns, c.dim(bias, -1), node)
        rows, group = (d.with_zero(False) if isinstance(d, Label) else d for d in (rows, group))
    c.set(node, [rows, columns] if flat_a != flat_b else [group, rows, columns])


def _align(c: Context, operand: int) -> None:
    """The dim along which an operand's memory runs is a whole number of 16 bytes, and so is a row it is a part of.

    A matrix may lie row by row or column by column (a weight of ``(groups, m, k)`` that is transposed).
    """
    shape, strides = c.shape(operand), c.value(operand).strides
    along, across = (-2, -1) if strides[-2] == 1 and strides[-1] >= max(1, shape[-2]) else (-1, -2)
    c.multiple(c.dim(operand, along), ALIGNMENT)
    if strides[across] == shape[along]:
        return
    value: int | None = operand
    while value is not None:  # half of a row: what it was cut from, as far back as the memory is the same
        for d, (size, stride) in enumerate(zip(c.shape(value), c.value(value).strides, strict=True)):
            if stride == 1 and size > 1:
                c.multiple(c.dim(value, d), ALIGNMENT)
        made = c.producers.get(value)
        value = made.inputs[0] if made is not None and _is_view(made) else None


def _is_view(node: Node) -> bool:
    """Whether the first output is other names for the memory of the first input."""
    returned = node.op._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
