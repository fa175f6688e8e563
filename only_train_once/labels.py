"""What a dim carries, and the constraints between what dims carry.

A dim of a value carries a `Label`: one integer id per index, and per index whether the value is 0 there once
the id's unit is removed. A dim without a label is *fixed*: nothing can be removed from it. Concatenation,
slicing, chunks and shuffles are then the same array operation on the ids. Two constraints suffice:

- equality: two ids leave together;
- product: an index of a merged dim stays when its index in every factor stays (``C = heads * head_dim``).

[Note: solving]
Equalities become classes (connected components). Products over classes are then simplified until nothing
changes: a factor that is frozen drops out and the entries along it become equal; a product with one factor left is an
equality; equal factors make equal products and the other way round; of two factorizations of the same entries the
one that nests in the other is expressed by it, and where none does both are frozen; places of a factor that hold the
same entries become equal. Every step only adds
constraints. At the end a unit that would take an entry out of a product without one of its factors is frozen.
What is left are free classes (the units) and product entries, which leave with any of their factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Kind(str, Enum):
    """What the units of a group are to a reader."""

    CHANNEL = "channel"  # a channel of a convolution, a neuron of a linear layer
    HEAD = "head"  # an attention head (with its query heads, if keys and values are shared)
    HEAD_DIM = "head_dim"  # one position inside every head
    EXPERT = "expert"  # one of several weight matrices that work side by side
    WIDTH = "width"  # a channel of a residual stream that a layer, group or RMS norm averages over


class Mark(str, Enum):
    """What a rule noticed about ids; together they make the `Kind` of a unit."""

    HEAD = "head"
    HEAD_DIM = "head_dim"
    EXPERT = "expert"
    NORMALIZED = "normalized"  # a norm averages over them
    STREAM = "stream"  # two activations are added


@dataclass(frozen=True, eq=False)
class Label:
    """What one dim carries.

    Attributes:
        ids: (size,) the id of each index; an id may stand at several indices.
        zero: (size,) whether the value is 0 at this index once the id's unit is removed.
    """

    ids: Ids
    zero: Flags

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: slice | Ids) -> Label:
        """The label of a selection along the dim."""
        return Label(self.ids[index], self.zero[index])

    def with_zero(self, zero: Flags | bool) -> Label:
        """The same ids with other zero flags."""
        return Label(self.ids, np.broadcast_to(np.asarray(zero, dtype=bool), self.ids.shape))


@dataclass(frozen=True, eq=False)
class Spread:
    """What a dim carries that repeats one value along it: it takes any label without constraining it.

    ``origin`` is the (value, dim) whose size the model's code named; what it says about that size then
    applies to the label that the dim meets.
    """

    origin: tuple[int, int]


Dim = Label | Spread | None


@dataclass
class Product:
    """Entry ``out[i, j, ...]`` stays when ``factors[0][i]`` and ``factors[1][j]`` and ... stay."""

    out: Ids  # (n1, n2, ...)
    factors: list[Ids]  # (n1,), (n2,), ...


@dataclass
class Solution:
    """What the constraints amount to.

    Attributes:
        of_id: (ids,) class of each id.
        frozen: (classes,) whether the class has to stay.
        reason: (classes,) index into ``reasons`` of why, -1 where not frozen.
        reasons: texts.
        products: what is left of them, over classes.
        marks: for each `Mark` (classes,) whether some id of the class has it.
        members: (classes, classes) boolean; row c holds the units whose removal removes c.
        component: (classes,) classes that products connect share a number.
    """

    of_id: Ids
    frozen: Flags
    reason: Ids
    reasons: list[str]
    products: list[Product]
    marks: dict[Mark, Flags]
    members: sparse.csr_matrix
    component: Ids

    def removed_by(self, ids: Ids) -> tuple[Ids, Ids]:
        """Units whose removal removes some of these ids, and at which places of ``ids``; pairs in order of place."""
        classes = self.of_id[np.asarray(ids).reshape(-1)]
        starts = self.members.indptr[classes].astype(np.int64)
        counts = self.members.indptr[classes + 1] - starts
        places = np.repeat(np.arange(len(classes)), counts)
        inside = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.members.indices[np.repeat(starts, counts) + inside].astype(np.int64), places


def kinds_of(solution: Solution) -> dict[Kind, Flags]:
    """For each kind (units,) whether a unit is that; a unit may be several, the last of `Kind` counts.

    A unit that takes part of a normalized stream with it is of that stream, whatever else it is. Experts are mixed by
    a product that looks like the one over the positions of a head; heads may have a matrix each.
    """
    expert = solution.marks[Mark.EXPERT] & ~solution.marks[Mark.HEAD]
    of_class = {
        Kind.HEAD: solution.marks[Mark.HEAD],
        Kind.HEAD_DIM: solution.marks[Mark.HEAD_DIM] & ~expert,
        Kind.EXPERT: expert,
        Kind.WIDTH: solution.marks[Mark.NORMALIZED] & solution.marks[Mark.STREAM],
    }
    width = np.zeros(len(solution.frozen), dtype=bool)
    marked = sparse.csr_matrix(of_class[Kind.WIDTH][None].astype(np.int32))
    width[(marked @ solution.members.astype(np.int32)).indices] = True
    return {**of_class, Kind.WIDTH: width | of_class[Kind.WIDTH]}


@dataclass
class LabelStore:
    """Makes ids and collects constraints; `solve` answers."""

    count: int = 0
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    freezes: list[tuple[Ids, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    marks: list[tuple[Ids, Mark]] = field(default_factory=list)
    multiples: list[tuple[Ids, int]] = field(default_factory=list)
    _splits: dict[tuple[bytes, tuple[int, ...]], list[Ids | None]] = field(default_factory=dict)
    _merges: dict[tuple[bytes, ...], Ids] = field(default_factory=dict)
    _grids: dict[tuple[bytes, ...], Product] = field(default_factory=dict)  # sorted factors -> a product of them
    _reason_index: dict[str, int] = field(default_factory=dict)
    _solved: _Solved = field(default_factory=lambda: _Solved())

    def fresh(self, size: int, zero: bool) -> Label:
        """A label of ids nobody has."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return Label(ids, np.full(size, zero))

    def equal(self, a: Ids, b: Ids) -> None:
        """These ids leave together, pairwise."""
        if a is not b:
            self.edges.append((a, b))

    def freeze(self, ids: Ids, reason: str) -> None:
        """These ids have to stay."""
        if len(ids) == 0:
            return
        self.freezes.append((ids, self._reason(reason)))

    def mark(self, ids: Ids, mark: Mark) -> None:
        """Note something about ids."""
        self.marks.append((ids, mark))

    def multiple(self, ids: Ids, of: int) -> None:
        """What leaves of these ids is a multiple of ``of``."""
        self.multiples.append((ids, of))

    def split(self, label: Label, sizes: Sequence[int]) -> list[Label | None]:
        """The labels of the dims that one dim is split into, row-major."""
        key = (label.ids.tobytes(), tuple(sizes))
        grid = label.ids.reshape(sizes)
        factors = self._splits.get(key)
        if factors is None:
            factors = self._splits[key] = self._factors(grid)
        zero = label.zero.reshape(sizes)
        result: list[Label | None] = []
        for axis, factor in enumerate(factors):
            others = tuple(a for a in range(len(sizes)) if a != axis)
            result.append(None if factor is None else Label(factor, np.asarray(zero.all(axis=others))))
        return result

    def _factors(self, grid: Ids) -> list[Ids | None]:
        """The ids of each dim of a grid that nobody has split yet; None along which all is the same."""
        firsts, places = zip(*(_rows_once(grid, axis) for axis in range(grid.ndim)), strict=True)
        core = grid[np.ix_(*firsts)]
        if core.shape != grid.shape:  # rows that are there twice (heads, once for every image) leave together
            once = self.split(Label(core.reshape(-1), np.ones(core.size, dtype=bool)), core.shape)
            return [None if f is None else f.ids[p] for f, p in zip(once, places, strict=True)]
        varies = [size > 1 for size in grid.shape]
        if sum(varies) <= 1:
            return [self._along(grid, a) if v else None for a, v in enumerate(varies)]
        factors = [self.fresh(size, True).ids if v else None for size, v in zip(grid.shape, varies, strict=True)]
        self._product(grid.squeeze(), [f for f in factors if f is not None])
        return factors

    def merge(self, labels: Sequence[Label | None], sizes: Sequence[int]) -> Label | None:
        """The label of the dim that several dims are merged into, row-major."""
        labelled = [a for a, label in enumerate(labels) if label is not None]
        if not labelled:
            return None
        grids: list[Ids] = []
        zero = np.ones(tuple(sizes), dtype=bool)
        for axis in labelled:
            label = labels[axis]
            assert label is not None
            shape = [1] * len(sizes)
            shape[axis] = sizes[axis]
            grids.append(np.broadcast_to(label.ids.reshape(shape), tuple(sizes)))
            zero = zero & label.zero.reshape(shape)
        if len(labelled) == 1:
            return Label(np.ascontiguousarray(grids[0]).reshape(-1), zero.reshape(-1))
        factors = [label.ids for label in labels if label is not None]
        # a factor that repeats its ids (heads, once for every image) makes the same entries again
        once, places = zip(*map(_once, factors), strict=True)
        key = tuple(f.tobytes() for f in once)
        ids = self._merges.get(key)
        if ids is None:
            shape = [len(f) for f in once]
            ids = self._transposed(list(once))
            if ids is None:
                ids = self.fresh(math.prod(shape), True).ids
            self._product(ids.reshape(shape), list(once))  # in this order too, for products are compared as they lie
            self._merges[key] = ids
        ids = ids.reshape([len(f) for f in once])[np.ix_(*places)].reshape(-1)
        shape = [sizes[a] if a in labelled else 1 for a in range(len(sizes))]
        full = np.ascontiguousarray(np.broadcast_to(ids.reshape(shape), tuple(sizes))).reshape(-1)
        by_axis = dict(zip(labelled, factors, strict=True))
        self._splits[(full.tobytes(), tuple(sizes))] = [by_axis.get(a) for a in range(len(sizes))]
        return Label(full, zero.reshape(-1))

    def _product(self, out: Ids, factors: list[Ids]) -> None:
        self.products.append(Product(out, factors))
        self._grids.setdefault(tuple(sorted(f.tobytes() for f in factors)), self.products[-1])
        # remember the split, so that taking apart what was put together gives the same ids back
        self._splits.setdefault((np.ascontiguousarray(out).tobytes(), out.shape), list(factors))

    def _transposed(self, factors: list[Ids]) -> Ids | None:
        """The entries of a product of the same factors in another order (a shuffle): they are the same entries."""
        key = [f.tobytes() for f in factors]
        known = self._grids.get(tuple(sorted(key)))
        if known is None or len(set(key)) != len(key):
            return None
        order = [f.tobytes() for f in known.factors]
        return np.ascontiguousarray(known.out.transpose([order.index(k) for k in key])).reshape(-1)

    @staticmethod
    def _along(grid: Ids, axis: int) -> Ids:
        index = tuple(slice(None) if a == axis else 0 for a in range(grid.ndim))
        return np.ascontiguousarray(grid[index])

    # ------------------------------------------------------------ solving, see [Note: solving]

    def solve(self) -> Solution:
        """Classes, what is frozen and why, and which units take which classes with them.

        Goes on from where the last call stopped: constraints only ever add up, see [Note: solving].
        """
        self._solved = known = self._read(self._solved)
        while True:
            if known.edges:
                known.join()
            known.products, known.edges, changed = _simplify(known.products, known.frozen, known.reason, self._reason)
            if known.edges or changed:
                continue
            members, component = _closure(known.products, known.classes)
            stray = _stray(known.products, members)
            stray = stray[~known.frozen[stray]]
            if not len(stray):
                break
            known.frozen[stray] = True
            known.reason[stray] = self._reason("is part of two dims that are merged in different ways")
        marks = {mark: np.zeros(known.classes, dtype=bool) for mark in Mark}
        for ids, mark in self.marks:
            marks[mark][known.of_id[ids]] = True
        products = [Product(p.out, list(p.factors)) for p in known.products]
        return Solution(
            known.of_id, known.frozen.copy(), known.reason.copy(), self.reasons, products, marks, members, component
        )

    def _read(self, known: _Solved) -> _Solved:
        """Take in what was said since the last call."""
        fresh = self.count - len(known.of_id)
        of_id = np.concatenate([known.of_id, np.arange(known.classes, known.classes + fresh, dtype=np.int64)])
        frozen = np.concatenate([known.frozen, np.zeros(fresh, dtype=bool)])
        reason = np.concatenate([known.reason, np.full(fresh, -1, dtype=np.int64)])
        for ids, index in self.freezes[known.read[0] :]:
            classes = of_id[ids]
            new = classes[~frozen[classes]]
            frozen[new] = True
            reason[new] = index
        edges = [
            (of_id[np.asarray(a).reshape(-1)], of_id[np.asarray(b).reshape(-1)]) for a, b in self.edges[known.read[1] :]
        ]
        products = [Product(of_id[p.out], [of_id[f] for f in p.factors]) for p in self.products[known.read[2] :]]
        return _Solved(
            of_id,
            frozen,
            reason,
            [*known.products, *products],
            edges,
            (len(self.freezes), len(self.edges), len(self.products)),
        )

    def _reason(self, text: str) -> int:
        """The index of a reason."""
        index = self._reason_index.setdefault(text, len(self.reasons))
        if index == len(self.reasons):
            self.reasons.append(text)
        return index


