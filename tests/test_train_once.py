"""The whole path on one network: analyse, train with each method, construct, verify, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import only_train_once
from only_train_once import OTO

from .pruning import randomize


class Net(nn.Module):
    """240 prunable units in groups of 48, 64 and 128."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.b = nn.Conv2d(48, 64, 3, padding=1)
        self.c, self.d = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.d(F.relu(self.c(F.relu(self.b(x)).mean((2, 3)))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=generator)
        target = torch.randint(0, 10, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


_PERIODS = {"start_pruning_step": 3, "pruning_steps": 8, "pruning_periods": 3}
METHODS: dict[str, dict[str, Any]] = {
    "hesso": _PERIODS,
    "hspg": {**_PERIODS, "lmbda": 5.0, "epsilon": 0.9},
    "ada_hspg": {**_PERIODS, "lmbda": 5.0, "epsilon": 0.9},
    "dhspg": {**_PERIODS, "lmbda": 5.0, "epsilon": 0.95},
    "hesso_cric": {"start_cric_step": 3, "sampling_steps": 2, "max_cycle_period": 3, "hybrid_training_steps": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["sgd", "adamw"])
@pytest.mark.parametrize("divisible", [1, 8])
@pytest.mark.parametrize(("sparsity", "expected"), [(0.1, 24), (0.5, 120), (0.9, 216)])
def test_exactly_as_many_units_as_asked(
    method: str, variant: str, divisible: int, sparsity: float, expected: int
) -> None:
    model = Net()
    oto = OTO(model, dummy_input=torch.randn(2, 3, 6, 6))
    arguments = {"target_group_sparsity": sparsity, "group_divisible": divisible, **METHODS[method]}
    optimizer = getattr(oto, method)(variant=variant, lr=1e-2, weight_decay=1e-3, **arguments)
    train(model, optimizer, 16)
    assert sum(len(units) for units in optimizer.redundant.values()) == expected
    assert optimizer.shortfall == 0
    subnet = oto.construct_subnet()
    widths = [subnet.model.a.out_channels, subnet.model.b.out_channels, subnet.model.c.out_features]
    assert sum(widths) == 240 - expected
    assert all(width % divisible == 0 for width in widths)
    assert subnet.report.verified_difference <= 1e-9


def test_from_model_to_loaded_subnet(tmp_path: Path) -> None:
    model = Net()
    oto = OTO(model, dummy_input=torch.randn(2, 3, 6, 6))
    base = torch.optim.SGD(
        [
            {"params": [p for n, p in model.named_parameters() if n.endswith("weight")], "weight_decay": 1e-3},
            {"params": [p for n, p in model.named_parameters() if n.endswith("bias")]},
        ],
        lr=0.05,
        momentum=0.9,
        nesterov=True,
    )
    optimizer = oto.attach(
        base, method="hesso", target_group_sparsity=0.5, start_pruning_step=2, pruning_steps=6, pruning_periods=2
    )
    assert optimizer is base
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0]
    train(model, optimizer, 12)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is Net
    assert not (tmp_path / "slim").exists()
    subnet.save(tmp_path / "slim")
    loaded = only_train_once.load(tmp_path / "slim", build=Net)
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), subnet.model.eval()(x))
        assert torch.allclose(loaded(x), model.eval()(x), atol=1e-5)
    # the subnet is a network like any other: it can be pruned again
    again = OTO(loaded, dummy_input=x)
    again.random_set_zero_groups(target_group_sparsity=0.5, seed=0)
    smaller = again.construct_subnet()
    assert sum(p.numel() for p in smaller.model.parameters()) < sum(p.numel() for p in loaded.parameters())


def test_a_wrong_group_is_excluded_and_named() -> None:
    """Should the analysis ever be wrong, the construction finds the group and leaves it in."""
    model = Net()
    randomize(model)
    oto = OTO(model, dummy_input=torch.randn(2, 3, 6, 6))
    oto.random_set_zero_groups(target_group_sparsity=0.5, seed=0)
    liar = Net.forward

    def forward(self: Net, x: Tensor) -> Tensor:
        width = self.c.out_features
        return liar(self, x) + (width != 128)  # the code depends on the width of one group

    Net.forward = forward  # type: ignore[method-assign]
    try:
        subnet = oto.construct_subnet()
    finally:
        Net.forward = liar  # type: ignore[method-assign]
    assert list(subnet.report.excluded) == ["c"]
    assert subnet.model.c.out_features == 128
    assert subnet.model.a.out_channels == 24
    assert "c" in str(subnet.report)


def test_skip_patterns_and_operators(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 6, 6)
    whole = {g.name for g in OTO(Net(), x).groups.prunable}
    assert whole == {"a", "b", "c"}
    chain = OTO(Net(), x, skip_patterns=["native_batch_norm->relu"])
    assert {g.name for g in chain.groups.prunable} == {"b", "c"}
    by_name = OTO(Net(), x, skip_patterns=[r"^c\.weight$"])
    assert {g.name for g in by_name.groups.prunable} == {"a"}  # b reads into c.weight, so it is touched as well
    by_operator = OTO(Net(), x)
    by_operator.skip_operators(["mean", "gelu"])
    assert "this model calls no gelu" in caplog.text
    assert "no mean" not in caplog.text
    assert {g.name for g in by_operator.groups.prunable} == {"a", "c"}
    with pytest.raises(only_train_once.errors.ConfigurationError, match="no gelu -> relu in this model"):
        OTO(Net(), x, skip_patterns=["gelu->relu"])
