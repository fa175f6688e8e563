"""What the slow versions share: masks, vectors and clearing, one unit at a time.

They share no code with the library, only the groups; the base step is a torch optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role

Unit = tuple[int, int]  # number of the group, number of the unit in it
OWNED = (Role.ZERO, Role.CONSUMER)


class Paper:
    """A base optimizer, groups, and who is gone."""

    def __init__(
        self, base: Optimizer, groups: Sequence[PruningGroup], parameters: dict[str, Tensor], sparsity: float
    ) -> None:
        self.base, self.groups, self.parameters = base, groups, parameters
        self.total = math.floor(sum(g.size for g in groups) * sparsity)
        self.history: list[dict[str, Tensor]] = []
        self.n = 0
        self.gone: list[Unit] = []

    @property
    def all_units(self) -> list[Unit]:
        return [(i, u) for i, g in enumerate(self.groups) for u in range(g.size)]

    def mask(self, unit: Unit, name: str, roles: Collection[Role] = (Role.ZERO,)) -> Tensor:
        """Which entries of a parameter belong to a unit."""
        mask = torch.zeros_like(self.parameters[name], dtype=torch.bool)
        for s in self.groups[unit[0]].slices:
            if s.param == name and s.role in roles:
                for position in s.index[unit[1]]:
                    mask.select(s.dim, int(position)).fill_(True)
        return mask

    def names(self, unit: Unit) -> list[str]:
        """Parameters in which a unit has ``zero`` entries."""
        return list(dict.fromkeys(s.param for s in self.groups[unit[0]].slices if s.role is Role.ZERO))

    def vector(self, unit: Unit, values: dict[str, Tensor]) -> Tensor:
        """The unit's ``zero`` entries as one vector, every entry once."""
        return torch.cat([values[n][self.mask(unit, n)].flatten() for n in self.names(unit)])

    def values(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    def gradients(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.parameters.items()}

    def mean_gradients(self, window: int) -> dict[str, Tensor]:
        """Over the last steps, this one included; ``history`` has to hold them."""
        recent = self.history[-window:]
        return {n: sum(h[n] for h in recent) / len(recent) for n in self.parameters}  # type: ignore[misc]

    def rate(self, name: str) -> float:
        for group in self.base.param_groups:
            if any(p is self.parameters[name] for p in group["params"]):
                return float(group["lr"])
        raise AssertionError(name)

    def lowest(self, scores: dict[Unit, float], gone: Collection[Unit], count: int) -> list[Unit]:
        """The units to go next, by score, group, number; every group keeps one."""
        left = [g.size - sum(1 for j, _ in gone if j == i) for i, g in enumerate(self.groups)]
        out: list[Unit] = []
        for unit in sorted((u for u in scores if u not in gone), key=lambda u: (scores[u], u)):
            if len(out) == count:
                break
            if left[unit[0]] > 1:
                left[unit[0]] -= 1
                out.append(unit)
        return out

    def ramp(self, units: Collection[Unit], t: int, length: int) -> None:
        """Step ``t`` of a ramp; the last one commits."""
        last = t == length - 1
        for name in self.parameters:
            mask = torch.zeros_like(self.parameters[name], dtype=torch.bool)
            for unit in units:
                mask |= self.mask(unit, name, OWNED if last else (Role.ZERO,))
            self.parameters[name][mask] *= (length - t - 1) / (length - t)
            if last:
                self.clear(name, mask)

    def clear(self, name: str, mask: Tensor) -> None:
        parameter = self.parameters[name]
        parameter[mask] = 0
        for value in self.base.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[mask] = 0

    def pin(self) -> None:
        """Hold what gets gradients although its unit is gone."""
        for i, unit in self.gone:
            for s in self.groups[i].slices:
                if s.pinned and s.role in OWNED:
                    self.clear(s.param, self.mask((i, unit), s.param, (s.role,)))
