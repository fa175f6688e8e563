"""AdaHSPG+, adaptive half-space projection (TMLR 2023), as far as its published description determines it.

It minimizes ``f(x) + lambda * sum_g ||x_g||`` like HSPG, and goes back and forth between two kinds of steps. What the
description fixes is followed: proximal steps, which may send units to zero and free them; enhanced half-space steps, in
which zeros stay and only units far from the origin move and are projected; a choice between the two for a number of
steps at a time, by how much each has left to do, weighed by mu; and an epsilon that adapts. What it leaves open is
fixed here as follows. With alpha the learning rate and g the gradient averaged over a window, at the first step of
every period of ``start_pruning_step .. start_pruning_step + pruning_steps - 1``:

1.  ``s = prox(x - alpha g) - x`` is the step that the proximal operator would take. The units at zero, those it would
    send there and those within ``delta`` of the origin are its own; ``chi_prox`` is the norm of s over them, and
    ``chi_half`` its norm over all others.
2.  If ``chi_prox >= mu * chi_half``, the period makes proximal steps, otherwise half-space steps.
3.  If the share of units at zero has grown by 1 % at most since the last period, epsilon grows by 0.1, up to 0.999 (the
    rule of OTOv1's released code).

The paper's proximal steps reduce the variance of the gradient with full gradients now and then (ProxSVRG). An optimizer
sees the gradients it is given, so that part is the user's; the base optimizer steps, and the operator follows. Units
that a half-space step leaves out keep their values. As in ``stages``, the target caps the number of zeros, every group
keeps a unit, and the last ``finish_steps`` take what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import NumericalError
from only_train_once.groups import Role
from only_train_once.masking import rows
from only_train_once.optim.arguments import SPARSITY, Budget, Schedule, finite, share
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.halfspace import learning_rates, shrinkage
from only_train_once.optim.hspg import half_space_step, prox_step, shrunk_by
from only_train_once.optim.method import Companions, register_method
from only_train_once.optim.scoring import Scoring
from only_train_once.optim.stages import Staged
from only_train_once.optim.state import damaged, saved_count
from only_train_once.sharding import shares_of
from only_train_once.unitwise import Sum

logger = logging.getLogger(__name__)

_GROWTH, _RAISE, _MOST = 0.01, 0.1, 0.999  # of epsilon: less growth than this raises it by that, up to here


@register_method
class AdaHspg(Staged):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        lmbda: lambda, the weight of the penalty.
        epsilon: of the half-space at the beginning, in [0, 1).
        mu: how much a proximal step has to have left to do, compared with a half-space step, to be preferred.
        delta: units no longer than this are left to proximal steps.
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        start_pruning_step: first step of the method.
        pruning_steps: number of steps it takes, the finish included.
        pruning_periods: how often the kind of step is chosen; the paper's default is once in an epoch.
        finish_steps: see `Staged`.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: see `Hesso`.
        pin: see `Hesso`.
        window: steps the gradients are averaged over, see `Hesso`.
        **budget: other targets than a share of the units, and which groups give how much, see `Budget`.
    """

    name = "ada_hspg"

    def __init__(
        self,
        candidates: Candidates,
        *,
        lmbda: float = 1e-3,
        epsilon: float = 0.0,
        mu: float = 1.0,
        delta: float = 1e-3,
        target_group_sparsity: float = SPARSITY,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        finish_steps: int | None = None,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        window: int | None = None,
        **budget: Any,
    ) -> None:
        for name, value in {"lmbda": lmbda, "mu": mu, "delta": delta}.items():
            finite(name, value, 0)
        share("epsilon", epsilon)
        left, sparsity = Budget.of(target_group_sparsity, budget)
        schedule = Schedule(sparsity, start_pruning_step, pruning_steps, pruning_periods, group_divisible)
        length = schedule.pruning_steps // schedule.pruning_periods
        super().__init__(
            candidates,
            schedule,
            left,
            Scoring(candidates, "taylor_first_order", (Role.ZERO,), window, length),  # for its averaged gradients
            first_step=schedule.start_pruning_step,
            finish_steps=finish_steps,
            fixed_zero_groups=fixed_zero_groups,
            pin=pin,
        )
        self.lmbda, self.epsilon, self.mu, self.delta = float(lmbda), float(epsilon), float(mu), float(delta)
        self.proximal = True  # the kind of step of the period under way
        self.zeros_before: int | None = None  # units at zero when the last period began

    @property
    def removed(self) -> dict[str, list[int]]:
        return self._listed(self._committed(self.step))  # zeros may be freed until then

    # -- a step ----------------------------------------------------------------------------------------------------

    def next_scoring(self) -> int | None:
        if self.step > self.finishing:
            return None
        begin = self.next_period()
        return self.finishing if begin is None else min(begin, self.finishing)

    def choose(self, optimizer: Optimizer) -> None:
        if self.step < self.finishing:
            self._decide(optimizer)
        if self.goal.plans or self.step == self.finishing:
            super().choose(optimizer)

    def _decide(self, optimizer: Optimizer) -> None:
        """The kind of step until the next period, and epsilon."""
        near, far = self._left_to_do(optimizer)
        facts = torch.stack([near, far, self.space.zero.sum().to(near)])
        chi_prox, chi_half, zeros = shares_of(self.tensors).agreed(facts).cpu().tolist()
        if not chi_prox + chi_half < float("inf"):
            steps = self.scoring.average.count + 1
            self.scoring.average.reset_unless_finite(self.tensors)
            raise NumericalError(
                f"step {self.step}: the gradients averaged over {steps} step(s) are not finite in some tensor; the "
                f"kind of step cannot be chosen. No weight was changed: skip this batch, lower the learning rate, or "
                f"use a GradScaler"
            )
        self.scoring.average.reset()
        self.proximal = chi_prox >= self.mu * chi_half
        grown = zeros - (self.zeros_before or 0)
        if self.zeros_before is not None and grown <= _GROWTH * self.units:
            self.epsilon = min(self.epsilon + _RAISE, _MOST)
        self.zeros_before = int(zeros)
        kind = "proximal" if self.proximal else "half-space"
        logger.info("step %d: %s steps, epsilon %.3f, %d units at zero", self.step, kind, self.epsilon, int(zeros))

    def _left_to_do(self, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """``chi_prox`` and ``chi_half``."""
        units, tensors = self.space.units, self.tensors
        gradients = self.scoring.average.mean(optimizer, tensors)
        rates = learning_rates(optimizer, tensors, units.names)

        def trial(name: str, block: slice) -> Tensor:
            return rows(tensors, name, block) - rates[name] * rows(gradients, name, block)

        def lengths(name: str, block: slice) -> list[tuple[Tensor, Tensor]]:
            tried, x = trial(name, block), rows(tensors, name, block)
            return [(tried, tried), (x, x)]

        tried, square = units.dots(lengths, [Sum(0), Sum(1)])
        factors, to_zero = shrunk_by(shrinkage(tried.sqrt(), self.lmbda), rates)
        shrunk = {n: units.scaled(n, f) for n, f in factors.items()}

        def moves(name: str, block: slice) -> list[tuple[Tensor, Tensor]]:
            moved = shrunk[name](trial(name, block), block) - rows(tensors, name, block)
            return [(moved, moved)]

        (moved,) = units.dots(moves, [Sum(0)])
        near = to_zero | (square.sqrt() <= self.delta)
        return torch.where(near, moved, 0).sum().sqrt(), torch.where(near, 0, moved).sum().sqrt()

    @property
    def compares(self) -> bool:
        return not self.proximal

    def project(self, optimizer: Optimizer) -> None:
        if self.proximal:
            prox_step(self.space, optimizer, self.lmbda)
        else:
            half_space_step(self.space, optimizer, self.lmbda, self.epsilon, still_within=self.delta)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        before = 0 if self.zeros_before is None else self.zeros_before + 1
        return {**super().state(), "proximal": self.proximal, "epsilon": self.epsilon, "zeros_before": before}

    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().check_state(state, companions)
        saved_count(state, "zeros_before")
        if not isinstance(state.get("proximal"), bool):
            raise damaged("proximal", state.get("proximal"), "True or False")
        if not isinstance(state.get("epsilon"), float) or not 0 <= state["epsilon"] < 1:
            raise damaged("epsilon", state.get("epsilon"), "a number in [0, 1)")

    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().load_state(state, companions)
        self.proximal, self.epsilon = state["proximal"], state["epsilon"]
        before = int(state["zeros_before"])
        self.zeros_before = before - 1 if before else None
