"""Run competitors on tasks and append one line of JSON for every training.

    python -m benchmarks.quality --task digits_res --levels 0.25 0.1 0.05 --seeds 5 --budget flops

A run that is in the file already is skipped, so that this can be stopped and called again. Settings are chosen with
``--split validation --first-seed 100``; the numbers of the table are the test split's, with seeds from 0 on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from benchmarks.quality.ablation import VARIANTS
from benchmarks.quality.competitors import BUDGETS, COMPETITORS, Asked, Competitor, recipe_of
from benchmarks.quality.task import Task, flops
from benchmarks.quality.tasks import AT_HAND, TASKS

RESULTS = Path("benchmarks/results/quality.jsonl")
ABLATION = Path("benchmarks/results/quality_ablation.jsonl")
KEYS = ("task", "competitor", "level", "seed", "budget", "split")
Key = tuple[Any, ...]


def known(path: Path) -> dict[Key, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def key(row: dict[str, Any]) -> Key:
    return tuple(row[name] for name in KEYS)


@torch.no_grad()
def latency(model: torch.nn.Module, example: Any) -> float:
    """Milliseconds of processor time of a forward pass on the example, on one thread, the median of 20."""
    times = []
    for _ in range(20):
        start = time.process_time()
        model(**example) if isinstance(example, dict) else model(example)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def measured(task: Task, competitor: Competitor, asked: Asked, split: str) -> dict[str, Any]:
    """What is written down of a training."""
    start = time.process_time()
    model, run = competitor(asked)
    score = task.score(model, split)
    return {
        "metric": task.metric,
        "score": round(score, 4),
        "training_flops": round(run.spent / task.steps, 4),
        "steps": run.done,
        "dense_steps": task.steps,
        "flops": round(flops(model, task.example) / task.full_flops, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "latency_ms": round(latency(model.eval(), task.example), 3),
        "seconds": round(time.process_time() - start, 1),
        "settings": settings(competitor, asked),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def settings(competitor: Competitor, asked: Asked) -> dict[str, Any]:
    """What the competitor was given besides the task; a recipe with everything in it."""
    given = dict(getattr(competitor, "keywords", {}))
    if "recipe" in given:
        recipe = dataclasses.asdict(recipe_of(asked, given["recipe"]))
        given["recipe"] = {**recipe, "roles": [str(getattr(r, "value", r)) for r in recipe["roles"]]}
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=AT_HAND)
    parser.add_argument("--competitor", nargs="+", choices=[*COMPETITORS, *VARIANTS], default=list(COMPETITORS))
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.1, 0.05])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=["flops"])
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # a target missed by more than 1 % is seen in the FLOPs of the line
    torch.set_num_threads(1)
    out = options.out or (RESULTS if options.split == "test" else ABLATION)
    everyone = {**COMPETITORS, **VARIANTS}
    tasks = {name: TASKS[name]() for name in options.task}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked = itertools.product(seeds, tasks, options.budget, options.levels, options.competitor)
    for seed, name, budget, level, competitor in asked:
        at = 1.0 if competitor == "dense" else level
        run = (name, competitor, at, seed, budget, options.split)
        if run in known(out):
            continue
        found = measured(tasks[name], everyone[competitor], Asked(tasks[name], at, seed, budget), options.split)
        with out.open("a") as file:
            file.write(json.dumps({**dict(zip(KEYS, run, strict=True)), **found}) + "\n")
        print(*run, found["score"], found["training_flops"], found["flops"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
