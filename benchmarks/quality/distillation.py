"""The recipe with a teacher: the moving average of the network's own weights, which loses the same units.

A step then costs a forward pass of the average more, a third of what it cost, so the budget buys fewer of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.competitors import Asked, begun, small
from benchmarks.quality.task import Batch
from benchmarks.quality.training import Run

SHARE = 1 / 3  # of a step, for the teacher's forward pass


def taught_once(
    asked: Asked, recipe: dict[str, Any], weight: float = 0.5, temperature: float = 2.0, decay: float = 0.99
) -> tuple[nn.Module, Run]:
    """For tasks whose batches are (inputs, labels) and whose loss is the cross-entropy."""
    one = begun(asked, recipe, budget=round(asked.task.steps / (1 + SHARE)))
    average = copy.deepcopy(one.model).eval().requires_grad_(False)
    one.optimizer.cut_also(average)  # type: ignore[attr-defined]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            for own, new in zip(average.parameters(), model.parameters(), strict=True):
                own.lerp_(new, 1 - decay)
            for own, new in zip(average.buffers(), model.buffers(), strict=True):
                own.copy_(new)
            taught = F.log_softmax(average(batch[0]) / temperature, -1)
        found = model(batch[0])
        near = F.kl_div(F.log_softmax(found / temperature, -1), taught, log_target=True, reduction="batchmean")
        return (1 - weight) * F.cross_entropy(found, batch[1]) + weight * temperature**2 * near

    one.run.train(one.model, one.optimizer, one.steps, loss=loss)
    one.run.spent *= 1 + SHARE
    return small(one.oto, asked), one.run
