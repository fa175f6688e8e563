"""Weights that read fewer units grow, so that what they put out keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.optim.fan_in import enlarge_
from only_train_once.recipe import RECIPES, Recipe
from only_train_once.rules.norm import normalizes


class Joined(nn.Module):
    """Two convolutions that one reads side by side, a transposed one, and a flattened picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 24, 3, 1, 1)
        self.both, self.up = nn.Conv2d(32, 16, 1), nn.ConvTranspose2d(16, 12, 2, 2)
        self.out = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.out(F.relu(self.up(F.relu(self.both(joined)))).flatten(1))


class Tied(nn.Module):
    """A table that makes the units and reads them again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) + F.relu(self.inner(self.table(x))))


def run(
    model: nn.Module, inputs: Tensor, cuts: bool, steps: int = 10, lr: float = 0.0, **changes: Any
) -> tuple[OTO, Any]:
    """A training with HESSO, by default at a learning rate of 0: only what HESSO does changes weights."""
    oto = OTO(model, inputs, wide=True)
    settings = {"target_group_sparsity": 0.5, "start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 3}
    optimizer: Any = oto.attach(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), physical_cuts=cuts, **{**settings, **changes}
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return oto, optimizer


def joined() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Joined().double()
    for bias in (p for n, p in model.named_parameters() if n.endswith("bias")):
        nn.init.zeros_(bias)
    return model, torch.randn(4, 3, 2, 2, dtype=torch.double)


@pytest.mark.parametrize("cuts", [False, True])
def test_by_the_root_of_the_inputs_that_were_and_are(cuts: bool) -> None:
    """Also over several periods, over what two groups put side by side, and over several positions of a unit."""
    same: Any = {"ranking": "per_layer", "importance_score_criteria": "magnitude"}  # the same units go in both
    model, x = joined()
    plain, _ = run(model, x, cuts, **same)
    again, _ = joined()
    grown, optimizer = run(again, x, cuts, rescale=True, **same)
    one, two = plain.construct_subnet().model, grown.construct_subnet().model
    left = {name: len(getattr(two, name).bias) for name in ("a", "b", "both", "up")}
    assert all(n < len(getattr(Joined(), name).bias) for name, n in left.items())
    factors = {
        "a": 1.0,
        "b": 1.0,
        "both": math.sqrt(32 / (left["a"] + left["b"])),
        "up": math.sqrt(16 / left["both"]),
        "out": math.sqrt(12 / left["up"]),
    }
    for name, factor in factors.items():
        before, after = getattr(one, name), getattr(two, name)
        torch.testing.assert_close(after.weight, factor * before.weight, rtol=1e-12, atol=0)
        assert torch.equal(after.bias, before.bias)
    assert sum(map(len, optimizer.removed.values())) == 30


def test_ends_where_the_training_without_cuts_ends() -> None:
    one, two = joined()[0], joined()[0]
    x = joined()[1]
    whole, _ = run(one, x, False, 20, 0.05, rescale=True)
    less, _ = run(two, x, True, 20, 0.05, rescale=True)
    large, small = whole.construct_subnet(), less.construct_subnet()
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    difference = small.report.verified_difference
    assert difference is not None
    assert difference <= 1e-9


def test_what_makes_the_units_as_well_stays() -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 11, (4, 6))
    table = model.table.weight.detach().clone()
    _, optimizer = run(model, x, False, rescale=True)
    gone = next(units for name, units in optimizer.removed.items() if "table" in name)
    assert gone
    kept = [n for n in range(16) if n not in gone]
    assert torch.equal(model.table.weight[:, kept], table[:, kept])


def deep(width: int) -> nn.Sequential:
    """Twelve layers of fresh weights, of a variance that keeps activations as they are."""
    layers: list[nn.Module] = []
    for wide in (8, *[width] * 11):
        layer = nn.Linear(wide, width, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def test_activations_keep_their_size() -> None:
    sizes = {}
    for rescale in (False, True):
        torch.manual_seed(0)
        model, x = deep(256), torch.randn(64, 8)
        before = float(model[:-1](x).detach().square().mean())
        by_weight: Any = {"ranking": "per_layer", "importance_score_criteria": "magnitude"}
        oto, _ = run(model, x, True, target_group_sparsity=0.75, rescale=rescale, **by_weight)
        slim: Any = oto.construct_subnet().model
        sizes[rescale] = float(slim[:-1](x).detach().square().mean()) / before
    assert sizes[False] < 1e-4
    assert 0.1 < sizes[True] < 100  # over eleven layers; larger than 1, for the weights of units that stay are large


def test_the_averages_of_schedule_free_optimizers_grow_along() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["train_mode"] = True
    optimizer.state[weight] = {"z": torch.full((2, 3), 5.0), "exp_avg_sq": torch.ones(2, 3)}
    with torch.no_grad():
        enlarge_({"w": 2.0}, {"w": weight}, optimizer)
    assert weight.eq(2).all()
    assert optimizer.state[weight]["z"].eq(10).all()
    assert optimizer.state[weight]["exp_avg_sq"].eq(1).all()


class RootMeanSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def stack(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "nothing": (lambda: stack(), False),
    "dropout": (lambda: stack(nn.Dropout()), False),
    "batch norm": (lambda: stack(nn.BatchNorm2d(16)), True),
    "group norm": (lambda: stack(nn.GroupNorm(4, 16)), True),
    "layer norm": (lambda: stack(nn.LayerNorm(4)), True),
    "RMS norm": (lambda: stack(nn.RMSNorm(4)), True),
    "RMS norm, written out": (lambda: stack(RootMeanSquare()), True),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)), stack()[1:]),
        True,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_rescale_where_nothing_is_normalized(name: str) -> None:
    build, normalized = NETWORKS[name]
    model = build()
    oto = OTO(model, torch.randn(2, 3, 6, 6))
    assert normalizes(oto.graph) is normalized
    assert ("rescale" in oto.suggest(1000).arguments) is not normalized
    for recipe in RECIPES:
        made: Any = OTO(model, torch.randn(2, 3, 6, 6)).train_once(
            torch.optim.SGD(model.parameters(), lr=0.1), 100, recipe=recipe, target_group_sparsity=0.5
        )
        assert made._method.rescale is (not normalized and recipe != "pretrained")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_recipe_may_say_it(wanted: bool) -> None:
    model = stack()
    made: Any = OTO(model, torch.randn(2, 3, 6, 6)).train_once(
        torch.optim.SGD(model.parameters(), lr=0.1), 100, recipe=Recipe(rescale=wanted), target_group_sparsity=0.5
    )
    assert made._method.rescale is wanted


def test_a_state_of_another_run_is_refused() -> None:
    one, x = joined()
    _, with_it = run(one, x, False, 6, rescale=True)
    _, without = run(joined()[0], x, False, 6)
    with pytest.raises(CheckpointError, match="rescale was True and is the default"):
        run(joined()[0], x, False, 0)[1].load_state_dict(with_it.state_dict())
    with pytest.raises(CheckpointError, match="rescale was the default and is True"):
        run(joined()[0], x, False, 0, rescale=True)[1].load_state_dict(without.state_dict())


@pytest.mark.parametrize("refused", ["yes", 1, None])
def test_what_is_no_truth_value_is_refused(refused: Any) -> None:
    model, x = joined()
    with pytest.raises(ConfigurationError, match="rescale is"):
        run(model, x, False, 0, rescale=refused)