@dataclass
class _Solved:
    """How far `LabelStore.solve` has come.

    Attributes:
        of_id: (ids,) class of each id.
        frozen, reason: (classes,) as in `Solution`.
        products: what is left of them, over classes.
        edges: classes still to be joined.
        read: how many freezes, edges and products of the store are in here.
    """

    of_id: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    frozen: Flags = field(default_factory=lambda: np.empty(0, dtype=bool))
    reason: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    products: list[Product] = field(default_factory=list)
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    read: tuple[int, int, int] = (0, 0, 0)

    @property
    def classes(self) -> int:
        return len(self.frozen)

    def join(self) -> None:
        """Make one class of those that edges connect; the first reason of its parts is its reason."""
        a = np.concatenate([e[0] for e in self.edges])
        b = np.concatenate([e[1] for e in self.edges])
        self.edges = []
        graph = sparse.coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(self.classes, self.classes))
        count, step = connected_components(graph, directed=False)
        if count == self.classes:
            return
        step = step.astype(np.int64)
        self.of_id = step[self.of_id]
        frozen, reason = np.zeros(count, dtype=bool), np.full(count, -1, dtype=np.int64)
        frozen[step[self.frozen]] = True
        where = np.flatnonzero(self.frozen)[::-1]  # the first reason is written last
        reason[step[where]] = self.reason[where]
        self.frozen, self.reason = frozen, reason
        for p in self.products:
            p.out = step[p.out]
            p.factors = [step[f] for f in p.factors]


