"""HSPG in the order of the papers (arXiv 2009.12078, 2107.07467), bounded by a target, then finished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup
from tests.reference.paper import Paper, Unit


class PaperHalfSpace(Paper):
    """Stages that send units to zero, then a ramp for those that are missing."""

    def __init__(
        self,
        base: Optimizer,
        groups: Sequence[PruningGroup],
        parameters: dict[str, Tensor],
        sparsity: float,
        *,
        lmbda: float,
        epsilon: float,
        warm_up: int,
        start: int,
        steps: int,
        finish: int,
    ) -> None:
        super().__init__(base, groups, parameters, sparsity)
        self.lmbda, self.epsilon = lmbda, epsilon
        self.warm_up, self.start, self.finish_at, self.end = warm_up, start, start + steps - finish, start + steps
        self.zero: list[Unit] = []
        self.rest: list[Unit] = []

    def admit(self, wanted: list[tuple[float, Unit]]) -> list[Unit]:
        """Those that may go to zero: the lowest first, while group and total have room."""
        left = [g.size - 1 - sum(1 for j, _ in self.zero if j == i) for i, g in enumerate(self.groups)]
        room = self.total - len(self.zero)
        out = []
        for _, unit in sorted(wanted):
            if room > 0 and left[unit[0]] > 0:
                room, left[unit[0]] = room - 1, left[unit[0]] - 1
                out.append(unit)
        return out

    def hold(self) -> None:
        for unit in self.zero:
            for name in self.names(unit):
                self.parameters[name][self.mask(unit, name)] = 0

    def penalty(self, unit: Unit, x: dict[str, Tensor], weight: float) -> None:
        """x~ <- x~ - alpha weight x_g / ||x_g||"""
        norm = float(self.vector(unit, x).norm())
        for name in self.names(unit):
            mask = self.mask(unit, name)
            self.parameters[name][mask] -= self.rate(name) * weight * x[name][mask] / norm

    def outside(self, unit: Unit, x: dict[str, Tensor]) -> float | None:
        """How far beyond its half-space a step has carried a unit, None if it is inside."""
        old = self.vector(unit, x)
        inner = float(self.vector(unit, self.values()) @ old)
        return inner / float(old @ old) if inner < self.epsilon * float(old @ old) else None

    def half_space(self, x: dict[str, Tensor], weights: dict[Unit, float]) -> None:
        """Penalize, then project what has left its half-space; zeros stay."""
        live = [u for u in weights if u not in self.zero]
        for unit in live:
            self.penalty(unit, x, weights[unit])
        wanted = [(far, unit) for unit in live if (far := self.outside(unit, x)) is not None]
        self.zero += self.admit(wanted)
        self.hold()

    def prox(self) -> None:
        """x_g <- max(0, 1 - alpha lambda / ||x^_g||) x^_g, units at zero included."""
        here = self.values()
        norms = {u: float(self.vector(u, here).norm()) for u in self.all_units}
        gone = []
        for unit, norm in norms.items():
            factors = {n: 1 - self.rate(n) * self.lmbda / norm if norm else 1.0 for n in self.names(unit)}
            if max(factors.values()) <= 0:
                gone.append((norm, unit))
                continue
            for name in self.names(unit):
                self.parameters[name][self.mask(unit, name)] *= max(factors[name], 0.0)
        self.zero = [u for u in self.zero if norms[u] == 0]
        self.zero += self.admit([g for g in gone if g[1] not in self.zero])
        self.hold()

    def before(self, x: dict[str, Tensor]) -> None:
        """What happens when gradients are there and nothing has changed."""

    def stage(self, x: dict[str, Tensor]) -> None:
        """What happens after the base step, before the finish."""
        raise NotImplementedError

    def eligible(self) -> list[Unit]:
        """Who may be taken at the finish."""
        return self.all_units

    @torch.no_grad()
    def step(self) -> None:
        self.history.append(self.gradients())
        x = self.values()
        self.before(x)
        if self.n == self.finish_at:
            norms = {u: float(self.vector(u, x).norm()) for u in self.eligible()}
            self.rest = self.lowest(norms, self.zero, self.total - len(self.zero))
        self.base.step()
        if self.warm_up <= self.n < self.finish_at:
            self.stage(x)
        elif self.finish_at <= self.n < self.end:
            self.ramp([*self.zero, *self.rest], self.n - self.finish_at, self.end - self.finish_at)
            self.hold()
            if self.n == self.end - 1:
                self.gone = [*self.zero, *self.rest]
        self.pin()
        self.n += 1


class PaperHspg(PaperHalfSpace):
    """Prox or sub-gradient stage, then half-space stage."""

    first_stage = "subgradient"

    def stage(self, x: dict[str, Tensor]) -> None:
        everyone = dict.fromkeys(self.all_units, self.lmbda)
        if self.n >= self.start:
            self.half_space(x, everyone)
        elif self.first_stage == "prox":
            self.prox()
        else:
            for unit in everyone:
                self.penalty(unit, x, self.lmbda)
