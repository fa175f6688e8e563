"""HESSO, hybrid efficient structured sparse optimizer (arXiv 2409.09085), on top of any torch optimizer.

Steps are counted from 0 inside ``step()``. Pruning runs over the steps ``start_pruning_step ..
start_pruning_step + pruning_steps - 1``, in ``pruning_periods`` periods of ``T = pruning_steps // pruning_periods``
steps (the last one takes the remainder). K = floor(sparsity * units) units go in all, as evenly as possible: each
period chooses the lowest scores, from gradients averaged over the last ``window`` steps (``min(T, 10)`` unless told),
and takes the units to zero along a linear ramp, see ``removal``.

Before and after pruning a step costs what the base optimizer's costs, within 2 %
(``benchmarks/results/step_cost.md``). The gradient sums of a window are kept only inside it, and nothing waits for the
device except at a period's first step.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from only_train_once.groups import Role
from only_train_once.importance import Criteria
from only_train_once.optim.arguments import SPARSITY, Budget, Schedule
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.method import register_method
from only_train_once.optim.removal import Removal
from only_train_once.optim.scoring import Scoring


@register_method
class Hesso(Removal):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        start_pruning_step: first step of pruning.
        pruning_steps: number of steps it takes.
        pruning_periods: number of periods.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: set pinned slices of removed units back to 0 after every step.
        pin: "auto" (the slices that are ``pinned``, and what the optimizer makes necessary, see
            `Removal._is_pinned`) or "always" (all ``zero`` and ``consumer`` slices of removed units).
        importance_score_criteria: see ``importance.resolve``.
        importance_roles: slices the scores look at.
        window: steps the gradients are averaged over, this many at most T; None for ``min(T, 10)``.
        rescale: whether weights that read units grow by ``√(inputs before / inputs after)`` when units have gone, see
            ``fan_in``: for fresh weights of a network without normalizations, and scores that look at weights alone
            (units that are chosen by what they put out bring its size along). Not in the papers.
        **budget: other targets than a share of the units, and which groups give how much, see `Budget`.
    """

    name = "hesso"

    def __init__(
        self,
        candidates: Candidates,
        *,
        target_group_sparsity: float = SPARSITY,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        importance_score_criteria: Criteria = "default",
        importance_roles: Collection[Role] = (Role.ZERO,),
        window: int | None = None,
        rescale: bool = False,
        **budget: Any,
    ) -> None:
        left, sparsity = Budget.of(target_group_sparsity, budget)
        schedule = Schedule(sparsity, start_pruning_step, pruning_steps, pruning_periods, group_divisible)
        length = schedule.pruning_steps // schedule.pruning_periods
        scoring = Scoring(candidates, importance_score_criteria, importance_roles, window, length)
        super().__init__(
            candidates, schedule, left, scoring, fixed_zero_groups=fixed_zero_groups, pin=pin, rescale=rescale
        )
