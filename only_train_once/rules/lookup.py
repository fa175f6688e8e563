"""Operators that pick or write entries by index or by data: the picked axis is frozen, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    x, picked = c.tensors(node)[:2]
    _freeze_index(c, node, picked)
    c.keep(node, x, fixed=(_along(c, node, x),), why=_picked(c, x))


@dataclass(frozen=True)
class _Layout:
    """Where the dims of ``x[i, :, j]`` come from.

    Attributes:
        used: dims of ``x`` that are indexed; they are replaced by the ``made`` dims that the indices broadcast to.
        kept: the other dims of ``x``.
        front: how many of those kept stand before the dims made.
    """

    used: tuple[int, ...]
    kept: tuple[int, ...]
    front: int
    made: int

    def insert(self, dims: Sequence[Dim]) -> list[Dim]:
        """The dims of ``x[i, :, j]``, given those of ``x``."""
        passed = [dims[d] for d in self.kept]
        return [*passed[: self.front], *[None] * self.made, *passed[self.front :]]

    def place(self, dim: int) -> int:
        """Where the kept ``dim`` of ``x`` stands in ``x[i, :, j]``."""
        position = self.kept.index(dim)
        return position if position < self.front else position + self.made


def _layout(c: Context, node: Node, x: int, indices: Sequence[Any]) -> _Layout:
    """Read the indices, and freeze them and what they index."""
    used: list[int] = []
    position = made = 0
    for item in indices:
        width = 1
        if isinstance(item, Ref):
            mask = str(c.value(item.index).dtype) in ("torch.bool", "torch.uint8")
            width = c.rank(item.index) if mask else 1
            made = max(made, 1 if mask else c.rank(item.index))
            _freeze_index(c, node, item.index)
            for d in range(position, position + width):
                c.freeze(c.dim(x, d), f"{_picked(c, x)} at {c.graph.where(node)}")
                used.append(d)
        position += width
    kept = tuple(d for d in range(c.rank(x)) if d not in used)
    together = used == list(range(used[0], used[0] + len(used))) if used else True
    front = len([d for d in kept if d < used[0]]) if used and together else 0
    return _Layout(tuple(used), kept, front, made)


def _picked(c: Context, x: int) -> str:
    return "its entries are chosen by data" if x in c.from_params else "is indexed by position"


def _freeze_index(c: Context, node: Node, index: int) -> None:
    for dim in c.dims(index):
        c.freeze(dim, f"indexes a tensor at {c.graph.where(node)}")


def _along(c: Context, node: Node, x: int) -> int:
    return int(node.argument("dim")) % max(c.rank(x), 1)


@rule("aten.index", "aten._unsafe_index")
def index(c: Context, node: Node) -> None:
    """``x[i, :, j]``: indexed dims freeze and are replaced by the broadcast dims of the indices.

    Where whole matrices of a parameter are chosen (the expert of each token), they are weights like the others.
    """
    x, made = c.tensors(node)[0], node.outputs[0]
    layout = _layout(c, node, x, node.args[1])
    if made is not None and x in c.from_params and sum(c.shape(x)[d] > 1 for d in layout.kept) >= 2:
        c.from_params.add(made)
    c.set(node, layout.insert(c.dims(x)))


@rule("aten.gather", "aten.take_along_dim")
def gather(c: Context, node: Node) -> None:
    x, picked = c.tensors(node)[:2]
    d = _along(c, node, x)
    dims: list[Dim] = []
    for k in range(c.rank(x)):
        if k == d:
            c.freeze(c.dim(x, k), f"indices are picked at {c.graph.where(node)}")
            c.freeze(c.dim(picked, k), f"indexes a tensor at {c.graph.where(node)}")
            dims.append(None)
        elif c.shape(x)[k] == c.shape(picked)[k]:
            dims.append(_zero_as(c.tie(c.dim(x, k), c.dim(picked, k), node), c.dim(x, k)))
        else:
            c.freeze(c.dim(x, k), f"only a part is gathered at {c.graph.where(node)}")
            c.freeze(c.dim(picked, k), f"only a part is gathered at {c.graph.where(node)}")
            dims.append(None)
    c.set(node, dims)


# ---------------------------------------------------------------- writing


@rule("aten.masked_scatter")
def masked_scatter(c: Context, node: Node) -> None:
    """Where the mask says so, the entries of ``source`` in their order: every dim that the mask varies along stays.

    Along the last dims a mask usually repeats (one decision for a whole vector): there the vectors run side by side.
    """
    x, mask, source = c.tensors(node)[:3]
    rank = c.rank(x)
    dims: list[Dim] = [None] * rank
    aligned = True
    for back in range(1, rank + 1):
        d, of_mask, of_source = rank - back, c.rank(mask) - back, c.rank(source) - back
        aligned = (
            aligned
            and of_source >= 0
            and c.shape(source)[of_source] == c.shape(x)[d]
            and (of_mask < 0 or repeats(c, mask, of_mask))
        )
        if aligned:
            joined = c.tie(c.dim(x, d), c.dim(source, of_source), node)
            dims[d] = _zero_as(joined, c.dim(x, d), c.dim(source, of_source))
            continue
        for index, own in ((x, d), (mask, of_mask), (source, of_source)):
            if own >= 0:
                c.freeze(c.dim(index, own), f"is written at positions that data decides at {c.graph.where(node)}")
    c.set(node, dims)


def repeats(c: Context, index: int, dim: int) -> bool:
    """Whether a value is the same all along a dim, because it was expanded there."""
    while c.shape(index)[dim] != 1:
        made = c.producers.get(index)
        if made is None or not made.inputs:
            return False
        source = made.inputs[0]
        if made.name in ("aten.expand", "aten.broadcast_to", "aten.expand_copy"):
            dim -= c.rank(index) - c.rank(source)
            if dim < 0:
                return True
        elif made.name not in ("aten._to_copy", "aten.clone", "aten.alias", "aten.detach", "aten.bitwise_not",
                               "aten.logical_not"):  # fmt: skip
            return False
        index = source
    return True


def _zero_as(joined: Dim, *sources: Dim) -> Dim:
    """``joined``, zero where all sources are; one that repeats a value along the dim is zero nowhere."""
    if not isinstance(joined, Label):
        return joined
    zero = joined.zero | True
    for source in sources:
        zero = zero & (source.zero if isinstance(source, Label) else False)
    return joined.with_zero(zero)


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce")
def index_add(c: Context, node: Node) -> None:
    """``x[:, i] += source`` along one dim: its positions are given, the other dims are those of both."""
    x, picked, source = c.tensors(node)[:3]
    along = _along(c, node, x)
    _freeze_index(c, node, picked)
    dims: list[Dim] = []
    for d in range(c.rank(x)):
        of_x, of_source = c.dim(x, d), c.dim(source, d)
        if d == along:
            for dim in (of_x, of_source):
                c.freeze(dim, f"is written at given positions at {c.graph.where(node)}")
            dims.append(None)
        else:
            dims.append(_zero_as(c.tie(of_x, of_source, node), of_x, of_source))
    c.set(node, dims)


@rule("aten.index_fill")
def index_fill(c: Context, node: Node) -> None:
    """``x[:, i] = number``."""
    x, picked = c.tensors(node)[:2]
    _freeze_index(c, node, picked)
    along = _along(c, node, x)
    c.freeze(c.dim(x, along), f"is written at given positions at {c.graph.where(node)}")
    stays_zero = node.argument("value") == 0
    dims = [d.with_zero(d.zero & stays_zero) if isinstance(d, Label) else d for d in c.dims(x)]
    c.set(node, [None if d == along else dim for d, dim in enumerate(dims)])


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(c: Context, node: Node) -> None:
    """``x[index[i, j], j] = source[i, j]`` along one dim; in the others the three run side by side.

    Where they do so only over a part, nothing may be removed: the part is the first so many indices.
    """
    x, picked, *rest = c.tensors(node)
    along = _along(c, node, x)
    dims: list[Dim] = []
    for d in range(c.rank(x)):
        taking_part = [x, picked, *rest]
        given = [c.dim(t, d) for t in taking_part]
        if d == along or len({c.shape(t)[d] for t in taking_part}) > 1:
            for dim in given:
                c.freeze(dim, f"is written at given positions at {c.graph.where(node)}")
            dims.append(None)
            continue
        joined = given[0]
        for other in given[1:]:
            joined = c.tie(joined, other, node)
        written: list[Dim] = [given[2]] if rest else []
        joined = _zero_as(joined, given[0], *written)
        number = node.argument("value", 0) if not rest else 0
        dims.append(joined.with_zero(False) if isinstance(joined, Label) and number != 0 else joined)
    c.set(node, dims)


@rule("aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put")
def index_put(c: Context, node: Node) -> None:
    """``x[i, :, j] = values``: indexed dims stay, the others are those of ``values``, which broadcast."""
    x, values = node.args[0].index, node.args[2].index
    layout = _layout(c, node, x, node.args[1])
    dims: list[Dim] = [None] * c.rank(x)
    missing = layout.made + len(layout.kept) - c.rank(values)
    for place in range(c.rank(values)):
        if place + missing not in [layout.place(d) for d in layout.kept]:
            c.freeze(c.dim(values, place), f"is written at given positions at {c.graph.where(node)}")
    for d in layout.kept:
        own, of_x = layout.place(d) - missing, c.dim(x, d)
        if own >= 0 and c.shape(values)[own] == c.shape(x)[d]:
            dims[d] = _zero_as(c.tie(of_x, c.dim(values, own), node), of_x, c.dim(values, own))
        else:
            dims[d] = of_x.with_zero(False) if isinstance(of_x, Label) else None  # one value all along the dim
    c.set(node, dims)


@rule("aten.select_scatter", "aten.slice_scatter", "aten.put")
def overwrite(c: Context, node: Node) -> None:
    """Written at positions that the code decides: everything involved stays."""
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
