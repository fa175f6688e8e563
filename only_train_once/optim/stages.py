"""What the half-space methods share: stages in which units go to zero by projection, then a ramp for the rest.

Pruning occupies the steps ``start_pruning_step .. start_pruning_step + pruning_steps - 1``. The last ``finish_steps``
of them make the count exact: units that are at zero stay there, those still missing are the ones with the smallest
norm, and they follow along the ramp of ``removal``. The papers stop where the projection left off, with the number that
it reached.

While units are projected, a copy of the tensors with ``zero`` entries is held, and the step costs up to four times the
base optimizer's (``benchmarks/results/step_cost.md``, which says also what it costs at least; forward and backward pass
not counted): whether a unit has left its half-space takes the weights before and after the step. Keeping a copy, the
sums over both and the change pass seven times over all weights, where SGD with momentum passes five times. Proximal
steps look only at the weights after it, and keep no copy. Before and after it costs what the base optimizer's does, and
nothing waits for the device except at the first steps of periods that score or plan, and at that of the finish.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.groups import Role
from only_train_once.optim.arguments import Budget, Schedule, whole
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.halfspace import HalfSpace
from only_train_once.optim.method import Companions
from only_train_once.optim.removal import Removal, next_period
from only_train_once.optim.scoring import Scoring, split
from only_train_once.optim.state import saved_per_unit
from only_train_once.schedules import period_lengths

logger = logging.getLogger(__name__)

_SHARE = 10  # a finish takes this part of the pruning steps unless told


class Staged(Removal):
    """A method whose units go to zero by projection, before a ramp takes those that are missing.

    Args:
        candidates: what may be pruned.
        schedule: the user's schedule.
        budget: what is left in the end.
        scoring: what units are scored by before the finish, if they are.
        first_step: the step at which the method begins to change weights.
        finish_steps: length of the ramp; None for a tenth of the pruning steps. At most the last period.
    """

    def __init__(
        self,
        candidates: Candidates,
        schedule: Schedule,
        budget: Budget,
        scoring: Scoring | None = None,
        *,
        first_step: int,
        finish_steps: int | None,
        fixed_zero_groups: bool,
        pin: str,
    ) -> None:
        last = period_lengths(schedule.pruning_steps, schedule.pruning_periods)[-1]
        if finish_steps is not None:
            whole("finish_steps", finish_steps, 1)
            if finish_steps > last:
                raise ConfigurationError(
                    f"finish_steps is {finish_steps}; the last of {schedule.pruning_periods} periods has {last} steps: "
                    f"lower finish_steps or raise pruning_steps"
                )
        finish = min(last, finish_steps or max(schedule.pruning_steps // _SHARE, 1))
        start = schedule.start_pruning_step + schedule.pruning_steps - finish
        self.norms = Scoring(candidates, "magnitude", (Role.ZERO,), None, finish)
        super().__init__(
            candidates,
            schedule,
            budget,
            scoring or self.norms,
            fixed_zero_groups=fixed_zero_groups,
            pin=pin,
            when={"start": start, "steps": finish, "periods": 1},
        )
        self.first_step = first_step
        self.space = HalfSpace(candidates, self.goal.most, self.total)

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def finishing(self) -> int:
        """First step of the finish."""
        return self.when["start"]

    @property
    def redundant(self) -> dict[str, list[int]]:
        return self._listed(self.space.fetch() | (self.chosen > 0))

    @property
    def removed(self) -> dict[str, list[int]]:
        flags = self._committed(self.step)
        if self.step > self.schedule.start_pruning_step:
            flags = flags | self.space.fetch()
        return self._listed(flags)

    @property
    def follows(self) -> bool:
        return self.finished  # until then half-spaces are counted by unit

    @property
    def compares(self) -> bool:
        """Whether this step looks at the weights as they were before it."""
        return True

    # -- a step ----------------------------------------------------------------------------------------------------

    def before(self, optimizer: Optimizer) -> None:
        super().before(optimizer)
        if self.total and self.first_step <= self.step < self.finishing:
            if self.compares:
                self.space.remember()
            else:
                self.space.forget()

    def after(self, optimizer: Optimizer) -> None:
        if self.total and self.first_step <= self.step < self.finishing:
            self.project(optimizer)
        super().after(optimizer)
        if self.total and self.finishing <= self.step < self.end:
            self.space.hold()  # the base step moves them; once committed, they stay by themselves

    @abstractmethod
    def project(self, optimizer: Optimizer) -> None:
        """What a stage does after the base step: penalty and projection."""

    def next_scoring(self) -> int | None:
        if self.step > self.finishing:
            return None
        begin = self.next_period() if self.goal.plans else None
        return self.finishing if begin is None else begin

    def next_period(self) -> int | None:
        """The first step >= this one, and before the finish is over, at which the method begins or a period does."""
        return self.first_step if self.step <= self.first_step else next_period(self.step, self.schedule.when)

    def ready(self) -> None:
        self.scoring.watch(self.step, self.next_period() if self.step < self.finishing else None)

    def collect(self, optimizer: Optimizer, scoring: int) -> None:
        begin = self.next_period()
        if begin is not None and self.scoring is not self.norms:  # norms at the finish need no gradients
            self.scoring.collect(optimizer, self.step, begin)

    def scores(self, optimizer: Optimizer) -> list[NDArray[np.float64]]:
        """Norms of the units."""
        return self.norms.scores(optimizer, self.step, self.chosen > 0)

    def choose(self, optimizer: Optimizer) -> None:
        """At the finish: the units at zero, and of the others those with the smallest norm. Before: plan again."""
        norms = self.scores(optimizer)
        self.space.agree()
        gone = self.space.fetch()
        if self.step < self.finishing:
            self.space.limit(self.goal.ceilings(norms, gone))
            return
        self._ramp = None
        self.scoring.reset()
        self.space.forget()
        self.chosen[:] = 0
        picked = self.goal.choose(norms, gone)
        self.chosen[picked] = 1
        self.chosen[gone] = 1
        logger.info("step %d: %d units are at zero, %d more follow", self.step, int(gone.sum()), len(picked))

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "zero": torch.from_numpy(self.space.fetch().astype(np.int32)),
            "ceiling": self.space.ceiling.cpu(),
        }

    @property
    def first_choice(self) -> int:
        return min(self.first_step, self.schedule.start_pruning_step)

    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().check_state(state, companions)
        zero = saved_per_unit(state, "zero", self.units)
        ceiling = saved_per_unit(state, "ceiling", len(self.groups))
        lost = [int((part > 0).sum()) for part in split(zero, self.groups)]
        full = [g.name for g, n in zip(self.groups, lost, strict=True) if n >= g.size]
        if full or sum(lost) > self.total or (ceiling >= [g.size for g in self.groups]).any():
            raise CheckpointError(
                f"the optimizer state is damaged: at most {self.total} units are at zero and every group keeps one; it "
                f"says {sum(lost)}, and that {full[:3]} keep none"
            )

    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().load_state(state, companions)
        self.space.restore(saved_per_unit(state, "zero", self.units) > 0)
        self.space.limit(saved_per_unit(state, "ceiling", len(self.groups)).tolist())
