"""Torch-Pruning, from its package (``pip install only_train_once[dev]``).

Each trains the full network, cuts it with a ratio that is the same for all layers (its default) and found by search,
and trains what is left. The parts of the budget are shares of it: half of the FLOPs before and half after the cut, or
half of the steps.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from benchmarks.quality.task import NEAR, RISE, Task
from benchmarks.quality.training import Run

if TYPE_CHECKING:
    from benchmarks.quality.competitors import Asked, Competitor

TAYLOR_BATCHES = 16


@dataclass(frozen=True)
class Cut:
    """A ratio, and one a little lower for the first layers, because a ratio alone gives sizes that are far apart.

    Attributes:
        ratio: of most layers.
        lower: of the first ``layers`` convolutions and linear layers.
        share: FLOPs that are left.
    """

    ratio: float
    lower: float
    layers: int = 0
    share: float = 1.0


def layers_of(task: Task, model: nn.Module) -> list[nn.Module]:
    kept = {id(m) for k in task.kept(model) for m in k.modules()}
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in kept]


def pruner(task: Task, model: nn.Module, importance: str, cut: Cut, steps: int = 1, **options: Any) -> Any:
    """A pruner of the package for a network."""
    import torch_pruning as tp

    kind = tp.pruner.GroupNormPruner if importance == "norm" else tp.pruner.BasePruner
    score = {"taylor": tp.importance.GroupTaylorImportance}.get(importance, tp.importance.GroupMagnitudeImportance)
    heads = dict(task.heads(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            model,
            task.example,
            importance=score(),
            pruning_ratio=cut.ratio,
            pruning_ratio_dict=dict.fromkeys(layers_of(task, model)[: cut.layers], cut.lower),
            iterative_steps=steps,
            ignored_layers=task.kept(model),
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
            head_pruning_ratio=min(cut.ratio, 1 - 1 / max(heads.values())) if heads else 0.0,  # one is left
            in_channel_groups={},
            out_channel_groups={},
            **options,
        )


def cut_out(task: Task, model: nn.Module, made: Any) -> None:
    made.step()
    task.mend(model)


@functools.cache
def cut_for(task: Task, level: float) -> Cut:
    """What leaves ``level`` of the FLOPs, or as little more as can be; found by trying it on fresh weights."""
    full = task.build(1.0)

    def tried(cut: Cut) -> Cut:
        model = copy.deepcopy(full)
        cut_out(task, model, pruner(task, model, "magnitude", cut))
        return replace(cut, share=task.share(model))

    low, high, found = 0.0, 1.0, []
    for _ in range(12):
        found.append(tried(Cut((low + high) / 2, 0.0)))
        low, high = (found[-1].ratio, high) if found[-1].share >= NEAR * level else (low, found[-1].ratio)
    found += [tried(Cut(high, low, n)) for n in range(len(layers_of(task, full)))]
    return min((cut for cut in found if cut.share >= NEAR * level), key=lambda cut: cut.share)


def cut_once(
    asked: Asked, importance: str = "magnitude", before: float = 0.5, schedule: str = "steps", reg: float = 0.0
) -> tuple[nn.Module, Run]:
    """Train, cut, train on.

    Args:
        importance: "magnitude", "taylor" or "norm", the last with its regularization before the cut.
        before: share of the budget before the cut; the batches of "taylor" are in it.
        schedule: of the learning rate: "each" training has its own, or they share one, by their "budget" or "steps".
        reg: strength of the regularization.
    """
    task = asked.task
    model, run = asked.fresh(), Run(task, asked.seed)
    cut = cut_for(task, asked.level)
    level = cut.share
    made = pruner(task, model, importance, cut, **({"reg": reg} if importance == "norm" else {}))
    penalty = made.regularize if importance == "norm" else None
    spared = TAYLOR_BATCHES if importance == "taylor" else 0
    before = max(before, spared / task.steps)
    one, two = asked.steps(before, 1.0), asked.steps(1 - before, level)
    middle = {"each": None, "budget": before, "steps": one / (one + two)}[schedule]
    rise = {"each": None, "budget": RISE, "steps": RISE * task.steps / (one + two)}[schedule]
    first, second = ((0.0, 1.0), (0.0, 1.0)) if middle is None else ((0.0, middle), (middle, 1.0))
    run.train(model, task.optimizer(model.parameters()), one - spared, first, rise, before_step=penalty)
    if importance == "taylor":
        gradients(task, model, run)
    cut_out(task, model, made)
    run.train(model, task.optimizer(model.parameters()), two, second, rise, settled=0)
    return model, run


def gradients(task: Task, model: nn.Module, run: Run) -> None:
    """Gradients over some batches, for scores; each costs as much as a step."""
    model.zero_grad()
    stream = task.stream(run.seed + 1)
    for _ in range(TAYLOR_BATCHES):
        task.loss(model, next(stream)).backward()
    run.spent += TAYLOR_BATCHES


def cut_often(
    asked: Asked, importance: str = "magnitude", before: float = 0.3, during: float = 0.3, times: int = 5
) -> tuple[nn.Module, Run]:
    """Train, cut a little and train on, several times, and train on."""
    task = asked.task
    model, run = asked.fresh(), Run(task, asked.seed)
    made = pruner(task, model, importance, cut_for(task, asked.level), times)
    run.train(model, task.optimizer(model.parameters()), asked.steps(before, 1.0), (0.0, before), RISE)
    at = before
    for number in range(times):
        cut_out(task, model, made)
        share = during / (times - 1) if number + 1 < times else 1 - at
        steps = asked.steps(share, task.share(model))
        settled = 0 if number + 1 == times else None
        run.train(model, task.optimizer(model.parameters()), steps, (at, at + share), RISE, settled=settled)
        at += share
    return model, run


FOR_PRETRAINED = ("tp_magnitude_first", "tp_taylor_first")
NOT_FOR_HEADS = ("tp_iterative",)
COMPETITORS: dict[str, Competitor] = {
    "tp_magnitude": cut_once,
    "tp_magnitude_first": functools.partial(cut_once, before=0.0),
    "tp_magnitude_twice": functools.partial(cut_once, schedule="each"),
    "tp_taylor": functools.partial(cut_once, importance="taylor"),
    "tp_taylor_first": functools.partial(cut_once, importance="taylor", before=0.0),
    "tp_group_norm": functools.partial(cut_once, importance="norm", reg=1e-4),
    "tp_iterative": cut_often,
}