def _rows_once(grid: Ids, axis: int) -> tuple[Ids, Ids]:
    """Where each row along ``axis`` is first, and which of these every row is."""
    every = np.arange(grid.shape[axis])
    rows = np.moveaxis(grid, axis, 0).reshape(len(every), -1)
    if len(np.unique(rows[:, 0])) == len(every):
        return every, every
    _, first, places = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[places.reshape(-1)]


def _once(ids: Ids) -> tuple[Ids, Ids]:
    """Each id once, in order of appearance, and where in that every place finds its own."""
    first, places = _rows_once(ids, 0)
    return (ids, places) if len(first) == len(ids) else (ids[first], places)


def _simplify(
    products: list[Product], frozen: Flags, reason: Ids, number: Callable[[str], int]
) -> tuple[list[Product], list[tuple[Ids, Ids]], bool]:
    """One round over the products; freezes in place, returns the products left and new equalities."""
    edges: list[tuple[Ids, Ids]] = []
    changed = False

    def freeze(classes: Ids, why: Ids) -> bool:
        new = ~frozen[classes]
        if not new.any():
            return False
        frozen[classes[new]] = True
        reason[classes[new]] = np.broadcast_to(why, classes.shape)[new]
        return True

    kept: list[Product] = []
    by_factors: dict[tuple[bytes, ...], Product] = {}
    by_out: dict[bytes, Product] = {}
    for p in products:
        # an entry that has to stay keeps all its factors
        stuck = frozen[p.out]
        if stuck.any():
            for axis, factor in enumerate(p.factors):
                others = tuple(a for a in range(p.out.ndim) if a != axis)
                hit = stuck.any(axis=others)
                if hit.any():
                    moved = np.moveaxis(p.out, axis, 0).reshape(len(factor), -1)[hit]
                    first = frozen[moved].argmax(axis=1)
                    changed |= freeze(factor[hit], reason[moved[np.arange(len(moved)), first]])
        # a factor that stays whole drops out
        for axis in reversed(range(len(p.factors))):
            if frozen[p.factors[axis]].all():
                first_entry = p.out.take([0], axis=axis)
                edges.append((np.broadcast_to(first_entry, p.out.shape).reshape(-1), p.out.reshape(-1)))
                p.out = first_entry.squeeze(axis)
                del p.factors[axis]
        if not p.factors:
            changed |= freeze(p.out.reshape(-1), np.asarray(number("every factor of this dim is fixed")))
            continue
        if len(p.factors) == 1:
            edges.append((p.out.reshape(-1), p.factors[0]))
            continue
        # an entry that is its own factor: the other factors can never go alone
        for axis, factor in enumerate(p.factors):
            if np.isin(factor, p.out).any():
                why = np.asarray(number("a merged dim is tied to one of its own factors"))
                for other, f in enumerate(p.factors):
                    if other != axis:
                        changed |= freeze(f, why)
        edges += _alike(p)
        key = tuple(f.tobytes() for f in p.factors)
        twin = by_factors.get(key)
        if twin is not None:
            if not np.array_equal(twin.out, p.out):
                edges.append((twin.out.reshape(-1), p.out.reshape(-1)))
            continue
        rival = by_out.get(p.out.tobytes())
        if rival is not None:
            if rival.out.shape == p.out.shape:
                for f, g in zip(rival.factors, p.factors, strict=True):
                    if not np.array_equal(f, g):
                        edges.append((f, g))
                continue
            coarse, fine = (rival, p) if len(rival.factors) < len(p.factors) else (p, rival)
            parts = _refine(coarse, fine, edges)
            if parts is None:
                text = f"one dim is read as {list(rival.out.shape)} and as {list(p.out.shape)}"
                changed |= freeze(p.out.reshape(-1), np.asarray(number(text)))
                kept.append(p)
                continue
            changed = True
            if coarse is rival:
                kept = [k for k in kept if k is not rival]
                by_out[p.out.tobytes()] = p
                kept.append(p)
            kept.extend(parts)
            continue
        by_factors[key] = p
        by_out[p.out.tobytes()] = p
        kept.append(p)
    return kept, edges, changed


