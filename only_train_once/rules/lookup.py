"""Operators that pick entries by index or by data: the picked axis is frozen, the others pass."""

from __future__ import annotations

from ..graph import Node, Ref
from ..labels import Dim, Label
from .registry import Context, rule


@rule("aten.embedding")
def embedding(c: Context, node: Node) -> None:
    """``weight (rows, width)``: rows are picked by data, the width passes."""
    weight, index = c.tensors(node)[:2]
    c.freeze(c.dim(weight, 0), f"rows are looked up by data at {c.graph.where(node)}")
    for dim in c.dims(index):
        c.freeze(dim, f"indexes a table at {c.graph.where(node)}")
    c.set(node, [*[None] * c.rank(index), c.dim(weight, 1)])


@rule("aten.index_select")
def index_select(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    c.keep(node, x, fixed=(int(node.argument("dim")) % c.rank(x),), why="indices are picked")


@rule("aten.index", "aten._unsafe_index")
def index(c: Context, node: Node) -> None:
    """``x[i, :, j]``: indexed dims freeze and are replaced by the broadcast dims of the indices."""
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    indices = list(node.args[1])
    dims = list(c.dims(x))
    used: list[int] = []
    position = 0
    for item in indices:
        width = 1
        if isinstance(item, Ref):
            value = c.value(item.index)
            if str(value.dtype) in ("torch.bool", "torch.uint8"):
                width = len(value.shape)
            for dim in c.dims(item.index):
                c.freeze(dim, f"indexes a tensor at {c.graph.where(node)}")
            for d in range(position, position + width):
                c.freeze(dims[d], f"is indexed by position at {c.graph.where(node)}")
                used.append(d)
        position += width
    kept = [d for d in range(len(dims)) if d not in used]
    made = c.rank(out) - len(kept)
    together = used == list(range(used[0], used[0] + len(used))) if used else True
    front = len([d for d in kept if d < used[0]]) if used and together else 0
    passed = [dims[d] for d in kept]
    c.set(node, [*passed[:front], *[None] * made, *passed[front:]])


@rule("aten.gather", "aten.take_along_dim")
def gather(c: Context, node: Node) -> None:
    x, picked = c.tensors(node)[:2]
    d = int(node.argument("dim")) % c.rank(x)
    dims: list[Dim] = []
    for k in range(c.rank(x)):
        if k == d:
            c.freeze(c.dim(x, k), f"indices are picked at {c.graph.where(node)}")
            c.freeze(c.dim(picked, k), f"indexes a tensor at {c.graph.where(node)}")
            dims.append(None)
        elif c.shape(x)[k] == c.shape(picked)[k]:
            of_x, of_index = c.dim(x, k), c.dim(picked, k)
            joined = c.tie(of_x, of_index, node)
            dims.append(
                joined.with_zero(of_x.zero) if isinstance(joined, Label) and isinstance(of_x, Label) else joined
            )
        else:
            c.freeze(c.dim(x, k), f"only a part is gathered at {c.graph.where(node)}")
            c.freeze(c.dim(picked, k), f"only a part is gathered at {c.graph.where(node)}")
            dims.append(None)
    c.set(node, dims)


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce", "aten.index_add", "aten.index_copy", "aten.index_fill",
      "aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put",
      "aten.select_scatter", "aten.slice_scatter", "aten.put")  # fmt: skip
def scatter(c: Context, node: Node) -> None:
    """Written at positions that data decides: everything involved stays."""
    c.freeze_node(node, "is written at given positions")
    for output, made in enumerate(node.outputs):
        if made is not None:
            c.set(node, [None] * c.rank(made), output)


@rule("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten._assert_async", "aten._assert_tensor_metadata",
      "aten._is_all_true", "aten._is_any_true")  # fmt: skip
def scalar_read(c: Context, node: Node) -> None:
    """A number leaves for Python; what it decides is handled with the graph's branches."""
    for output, made in enumerate(node.outputs):
        if made is not None:
            c.set(node, [None] * c.rank(made), output)
