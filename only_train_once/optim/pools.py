"""Pools: the groups as `selection` sees them, and what each may have lost in the end.

[Note: uniform]
Groups that are to end with the same width are one pool. Its units come in rungs: the lowest live unit of every member,
then the second lowest of every member, and so on, each rung with the mean of its units' keys. What a pool loses is a
multiple of the number of its members, so its members lose the same; which units these are, each member's scores say.
In the midst of a rung some members are one unit ahead. A member that is farther ahead (its units went to zero by
themselves) is met by the others: the pool has to lose that many rungs at least.

[Note: alignment]
Kernels are fast for widths that are multiples of a number, `preferred_width`. Pools prefer to end with such a width;
where the target cannot be met so, the largest pools are let off, as few as do. The narrower a layer is to be, the
more a step of so many units takes from it or leaves too much of it, and a wrong width costs accuracy
(``benchmarks/results/quality_ablation.md``): so the multiple is small against what a group is expected to end with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Tensors
from only_train_once.optim.selection import places

_Flags = NDArray[np.bool_]
_STEPS, _STEPS_LEFT = 8, 4  # a group has room for so many widths in all, and up to the width that it may end with
_SHORTEST = 8  # kernels that like more than this do not gain from multiples of less


@dataclass(frozen=True)
class View:
    """Keys and flags of the units, pool by pool.

    Attributes:
        keys, gone: per pool (units,).
        order: (units,) position among the units of all groups, of the pools' units in order.
        rules: what `selection` is asked to keep.
    """

    keys: list[NDArray[np.float64]]
    gone: list[_Flags]
    order: NDArray[np.int64]
    rules: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        """Units of every pool."""
        return [len(g) for g in self.gone]

    @property
    def lost(self) -> list[int]:
        """Units every pool has lost."""
        return [int(g.sum()) for g in self.gone]

    def flags(self, of_pools: _Flags) -> _Flags:
        """One flag per unit of all groups, from one per unit of all pools."""
        out = np.zeros_like(of_pools)
        out[self.order] = of_pools
        return out


class Pools:
    """The groups, those of one class together.

    Args:
        sizes: units of every group.
        classes: per group the number of its pool; None: each is one.
        rules: per group ``divisible``, ``multiples``, ``min_units`` and ``max_units`` (or None), as `selection` has
            them.
        widths: per group the multiple its width would best be, see [Note: alignment].
    """

    def __init__(
        self,
        sizes: Sequence[int],
        classes: Sequence[int] | None,
        rules: dict[str, Any],
        widths: Sequence[int],
    ) -> None:
        together: dict[int, list[int]] = {}
        for i, number in enumerate(range(len(sizes)) if classes is None else classes):
            together.setdefault(number, []).append(i)
        self.sizes = list(sizes)
        self.members = list(together.values())
        self.pool_of = dict(sorted((i, p) for p, members in enumerate(self.members) for i in members))
        self.starts = np.cumsum([0, *sizes])
        self.together = len(self.members) < len(sizes)

        def every(name: str, choose: Any) -> list[int]:
            return [len(m) * choose(rules[name][i] for i in m) for m in self.members]

        # Members have the same structure, so only what a user says about one of them can differ: the stricter holds.
        self.rules: dict[str, Any] = {
            "divisible": [len(m) * math.lcm(*(rules["divisible"][i] for i in m)) for m in self.members],
            "multiples": [len(m) * math.lcm(*(rules["multiples"][i] for i in m)) for m in self.members],
            "min_units": every("min_units", max),
            "max_units": None if rules["max_units"] is None else every("max_units", min),
        }
        self.widths = [len(m) * math.lcm(*(widths[i] for i in m)) for m in self.members]

    def view(self, keys: Sequence[NDArray[np.float64]], gone: Sequence[_Flags]) -> View:
        """The pools with these keys; ``gone`` as in `selection`, both per group."""
        if not self.together:
            order = np.arange(self.starts[-1], dtype=np.int64)
            return View(list(keys), list(gone), order, dict(self.rules))
        pools: list[tuple[NDArray[np.float64], _Flags, NDArray[np.int64]]] = []
        at_least = []
        for members in self.members:
            # (members, rungs): the unit of each member that goes on each rung; those that are gone, before them.
            units = np.stack([_in_order(keys[i], gone[i]) for i in members])
            left = np.stack([~gone[i][u] for i, u in zip(members, units, strict=True)])
            ahead = int((~left).sum(axis=1).max())  # rungs that some member has behind it
            values = np.stack([keys[i][u[ahead:]] for i, u in zip(members, units, strict=True)])
            mean = np.maximum.accumulate(values.mean(axis=0))  # rounding must not turn the order
            rung = np.concatenate([np.full(ahead, mean[0] if len(mean) else 0.0), mean])
            flat = units + self.starts[members][:, None]
            pools.append((np.repeat(rung, len(members)), ~left.T.ravel(), flat.T.ravel()))
            at_least.append(ahead * len(members))
        rules = dict(self.rules)
        sizes = [len(p[0]) for p in pools]
        most = rules["max_units"] or sizes
        rules["max_units"] = [min(m, n - a) for m, n, a in zip(most, sizes, at_least, strict=True)]
        return View([p[0] for p in pools], [p[1] for p in pools], np.concatenate([p[2] for p in pools]), rules)

    def preferred(self, rules: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rules with widths aligned, then with the largest 1, 2, 4, ... pools let off, as long as one is not."""
        wide = [p for p, w in enumerate(self.widths) if w > len(self.members[p])]
        wide.sort(key=lambda p: -self.sizes[self.members[p][0]])
        free = 0
        while free < len(wide):
            divisible = list(rules["divisible"])
            for p in wide[free:]:
                divisible[p] = math.lcm(divisible[p], self.widths[p])
            yield {**rules, "divisible": divisible}
            free = max(1, 2 * free)

    def per_group(self, counts: Sequence[int]) -> list[int]:
        """Units each group has lost, from those the pools have."""
        return [counts[p] // len(self.members[p]) for p in self.pool_of.values()]


def _in_order(key: NDArray[np.float64], gone: _Flags) -> NDArray[np.int64]:
    """Units that are gone, then the others, lowest first."""
    place = places([key], [gone])
    return np.concatenate([np.flatnonzero(gone), np.argsort(place, kind="stable")[int(gone.sum()) :]]).astype(np.int64)


# ---------------------------------------------------------------- alignment

# Bytes of a row that kernels like best, by device: a cache line of a GPU, which its matrix units read whole; the
# vector registers of a CPU, which its convolutions and matrix products block channels by.
_BYTES = {"cuda": 128, "xpu": 64, "mps": 32}
_CPU_BYTES = {"AVX512": 64, "AVX2": 32}


def preferred_width(device: torch.device, dtype: torch.dtype) -> int:
    """The multiple that the width of a layer would best be: 8 to 16 on CPUs, 32 (float32) to 64 (halves) on GPUs."""
    if device.type == "cpu":
        row = _CPU_BYTES.get(torch.backends.cpu.get_cpu_capability(), 32)
    else:
        row = _BYTES.get(device.type, 32)
    return max(1, row // dtype.itemsize)


def aligned_units(group: PruningGroup, tensors: Tensors, align: int | None, left: float = 1.0) -> int:
    """The multiple of units that makes the widths of a group multiples of ``align`` (None: what its device likes).

    Only dims that belong to the group whole can be aligned by it. A group of few units prefers a smaller power of two,
    so that it can still have eight widths, four of them within the share ``left`` that groups are expected to keep.
    Where that leaves a multiple that no kernel likes, any width will do.
    """
    units, positions, shortest = 1, group.size, _SHORTEST
    for s in group.with_role(Role.ZERO, Role.CONSUMER):
        per_unit = s.index.shape[1]
        if group.size * per_unit == s.length:
            tensor = tensors[s.param]
            wanted = preferred_width(tensor.device, tensor.dtype) if align is None else align
            units = math.lcm(units, wanted // math.gcd(wanted, per_unit))
            positions = min(positions, per_unit)
            shortest = min(shortest, wanted)
    if align is not None:
        return units
    while units > 1 and units > min(group.size / _STEPS, group.size * left / _STEPS_LEFT):
        units = units // 2 if units % 2 == 0 else 1
    return units if units * positions >= shortest else 1
