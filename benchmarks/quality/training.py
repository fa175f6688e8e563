"""The one training loop of all competitors, which counts what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quality.task import RISE, Batch, Task


@dataclass
class Run:
    """A training in one or more parts.

    Attributes:
        spent: FLOPs so far, in steps of the full network: a step costs in proportion to a forward pass, whatever is
            trained. What analysis, verification and choosing take is not counted.
        done: steps so far.
    """

    task: Task
    seed: int
    spent: float = 0.0
    done: int = 0

    def __post_init__(self) -> None:
        self._stream = self.task.stream(self.seed)

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        part: tuple[float, float] = (0.0, 1.0),
        rise: float | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        settled: int | None = None,
    ) -> None:
        """Train on for so many steps, which are this part of a learning-rate schedule that rises over a share of it.

        From step ``settled`` on the network has its final size, and the task may want another loss.
        """
        if rise is None:
            rise = RISE * self.task.steps * (part[1] - part[0]) / steps
        peaks = [group.setdefault("peak", group["lr"]) for group in optimizer.param_groups]
        loss = loss or self.task.loss
        size, share = -1, 0.0
        model.train()
        for step in range(steps):
            now = sum(p.numel() for p in model.parameters())
            if now != size:  # units have left
                size, share = now, self.task.share(model)
            if step == settled:
                loss = self.task.settled_loss or loss
            rate = self.task.schedule(part[0] + (part[1] - part[0]) * step / steps, rise)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            value = loss(model, next(self._stream))
            optimizer.zero_grad()
            value.backward()
            if before_step is not None:
                before_step(model)
            if self.task.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.task.clip)
            optimizer.step()
            self.done += 1
            self.spent += share
