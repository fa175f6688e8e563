"""What a network costs without some units: parameters and FLOPs exactly, memory as defined here, latency by a table.

`CostModel` answers for any choice of units without building anything: sizes of parameters are what no group cuts,
sizes of activations what the labels say (`workload.py`), and a cost is a sum of products of sizes. So what is said
about parameters and FLOPs is what ``count_parameters`` and ``count_flops`` say of the subnet, to the last digit.

[Note: memory]
Bytes of an inference pass on the example inputs: of all parameters and buffers, and of the activations at the call
that needs most of them at a time, if each is freed after the call that reads it last. Views take nothing, inputs and
outputs stay until the end. What an operator allocates inside, and what Python holds on to longer, is not counted. The
operators are those that ran when the model was traced: on another device attention may be made of other ones.

[Note: latency]
A `LatencyTable` has, for every counted operator, seconds at a grid of sizes of its dims, and interpolates linearly in
each. It is measured here, or brought along from another device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import ConfigurationError
from .groups import GroupList, PruningGroup
from .latency import LatencyTable
from .masking import Tensors
from .workload import Extent, Term, Workload

MEASURES = ("params", "flops", "memory", "latency")
_UNITS = {"params": "parameters", "flops": "FLOPs", "memory": "bytes", "latency": "s"}

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Costs:
    """What a network costs; None where the groups or the table to tell it are not there.

    Attributes:
        params: parameters, a tied one counted once.
        flops: of one forward pass on the example inputs, two per multiply-accumulate.
        memory: bytes of that pass, see [Note: memory].
        latency: seconds of that pass, by the table.
    """

    params: int
    flops: int | None = None
    memory: int | None = None
    latency: float | None = None

    def __str__(self) -> str:
        known = [f"{shown(m, getattr(self, m))}" for m in MEASURES if getattr(self, m) is not None]
        return ", ".join(known)


def shown(measure: str, value: float) -> str:
    """``"1,234 parameters"``; seconds with four digits."""
    return f"{value:.4g} {_UNITS[measure]}" if measure == "latency" else f"{round(value):,} {_UNITS[measure]}"


class CostModel:
    """Costs of a network as a function of the units that are removed.

    Example::

        model = CostModel(find_groups(graph), dict(net.named_parameters()))
        model.costs()                      # of the full network
        model.costs({"conv1": [0, 3]})     # without two units of a group

    Args:
        groups: whose units can be removed; those of `find_groups` know the operators of the graph.
        named_tensors: name -> parameter or buffer of the whole model; an unnamed one is not counted.
        workload: what a forward pass takes; that of ``groups`` unless told.
        latency: seconds of every operator.
    """

    def __init__(
        self,
        groups: Iterable[PruningGroup],
        named_tensors: Tensors,
        workload: Workload | None = None,
        latency: LatencyTable | None = None,
    ) -> None:
        if workload is None and isinstance(groups, GroupList):
            workload = groups.workload
        self.groups = tuple(groups)
        self.workload, self.latency = workload, latency
        self.units = sum(g.size for g in self.groups)
        self._starts = np.cumsum([0, *(g.size for g in self.groups)])
        self._sizes = _Sizes(self.groups, self._starts, workload.extents if workload is not None else ())
        self._params, self._weight_bytes = self._of_tensors(named_tensors)
        if workload is not None:
            self._flops = self._sizes.products([t for o in workload.operators for t in o.terms])
            self._activations = self._sizes.products([s.bytes for s in workload.storages])
            self._first = np.array([s.first for s in workload.storages], dtype=np.int64)
            self._after = np.array([s.last + 1 for s in workload.storages], dtype=np.int64)
        if latency is not None:
            self._seconds = latency.bound(self._need_workload("latency"))

    def _need_workload(self, measure: str) -> Workload:
        if self.workload is None:
            raise ConfigurationError(
                f"the {measure} of a subnet cannot be told from these groups alone: give the GroupList that "
                f"find_groups(graph) returns, or use target_params or target_group_sparsity"
            )
        return self.workload

    def _of_tensors(self, named_tensors: Tensors) -> tuple[_Products, _Products]:
        """Entries of every parameter, and bytes of every parameter and buffer."""
        cut: dict[tuple[str, int], dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}
        for group in self.groups:
            for s in group.slices:
                if s.role.is_tensor and s.param in named_tensors:
                    dim = s.dim % named_tensors[s.param].dim()
                    units = np.repeat(np.arange(group.size), s.index.shape[1])
                    found = cut.setdefault((s.param, dim), {})
                    pair = (units, s.index.ravel())
                    if group.name in found:  # two slices of one group in one dim
                        pair = tuple(np.concatenate(both) for both in zip(found[group.name], pair, strict=True))  # type: ignore[assignment]
                    found[group.name] = pair
        entries, sizes = [], []
        for name, tensor in _once(named_tensors).items():
            factor, extents = 1, []
            for dim, length in enumerate(tensor.shape):
                if (name, dim) in cut:
                    extents.append(self._sizes.add(Extent(length, cut[name, dim])))
                else:
                    factor *= length
            if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                entries.append(Term(factor, tuple(extents)))
            sizes.append(Term(factor * tensor.element_size(), tuple(extents)))
        self._sizes.close()
        return self._sizes.products(entries), self._sizes.products(sizes)

    # -- asking ----------------------------------------------------------------------------------------------------

    def costs(self, removed: Mapping[str, Sequence[int] | NDArray[np.int64]] | None = None) -> Costs:
        """All that is known of the network without these units (group name -> units)."""
        gone = self.flags(removed or {})
        flops = memory = seconds = None
        if self.workload is not None:
            flops, memory = int(self.cost("flops", gone)), int(self.cost("memory", gone))
        if self.latency is not None:
            seconds = float(self.cost("latency", gone))
        return Costs(int(self.cost("params", gone)), flops, memory, seconds)

    def flags(self, removed: Mapping[str, Sequence[int] | NDArray[np.int64]]) -> Flags:
        """One flag per unit of all groups in order.  (units,)"""
        gone = np.zeros(self.units, dtype=bool)
        for group, start in zip(self.groups, self._starts, strict=False):
            units = np.asarray(removed.get(group.name, []), dtype=np.int64)
            if len(units) and not 0 <= units.min() <= units.max() < group.size:
                raise ConfigurationError(
                    f"the group {group.name!r} has the units 0 to {group.size - 1}; {units.tolist()[:5]} are named"
                )
            gone[start + units] = True
        return gone

    def cost(self, measure: str, gone: Flags) -> float:
        """One measure of the network without the flagged units.

        Raises:
            ConfigurationError: it cannot be told from these groups, or without a table.
        """
        left = self._sizes.left(gone)
        if measure == "params":
            return int(self._params.sum(left))
        self._need_workload(measure)
        if measure == "flops":
            return int(self._flops.sum(left))
        if measure == "memory":
            return int(self._weight_bytes.sum(left)) + self._peak(left)
        if self.latency is None:
            raise ConfigurationError("the latency is unknown without a table: give latency_table=oto.measure_latency()")
        assert self.workload is not None
        return self._seconds(left[: len(self.workload.extents)])

    def _peak(self, left: NDArray[np.int64]) -> int:
        """Bytes of activations at the call that needs most."""
        assert self.workload is not None
        change = np.zeros(self.workload.calls + 1, dtype=np.int64)
        held = self._activations.values(left)
        np.add.at(change, self._first, held)
        np.subtract.at(change, self._after, held)
        return int(change.cumsum().max())

    def savings(self, measure: str, gone: Flags) -> NDArray[np.float64]:
        """What one more unit of each group saves; where it leaves in multiples, the share of one.  (groups,)"""
        before = self.cost(measure, gone)
        saved = np.zeros(len(self.groups))
        for number, group in enumerate(self.groups):
            start = self._starts[number]
            live = np.flatnonzero(~gone[start : start + group.size])[: group.multiple]
            if len(live):
                fewer = gone.copy()
                fewer[start + live] = True
                saved[number] = (before - self.cost(measure, fewer)) / len(live)
        return saved


def _once(named_tensors: Tensors) -> dict[str, Tensor]:
    """Every tensor under its first name."""
    firsts: dict[int, str] = {}
    return {name: t for name, t in named_tensors.items() if firsts.setdefault(id(t), name) == name}


class _Sizes:
    """What is left of many extents at once."""

    def __init__(self, groups: Sequence[PruningGroup], starts: NDArray[np.int64], extents: Iterable[Extent]) -> None:
        self._first = {g.name: int(start) for g, start in zip(groups, starts, strict=False)}
        self._lengths: list[int] = []
        self._units: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._known: dict[tuple[bytes, ...], int] = {}
        self._total = 0
        for extent in extents:  # these keep their numbers
            self.add(extent, share=False)

    def add(self, extent: Extent, *, share: bool = True) -> int:
        """The number of an extent; that of an equal one, where numbers may be shared."""
        units, rows = [], []
        for name, (unit, index) in extent.units.items():
            if name in self._first:
                units.append(self._first[name] + unit)
                rows.append(index)
        unit = np.concatenate(units) if units else np.empty(0, dtype=np.int64)
        row = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        order = np.lexsort((unit, row))
        unit, row = unit[order], row[order]
        key = (str(extent.length).encode(), unit.tobytes(), row.tobytes())
        if share and key in self._known:
            return self._known[key]
        self._known.setdefault(key, len(self._lengths))
        self._lengths.append(extent.length)
        self._units.append(unit)
        self._rows.append(row + self._total)
        self._total += extent.length
        return len(self._lengths) - 1

    def close(self) -> None:
        """No more extents; what is left of them can be asked."""
        self.lengths = np.array(self._lengths, dtype=np.int64)
        none = [np.empty(0, dtype=np.int64)]
        self._unit, self._row = np.concatenate(self._units or none), np.concatenate(self._rows or none)
        self._extent_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        self._lengths, self._units, self._rows, self._known = [], [], [], {}

    def left(self, gone: Flags) -> NDArray[np.int64]:
        """How long every extent is; surgery leaves something of each.  (extents,)"""
        lost = np.zeros(self._total, dtype=bool)
        lost[self._row[gone[self._unit]]] = True
        counts = np.bincount(self._extent_of[lost], minlength=len(self.lengths))
        return np.maximum(self.lengths - counts, np.minimum(self.lengths, 1))

    def products(self, terms: Sequence[Term]) -> _Products:
        return _Products(terms)


class _Products:
    """Many terms at once."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._factors = np.array([t.factor for t in terms], dtype=np.int64)
        widest = max((len(t.extents) for t in terms), default=0)
        # -1 is the 1 that `values` puts behind the sizes
        self._extents = np.full((len(terms), widest), -1, dtype=np.int64)
        for row, term in enumerate(terms):
            self._extents[row, : len(term.extents)] = term.extents

    def values(self, left: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._factors * np.append(left, 1)[self._extents].prod(axis=1)

    def sum(self, left: NDArray[np.int64]) -> int:
        return int(self.values(left).sum())
