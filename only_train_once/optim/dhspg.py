"""DHSPG, dual half-space projected gradient (OTOv2, arXiv 2303.06862), on any torch optimizer.

With alpha the learning rate, x the unit's entries and d the direction along which the base optimizer steps:

1.  Before ``start_pruning_step`` the base optimizer trains alone.
2.  At ``start_pruning_step`` as many units as are to be removed are chosen by score, once; they are the penalized set
    (with ``pruning_periods``, in equal shares at the periods' first steps).
3.  From then on, each of them gets a weight of its own: ``lambda``, and where ``<x, d> < 0``, that is, where the base
    step lengthens the unit, ``lambda_g = clip(amplify * lambda_min, lambda, hat * lambda)`` with
    ``lambda_min = -<x, d> / ||x||``, and ``(lambda_min + lambda_max) / 2`` if that is not below
    ``lambda_max = -||d||^2 ||x|| / <x, d>``. Above lambda_min the unit shrinks; below lambda_max the step still goes
    down along d (Cauchy and Schwarz put one below the other).
    ``x~ = x - alpha d - alpha lambda_g x / ||x||``, and x <- 0 where ``<x~, x> < epsilon ||x||^2``; zeros stay.
4.  The last ``finish_steps`` take the chosen units that are not at zero yet, see ``stages``.

Units outside the set make the base optimizer's step. Where paper and released code differ: the paper writes the bounds
with the gradient, for plain SGD, where d is the gradient; with another base optimizer they bound what it does, so they
are taken from its own step, as in the released code. ``direction="gradient"`` takes them from the gradient. The paper's
set has exactly the target's size; the released code adds ``tolerance_group_sparsity`` to it, stops penalizing when the
target is reached, and scores by ``importance_score_criteria="otov2"``, on the momentum of one mini-batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.groups import Role
from only_train_once.importance import Criteria
from only_train_once.masking import Names, rows
from only_train_once.optim.arguments import SPARSITY, Budget, Schedule, finite, one_of, share
from only_train_once.optim.average import GradientAverage
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.halfspace import Rates, StepSums, learning_rates
from only_train_once.optim.method import Companions, register_method
from only_train_once.optim.scoring import Scoring, split
from only_train_once.optim.stages import Staged
from only_train_once.optim.state import saved_per_unit
from only_train_once.schedules import position
from only_train_once.sharding import shared_as
from only_train_once.unitwise import Sum

SALIENCY = {"cosine_similarity": 0.5, "avg_magnitude": 0.5}  # the paper names both, and leaves their mix open
DIRECTIONS = ("step", "gradient")
# lambda, amplify, hat of the released code: for SGD, and for optimizers that divide by the gradient's size
_PLAIN, _ADAPTIVE = (1e-3, 2.0, 10.0), (1e-2, 20.0, 1e3)


@register_method
class Dhspg(Staged):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        lmbda: lambda; None for 1e-3, and 1e-2 with Adam and its kin (whatever has ``betas``).
        lmbda_amplify: None for 2, and 20 with Adam.
        hat_lmbda_coeff: None for 10, and 1e3 with Adam.
        epsilon: of the half-space, in [0, 1); 0.9 to 0.95 projects more readily.
        direction: what the bounds of lambda are taken from, "step" or "gradient".
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        tolerance_group_sparsity: share of the units that is penalized beyond the target; the first to reach zero, and
            of the others the shortest, are removed.
        start_pruning_step: first step of pruning.
        pruning_steps: number of steps it takes, the finish included.
        pruning_periods: number of shares in which units are chosen; the paper has one.
        finish_steps: see `Staged`.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: see `Hesso`.
        pin: see `Hesso`.
        importance_score_criteria: "default" for `SALIENCY`; otherwise see ``importance.resolve``.
        importance_roles: slices the scores look at.
        window: see `Hesso`.
        **budget: other targets than a share of the units, and which groups give how much, see `Budget`.
    """

    name = "dhspg"

    def __init__(
        self,
        candidates: Candidates,
        *,
        lmbda: float | None = None,
        lmbda_amplify: float | None = None,
        hat_lmbda_coeff: float | None = None,
        epsilon: float = 0.0,
        direction: str = "step",
        target_group_sparsity: float = SPARSITY,
        tolerance_group_sparsity: float = 0.0,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        finish_steps: int | None = None,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        importance_score_criteria: Criteria = "default",
        importance_roles: Collection[Role] = (Role.ZERO,),
        window: int | None = None,
        **budget: Any,
    ) -> None:
        given = {"lmbda": lmbda, "lmbda_amplify": lmbda_amplify, "hat_lmbda_coeff": hat_lmbda_coeff}
        for name, value in given.items():
            if value is not None:
                finite(name, value, 1 if name == "hat_lmbda_coeff" else 0)
        share("epsilon", epsilon)
        one_of("direction", direction, DIRECTIONS)
        left, sparsity = Budget.of(target_group_sparsity, budget)
        schedule = Schedule(sparsity, start_pruning_step, pruning_steps, pruning_periods, group_divisible)
        share("tolerance_group_sparsity", tolerance_group_sparsity)
        reach = (schedule.target_group_sparsity or 0.0) + tolerance_group_sparsity
        if tolerance_group_sparsity and reach >= 1:
            raise ConfigurationError(
                f"target_group_sparsity + tolerance_group_sparsity is {reach}; the rule is that it stays below 1"
            )
        criteria = SALIENCY if importance_score_criteria == "default" else importance_score_criteria
        length = schedule.pruning_steps // schedule.pruning_periods
        super().__init__(
            candidates,
            schedule,
            left,
            Scoring(candidates, criteria, importance_roles, window, length),
            first_step=schedule.start_pruning_step,
            finish_steps=finish_steps,
            fixed_zero_groups=fixed_zero_groups,
            pin=pin,
        )
        self._weights = tuple(given.values())
        self.epsilon, self.direction = float(epsilon), direction
        self.set_goal = self.goal.beyond(tolerance_group_sparsity)
        self.reach = self.set_goal.total  # size of the penalized set; at most, where the scores decide
        # 0: not penalized; p + 1: penalized since period p.  (units of all groups in order,)
        self.penalized: NDArray[np.int32] = np.zeros(self.units, dtype=np.int32)
        self._flags: Tensor | None = None  # the same on the device; None: not there yet
        self._gradient: Mapping[str, Tensor] = {}

    @property
    def redundant(self) -> dict[str, list[int]]:
        return self._listed((self.chosen > 0) if self.step > self.finishing else (self.penalized > 0))

    # -- a step ----------------------------------------------------------------------------------------------------

    def before(self, optimizer: Optimizer) -> None:
        super().before(optimizer)
        if self.direction == "gradient" and self.total and self.first_step <= self.step < self.finishing:
            now = GradientAverage(self.space.units.names)
            means = dict(now.mean(optimizer, self.tensors))  # all of them: the step may change the gradients
            self._gradient = shared_as(self.tensors, means)

    def choose(self, optimizer: Optimizer) -> None:
        where = position(self.step, **self.schedule.when)
        assert where is not None
        ignored, periods = self.penalized > 0, self.schedule.pruning_periods
        due = self.set_goal.due(where.period, periods, int(ignored.sum()))
        if due > 0 if due is not None else where.t == 0:
            scores = self.scoring.scores(optimizer, self.step, ignored)
            self.penalized[self.set_goal.choose(scores, ignored, where.period, periods)] = where.period + 1
            self._flags = None
        if self.goal.plans or self.step == self.finishing:
            super().choose(optimizer)

    def next_scoring(self) -> int | None:
        if self.step > self.finishing:
            return None
        begin = self.next_period()
        return self.finishing if begin is None else begin

    def scores(self, optimizer: Optimizer) -> list[NDArray[np.float64]]:
        """Norms, those of units that are not penalized behind all others."""
        norms = super().scores(optimizer)
        behind = 1 + max(float(n.max()) for n in norms)
        return [n + behind * (p == 0) for n, p in zip(norms, split(self.penalized, self.groups), strict=True)]

    def project(self, optimizer: Optimizer) -> None:
        space, units = self.space, self.space.units
        if self._flags is None:
            self._flags = torch.from_numpy(self.penalized > 0).to(units.device)
        rates = learning_rates(optimizer, space.tensors, units.names)
        sums, dot, size = self._sums(rates)
        norm = sums.square.sqrt()
        strength = bounded(norm, dot, size, *self.weights(optimizer))
        active = self._flags & ~space.zero & (space.zero.sum() < space.total)
        coefficient = torch.where(active & (norm > 0), -strength / torch.where(norm > 0, norm, 1), 0)
        space.step(coefficient, rates, sums, self.epsilon, among=self._flags)
        self._gradient = {}

    def _sums(self, rates: Rates) -> tuple[StepSums, Tensor, Tensor]:
        """Sums of x and x~, then ``<x, d>`` and ``||d||^2``.  (units,)

        d is the mean gradient, or that of ``x~ = x - alpha d``; where alpha is 0, neither matters.
        """
        space, gradient = self.space, self._gradient
        along = self.direction == "step"

        def pairs(name: Names, block: slice) -> list[tuple[Tensor, Tensor]]:
            x, moved = rows(space.before, name, block), rows(space.tensors, name, block)
            d = x - moved if along else rows(gradient, name, block)
            return [(x, x), (x, d), (d, d), *([] if along else [(x, moved)])]

        inverse = {n: _inverse(rate) for n, rate in rates.items()}
        scales = (inverse, {n: r * r for n, r in inverse.items()}) if along else (None, None)
        wanted = [Sum(0), Sum(0, rates), Sum(1 if along else 3), Sum(1, scales[0]), Sum(2, scales[1])]
        square, weighted, inner, dot, size = space.units.dots(pairs, wanted, bundled=True)
        return StepSums(square, square - inner if along else inner, weighted), dot, size

    def weights(self, optimizer: Optimizer) -> tuple[float, float, float]:
        """lambda, amplify and hat for this base optimizer."""
        usual = _ADAPTIVE if any("betas" in g for g in optimizer.param_groups) else _PLAIN
        lmbda, amplify, hat = (u if w is None else float(w) for w, u in zip(self._weights, usual, strict=True))
        return lmbda, amplify, hat

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {**super().state(), "penalized": torch.from_numpy(self.penalized.copy())}

    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().check_state(state, companions)
        penalized = saved_per_unit(state, "penalized", self.units)
        if int((penalized > 0).sum()) > self.reach or not all((p == 0).any() for p in split(penalized, self.groups)):
            raise CheckpointError(
                f"the optimizer state is damaged: at most {self.reach} units are penalized and every group keeps one; "
                f"it says {int((penalized > 0).sum())}"
            )

    def has_choice(self, state: Mapping[str, Any]) -> bool:
        return super().has_choice(state) or bool(saved_per_unit(state, "penalized", self.units).any())

    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        super().load_state(state, companions)
        self.penalized = saved_per_unit(state, "penalized", self.units).astype(np.int32)
        self._flags = None


def _inverse(rate: float | Tensor) -> float | Tensor:
    """1 / rate, and 1 for 0."""
    return 1 / torch.where(rate == 0, 1, rate) if isinstance(rate, Tensor) else 1 / (rate or 1.0)


def bounded(norm: Tensor, dot: Tensor, square: Tensor, lmbda: float, amplify: float, hat: float) -> Tensor:
    """lambda_g of every unit, from ``||x||``, ``<x, d>`` and ``||d||^2``.  (units,)"""
    growing = (dot < 0) & (norm > 0)
    safe_dot, safe_norm = torch.where(growing, dot, -1), torch.where(growing, norm, 1)
    least, most = -safe_dot / safe_norm, -square * safe_norm / safe_dot
    wanted = (amplify * least).clamp(lmbda, lmbda * hat)
    wanted = torch.where(wanted >= most, (least + most) / 2, wanted)
    return torch.where(growing, wanted, lmbda)