def _alike(product: Product) -> list[tuple[Ids, Ids]]:
    """Equalities between the places of a factor that hold the same entries (a repeated dim, read another way)."""
    out = product.out
    edges: list[tuple[Ids, Ids]] = []
    entries = np.sort(out, axis=None)
    if (entries[1:] != entries[:-1]).all():
        return edges
    for axis, factor in enumerate(product.factors):
        rows = np.moveaxis(out, axis, 0).reshape(len(factor), -1)
        _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        same = factor[first[group.reshape(-1)]]
        if len(first) > 1 and not np.array_equal(factor, same):  # one row for all is no row to take out
            edges.append((factor, same))
    return edges


def _cuts(shape: Sequence[int]) -> list[int]:
    """Strides at which a factorization cuts: the products of its trailing sizes."""
    cuts, stride = [], 1
    for size in reversed(shape[1:]):
        stride *= size
        cuts.append(stride)
    return cuts


def _refine(coarse: Product, fine: Product, edges: list[tuple[Ids, Ids]]) -> list[Product] | None:
    """Express the factors of ``coarse`` by those of ``fine``, a longer factorization of the same entries.

    Returns the products that replace ``coarse`` (a factor that spans several of the fine ones), or None where the
    cuts of the two do not nest.
    """
    coarse_cuts = [math.prod(coarse.out.shape), *reversed(_cuts(coarse.out.shape)), 1]
    fine_cuts = [math.prod(fine.out.shape), *reversed(_cuts(fine.out.shape)), 1]
    if not set(coarse_cuts) <= set(fine_cuts):
        return None
    parts: list[Product] = []
    for axis, factor in enumerate(coarse.factors):
        first, last = fine_cuts.index(coarse_cuts[axis]), fine_cuts.index(coarse_cuts[axis + 1])
        inner = fine.factors[first:last]
        if len(inner) == 1:
            edges.append((factor, inner[0]))
        else:
            parts.append(Product(factor.reshape([len(f) for f in inner]), inner))
    return parts


