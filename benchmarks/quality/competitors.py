"""Who competes: name -> a function that trains a network for a task within a budget.

The budget is that of ``task.steps`` steps of the full network: in FLOPs, so that whoever trains a smaller network makes
more steps, or in steps. All get the same data, batches, optimizer, shape of the learning-rate schedule and seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.quality import peers
from benchmarks.quality.task import Task
from benchmarks.quality.training import Run
from only_train_once import OTO
from only_train_once.recipe import Recipe, recipe_for

BUDGETS = ("flops", "steps")
OVER = 1.01  # how far a target may be missed


@dataclass(frozen=True)
class Asked:
    """What is asked of a competitor: a network that costs ``level`` of the full one, from a budget."""

    task: Task
    level: float
    seed: int
    budget: str

    def steps(self, share: float, level: float) -> int:
        """Steps that this share of the budget buys for a network that costs ``level`` of the full one."""
        return max(round(share * self.task.steps / (level if self.budget == "flops" else 1.0)), 1)

    def fresh(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.task.build(1.0)


Competitor = Callable[[Asked], tuple[nn.Module, Run]]


def dense(asked: Asked) -> tuple[nn.Module, Run]:
    """The full network, whatever the level."""
    model, run = asked.fresh(), Run(asked.task, asked.seed)
    run.train(model, asked.task.optimizer(model.parameters()), asked.task.steps)
    return model, run


def scratch(asked: Asked) -> tuple[nn.Module, Run]:
    """A network of uniform width that costs as much, from the start."""
    torch.manual_seed(asked.seed)
    model, run = asked.task.narrow(asked.level), Run(asked.task, asked.seed)
    steps = asked.steps(1.0, asked.task.share(model))
    run.train(model, asked.task.optimizer(model.parameters()), steps, settled=0)
    return model, run


def recipe_of(asked: Asked, changes: dict[str, Any]) -> Recipe:
    """The library's recipe for the budget, with what the task and ``changes`` want otherwise."""
    usual = "equal_cost" if asked.budget == "flops" else "cheaper"
    return replace(recipe_for(asked.task.recipe or usual, None), **changes)


@dataclass(frozen=True)
class Begun:
    """A training with this library that is about to begin, of so many steps."""

    oto: OTO
    optimizer: torch.optim.Optimizer
    run: Run
    made: Recipe
    steps: int

    @property
    def model(self) -> nn.Module:
        return self.oto.model


def begun(asked: Asked, recipe: dict[str, Any], budget: int | None = None, **config: Any) -> Begun:
    """``recipe`` and ``config`` are what differs from the library's defaults, ``budget`` from the task's steps."""
    task, steps = asked.task, budget or asked.task.steps
    model, run = asked.fresh(), Run(task, asked.seed)
    optimizer = task.optimizer(model.parameters())
    oto = OTO(model, task.example, wide=task.wide)
    made = recipe_of(asked, recipe)
    length = {"full_steps" if asked.budget == "flops" else "total_steps": steps}
    oto.train_once(optimizer, **length, recipe=made, target_flops=asked.level, **config)
    steps = made.steps_within(steps, asked.level) if asked.budget == "flops" else steps
    return Begun(oto, optimizer, run, made, steps)


def once(asked: Asked, recipe: dict[str, Any], **config: Any) -> tuple[nn.Module, Run]:
    """One training with this library."""
    one = begun(asked, recipe, **config)
    when = one.made.when(one.steps, asked.level)
    settled = when["start_pruning_step"] + when["pruning_steps"]  # the last units leave with this step
    one.run.train(one.model, one.optimizer, one.steps, settled=settled)
    return small(one.oto, asked), one.run


def small(oto: OTO, asked: Asked) -> nn.Module:
    """What a training with this library leaves.

    Raises:
        RuntimeError: that has more FLOPs than asked for, as when units could not leave.
    """
    subnet = oto.construct_subnet()
    share = asked.task.share(subnet.model)
    if share > OVER * asked.level:
        raise RuntimeError(
            f"{asked.task.name}: {share:.3f} of the FLOPs are left, asked for were {asked.level}; "
            f"what could not leave: {subnet.report.excluded}"
        )
    return subnet.model


# HESSO by its published formulas, to which ``tests/test_optim.py`` proves this library's equal, step by step; with a
# target in FLOPs, any width, and units that leave physically, so that it has the same budget.
PUBLISHED = {
    "start": 1 / 6, "length": 1 / 3, "periods": 10, "of": "steps", "ramp": "linear", "scarcity": 0.0,
    "cost_exponent": 0.0, "criteria": "default", "roles": ("zero",), "rescale": False,
}  # fmt: skip


def unsuited(name: str, task: Task) -> str | None:
    """Why a competitor cannot run on a task; None if it can."""
    if name in peers.FOR_PRETRAINED and not task.pretrained:
        return "what it cuts at once are fresh weights"
    if name in peers.NOT_FOR_HEADS and task.heads(task.build(1.0)):
        return "Torch-Pruning 1.6.1 cannot remove heads in several steps"
    return None


COMPETITORS: dict[str, Competitor] = {
    "ours": functools.partial(once, recipe={}),
    "dense": dense,
    "scratch": scratch,
    "hesso": functools.partial(once, recipe=PUBLISHED, align=1),
    **peers.COMPETITORS,
}
