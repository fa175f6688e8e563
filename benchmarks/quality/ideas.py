"""Ideas that need more than other settings of the recipe: other methods, learning rates, batch norms measured anew.

All of them have the budget of the recipe, in FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.quality.competitors import Asked, begun, recipe_of, small
from benchmarks.quality.training import Run
from only_train_once import OTO

NEAR = 0.02  # of the budget: so much more or less is spent by a method whose cost is known only once it has run
FORWARD = 1 / 3  # of a step


def rewound(asked: Asked, whole_first: bool, **recipe: Any) -> tuple[nn.Module, Run]:
    """The learning rate rises again when the last units have left.

    Args:
        whole_first: it has fallen to nothing by then; else it is what it would be without this.
        **recipe: what differs in the recipe.
    """
    one = begun(asked, recipe)
    when = one.made.when(one.steps, asked.level)
    first = when["start_pruning_step"] + when["pruning_steps"]
    one.run.train(one.model, one.optimizer, first, (0.0, 1.0 if whole_first else first / one.steps))
    one.run.train(one.model, one.optimizer, one.steps - first)
    return small(one.oto, asked), one.run


def recalibrated(asked: Asked, batches: int = 16, **recipe: Any) -> tuple[nn.Module, Run]:
    """Running statistics of batch norms measured anew at the end, as plain means over some batches."""
    task, one = asked.task, begun(asked, recipe)
    one.run.train(one.model, one.optimizer, one.steps - round(FORWARD * batches))
    subnet = small(one.oto, asked).train()
    for part in subnet.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
            part.momentum = None  # the mean of all batches
    stream = task.stream(asked.seed + 1)
    with torch.no_grad():
        for _ in range(batches):
            task.loss(subnet, next(stream))
    one.run.spent += FORWARD * batches * task.share(subnet)
    return subnet, one.run


def another_method(asked: Asked, method: str, **settings: Any) -> tuple[nn.Module, Run]:
    """Another of the library's methods, with the recipe's scores, allocation and ramp in FLOPs where it has periods.

    Its units leave when the method lets them, so a first training finds out how many steps the budget has.
    """
    steps = recipe_of(asked, {}).steps_within(asked.task.steps, asked.level)
    while True:
        model, run = _attached(asked, method, steps, settings)
        over = run.spent / asked.task.steps - 1
        if abs(over) <= NEAR:
            return model, run
        steps -= round(over * asked.task.steps / asked.level)


def _attached(asked: Asked, method: str, steps: int, settings: dict[str, Any]) -> tuple[nn.Module, Run]:
    task = asked.task
    model, run, made = asked.fresh(), Run(task, asked.seed), recipe_of(asked, {})
    optimizer = task.optimizer(model.parameters())
    oto = OTO(model, task.example, wide=task.wide)
    arguments = {**made.arguments(steps, "flops", asked.level), "target_flops": asked.level}
    when = {name: arguments.pop(name) for name in made.when(steps, asked.level)}
    if method == "hesso_cric":  # it has one ramp, after cycles in which the network has its full size
        start = round(made.start * task.steps)
        cycle = max(round(0.02 * task.steps), 2)
        when = {
            "start_cric_step": start,
            "sampling_steps": cycle,
            "max_cycle_period": 4,
            "hybrid_training_steps": cycle,
        }
        del arguments["ramp"]
    oto.attach(optimizer, method, physical_cuts=True, **{**arguments, **when, **settings})
    run.train(model, optimizer, steps)
    return small(oto, asked), run
