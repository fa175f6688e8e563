"""Seconds of one training that ends with 70 % of the units gone, next to the dense training of as many steps.

    python -m benchmarks.quality.wall_time      writes benchmarks/results/quality_wall_time.md

Two copies of a network are trained in turns, step by step, in one process, so that other programs on the machine slow
both. All that `OTO.train_once` does is in its time: scoring, choosing, cutting and the check of every cut. The aim is
at most 0.8 of the dense training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from benchmarks.quality.task import Task
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.digits import residual
from benchmarks.quality.tasks.language import Gpt
from only_train_once import OTO

SPARSITY = 0.7
NETWORKS: dict[str, tuple[str, int, Callable[[], Any]]] = {  # name -> task, steps, network
    "residual CNN, 390 k parameters": ("digits_res", 400, lambda: residual(4.0)),
    "GPT-like, 790 k parameters": ("bytes_gpt", 150, lambda: Gpt(128, 8, 16, 512, 4)),
}


def compared(task: Task, model: Any, steps: int, recipe: bool) -> list[float]:
    """Seconds of the dense training, of the one with cuts, and the share of the FLOPs left."""
    start = time.process_time()
    oto = OTO(model, task.example)
    other = copy.deepcopy(model)
    cut, dense = (task.optimizer(m.parameters()) for m in (model, other))
    if recipe:
        oto.train_once(cut, steps, target_group_sparsity=SPARSITY)
    else:
        when = {"start_pruning_step": steps // 10, "pruning_steps": steps // 2, "pruning_periods": 10}
        oto.attach(cut, "hesso", target_group_sparsity=SPARSITY, physical_cuts=True, **when)
    seconds = [0.0, time.process_time() - start]
    before, stream = task.share(model), task.stream(0)
    for _ in range(steps):
        batch = next(stream)
        for number, (network, optimizer) in enumerate(((other, dense), (model, cut))):
            start = time.process_time()
            optimizer.zero_grad()
            task.loss(network.train(), batch).backward()
            optimizer.step()
            seconds[number] += time.process_time() - start
    return [*seconds, task.share(model) / before]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# Wall time of one training",
        "",
        f"`python -m benchmarks.quality.wall_time` with torch {torch.__version__}, 1 thread, CPU, processor time of "
        f"as many steps each, taken in turns: a training that ends with {SPARSITY:.0%} of the units gone, analysis, "
        "choosing and checked cuts included, over the dense training. The aim is at most 0.8.",
        "",
        "| network | steps | settings | dense, s | with cuts, s | ratio | FLOPs left |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, (task, steps, build) in NETWORKS.items():
        for settings in ("train_once", "hesso, half of the steps prune"):
            dense, cut, left = compared(TASKS[task](), build(), steps, settings == "train_once")
            ratio = cut / dense
            lines.append(f"| {name} | {steps} | {settings} | {dense:.1f} | {cut:.1f} | {ratio:.2f} | {left:.2f} |")
            print(lines[-1], flush=True)
    Path("benchmarks/results/quality_wall_time.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
