"""HESSO-CRIC in the order of the paper (arXiv 2409.09085): simulate, put back, look what came up, then the ramp."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.reference.hesso import PaperHesso
from tests.reference.paper import Unit


class PaperCric(PaperHesso):
    """The scores of every sampled step are kept in a list."""

    def __init__(self, *run: Any, start: int, sampling: int, cycles: int, tolerance: int, ramp: int) -> None:
        super().__init__(*run, start, 1, 1)
        self.sampling, self.cycles, self.tolerance, self.length = sampling, cycles, tolerance, ramp
        self.buffers: dict[str, Tensor] = {}
        self.seen: list[dict[Unit, float]] = []
        self.violators: list[Unit] = []
        self.historical: list[Unit] = []
        self.candidates: list[Unit] = []
        self.cycle = 0
        self.ramp_start: int | None = None
        self.copy: Any = None

    def put_back(self) -> None:
        parameters, state, buffers = self.copy
        for name, value in parameters.items():
            self.parameters[name].copy_(value)
        self.base.load_state_dict(copy.deepcopy(state))
        for name, value in buffers.items():
            self.buffers[name].copy_(value)

    def sample(self) -> None:
        t = (self.n - self.start) % self.sampling
        scores = self.scores(self.gradients())
        if self.n == self.start:
            buffers = {n: b.clone() for n, b in self.buffers.items()}
            self.copy = (self.values(), copy.deepcopy(self.base.state_dict()), buffers)
            self.violators = self.lowest(scores, [], self.total)
        if t == 0:
            self.historical += self.violators
        self.seen.append(scores)
        self.candidates += [u for u in self.lowest(scores, [], self.total) if u not in self.historical]
        self.base.step()
        self.ramp_without_commit(t)
        if t < self.sampling - 1:
            return
        self.put_back()
        self.cycle += 1
        self.violators, self.candidates = list(dict.fromkeys(self.candidates)), []
        if self.cycle >= self.cycles or len(self.violators) <= self.tolerance:
            self.ramp_start = self.n + 1

    def ramp_without_commit(self, t: int) -> None:
        for name, parameter in self.parameters.items():
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            for unit in self.violators:
                mask |= self.mask(unit, name)
            parameter[mask] *= (self.sampling - t - 1) / (self.sampling - t)

    @torch.no_grad()
    def step(self) -> None:
        if self.n >= self.start and self.ramp_start is None:
            self.sample()
        else:
            t = self.n - (self.ramp_start or 0)
            if self.ramp_start is not None and t == 0:
                mean = {u: sum(s[u] for s in self.seen) / len(self.seen) for u in self.all_units}
                self.active = self.lowest(mean, [], self.total)
            self.base.step()
            if self.ramp_start is not None and t < self.length:
                self.ramp(self.active, t, self.length)
                if t == self.length - 1:
                    self.gone = self.active
            self.pin()
        self.n += 1
