"""HSPG, half-space stochastic projected gradient (arXiv 2009.12078; OTOv1, arXiv 2107.07467), on any torch optimizer.

It minimizes ``f(x) + lambda * sum_g ||x_g||`` over the units g, in two stages. With alpha the learning rate and d the
direction along which the base optimizer steps (the gradient of f, for plain SGD):

1.  Steps ``warm_up_steps .. start_pruning_step - 1`` search a solution without caring for zeros.
    ``first_stage="subgradient"``, as in OTOv1: ``x <- x - alpha (d + lambda x_g / ||x_g||)``.
    ``first_stage="prox"``, as in 2009.12078: ``y = x - alpha d``, ``x_g <- max(0, 1 - alpha lambda / ||y_g||) y_g``.
2.  From ``start_pruning_step`` on, units at zero stay there. The others make the sub-gradient step to x~, and those
    that leave their half-space are projected: ``x_g <- 0`` where ``<x~_g, x_g> < epsilon ||x_g||^2``.

Where this differs: the papers step along the stochastic gradient; the released code puts the penalty into the gradient,
so that momentum averages it, too, and treats parameters outside the groups differently in its two stages. Here the
penalty stands beside the base optimizer's step whatever that is, and all else trains as the base optimizer does. The
papers' number of zeros follows from lambda; the released code caps it (``upper_group_sparsity``) and projects random
units when the cap is reached. Here the target is a cap, those that went farthest are projected first, every group keeps
a unit, and the last ``finish_steps`` take what is missing, so that the target is met exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import ConfigurationError
from only_train_once.optim.arguments import SPARSITY, Budget, Schedule, finite, one_of, share, whole
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.halfspace import HalfSpace, Rates, learning_rates, shrinkage
from only_train_once.optim.method import register_method
from only_train_once.optim.stages import Staged

FIRST_STAGES = ("subgradient", "prox")


@register_method
class Hspg(Staged):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        lmbda: lambda, the weight of the penalty (the papers: 1e-3, 5e-4 for VGG16 with batch norm).
        epsilon: of the half-space, in [0, 1); 0.9 to 0.95 projects more readily.
        first_stage: "subgradient" or "prox".
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        warm_up_steps: steps of the base optimizer alone before the first stage.
        start_pruning_step: first step of the second stage (N_P in the papers).
        pruning_steps: number of steps of the second stage and the finish.
        pruning_periods: where not every number will do (``group_divisible``, a target in a cost), how often the numbers
            per group are planned.
        finish_steps: see `Staged`.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: see `Hesso`.
        pin: see `Hesso`.
        **budget: other targets than a share of the units, and which groups give how much, see `Budget`.
    """

    name = "hspg"

    def __init__(
        self,
        candidates: Candidates,
        *,
        lmbda: float = 1e-3,
        epsilon: float = 0.0,
        first_stage: str = "subgradient",
        target_group_sparsity: float = SPARSITY,
        warm_up_steps: int = 0,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        finish_steps: int | None = None,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        **budget: Any,
    ) -> None:
        finite("lmbda", lmbda, 0)
        share("epsilon", epsilon)
        one_of("first_stage", first_stage, FIRST_STAGES)
        whole("warm_up_steps", warm_up_steps, 0)
        left, sparsity = Budget.of(target_group_sparsity, budget)
        schedule = Schedule(sparsity, start_pruning_step, pruning_steps, pruning_periods, group_divisible)
        if warm_up_steps > schedule.start_pruning_step:
            raise ConfigurationError(
                f"warm_up_steps ({warm_up_steps}) > start_pruning_step ({start_pruning_step}); the first stage lies "
                f"between them: lower warm_up_steps"
            )
        super().__init__(
            candidates,
            schedule,
            left,
            first_step=int(warm_up_steps),
            finish_steps=finish_steps,
            fixed_zero_groups=fixed_zero_groups,
            pin=pin,
        )
        self.lmbda, self.epsilon, self.first_stage = float(lmbda), float(epsilon), first_stage

    @property
    def compares(self) -> bool:
        return self.step >= self.schedule.start_pruning_step or self.first_stage != "prox"

    def project(self, optimizer: Optimizer) -> None:
        if self.step >= self.schedule.start_pruning_step:
            half_space_step(self.space, optimizer, self.lmbda, self.epsilon)
        elif self.first_stage == "prox":
            prox_step(self.space, optimizer, self.lmbda)
        else:
            penalize(self.space, optimizer, self.lmbda)


def penalize(space: HalfSpace, optimizer: Optimizer, lmbda: float) -> None:
    """``x~ <- x~ - alpha lambda x / ||x||``."""
    norm = space.units.square(space.before).sqrt()
    rates = learning_rates(optimizer, space.tensors, space.units.names)
    space.units.change_(space.tensors, space.before, -shrinkage(norm, lmbda), rates)


def half_space_step(
    space: HalfSpace, optimizer: Optimizer, lmbda: float, epsilon: float, still_within: float | None = None
) -> None:
    """The sub-gradient step, then the projection; units at zero stay there.

    Units that were no longer than ``still_within`` stay what they were.
    """
    rates = learning_rates(optimizer, space.tensors, space.units.names)
    sums = space.step_sums(rates)
    norm = sums.square.sqrt()
    still = None if still_within is None else norm <= still_within
    strength = shrinkage(norm, lmbda)
    strength = strength if still is None else torch.where(still, 0, strength)
    space.step(-strength, rates, sums, epsilon, still=still)


def prox_step(space: HalfSpace, optimizer: Optimizer, lmbda: float) -> None:
    """The proximal operator of ``alpha lambda sum_g ||x_g||``; units at zero may leave it, others may get there.

    A unit whose tensors are trained at different rates is shrunk in each at that rate, and is at zero when all are.
    A unit that would go to zero and has no room there is not shrunk.
    """
    norm = space.units.square(space.tensors).sqrt()
    strength = shrinkage(norm, lmbda)
    rates = learning_rates(optimizer, space.tensors, space.units.names)
    factors, to_zero = shrunk_by(strength, rates)
    unmoved = space.zero & (norm == 0)
    space.zero = unmoved
    space.zero = unmoved | space.within_limits(to_zero, norm)
    kept = {id(f): torch.where(to_zero, 1, f) for f in {id(f): f for f in factors.values()}.values()}
    space.units.scale_(space.tensors, {n: kept[id(f)] for n, f in factors.items()}, zero=space.zero)


def shrunk_by(strength: Tensor, rates: Rates) -> tuple[dict[str, Tensor], Tensor]:
    """``max(0, 1 - alpha * strength)`` per tensor, those trained at one rate share it; which units are at 0 in all."""
    distinct = {id(rate) if isinstance(rate, Tensor) else rate: rate for rate in rates.values()}
    made = {key: (1 - rate * strength).clamp_(min=0) for key, rate in distinct.items()}
    to_zero = torch.stack([f.to(strength.device) for f in made.values()]).amax(0) == 0
    return {n: made[id(rate) if isinstance(rate, Tensor) else rate] for n, rate in rates.items()}, to_zero
