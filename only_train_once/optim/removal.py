"""What all methods share: exactly K units, chosen in periods, taken to zero along a ramp, committed, held there.

1.  At a period's first step, before any weight changes, its share of the K units is chosen by score, lowest first.
    With a target in a cost, K is what the cost needs (``goals``).
2.  At step t = 0 .. T-1 of the period: the base optimizer's step, then the chosen units' ``zero`` entries times
    ``(T - t - 1) / (T - t)``: the product telescopes to a linear ramp, exactly 0 after the last step.
3.  After the last step the units are committed: their ``zero`` entries, the ``consumer`` entries that read them and
    now multiply zeros, and those of the optimizer's state are set to 0. From then on their gradients vanish and
    nothing is touched any more, except slices that are ``pinned``, which are set back to 0 after every step. If that
    is wanted, the weights that read them grow (``fan_in``).

``follow`` entries are never changed. HESSO is these three with its scores. The half-space methods drive units to zero
by themselves and use one period at the very end, for the units that they missed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from only_train_once.errors import CheckpointError
from only_train_once.groups import ParamSlice, PruningGroup, Role
from only_train_once.masking import Region, regions
from only_train_once.optim.arguments import Budget, Schedule, flag, one_of
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.cutting import Kept
from only_train_once.optim.fan_in import enlarge_, growth
from only_train_once.optim.goals import make_goal
from only_train_once.optim.method import Companions, Method
from only_train_once.optim.ramp import Ramp
from only_train_once.optim.scoring import Scoring, split, units_by_group
from only_train_once.optim.state import damaged, saved_count, saved_per_unit
from only_train_once.optim.zeros import mixes_entries, slow_weights, zero_entries_
from only_train_once.schedules import decay_factor, period_start, position

logger = logging.getLogger(__name__)

_OWNED = (Role.ZERO, Role.CONSUMER)  # what goes to zero with a unit
_PINS = ("auto", "always")


class Removal(Method):
    """The steps at the top of this file; see `Hesso` for the arguments users know.

    Args:
        candidates: what may be pruned.
        schedule: the user's schedule; saved, and compared when a state is loaded.
        budget: what is left in the end; as well.
        scoring: what the units are scored by.
        when: start, steps and periods of the ramps; None for the user's schedule.
        rescale: see `Hesso`.
    """

    def __init__(
        self,
        candidates: Candidates,
        schedule: Schedule,
        budget: Budget,
        scoring: Scoring,
        *,
        fixed_zero_groups: bool,
        pin: str,
        when: Mapping[str, int] | None = None,
        rescale: bool = False,
    ) -> None:
        super().__init__(candidates)
        one_of("pin", pin, _PINS)
        flag("fixed_zero_groups", fixed_zero_groups)
        flag("rescale", rescale)
        self.schedule, self.budget, self.scoring = schedule, budget, scoring
        self.when = dict(schedule.when if when is None else when)
        self.pin, self.fixed_zero_groups, self.rescale = pin, fixed_zero_groups, bool(rescale)

        self.units = sum(g.size for g in self.groups)
        self.goal = make_goal(candidates, schedule, budget)
        self.total, self.shortfall = self.goal.total, self.goal.shortfall
        # 0: live; p + 1: chosen in period p.  (units of all groups in order,)
        self.chosen: NDArray[np.int32] = np.zeros(self.units, dtype=np.int32)
        self._ramp: Ramp | None = None  # scaled in the period under way; None: not computed
        self._pinned: tuple[Region, ...] | None = None  # of committed units; None: not computed

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """First step after pruning."""
        return self.schedule.start_pruning_step + self.schedule.pruning_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.end or self.total == 0

    @property
    def period(self) -> int:
        when = self.schedule.when
        return sum(period_start(p, **when) < self.step for p in range(when["periods"]))

    @property
    def redundant(self) -> dict[str, list[int]]:
        return self._listed(self.chosen > 0)

    @property
    def removed(self) -> dict[str, list[int]]:
        return self._listed(self._committed(self.step))

    @property
    def settled(self) -> NDArray[np.bool_]:
        return self._committed(self.step)

    @property
    def just_settled(self) -> bool:
        periods = range(self.when["periods"])
        return self.total > 0 and any(period_start(p + 1, **self.when) == self.step for p in periods)

    def leave(self, groups: Sequence[PruningGroup], present: NDArray[np.bool_], kept: Kept) -> None:
        super().leave(groups, present, kept)
        self.scoring.leave(groups, present, kept)
        self._ramp, self._pinned = None, None

    def _listed(self, flags: NDArray[np.bool_]) -> dict[str, list[int]]:
        return {name: units.tolist() for name, units in units_by_group(flags, self.groups).items()}

    def _begun(self, steps: int) -> int:
        """Ramps begun once ``steps`` steps were taken, that of the step to come included."""
        return sum(period_start(p, **self.when) <= steps for p in range(self.when["periods"]))

    def _committed(self, steps: int) -> NDArray[np.bool_]:
        """One flag per unit: its ramp is over once ``steps`` steps were taken.  (units,)"""
        done = sum(period_start(p + 1, **self.when) <= steps for p in range(self.when["periods"]))
        return (self.chosen > 0) & (self.chosen <= done)

    # -- a step ----------------------------------------------------------------------------------------------------

    def before(self, optimizer: Optimizer) -> None:
        """Collect gradients inside a window; choose units at a period's first step."""
        if self.finished:
            return
        scoring = self.next_scoring()
        if scoring is None:
            return
        if self.step == scoring:
            self.choose(optimizer)
        else:
            self.collect(optimizer, scoring)

    def ready(self) -> None:
        self.scoring.watch(self.step, None if self.finished else self.next_scoring())

    def next_scoring(self) -> int | None:
        """The first step >= this one at which scores are needed, or None."""
        return next_period(self.step, self.when)

    def collect(self, optimizer: Optimizer, scoring: int) -> None:
        """Take note of the gradients of a step before the next scoring."""
        self.scoring.collect(optimizer, self.step, scoring)

    def choose(self, optimizer: Optimizer) -> None:
        """Choose this period's units."""
        where = position(self.step, **self.when)
        assert where is not None
        self._ramp = None  # `after` finds the period's units; also when they were chosen before an interrupted step
        gone = self.chosen > 0
        if self.goal.due(where.period, self.when["periods"], int(gone.sum())) == 0:
            self.scoring.reset()
            return
        picked = self.goal.choose(self.scores(optimizer), gone, where.period, self.when["periods"])
        self.chosen[picked] = where.period + 1
        logger.info("step %d: period %d chooses %d units", self.step, where.period, len(picked))
        warn_of_bottlenecks(self.groups, gone, self.chosen > 0)

    def scores(self, optimizer: Optimizer) -> list[NDArray[np.float64]]:
        """Scores of the units, per group."""
        gone = self._regions(self._committed(self.step))
        return self.scoring.scores(optimizer, self.step, self.chosen > 0, gone)

    def after(self, optimizer: Optimizer) -> None:
        """Scale the chosen units, commit them at the period's end, hold pinned slices at zero."""
        if self.total == 0 or self.step < self.when["start"]:
            return
        where = position(self.step, **self.when)
        if where is not None:
            period = where.period + 1
            if where.t < where.length - 1:
                if self._ramp is None:
                    active = self.chosen == period
                    self._ramp = Ramp(self._regions(active, lambda group, s: s.role is Role.ZERO), self.tensors)
                factor = decay_factor(where.t, where.length)
                self._ramp.scale_(factor)
                for region in self._ramp.regions:
                    for values in slow_weights(optimizer, self.tensors[region.name]):
                        region.scale_(values, factor)
            else:
                zero_entries_(self._regions(self.chosen == period), self.tensors, optimizer.state)
                if self.rescale:
                    self._enlarge(optimizer)
                self._ramp, self._pinned = None, None
        if self._pinned is None:
            self._pinned = self._pins(optimizer)
        zero_entries_(self._pinned, self.tensors, optimizer.state)

    def _enlarge(self, optimizer: Optimizer) -> None:
        """Let what reads the units that this step committed grow, now that these are gone; see ``fan_in``."""
        flags = self._committed(self.step), self._committed(self.step + 1)
        before, after = (units_by_group(f[self.present], self.current) for f in flags)
        factors = growth(self.current, before, after, self.tensors)
        enlarge_({n: f for n, f in factors.items() if n in self.trained}, self.tensors, optimizer)

    def _regions(self, flags: NDArray[np.bool_], only: Any = lambda group, s: True) -> tuple[Region, ...]:
        return regions(
            self.current,
            units_by_group(flags[self.present], self.current),
            self.tensors,
            _OWNED,
            lambda group, s: s.param in self.trained and only(group, s),
        )

    def _pins(self, optimizer: Optimizer) -> tuple[Region, ...]:
        """Entries to hold at zero, of the units that are committed when this step is over."""
        if not self.fixed_zero_groups:
            return ()
        flags = self._committed(self.step + 1)
        if self.pin == "always" or mixes_entries(optimizer):
            return self._regions(flags)
        return self._regions(flags, self._is_pinned)

    def _is_pinned(self, group: PruningGroup, s: ParamSlice) -> bool:
        """Whether a slice gets gradients although its unit is at zero.

        The analysis says so; and so does a downstream column that is not trained, hence not zero: the unit's own
        entries then see a gradient through it.
        """
        if s.pinned:
            return True
        return s.role is Role.ZERO and any(c.param not in self.trained for c in group.with_role(Role.CONSUMER))

    # -- state -----------------------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, Any]:
        """The arguments that a saved state has to agree in."""
        rescaled = {"rescale": True} if self.rescale else {}  # states of runs without it may be older
        return {**asdict(self.schedule), **self.budget.saved(), **rescaled}

    def state(self) -> dict[str, Any]:
        return {
            "schedule": self._asked(),
            "chosen": torch.from_numpy(self.chosen.copy()),
            **self.scoring.state(),
        }

    @property
    def companions(self) -> Companions:
        return self.scoring.companions

    def expect(self, optimizer: Optimizer, what: Mapping[str, Collection[str]]) -> None:
        self.scoring.expect(what)

    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        saved, own = state.get("schedule"), self._asked()
        if not isinstance(saved, Mapping):
            raise damaged("schedule", saved, "a dictionary of the schedule's arguments")
        self.scoring.check_state(state, companions)
        chosen = saved_per_unit(state, "chosen", self.units)
        different = [k for k in {**own, **saved} if saved.get(k) != own.get(k)]
        step = saved_count(state, "step")
        if different and not (step <= self.first_choice and not self.has_choice(state)):
            listed = ", ".join(f"{k} was {_shown(saved, k)} and is {_shown(own, k)}" for k in different)
            raise CheckpointError(
                f"the optimizer state was saved in the middle of another schedule: {listed}; build the optimizer with "
                f"the arguments of the saved run"
            )
        begun, count, last = self._begun(step), int((chosen > 0).sum()), int(chosen.max())
        alive = all((part == 0).any() for part in split(chosen, self.groups))
        if count and (last > begun or count > self.total or not alive):
            raise CheckpointError(
                f"the optimizer state is damaged: at step {step} with {begun} period(s) begun at most {self.total} "
                f"units are chosen and every group keeps one; it says {count} units, the last of them in period {last}"
            )

    @property
    def first_choice(self) -> int:
        """Up to this step a state says nothing that depends on the schedule."""
        return self.schedule.start_pruning_step

    def has_choice(self, state: Mapping[str, Any]) -> bool:
        """Whether a state, whose entries were checked, holds a choice of units."""
        return bool((saved_per_unit(state, "chosen", self.units) > 0).any())

    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        self.chosen = saved_per_unit(state, "chosen", self.units).astype(np.int32)
        self._ramp, self._pinned = None, None
        self.scoring.load_state(state, companions)


