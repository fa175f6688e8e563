"""What is to be removed in all, and which units that makes now: a share of the units, or a cost that is left.

`UnitGoal` knows from the beginning how many units go. With a `CostGoal` that depends on which ones: at each period the
scores are planned to the end, and of the plan's units as many go as the period's share of the cost needs.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from only_train_once.budgets import CostModel, shown
from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Tensors
from only_train_once.optim.arguments import Budget, Schedule
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.pools import Pools, View, aligned_units
from only_train_once.optim.scoring import split
from only_train_once.optim.selection import (
    all_allowed,
    ceilings,
    first_within,
    nearest_total,
    places,
    plan_costs,
    priorities,
    select,
    units_for,
)
from only_train_once.schedules import left_due, units_due

logger = logging.getLogger(__name__)

_Scores = Sequence[NDArray[np.float64]]
_Flags = NDArray[np.bool_]
_NEAR = 1e-2  # a cost farther from its target than this, relative to it, is told


class Goal(ABC):
    """Which units go.

    Attributes:
        total: units that go in all; at most, where that depends on the scores.
        shortfall: units asked for minus units that will be removed.
        most: units each group can lose.
        plans: whether how many units a group may lose has to be planned, because not every number will do.
        shaped: whether something else than the scores says how much each group gives.
        waits: whether only scores tell how many units of each group the lowest are.
    """

    total: int
    shortfall = 0
    waits: bool

    def __init__(self, candidates: Candidates, schedule: Schedule, budget: Budget, left: float) -> None:
        """``left``: the share of their units that groups are expected to keep."""
        self.groups, self.budget, self.divisible = candidates.groups, budget, schedule.group_divisible
        self.sizes = [g.size for g in self.groups]
        self.units = sum(self.sizes)
        multiples = [g.multiple for g in self.groups]
        least, most = _kept(self.groups, budget, schedule.group_divisible)
        divisible = [schedule.group_divisible] * len(self.groups)
        align = None if isinstance(budget.align, str) else budget.align
        self.pools = Pools(
            self.sizes,
            isomorphic(self.groups, candidates.tensors) if budget.uniform else None,
            {"divisible": divisible, "multiples": multiples, "min_units": least, "max_units": most},
            [aligned_units(g, candidates.tensors, align, left) for g in self.groups],
        )
        self.most = [(g.size - low) // g.multiple * g.multiple for g, low in zip(self.groups, least, strict=True)]
        self.classes = _classes(candidates, budget.ranking)
        any_number = max([schedule.group_divisible, *multiples]) == 1 and most is None
        self.shaped = self.classes is not None or budget.scarcity > 0 or self.pools.together
        self.plans = not any_number or self.shaped

    def keys(self, scores: _Scores, gone: _Flags) -> list[NDArray[np.float64]]:
        """Scores as keys by which units go, lowest first."""
        b = self.budget
        parts = split(gone, self.groups)
        return priorities(scores, parts, self.most, self.classes, b.scarcity, self.savings(gone), b.cost_exponent)

    def view(self, scores: _Scores, gone: _Flags) -> View:
        """The pools, with these scores as keys."""
        return self.pools.view(self.keys(scores, gone), split(gone, self.groups))

    def untouched(self) -> View:
        """The pools before anything is scored."""
        zeros = [np.zeros(n) for n in self.sizes]
        return self.pools.view(zeros, [z > 0 for z in zeros])

    def savings(self, gone: _Flags) -> NDArray[np.float64] | None:
        """What a unit of each group saves, if that is asked."""
        return None

    @abstractmethod
    def due(self, period: int, periods: int, gone: int) -> int | None:
        """How many units this period chooses; None where the scores decide."""

    @abstractmethod
    def choose(self, scores: _Scores, gone: _Flags, period: int = 0, periods: int = 1) -> NDArray[np.int64]:
        """The units that go now, as positions among the units of all groups."""

    @abstractmethod
    def ceilings(self, scores: _Scores, gone: _Flags) -> list[int]:
        """How many units each group may have lost while the goal stays in reach whatever the others do."""

    @abstractmethod
    def beyond(self, share: float) -> Goal:
        """This goal, and this share of the units more."""


class UnitGoal(Goal):
    """A share of the units."""

    def __init__(self, candidates: Candidates, schedule: Schedule, budget: Budget, share: float) -> None:
        super().__init__(candidates, schedule, budget, 1 - share)
        self._share = share
        requested = units_for(self.units, share)
        self.total = _nearest(self.untouched(), requested)
        self.shortfall = requested - self.total
        self.waits = self.shaped

    def warn(self) -> None:
        """Say so if the number of units cannot be reached."""
        if not self.shortfall:
            return
        requested = self.total + self.shortfall
        logger.warning(
            "%d of %d units were requested, %d will be removed: no combination over the %d groups (each keeps at "
            "least %s, and a multiple of group_divisible=%d once touched%s%s) removes exactly %d",
            requested,
            self.units,
            self.total,
            len(self.sizes),
            "one unit" if self.budget.min_units == 1 else "min_units",
            self.divisible,
            "; some lose units only in multiples, see PruningGroup.multiple"
            if any(g.multiple > 1 for g in self.groups)
            else "",
            "; uniform=True: the same layers of repeated blocks all lose the same" if self.pools.together else "",
            requested,
        )

    def due(self, period: int, periods: int, gone: int) -> int | None:
        return units_due(period, periods, self.total, self.units, self.budget.ramp) - gone

    def choose(self, scores: _Scores, gone: _Flags, period: int = 0, periods: int = 1) -> NDArray[np.int64]:
        count = self.due(period, periods, int(gone.sum()))
        assert count is not None
        view = self.view(scores, gone)
        aligned = (r for r in self.pools.preferred(view.rules) if _nearest(view, self.total, r) == self.total)
        rules = next(aligned, view.rules)
        picked = select(view.keys, view.gone, count, self.total, **rules)
        starts = np.cumsum([0, *view.sizes])
        return np.sort(view.order[np.concatenate([at + units for at, units in zip(starts, picked, strict=False)])])

    def ceilings(self, scores: _Scores, gone: _Flags) -> list[int]:
        view = self.view(scores, gone)
        if not self.shaped:
            return self.pools.per_group(ceilings(view.keys, view.gone, self.total, **view.rules))
        left = self.total - int(gone.sum())
        picked = select(view.keys, view.gone, left, self.total, **view.rules)
        return self.pools.per_group([lost + len(units) for lost, units in zip(view.lost, picked, strict=True)])

    def beyond(self, share: float) -> Goal:
        more = copy.copy(self)
        wanted = max(self.total, units_for(self.units, self._share + share))
        more.total = max(self.total, _nearest(self.untouched(), wanted))
        return more


class CostGoal(Goal):
    """A cost that is left."""

    def __init__(self, candidates: Candidates, schedule: Schedule, budget: Budget) -> None:
        assert budget.measure is not None
        self.measure = budget.measure
        workload = None if candidates.analysis is None else candidates.analysis.workload
        self.model = CostModel(candidates.groups, candidates.named_tensors, workload, budget.latency_table)
        self.full = self._cost(np.zeros(sum(g.size for g in candidates.groups), dtype=bool))
        self.target = budget.level(self.full)
        # Products of widths shrink with the square of them.
        left = (self.target / self.full) ** (0.5 if self.measure in ("params", "flops") else 1.0)
        super().__init__(candidates, schedule, budget, left)
        self.final, self.extra = True, 0
        view = self.untouched()
        allowed = all_allowed(view.sizes, view.lost, **view.rules)
        smallest = self._cost(_planned(view, [max(a.counts) for a in allowed]))
        if smallest > self.target * (1 + _NEAR):
            raise ConfigurationError(
                f"{self._asked()} of {shown(self.measure, self.full)}; the smallest that can be reached is "
                f"{shown(self.measure, smallest)}, {_rounded_up(smallest / self.full)} of it: give at least that, let "
                f"groups keep fewer units, or free more of them, see oto.explain()"
            )
        most = view.rules["max_units"] or view.sizes
        must = max((size - m for size, m in zip(view.sizes, most, strict=True)), default=0)
        self.total = sum(self.most) if self.full > self.target or must > 0 else 0
        self.plans = self.waits = True

    def _asked(self) -> str:
        return f"target_{self.measure} is {self.budget.target!r}, that is {shown(self.measure, self.target)}"

    def _cost(self, gone: _Flags) -> float:
        return self.model.cost(self.measure, gone)

    def savings(self, gone: _Flags) -> NDArray[np.float64] | None:
        return self.model.savings(self.measure, gone) if self.budget.cost_exponent else None

    def due(self, period: int, periods: int, gone: int) -> int | None:
        return None

    def _plan(self, view: View, prefer: bool) -> list[int]:
        """How many units every pool will have lost; of widths that are preferred, if the target allows it."""
        counts: list[int] = []
        for rules in (*(self.pools.preferred(view.rules) if prefer else ()), view.rules):
            # Where groups are to lose the same share, they differ from it by as few units as bring the target near.
            for slack in (None,) if self.classes is None else (1, 2, 3):
                counts = plan_costs(
                    view.keys, view.gone, lambda flags: self._cost(view.flags(flags)), self.target, **rules, slack=slack
                )
                if (1 - _NEAR) * self.target <= self._cost(_planned(view, counts)) <= self.target:
                    return counts
        return counts

    def choose(self, scores: _Scores, gone: _Flags, period: int = 0, periods: int = 1) -> NDArray[np.int64]:
        view = self.view(scores, gone)
        planned = _planned(view, self._plan(view, prefer=True))[view.order] & ~gone[view.order]
        # In the order of the pools, so that of equal keys the first rung goes first.
        units = view.order[planned]
        order = units[np.argsort(np.concatenate(view.keys)[planned], kind="stable")]
        if period + 1 < periods:
            level = left_due(period, periods, self.full, self.target, self.budget.ramp)
            return np.sort(order[: first_within(lambda n: self._cost(_with(gone, order[:n])), level, len(order))])
        chosen = _with(gone, order)
        if self.final:
            self._tell(self._cost(chosen))
            return np.sort(order)
        keys = self.keys(scores, gone)
        flat, place = np.concatenate(keys), places(keys, split(gone, self.groups))
        others = np.flatnonzero((place < np.repeat(self.most, self.sizes)) & ~chosen)
        return np.sort(np.concatenate([order, others[np.argsort(flat[others], kind="stable")][: self.extra]]))

    def _tell(self, reached: float) -> None:
        """Say so if the target is missed."""
        if abs(reached - self.target) > _NEAR * self.target or reached > self.target:
            logger.warning(
                "%s; with the units chosen %s are left (%+.1f %%): groups keep min_units and at most max_units, and "
                "lose units in whole multiples where group_divisible or PruningGroup.multiple say so",
                self._asked(),
                shown(self.measure, reached),
                100 * (reached / self.target - 1),
            )
        else:
            logger.info("%s; %s will be left", self._asked(), shown(self.measure, reached))

    def ceilings(self, scores: _Scores, gone: _Flags) -> list[int]:
        return self.pools.per_group(self._plan(self.view(scores, gone), prefer=False))

    def beyond(self, share: float) -> Goal:
        more = copy.copy(self)
        more.final, more.extra = False, units_for(self.units, share)
        return more


def make_goal(candidates: Candidates, schedule: Schedule, budget: Budget) -> Goal:
    """The goal that the arguments ask for."""
    if budget.measure is None:
        assert schedule.target_group_sparsity is not None
        goal = UnitGoal(candidates, schedule, budget, schedule.target_group_sparsity)
        goal.warn()
        return goal
    return CostGoal(candidates, schedule, budget)


def _nearest(view: View, total: int, rules: Mapping[str, Any] | None = None) -> int:
    return nearest_total(view.sizes, view.lost, total, **(view.rules if rules is None else rules))


def _planned(view: View, counts: Sequence[int]) -> _Flags:
    """One flag per unit of all groups: it will be gone when the pools have lost so many."""
    return view.flags(places(view.keys, view.gone) < np.repeat(counts, view.sizes))


def _with(gone: _Flags, units: NDArray[np.int64]) -> _Flags:
    out = gone.copy()
    out[units] = True
    return out


def _rounded_up(share: float) -> float:
    """To four digits, so that it can be given as a target."""
    return math.ceil(share * 1e4) / 1e4


# ---------------------------------------------------------------- minimum and maximum


def _kept(groups: Sequence[PruningGroup], budget: Budget, divisible: int) -> tuple[list[int], list[int] | None]:
    """Units every group keeps at least, and at most (None where any number may stay)."""
    numbers = _numbers(groups, "min_units", budget.min_units)
    least = [min(max(1, n), g.size) for g, n in zip(groups, numbers, strict=True)]
    if budget.max_units is None:
        return least, None
    most = [n or g.size for g, n in zip(groups, _numbers(groups, "max_units", budget.max_units), strict=True)]
    for group, low, high in zip(groups, least, most, strict=True):
        (allowed,) = all_allowed([group.size], [0], divisible, low, [group.multiple], [high])
        if high < low or (high < group.size and group.size - max(allowed.counts) > high):
            raise ConfigurationError(
                f"max_units leaves at most {high} of the {group.size} units of group {group.name!r}, where at least "
                f"{low} stay, and they leave in multiples of {group.multiple} with group_divisible={divisible}: no "
                f"number does it all; raise max_units or lower min_units for it"
            )
    return least, most


def _numbers(groups: Sequence[PruningGroup], name: str, value: Any) -> list[int]:
    """The number for each group; 0 for those that a dictionary does not name."""
    if not isinstance(value, dict):
        return [_count(value, g.size) for g in groups]
    found = [0] * len(groups)
    for key, each in value.items():
        hits = [i for i, g in enumerate(groups) if _names(key, g)]
        if not hits:
            raise ConfigurationError(
                f"{name} names {key!r}, which is no group that can be pruned, and no module or parameter of one; the "
                f"groups are {[g.name for g in groups][:8]}"
            )
        for i in hits:  # of several, the one that keeps the rule of all
            number = _count(each, groups[i].size)
            stricter = max if name == "min_units" else min
            found[i] = stricter(found[i], number) if found[i] else number
    return found


def _count(value: float, size: int) -> int:
    return value if isinstance(value, int) else max(math.ceil(value * size - 1e-9), 1)


def _names(key: str, group: PruningGroup) -> bool:
    """Whether a key means a group: its name, or a parameter that makes it, or a module above one."""
    made = [s.param for s in group.with_role(Role.ZERO)]
    below = any(name == key or name.startswith(f"{key}.") for name in made)
    return below or any(fnmatch.fnmatchcase(name, key) for name in (group.name, *made))


# ---------------------------------------------------------------- repeated blocks


def _classes(candidates: Candidates, ranking: str) -> list[int] | None:
    """Per group the number of those it competes with; None for all."""
    if ranking == "global":
        return None
    groups = candidates.groups
    return list(range(len(groups))) if ranking == "per_layer" else isomorphic(groups, candidates.tensors)


def isomorphic(groups: Sequence[PruningGroup], tensors: Tensors) -> list[int]:
    """Per group a number, the same for groups that are one layer of a repeated block.

    They have as many units, of the same kind, and the same slices of tensors of the same shapes, once the numbers in
    module paths are left out: ``layers.0.fc1`` and ``layers.7.fc1``.
    """
    seen: dict[Any, int] = {}
    return [seen.setdefault(_structure(group, tensors), len(seen)) for group in groups]


def _structure(group: PruningGroup, tensors: Tensors) -> Any:
    slices = sorted(
        (_without_numbers(s.param), s.dim, s.role.value, s.length, s.index.shape[1], tuple(tensors[s.param].shape))
        if s.role.is_tensor
        else (_without_numbers(s.param), s.dim, s.role.value, s.length, s.index.shape[1], ())
        for s in group.slices
    )
    return group.kind, group.size, group.multiple, tuple(slices)


def _without_numbers(path: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", path)
