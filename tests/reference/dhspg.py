"""DHSPG in the order of the paper (OTOv2, arXiv 2303.06862): a penalized set, a weight for each of its units."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tests.reference.hspg import PaperHalfSpace
from tests.reference.paper import Unit


class PaperDhspg(PaperHalfSpace):
    """Warm-up, one choice of exactly the target's number, dual half-space steps."""

    def __init__(self, *args: Any, amplify: float, hat: float, direction: str, window: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.amplify, self.hat, self.direction, self.window = amplify, hat, direction, window
        self.penalized: list[Unit] = []

    def choose(self, x: dict[str, Tensor]) -> None:
        gradients = self.mean_gradients(min(self.window, self.n + 1))
        cosine, average = {}, {}
        for unit in self.all_units:
            v, g = self.vector(unit, x), self.vector(unit, gradients)
            cosine[unit] = 1 - float(v @ g) / float(v.norm() * g.norm())
            average[unit] = float(v.norm()) / len(v)
        scores = dict.fromkeys(cosine, 0.0)
        for table in (cosine, average):
            norm = math.sqrt(sum(v * v for v in table.values()))
            for unit, value in table.items():
                scores[unit] += 0.5 * value / norm
        self.penalized = self.lowest(scores, [], self.total)

    def before(self, x: dict[str, Tensor]) -> None:
        if self.n == self.start:
            self.choose(x)

    def weight(self, x: Tensor, d: Tensor) -> float:
        dot, norm = float(x @ d), float(x.norm())
        if dot >= 0:
            return self.lmbda
        least, most = -dot / norm, -float(d @ d) * norm / dot
        weight = min(max(self.amplify * least, self.lmbda), self.lmbda * self.hat)
        return (least + most) / 2 if weight >= most else weight

    def stage(self, x: dict[str, Tensor]) -> None:
        if self.direction == "gradient":
            d = self.history[-1]
        else:
            d = {n: (x[n] - p.detach()) / self.rate(n) for n, p in self.parameters.items()}
        live = [u for u in self.penalized if u not in self.zero]
        if len(self.zero) < self.total:
            self.half_space(x, {u: self.weight(self.vector(u, x), self.vector(u, d)) for u in live})
        self.hold()

    def eligible(self) -> list[Unit]:
        return self.penalized
