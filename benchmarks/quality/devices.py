"""A task on another device or in another precision: networks, inputs and batches go there, and the task is unaware."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.devices import CPU, clock_of, moved
from benchmarks.quality.task import Batch, Task

Score = Callable[[nn.Module, str], float]
Loss = Callable[[nn.Module, Batch], Tensor]


class Remote(nn.Module):
    """A network on a device, for whoever has inputs on the CPU and wants outputs there, in float32."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        found = self.model(*moved(inputs, self.device), **moved(named, self.device))
        if isinstance(found, Tensor):
            return found.to(CPU).float()
        return type(found)(**{k: v.to(CPU).float() for k, v in found.items()})


def on(task: Task, device: torch.device, bf16: bool = False) -> Task:
    """The task with its networks on the device; forward passes of training and scoring in bfloat16 if asked for."""
    if device == CPU and not bf16:
        return task

    def cast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        return (moved(batch, device) for batch in task.batches(generator))

    def learned(loss: Loss) -> Loss:
        def there(model: nn.Module, batch: Batch) -> Tensor:
            with cast():
                return loss(model, batch)

        return there

    def scored(score: Score) -> Score:
        def there(model: nn.Module, split: str) -> float:
            with cast():
                return score(Remote(model, device), split)

        return there

    return replace(
        task,
        build=lambda width: task.build(width).to(device),
        batches=batches,
        loss=learned(task.loss),
        settled_loss=None if task.settled_loss is None else learned(task.settled_loss),
        score=scored(task.score),
        also={name: scored(score) for name, score in task.also.items()},
        example=moved(task.example, device),
    )


@torch.no_grad()
def latency(model: nn.Module, example: Any, device: torch.device = CPU) -> float:
    """Milliseconds of a forward pass on the example, the median of 20: the processor's time, or a device's."""
    clock = clock_of(device)
    times = []
    for _ in range(20):
        start = clock()
        model(**example) if isinstance(example, dict) else model(example)
        times.append(1e3 * (clock() - start))
    return statistics.median(times)
