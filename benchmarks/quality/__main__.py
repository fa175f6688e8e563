"""Run competitors on tasks and append one line of JSON for every training.

    python -m benchmarks.quality --task digits_res --levels 0.25 0.1 0.05 --seeds 5 --budget flops

    python -m benchmarks.quality --task imagenet_resnet50 --data /data --device cuda --workers 12 --seeds 1

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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from benchmarks.devices import CPU, clock_of
from benchmarks.quality.ablation import VARIANTS
from benchmarks.quality.competitors import BUDGETS, COMPETITORS, Asked, Competitor, recipe_of, unsuited
from benchmarks.quality.devices import latency, on
from benchmarks.quality.task import Task, flops
from benchmarks.quality.tasks import AT_HAND, TASKS, make
from benchmarks.quality.tasks.folders import Source

RESULTS = Path("benchmarks/results/quality.jsonl")
ABLATION = Path("benchmarks/results/quality_ablation.jsonl")
KEYS = ("task", "competitor", "level", "seed", "budget", "split")
Key = tuple[Any, ...]


def known(path: Path) -> dict[Key, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def key(row: dict[str, Any]) -> Key:
    return tuple(row[name] for name in KEYS)


def measured(
    task: Task, competitor: Competitor, asked: Asked, split: str, device: torch.device = CPU
) -> dict[str, Any]:
    """What is written down of a training."""
    clock = clock_of(device)
    start = clock()
    model, run = competitor(asked)
    score = task.score(model, split)
    return {
        "metric": task.metric,
        "score": round(score, 4),
        **{name: round(other(model, split), 4) for name, other in task.also.items()},
        "training_flops": round(run.spent / task.steps, 4),
        "steps": run.done,
        "dense_steps": task.steps,
        "flops": round(flops(model, task.example) / task.full_flops, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "latency_ms": round(latency(model.eval(), task.example, device), 3),
        "seconds": round(clock() - start, 1),
        "settings": settings(competitor, asked),
        "device": str(device),
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=AT_HAND)
    parser.add_argument("--competitor", nargs="+", choices=[*COMPETITORS, *VARIANTS], default=list(COMPETITORS))
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.1, 0.05])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=["flops"])
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--data", type=Path, default=Source.folder, help="holds the folders of CIFAR-10, ImageNet, SQuAD"
    )
    parser.add_argument("--workers", type=int, default=Source.workers, help="processes that read ImageNet's pictures")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16; needs --out")
    parser.add_argument("--steps", type=int, help="of the dense training, for a trial; needs --out")
    options = parser.parse_args(arguments)
    if options.out is None and (options.bf16 or options.steps is not None):
        parser.error("--bf16 and --steps make other numbers: name a file for them with --out")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # a target missed by more than 1 % is seen in the FLOPs of the line
    torch.set_num_threads(1)
    out = options.out or (RESULTS if options.split == "test" else ABLATION)
    everyone = {**COMPETITORS, **VARIANTS}
    source = Source(options.data, options.workers)
    try:
        tasks = {name: on(make(name, source), options.device, options.bf16) for name in options.task}
    except FileNotFoundError as error:
        parser.error(str(error))
    if options.steps is not None:
        tasks = {name: dataclasses.replace(task, steps=options.steps) for name, task in tasks.items()}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked = itertools.product(seeds, tasks, options.budget, options.levels, options.competitor)
    for seed, name, budget, level, competitor in asked:
        at = 1.0 if competitor == "dense" else level
        run = (name, competitor, at, seed, budget, options.split)
        if run in known(out):
            continue
        task = tasks[name]
        if (reason := unsuited(competitor, task)) is not None:
            print(*run, "not run:", reason, flush=True)
            continue
        found = measured(task, everyone[competitor], Asked(task, at, seed, budget), options.split, options.device)
        with out.open("a") as file:
            file.write(json.dumps({**dict(zip(KEYS, run, strict=True)), **found}) + "\n")
        print(*run, found["score"], found["training_flops"], found["flops"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
