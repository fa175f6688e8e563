"""Which groups can give, what is suggested from that, and the warning before a group is emptied."""

from __future__ import annotations

import builtins
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.recipe import EQUAL_COST
from only_train_once.sensitivity import GroupSensitivity, Sensitivity

from .zoo import ZOO


class Two(nn.Module):
    """Two hidden layers; half of the first is nearly nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight[:5] *= 1e-4
            self.first.bias[:5] = 0
            self.second.weight[:, :5] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.second(self.first(x).relu()).relu()))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def two() -> OTO:
    torch.manual_seed(0)
    return OTO(Two(), X)


def distance(model: nn.Module) -> float:
    """From what the whole network says, negative: more is better."""
    torch.manual_seed(0)
    whole = Two().eval()
    with torch.no_grad():
        return -float((model(X) - whole(X)).norm())


def test_values_are_those_of_units_at_zero(two: OTO) -> None:
    found = two.sensitivity(distance, levels=(0.2, 0.5, 0.9), metric="likeness")
    assert found.baseline == 0.0
    for group in found.groups:
        weights = {"first": (two.model.first, two.model.second), "second": (two.model.second, two.model.head)}
        layer, reader = weights[group.name]  # magnitude over rows, bias and the reader's columns
        score = layer.weight.square().sum(1) + layer.bias.square() + reader.weight.square().sum(0)
        order = score.argsort()
        for removed, value in zip(group.removed, group.values, strict=True):
            torch.manual_seed(0)
            other = Two().eval()
            with torch.no_grad():
                getattr(other, group.name).weight[order[:removed]] = 0
                getattr(other, group.name).bias[order[:removed]] = 0
            assert value == pytest.approx(distance(other), abs=1e-6)
    assert found.groups[0].removed == (2, 5, 9)
    assert found.together.removed == (2 + 1, 5 + 4, 9 + 7)
    assert found.loss(found.groups[0])[1] < 0.05 < found.loss(found.groups[0])[2]
    assert found.tolerated(0.05)["first"] == 5
    assert found.min_units(0.05)["first"] == 5
    assert found.tolerated(0.0) == {"first": 5, "second": 0}  # those are lost in rounding


@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].prunable][::12])
def test_the_model_is_as_before(name: str) -> None:
    case = ZOO[name]
    model = case.build()
    oto = OTO(model, case.inputs())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    addresses = [p.data_ptr() for p in model.parameters()]
    calls = []

    def evaluate(net: nn.Module) -> Tensor:
        assert not any(m.training for m in net.modules())
        assert not torch.is_grad_enabled()
        calls.append(net)
        return sum((p.square().sum() for p in net.parameters()), torch.zeros(()))

    found = oto.sensitivity(evaluate, levels=(0.5,), higher_is_better=False)
    assert {id(c) for c in calls} == {id(model)}
    assert all(v <= found.baseline for g in found.groups for v in g.values)
    assert found.together.values[0] < found.baseline
    assert [m.training for m in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == addresses
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n])


def test_an_error_in_the_middle_leaves_the_model_as_it_was(two: OTO) -> None:
    before = {n: t.clone() for n, t in two.model.state_dict().items()}
    calls = iter(range(100))

    def evaluate(model: nn.Module) -> float:
        if next(calls) == 3:
            raise RuntimeError("interrupted")
        return 0.0

    with pytest.raises(RuntimeError, match="interrupted"):
        two.sensitivity(evaluate)
    assert two.model.training
    assert all(torch.equal(t, before[n]) for n, t in two.model.state_dict().items())


def test_gradients_are_taken_from_the_parameters(two: OTO) -> None:
    with pytest.raises(ConfigurationError, match=r"has none: call loss.backward\(\) first"):
        two.sensitivity(distance, criteria="taylor_first_order")
    two.model(X).square().sum().backward()
    found = two.sensitivity(distance, criteria="taylor_first_order", levels=(0.5,))
    assert found.groups[0].removed == (5,)


def test_round_trip(two: OTO, tmp_path: Path) -> None:
    found = two.sensitivity(distance)
    data = json.loads(json.dumps(found.to_dict()))
    assert Sensitivity.from_dict(data) == found
    text = str(found)
    assert "all groups" in text
    assert "-90%" in text
    for broken in ({}, {**data, "levels": 3}, {**data, "groups": [{}]}, {**data, "baseline": "much"}):
        with pytest.raises(CheckpointError, match="this is no sensitivity analysis"):
            Sensitivity.from_dict(broken)


def test_plot(two: OTO, tmp_path: Path) -> None:
    found = two.sensitivity(distance)
    path = found.plot(tmp_path / "sensitivity.svg")
    picture = path.read_text()
    assert picture.startswith("<?xml")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        found.plot(tmp_path / "absent" / "picture.svg")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        found.plot(tmp_path / "picture.no_such_format")


def test_plot_without_matplotlib(two: OTO, tmp_path: Path, monkeypatch: Any) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    found = two.sensitivity(distance, levels=(0.5,))
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigurationError, match=r"pip install only_train_once\[viz\]"):
        found.plot(tmp_path / "picture.svg")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"evaluate": None}, "evaluate is None; give a function"),
        ({"evaluate": lambda m: float("nan")}, "evaluate returned nan with all units"),
        ({"evaluate": lambda m: "good"}, "evaluate returned str with all units"),
        ({"evaluate": lambda m: torch.zeros(2)}, "evaluate returned Tensor with all units"),
        ({"levels": ()}, r"levels is \(\); give shares"),
        ({"levels": (0.0, 0.5)}, "each between 0 and 1"),
        ({"levels": (0.5, 1.0)}, "each between 0 and 1"),
        ({"levels": (0.5, 0.3)}, "give them rising"),
        ({"levels": 0.5}, "levels is 0.5"),
        ({"levels": "0.5"}, "levels is '0.5'"),
        ({"criteria": "size"}, "importance_score_criteria is 'size'|names 'size'"),
    ],
)
def test_errors(two: OTO, options: dict[str, Any], named: str) -> None:
    evaluate = options.pop("evaluate", distance)
    with pytest.raises(ConfigurationError, match=named):
        two.sensitivity(evaluate, **options)
    assert two.model.training


def test_nothing_to_be_sensitive_to() -> None:
    with pytest.raises(ConfigurationError, match="no group is prunable"):
        OTO(nn.Linear(3, 3), torch.randn(2, 3)).sensitivity(distance)


@pytest.mark.parametrize("tolerance", [-1, True, None, float("inf"), float("nan")])
def test_tolerances(tolerance: Any) -> None:
    rows = GroupSensitivity("g", 4, (2,), (0.5,))
    found = Sensitivity("accuracy", True, 1.0, (0.5,), (rows,), rows)
    with pytest.raises(ConfigurationError, match="tolerance is"):
        found.tolerated(tolerance)
    assert found.tolerated(0.5) == {"g": 2}
    assert found.tolerated(0.49) == {"g": 0}


# -- suggestions ------------------------------------------------------------------------------------------------------


def train(oto: OTO, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        oto.model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [10, 60, 300, 1000])
def test_a_suggestion_can_be_followed(two: OTO, steps: int) -> None:
    suggestion = two.suggest(steps)
    assert f"of {steps} steps" in str(suggestion)
    optimizer = two.hesso(variant="sgd", lr=1e-2, **suggestion.arguments)
    train(two, optimizer, steps)
    left = two.costs(two._zero_units()).flops / two.costs().flops
    assert left <= suggestion.arguments["target_flops"] < (1 if steps < 600 else 0.5)
    assert suggestion.arguments["pruning_periods"] <= max(1, suggestion.arguments["pruning_steps"] // 5)
    assert optimizer.compute_metrics().num_zero_groups > 0
    subnet = two.construct_subnet()
    assert subnet.report.flops_after == two.costs(two._zero_units()).flops


def test_what_a_sensitive_group_needs_is_kept(two: OTO) -> None:
    found = two.sensitivity(distance)
    suggestion = two.suggest(1000, sensitivity=found, tolerance=0.05)
    assert suggestion.arguments["min_units"] == found.min_units(0.05)
    optimizer = two.hesso(variant="sgd", lr=1e-3, **suggestion.arguments)
    train(two, optimizer, 1000)
    for name, least in found.min_units(0.05).items():
        assert two.groups[name].size - len(optimizer.removed[name]) >= least


def test_without_operators_units_are_counted(two: OTO) -> None:
    groups = two.groups.of(list(two.groups))
    groups._workload = None
    two._groups = groups
    suggestion = two.suggest(1000)
    assert 0 < suggestion.arguments["target_group_sparsity"] <= 0.7
    assert two.hesso(variant="sgd", lr=1e-2, **suggestion.arguments)


def test_a_recipe_in_flops_gets_the_steps_that_the_target_leaves(two: OTO) -> None:
    suggested = two.suggest(1000, recipe=EQUAL_COST).arguments
    when = EQUAL_COST.when(1000, suggested["target_flops"])
    assert {name: suggested[name] for name in when} == when
    assert suggested["pruning_steps"] < two.suggest(1000).arguments["pruning_steps"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"total_steps": "many"}, "total_steps is 'many'"),
        ({"total_steps": -1}, "total_steps is -1"),
        ({"total_steps": 3}, "total_steps is 3"),
        ({"total_steps": 1e3}, "total_steps is 1000.0"),
        ({"total_steps": 100, "tolerance": 0.1}, "tolerance is given without sensitivity"),
    ],
)
def test_errors_of_suggestions(two: OTO, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        two.suggest(**options)


# -- the warning before a group is emptied ----------------------------------------------------------------------------


def bottleneck(**options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        net[0].weight *= 1e-3
        net[0].bias *= 1e-3
    oto = OTO(net, X)
    base = torch.optim.SGD(net.parameters(), lr=1e-3)
    optimizer = oto.attach(
        base,
        method="hesso",
        target_group_sparsity=0.6,
        start_pruning_step=0,
        pruning_steps=4,
        pruning_periods=2,
        importance_score_criteria="magnitude",
        align=1,
        **options,
    )
    train(oto, optimizer, 5)
    return {g.name: g.size - len(optimizer.removed[g.name]) for g in oto.groups.prunable}


def test_a_bottleneck_is_told_once(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        kept = bottleneck()
    assert kept["0"] == 1
    (record,) = caplog.records
    assert "about to leave bottlenecks" in record.getMessage()
    assert "keeps 1 of 40" in record.getMessage()


@pytest.mark.parametrize("options", [{"scarcity": 3.0}, {"min_units": 0.1}, {"ranking": "per_layer"}], ids=str)
def test_what_the_warning_says_helps(options: dict[str, Any], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        kept = bottleneck(**options)
    assert min(kept.values()) >= 3
    assert not caplog.records
