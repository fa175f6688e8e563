"""The recipe: what it costs, how many steps a budget buys, and a training that follows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from only_train_once import OTO
from only_train_once.errors import ConfigurationError
from only_train_once.flops import count_flops
from only_train_once.recipe import RECIPES, Recipe, recipe_for

STEPS, FLOPS = Recipe(start=0.1, length=0.2, of="steps"), Recipe(start=0.1, length=0.4, of="flops")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("left", [1.0, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("recipe", [STEPS, FLOPS])
def test_steps_within_spend_the_budget_and_no_more(recipe: Recipe, left: float) -> None:
    steps = recipe.steps_within(1000, left)
    assert recipe.cost(steps, left) <= 1000 < recipe.cost(steps + 1, left)


def test_cost_by_hand() -> None:
    recipe = Recipe(start=0.1, length=0.2, periods=2, of="steps")
    during = 100 * 1 + 100 * 0.25**0.5  # the second period costs what is left after the first
    assert recipe.cost(1000, 0.25) == pytest.approx(100 + during + 700 * 0.25)


def test_shares_of_the_flops() -> None:
    when = FLOPS.when(10_000, 0.1)
    cost = FLOPS.cost(10_000, 0.1)
    assert when["start_pruning_step"] / cost == pytest.approx(0.1, rel=1e-2)
    rest = 10_000 - when["start_pruning_step"] - when["pruning_steps"]
    assert 0.1 * rest / cost == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize(("left", "share"), [(0.5, 0.4), (0.25, 0.4), (0.1, 0.16), (0.05, 0.08)])
def test_less_time_for_pruning_the_less_is_to_be_left(left: float, share: float) -> None:
    recipe = Recipe(start=0.1, length=0.4, per_left=1.6, of="flops")
    when, cost = recipe.when(10_000, left), recipe.cost(10_000, left)
    rest = 10_000 - when["start_pruning_step"] - when["pruning_steps"]
    assert left * rest / cost == pytest.approx(0.9 - share, rel=1e-2)
    assert dataclasses.replace(recipe, of="steps").when(10_000, left)["pruning_steps"] == round(10_000 * share)


@pytest.mark.parametrize("recipe", [STEPS, FLOPS])
def test_a_training_costs_what_the_recipe_says(recipe: Recipe) -> None:
    model, x = network(), torch.randn(8, 1, 8, 8)
    oto = OTO(model, x)
    steps = oto.steps_within(60, target_flops=0.2, recipe=recipe)
    assert steps > 60
    optimizer = oto.train_once(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), full_steps=60, target_flops=0.2, recipe=recipe
    )
    full = count_flops(model.eval(), x).total
    spent = 0.0
    for _ in range(steps):
        spent += count_flops(model.eval(), x).total / full
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    assert spent == pytest.approx(60, rel=0.05)
    subnet = oto.construct_subnet().model
    assert count_flops(subnet.eval(), x).total <= 0.2 * full
    assert count_flops(model.eval(), x).total == count_flops(subnet, x).total  # the units have left


def test_a_target_in_flops_themselves() -> None:
    model, x = network(), torch.randn(8, 1, 8, 8)
    oto = OTO(model, x)
    full = count_flops(model.eval(), x).total
    assert oto.steps_within(100, 0.2 * full) == oto.steps_within(100, 0.2)


def test_what_is_given_goes_before_the_recipe() -> None:
    model = network()
    oto = OTO(model, torch.randn(8, 1, 8, 8))
    optimizer: Any = oto.train_once(
        torch.optim.SGD(model.parameters(), lr=0.1), 100, target_group_sparsity=0.5, pruning_periods=3, scarcity=1.0
    )
    method = optimizer._method
    assert (method.schedule.pruning_periods, method.budget.scarcity) == (3, 1.0)
    assert method.budget.cost_exponent == 0  # units cost the same when the target is in units


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recipe(start=0.5, length=0.6), "length is 0.6"),
        (lambda: Recipe(start=1.0), "start is 1.0"),
        (lambda: Recipe(periods=0), "periods is 0"),
        (lambda: Recipe(per_left=0.0), "per_left is 0.0"),
        (lambda: Recipe(rescale="yes"), "rescale is 'yes'"),  # type: ignore[arg-type]
        (lambda: Recipe(of="epochs"), "of is 'epochs'"),
        (lambda: Recipe().steps_within(100, 0.0), "left is 0.0"),
        (lambda: Recipe().when(3), "total_steps is 3"),
        (lambda: recipe_for("fine-tuning", None), "recipe is 'fine-tuning'"),
        (lambda: recipe_for({"start": 0.1}, 100), "recipe is {'start': 0.1}"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_the_recipe_that_fits() -> None:
    def schedule(**length: Any) -> Any:
        model = network()
        made: Any = OTO(model, torch.randn(8, 1, 8, 8)).train_once(
            torch.optim.SGD(model.parameters(), lr=0.1), target_flops=0.2, **length
        )
        return made._method.schedule

    for steps in (100, 400):
        made = schedule(total_steps=steps)
        assert (made.start_pruning_step, made.pruning_steps) == (steps // 10, steps // 5)
    made = schedule(full_steps=100)
    assert (made.start_pruning_step, made.pruning_steps) == (10, 37)  # a tenth and a fifth of the FLOPs of 100 steps
    made = schedule(full_steps=100, recipe="undertrained")
    assert (made.start_pruning_step, made.pruning_steps) == (2, 9)


@pytest.mark.parametrize(("name", "recipe"), RECIPES.items())
def test_a_recipe_by_name(name: str, recipe: Recipe) -> None:
    def settings(wanted: Any) -> dict[str, Any]:
        model = network()
        oto = OTO(model, torch.randn(8, 1, 8, 8))
        made: Any = oto.train_once(torch.optim.SGD(model.parameters(), lr=0.1), 100, target_flops=0.3, recipe=wanted)
        method = made._method
        budget, schedule = dataclasses.asdict(method.budget), dataclasses.asdict(method.schedule)
        return {**budget, **schedule, "criteria": method.scoring.criteria, "steps": oto.steps_within(100, 0.3, wanted)}

    assert settings(name) == settings(recipe)
    others = [settings(other) for other in RECIPES if other != name]
    assert settings(name) not in others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_flops": 0.2}, "total_steps is None and full_steps is None"),
        ({"total_steps": 50, "target_flops": "half"}, "target_flops is 'half'"),
        ({"full_steps": 50, "target_flops": float("nan")}, "target_flops is nan"),
        ({"full_steps": 50, "target_flops": 0}, "target_flops is 0"),
        ({"full_steps": 50, "target_flops": 1e12}, "nothing is added to it"),
        ({"total_steps": 50, "full_steps": 50, "target_flops": 0.2}, "total_steps is 50 and full_steps is 50"),
        ({"full_steps": 50, "target_params": 0.2}, "full_steps is 50 without target_flops"),
    ],
)
def test_one_length_is_given(arguments: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=message):
        OTO(model, torch.randn(8, 1, 8, 8)).train_once(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)