_THIN = 0.05  # share of its units, at or below which what is left of a group is called a bottleneck


def warn_of_bottlenecks(groups: Sequence[PruningGroup], before: NDArray[np.bool_], after: NDArray[np.bool_]) -> None:
    """Say which groups are about to become bottlenecks, once each: networks seldom recover from those."""
    thin = []
    for group, was, now in zip(groups, split(before, groups), split(after, groups), strict=True):
        most = max(1, int(_THIN * group.size))
        left = int((~now).sum())
        if left <= most < int((~was).sum()) and group.size > 4:
            thin.append(f"{group.name} (keeps {left} of {group.size})")
    if thin:
        logger.warning(
            "about to leave bottlenecks, which a network seldom recovers from: %s%s. scarcity=3, ranking='per_layer' "
            "or min_units=0.1 spread what is removed over other groups; oto.sensitivity(...) shows which can give more",
            ", ".join(thin[:5]),
            f" and {len(thin) - 5} more" if len(thin) > 5 else "",
        )


def _shown(arguments: Mapping[str, Any], name: str) -> str:
    return repr(arguments[name]) if name in arguments else "the default"


def next_period(step: int, when: Mapping[str, int]) -> int | None:
    """The first step >= ``step`` at which a period begins, or None."""
    if step <= when["start"]:
        return when["start"]
    period = -(-(step - when["start"]) // (when["steps"] // when["periods"]))
    return period_start(period, **when) if period < when["periods"] else None