def _stray(products: list[Product], members: sparse.csr_matrix) -> Ids:
    """Units that would remove an entry of a product without removing one of its factors.

    The entries left would not form a grid. It takes a class that is an entry twice: products that share only some
    of their entries (a dim is split on its own, and again as part of a concatenation) are not refined.
    """
    if not products:
        return np.empty(0, dtype=np.int64)
    out = np.concatenate([p.out.reshape(-1) for p in products])
    if len(np.unique(out)) == len(out):
        return np.empty(0, dtype=np.int64)
    units = members.astype(np.int8)
    rows, cols, start = [], [], 0
    for p in products:
        for axis, factor in enumerate(p.factors):
            shape = [1] * p.out.ndim
            shape[axis] = len(factor)
            rows.append(np.arange(start, start + p.out.size))
            cols.append(np.broadcast_to(factor.reshape(shape), p.out.shape).reshape(-1))
        start += p.out.size
    r, c = np.concatenate(rows), np.concatenate(cols)
    factors = sparse.csr_matrix((np.ones(len(r), dtype=np.int8), (r, c)), shape=(start, members.shape[0]))
    explained = units[out].multiply((factors @ units) > 0)
    extra = sparse.csr_matrix(units[out] - explained)
    extra.eliminate_zeros()
    return np.unique(extra.indices).astype(np.int64)


