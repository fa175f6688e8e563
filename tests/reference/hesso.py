"""HESSO in the order of the paper (arXiv 2409.09085): Python loops over units, one boolean mask per unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup
from tests.reference.paper import Paper, Unit


class PaperHesso(Paper):
    """Keep every gradient, mask every unit, decide by sorting a list."""

    def __init__(
        self,
        base: Optimizer,
        groups: Sequence[PruningGroup],
        parameters: dict[str, Tensor],
        sparsity: float,
        start: int,
        steps: int,
        periods: int,
    ) -> None:
        super().__init__(base, groups, parameters, sparsity)
        self.start, self.steps, self.periods = start, steps, periods
        self.period_length = steps // periods
        self.active: list[Unit] = []

    def scores(self, gradients: dict[str, Tensor]) -> dict[Unit, float]:
        values = self.values()
        table: dict[str, dict[Unit, float]] = {c: {} for c in ("mag", "avg", "cos", "first", "second")}
        for unit in self.all_units:
            x, g = self.vector(unit, values), self.vector(unit, gradients)
            dot, nx, ng = float(x @ g), float(x.norm()), float(g.norm())
            table["mag"][unit] = nx
            table["avg"][unit] = nx / len(x)
            table["cos"][unit] = 0.0 if nx == 0 else 1 - (dot / (nx * ng) if ng > 0 else 0.0)
            table["first"][unit] = abs(dot)
            table["second"][unit] = dot * dot / 2
        overall = dict.fromkeys(table["mag"], 0.0)
        for score in table.values():
            norm = math.sqrt(sum(v * v for v in score.values()))
            for key, value in score.items():
                overall[key] += 0.2 * value / norm if norm else 0.0
        return overall

    def choose(self, period: int) -> None:
        count = self.total * (period + 1) // self.periods - len(self.gone)
        overall = self.scores(self.mean_gradients(min(self.period_length, 10, self.n + 1)))
        self.active = self.lowest(overall, self.gone, count)

    @torch.no_grad()
    def step(self) -> None:
        self.history.append(self.gradients())
        inside = self.start <= self.n < self.start + self.steps
        period = min((self.n - self.start) // self.period_length, self.periods - 1)
        t = self.n - self.start - period * self.period_length
        length = self.steps - period * self.period_length if period == self.periods - 1 else self.period_length
        if inside and t == 0:
            self.choose(period)
        self.base.step()
        if inside:
            self.ramp(self.active, t, length)
            if t == length - 1:
                self.gone += self.active
                self.active = []
        self.pin()
        self.n += 1
