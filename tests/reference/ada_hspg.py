"""AdaHSPG+ as its description has it: proximal or half-space steps, a period at a time."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tests.reference.hspg import PaperHalfSpace


class PaperAdaHspg(PaperHalfSpace):
    """Every decision is written down."""

    def __init__(self, *run: Any, mu: float, delta: float, periods: int, window: int, **kwargs: Any) -> None:
        super().__init__(*run, **kwargs)
        self.mu, self.delta, self.window = mu, delta, window
        length = (self.end - self.start) // periods
        self.decisions_at = [self.start + p * length for p in range(periods)]
        self.kinds: list[str] = []
        self.counts: list[int] = []

    def before(self, x: dict[str, Tensor]) -> None:
        if self.n not in self.decisions_at or self.n >= self.finish_at:
            return
        gradients = self.mean_gradients(min(self.window, self.n + 1))
        prox = half = 0.0
        for unit in self.all_units:
            here, trial = self.vector(unit, x), {n: x[n] - self.rate(n) * gradients[n] for n in x}
            there = self.vector(unit, trial)
            norm = float(there.norm())
            factor = max(0.0, 1 - self.rate("") * self.lmbda / norm) if norm else 1.0
            moved = float((factor * there - here).norm()) ** 2
            if factor == 0 or float(here.norm()) <= self.delta:
                prox += moved
            else:
                half += moved
        self.kinds.append("prox" if math.sqrt(prox) >= self.mu * math.sqrt(half) else "half")
        if self.counts and len(self.zero) - self.counts[-1] <= 0.01 * len(self.all_units):
            self.epsilon = min(self.epsilon + 0.1, 0.999)
        self.counts.append(len(self.zero))

    def rate(self, name: str) -> float:
        return float(self.base.param_groups[0]["lr"])  # one rate for all

    def stage(self, x: dict[str, Tensor]) -> None:
        if self.kinds[-1] == "prox":
            self.prox()
            return
        near = [u for u in self.all_units if float(self.vector(u, x).norm()) <= self.delta]
        for unit in near:
            for name in self.names(unit):
                mask = self.mask(unit, name)
                self.parameters[name][mask] = x[name][mask]
        self.half_space(x, {u: self.lmbda for u in self.all_units if u not in near})