def _closure(products: list[Product], classes: int) -> tuple[sparse.csr_matrix, Ids]:
    """Which free classes each class leaves with, and which classes hang together."""
    rows: list[Ids] = []
    cols: list[Ids] = []
    dependent = np.zeros(classes, dtype=bool)
    for p in products:
        dependent[p.out] = True
        for axis, factor in enumerate(p.factors):
            shape = [1] * p.out.ndim
            shape[axis] = len(factor)
            rows.append(p.out.reshape(-1))
            cols.append(np.broadcast_to(factor.reshape(shape), p.out.shape).reshape(-1))
    if not rows:
        return sparse.identity(classes, dtype=bool, format="csr"), np.arange(classes, dtype=np.int64)
    r, c = np.concatenate(rows), np.concatenate(cols)
    if not dependent[c].any():  # no product inside another, as nearly always: a row says it all
        alone = np.flatnonzero(~dependent)
        entries = (np.concatenate([alone, r]), np.concatenate([alone, c]))
        members = sparse.csr_matrix((np.ones(len(entries[0]), dtype=bool), entries), shape=(classes, classes))
        return members, connected_components(members, directed=False)[1].astype(np.int64)
    # counts of paths, which 8 bits would not hold
    parents = sparse.csr_matrix((np.ones(len(r), dtype=np.int32), (r, c)), shape=(classes, classes))
    _, component = connected_components(parents, directed=False)
    free = sparse.diags((~dependent).astype(np.int8), format="csr", dtype=np.int8)
    members = free
    while True:  # as many rounds as products are nested
        larger = ((parents @ members + free) > 0).astype(np.int8)
        if larger.nnz == members.nnz:
            return larger.astype(bool), component.astype(np.int64)
        members = larger
