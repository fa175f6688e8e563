"""HESSO-CRIC, HESSO with a corrective redundancy identification cycle (arXiv 2409.09085), on any torch optimizer.

Scores taken once mislead when many units go together: with the lowest ones away, others turn out redundant. So their
removal is simulated, and what it brings up is simulated as well, until nothing new comes up. With K units to remove:

1.  At ``start_cric_step`` the run is copied, and the *violators* are the K units with the lowest scores.
2.  A cycle of S = ``sampling_steps`` steps trains as usual while the violators are shrunk by ``(S - t - 1) / (S - t)``
    after step t, so that scores are seen at S points on the way to zero. Each step's scores are added up, and the K
    lowest become candidates. After its last step everything is put back to the copy, the optimizer's state and the
    buffers included, and the candidates that have never been violators are the next cycle's.
3.  Cycles end when not more than ``tolerance`` new violators come up, or after ``max_cycle_period`` of them. Violators
    never repeat, so there is an end in any case.
4.  The K lowest by mean score are taken to zero along HESSO's ramp, over ``hybrid_training_steps``.

Where this differs from the released code: it leaves momentum and running statistics where the simulation took them,
holds parameters outside the groups still in cycles, and can add a term from probing each layer's loss with a share of
its units at zero, which needs the loss, and is the same for all units of a layer; it is not offered here. Scores are
those of gradients, not of momentum. A step with a gradient that is not finite does not count.

Nothing waits for the device except at a cycle's boundaries. A copy of the run is held while cycles last; it is saved in
the optimizer's ``state_dict``; for ``torch.distributed.checkpoint`` see ``files``. Give ``attach`` the model's buffers,
too, or running statistics are not put back.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.criteria import Prepared
from only_train_once.errors import CheckpointError
from only_train_once.groups import Role
from only_train_once.importance import Criteria
from only_train_once.optim.arguments import SPARSITY, Budget, Schedule, whole
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.halfspace import lowest_with_room
from only_train_once.optim.method import Companions, register_method
from only_train_once.optim.ramp import Ramp
from only_train_once.optim.removal import Removal
from only_train_once.optim.scoring import Scoring, split
from only_train_once.optim.snapshot import Snapshot, check_snapshot, load_snapshot
from only_train_once.optim.state import damaged, saved_count, saved_per_unit
from only_train_once.schedules import decay_factor
from only_train_once.sharding import shares_of
from only_train_once.unitwise import Units

logger = logging.getLogger(__name__)

_SNAPSHOT = "snapshot"


@register_method
class HessoCric(Removal):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        start_cric_step: first step of the first cycle.
        sampling_steps: steps of a cycle.
        max_cycle_period: cycles at most.
        tolerance: a cycle with at most this many new violators is not made.
        hybrid_training_steps: steps of the ramp that follows.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: see `Hesso`.
        pin: see `Hesso`.
        importance_score_criteria: see ``importance.resolve``.
        importance_roles: slices the scores look at.
        **budget: other targets than a share of the units, and which groups give how much, see `Budget`.
    """

    name = "hesso_cric"

    def __init__(
        self,
        candidates: Candidates,
        *,
        target_group_sparsity: float = SPARSITY,
        start_cric_step: int = 0,
        sampling_steps: int = 1,
        max_cycle_period: int = 10,
        tolerance: int = 0,
        hybrid_training_steps: int = 1,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        importance_score_criteria: Criteria = "default",
        importance_roles: Collection[Role] = (Role.ZERO,),
        **budget: Any,
    ) -> None:
        whole("start_cric_step", start_cric_step, 0)
        whole("tolerance", tolerance, 0)
        lengths = {"sampling_steps": sampling_steps, "max_cycle_period": max_cycle_period}
        for name, value in {**lengths, "hybrid_training_steps": hybrid_training_steps}.items():
            whole(name, value, 1)
        self.sampling, self.cycles, self.tolerance = int(sampling_steps), int(max_cycle_period), int(tolerance)
        self.ramp_steps = int(hybrid_training_steps)
        steps = self.sampling * self.cycles + self.ramp_steps
        left, sparsity = Budget.of(target_group_sparsity, budget)
        schedule = Schedule(sparsity, start_cric_step, steps, 1, group_divisible)
        scoring = Scoring(candidates, importance_score_criteria, importance_roles, None, 1)
        super().__init__(
            candidates,
            schedule,
            left,
            scoring,
            fixed_zero_groups=fixed_zero_groups,
            pin=pin,
            when=self._ramp_from(int(start_cric_step) + self.sampling * self.cycles),
        )
        self._units = Units(self.groups, self.tensors)
        # How many units are violators at first; 0 where the first scores decide.
        self._want(0 if self.goal.waits else self.total, self.goal.most)
        # 0: never a violator; c + 1: violator of cycle c.  (units of all groups in order,)
        self.violators: NDArray[np.int32] = np.zeros(self.units, dtype=np.int32)
        self._sum = torch.zeros(self.units, dtype=torch.float64, device=self._units.device)
        self._count = torch.zeros((), dtype=torch.int64, device=self._units.device)
        self._candidates = torch.zeros(self.units, dtype=torch.bool, device=self._units.device)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None
        self._shrunk: Ramp | None = None
        self._snapshot: Snapshot | None = None
        self._scored: Prepared | None = None  # while cycles last

    def _ramp_from(self, step: int) -> dict[str, int]:
        return {"start": step, "steps": self.ramp_steps, "periods": 1}

    @property
    def end(self) -> int:
        return self.when["start"] + self.when["steps"]

    @property
    def follows(self) -> bool:
        return self.finished  # until then scores are summed by unit, and the run is to be put back

    @property
    def _in_cycles(self) -> bool:
        return self.total > 0 and self.schedule.start_pruning_step <= self.step < self.when["start"]

    @property
    def cycle(self) -> int:
        """Number of the cycle under way, from 0."""
        return (self.step - self.schedule.start_pruning_step) // self.sampling

    # -- a step ----------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        if self._in_cycles:
            self.scoring.watch(self.step, self.step)
        else:
            super().ready()

    def before(self, optimizer: Optimizer) -> None:
        if self._in_cycles:
            self._sample(optimizer)
        else:
            super().before(optimizer)

    def _sample(self, optimizer: Optimizer) -> None:
        """Score all units by this step's gradients; take the copy and the first violators where that is due."""
        if self._snapshot is None:
            self._snapshot = Snapshot.take(optimizer, self.named_tensors)
        if self._scored is None:
            self._scored = self.scoring.prepare()
        # Means of this step alone: nothing was added before.
        parts = self.scoring.score(*self.scoring.means(optimizer), prepared=self._scored)
        scores = torch.cat([p.to(self._units.device, torch.float64) for p in parts])
        sound = torch.isfinite(scores).all()
        scores = torch.where(sound, scores, 0)
        if self._wanted == 0 and bool(sound):  # once: how many units go depends on the scores
            self._plan(scores)
        everyone = torch.ones_like(self._candidates)
        lowest = lowest_with_room(self._units, everyone, scores, self._room, self._wanted) & sound
        self._pending = scores, sound, lowest  # counted after the step, should something interrupt it
        if self.step == self.schedule.start_pruning_step:
            self.violators = self._agreed(lowest).astype(np.int32)

    def _plan(self, scores: Tensor) -> None:
        """How many units of each group are the lowest, by the first scores."""
        counts = self.goal.ceilings(split(scores.cpu().numpy(), self.groups), np.zeros(self.units, dtype=bool))
        self._want(sum(counts), counts if self.goal.shaped else self.goal.most)

    def _want(self, count: int, room: Sequence[int]) -> None:
        self._wanted, self._room = count, torch.tensor(list(room), device=self._units.device)

    def after(self, optimizer: Optimizer) -> None:
        if not self._in_cycles:
            super().after(optimizer)
            return
        assert self._pending is not None
        scores, sound, lowest = self._pending
        self._pending = None
        self._sum, self._count = self._sum + scores, self._count + sound
        self._candidates = self._candidates | lowest
        t = (self.step - self.schedule.start_pruning_step) % self.sampling
        if t == self.sampling - 1:
            self._close(optimizer)
            return
        if self._shrunk is None:
            now = self.violators == self.cycle + 1
            self._shrunk = Ramp(self._regions(now, lambda group, s: s.role is Role.ZERO), self.tensors)
        self._shrunk.scale_(decay_factor(t, self.sampling))

    def _close(self, optimizer: Optimizer) -> None:
        """Put everything back; who is new among the candidates decides whether another cycle follows."""
        assert self._snapshot is not None
        self._snapshot.put_back(optimizer, self.named_tensors)
        self._shrunk = None
        new = (self._agreed(self._candidates) > 0) & (self.violators == 0)
        done = self.cycle + 1
        logger.info("step %d: cycle %d ends, %d new violators", self.step, done, int(new.sum()))
        if done >= self.cycles or int(new.sum()) <= self.tolerance:
            self.when = self._ramp_from(self.step + 1)
            self._snapshot, self._scored = None, None
            return
        self.violators[new] = done + 1
        self._candidates = torch.zeros_like(self._candidates)

    def _agreed(self, values: Tensor) -> NDArray[np.float64]:
        """Numbers on the device, as they are in the first process."""
        return shares_of(self.tensors).agreed(values.double()).cpu().numpy()

    def scores(self, optimizer: Optimizer) -> list[NDArray[np.float64]]:
        """Means over all cycles; if no step of them counted, this step's scores."""
        *sums, steps = self._agreed(torch.cat([self._sum, self._count[None].double()]))
        return split(np.array(sums) / steps, self.groups) if steps else super().scores(optimizer)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "ramp_start": self.when["start"],
            "violators": torch.from_numpy(self.violators.copy()),
            "score_sum": self._sum.cpu(),
            "score_count": int(self._count.cpu()),
            "candidates": self._candidates.cpu().int(),
            "buffers": {} if self._snapshot is None else self._snapshot.buffers,
            **({"wanted": self._wanted, "room": self._room.cpu()} if self.goal.waits else {}),
        }

    @property
    def companions(self) -> Companions:
        return super().companions if self._snapshot is None else {_SNAPSHOT: self._snapshot.parameters}

    def expect(self, optimizer: Optimizer, what: Mapping[str, Collection[str]]) -> None:
        super().expect(optimizer, what)
        if _SNAPSHOT in what:
            self._snapshot = Snapshot.take(optimizer, self.named_tensors)

    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        ramp, start = saved_count(state, "ramp_start"), self.schedule.start_pruning_step
        own = self.when
        self.when = self._ramp_from(ramp)
        try:
            super().check_state(state, companions)
        finally:
            self.when = own
        untouched = state["step"] <= start and not self.has_choice(state)
        cycles, rest = divmod(ramp - start, self.sampling)
        if not untouched and (rest or not 1 <= cycles <= self.cycles):
            raise damaged("ramp_start", ramp, f"the end of one of {self.cycles} cycles after step {start}")
        violators = saved_per_unit(state, "violators", self.units)
        saved_per_unit(state, "candidates", self.units)
        saved_count(state, "score_count")
        if self.goal.waits and not untouched:
            saved_count(state, "wanted")
            saved_per_unit(state, "room", len(self.groups))
        total = state.get("score_sum")
        if not isinstance(total, Tensor) or total.shape != (self.units,) or not total.is_floating_point():
            raise damaged("score_sum", total, f"a tensor of {self.units} numbers")
        if int(violators.max()) > self.cycles:
            raise CheckpointError(
                f"the optimizer state is damaged: violators of cycle {int(violators.max())}, there are {self.cycles}"
            )
        check_snapshot(companions.get(_SNAPSHOT, {}), state.get("buffers"), self.named_tensors)

    def has_choice(self, state: Mapping[str, Any]) -> bool:
        return super().has_choice(state) or bool(saved_per_unit(state, "violators", self.units).any())

    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().load_state(state, companions)
        device = self._units.device
        if self.step > self.schedule.start_pruning_step or self.has_choice(state):
            self.when = self._ramp_from(int(state["ramp_start"]))
        self.violators = saved_per_unit(state, "violators", self.units).astype(np.int32)
        self._sum = state["score_sum"].to(device, torch.float64, copy=True)
        self._count = torch.tensor(int(state["score_count"]), device=device)
        self._candidates = torch.from_numpy(saved_per_unit(state, "candidates", self.units) > 0).to(device)
        if self.goal.waits and self.step > self.schedule.start_pruning_step:
            self._want(int(state["wanted"]), saved_per_unit(state, "room", len(self.groups)).tolist())
        self._pending, self._shrunk, self._snapshot = None, None, None
        if companions.get(_SNAPSHOT):
            self._snapshot = load_snapshot(companions[_SNAPSHOT], state["buffers"], self.named_tensors)
        elif self._in_cycles and self.step > self.schedule.start_pruning_step:
            logger.warning(
                "the saved state lies inside a cycle, but the copy of the run was not saved with it: the weights as "
                "they are take its place"
            )
