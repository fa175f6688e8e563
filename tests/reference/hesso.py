"""HESSO in the order of the paper (arXiv 2409.09085): Python loops over units, one boolean mask per unit.

Slow and plain on purpose. It shares no code with the library, only the groups; the base step is a torch optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role


class PaperHesso:
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
        self.base, self.groups, self.parameters = base, groups, parameters
        self.start, self.steps, self.periods = start, steps, periods
        self.period_length = steps // periods
        self.total = math.floor(sum(g.size for g in groups) * sparsity)
        self.history: list[dict[str, Tensor]] = []
        self.n = 0
        self.active: list[tuple[int, int]] = []
        self.gone: list[tuple[int, int]] = []

    def mask(self, group: PruningGroup, unit: int, name: str, roles: set[Role]) -> Tensor:
        """Which entries of a parameter belong to a unit."""
        mask = torch.zeros_like(self.parameters[name], dtype=torch.bool)
        for s in group.slices:
            if s.param == name and s.role in roles:
                for position in s.index[unit]:
                    mask.select(s.dim, int(position)).fill_(True)
        return mask

    def vector(self, group: PruningGroup, unit: int, values: dict[str, Tensor]) -> Tensor:
        """The unit's ``zero`` entries as one vector, every entry once."""
        names = dict.fromkeys(s.param for s in group.slices if s.role is Role.ZERO)
        return torch.cat([values[n][self.mask(group, unit, n, {Role.ZERO})].flatten() for n in names])

    def scores(self, gradients: dict[str, Tensor]) -> dict[tuple[int, int], float]:
        values = {n: p.detach() for n, p in self.parameters.items()}
        table: dict[str, dict[tuple[int, int], float]] = {c: {} for c in ("mag", "avg", "cos", "first", "second")}
        for i, group in enumerate(self.groups):
            for unit in range(group.size):
                x, g = self.vector(group, unit, values), self.vector(group, unit, gradients)
                dot, nx, ng = float(x @ g), float(x.norm()), float(g.norm())
                table["mag"][i, unit] = nx
                table["avg"][i, unit] = nx / len(x)
                table["cos"][i, unit] = 0.0 if nx == 0 else 1 - (dot / (nx * ng) if ng > 0 else 0.0)
                table["first"][i, unit] = abs(dot)
                table["second"][i, unit] = dot * dot / 2
        overall = dict.fromkeys(table["mag"], 0.0)
        for score in table.values():
            norm = math.sqrt(sum(v * v for v in score.values()))
            for key, value in score.items():
                overall[key] += 0.2 * value / norm if norm else 0.0
        return overall

    def choose(self, period: int) -> None:
        window = min(self.period_length, 10)
        recent = self.history[max(0, self.n - window + 1) :]
        mean = {n: sum(h[n] for h in recent) / len(recent) for n in self.parameters}
        count = self.total * (period + 1) // self.periods - len(self.gone)
        overall = self.scores(mean)
        left = {i: g.size - sum(1 for j, _ in self.gone if j == i) for i, g in enumerate(self.groups)}
        for key in sorted((k for k in overall if k not in self.gone), key=lambda k: (overall[k], k)):
            if len(self.active) == count:
                break
            if left[key[0]] > 1:
                left[key[0]] -= 1
                self.active.append(key)

    @torch.no_grad()
    def step(self) -> None:
        self.history.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.parameters.items()}
        )
        inside = self.start <= self.n < self.start + self.steps
        period = min((self.n - self.start) // self.period_length, self.periods - 1)
        t = self.n - self.start - period * self.period_length
        length = self.steps - period * self.period_length if period == self.periods - 1 else self.period_length
        if inside and t == 0:
            self.choose(period)
        self.base.step()
        if inside:
            owned = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.parameters.items()}
            roles = {Role.ZERO, Role.CONSUMER} if t == length - 1 else {Role.ZERO}
            for i, unit in self.active:
                for name in owned:
                    owned[name] |= self.mask(self.groups[i], unit, name, roles)
            for name, mask in owned.items():
                self.parameters[name][mask] *= (length - t - 1) / (length - t)
            if t == length - 1:
                for name, mask in owned.items():
                    self.clear(name, mask)
                self.gone += self.active
                self.active = []
        for i, unit in self.gone:
            for s in self.groups[i].slices:
                if s.pinned and s.role in (Role.ZERO, Role.CONSUMER):
                    self.clear(s.param, self.mask(self.groups[i], unit, s.param, {s.role}))
        self.n += 1

    def clear(self, name: str, mask: Tensor) -> None:
        parameter = self.parameters[name]
        parameter[mask] = 0
        for value in self.base.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[mask] = 0
