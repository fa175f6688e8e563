"""What a step of an optimizer with a method attached costs, as a ratio to the base optimizer's own step.

    python -m benchmarks.step_cost            writes benchmarks/results/step_cost.md

Two copies of a ResNet-18 with fixed gradients; the two optimizers step in turns in one process, and the median of the
ratio is taken over the steps before, during and after pruning. The forward and backward pass are not in it.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from only_train_once import OTO

START, STEPS, END = 30, 180, 260
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD momentum, for-loop": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "foreach": False}),
    "SGD momentum, foreach": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "foreach": True}),
    "AdamW, foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
}
_PERIODS = {"start_pruning_step": START, "pruning_steps": STEPS, "pruning_periods": 3}
METHODS: dict[str, dict[str, Any]] = {
    "hesso": _PERIODS,
    "hspg": {**_PERIODS, "warm_up_steps": START},
    "ada_hspg": _PERIODS,
    "dhspg": _PERIODS,
    "hesso_cric": {
        "start_cric_step": START, "sampling_steps": 30, "max_cycle_period": 3, "hybrid_training_steps": STEPS - 90,
    },
}  # fmt: skip
ROWS = [*(("hesso", base) for base in BASES), *((method, "SGD momentum, foreach") for method in [*METHODS][1:])]


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def row(method: str, name: str) -> str:
    import torchvision

    cls, options = BASES[name]
    plain = torchvision.models.resnet18(weights=None)
    pruned = copy.deepcopy(plain)
    oto = OTO(pruned, torch.randn(2, 3, 64, 64))
    base, attached = (cls(m.parameters(), **options) for m in (plain, pruned))
    oto.attach(attached, method=method, target_group_sparsity=0.5, **METHODS[method])
    for model in (plain, pruned):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
    ratios: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for step in range(END):
        one, other = seconds(base), seconds(attached)
        phase = "before" if step < START else "during" if step < START + STEPS else "after"
        ratios[phase].append(other / one)
    return " | ".join([f"| {method} | {name}", *(f"{statistics.median(r):.2f}" for r in ratios.values())]) + " |"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [row(method, base) for method, base in ROWS]
    text = [
        "# Cost of a step",
        "",
        f"`python -m benchmarks.step_cost` with torch {torch.__version__}, 1 thread, CPU: the optimizer's step alone "
        "with a method attached over the same step without, ResNet-18, median of interleaved steps. The forward and "
        "backward pass, which take most of an iteration, are not in it.",
        "",
        "| method | base | before pruning | during | after |",
        "|---|---|---:|---:|---:|",
        *rows,
        "",
    ]
    Path("benchmarks/results/step_cost.md").write_text("\n".join(text))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
