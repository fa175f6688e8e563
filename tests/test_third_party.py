"""Optimizers from elsewhere whose state is more than one number per entry of a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import ConfigurationError

START, STEPS = 3, 8
PLAN: dict[str, Any] = {"target_group_sparsity": 0.5, "start_pruning_step": START, "pruning_steps": STEPS}


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(8, 6)


def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("cls", [AdamWScheduleFree, SGDScheduleFree])
def test_the_average_of_a_schedule_free_optimizer_goes_along_the_ramp(cls: type[torch.optim.Optimizer]) -> None:
    """With next to no learning rate all of its weights are the first ones, times what the ramp leaves."""
    model, x = small()
    first = model[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    optimizer: Any = OTO(model, x).attach(cls(model.parameters(), lr=1e-12), **PLAN)
    for done in range(1, START + STEPS + 1):
        optimizer.train()
        step(model, optimizer, x)
        optimizer.eval()
        left = max(1 - max(done - START, 0) / STEPS, 0)
        units = optimizer.redundant["0"]
        assert len(units) == (10 if done > START else 0)
        expected = first.clone()
        expected[units] *= left
        torch.testing.assert_close(model[0].weight, expected, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]
    assert (model[0].weight[units] == 0).all()  # type: ignore[union-attr, index]


class CodedMomentum(torch.optim.Optimizer):
    """Momentum kept as one byte per entry, as 8-bit optimizers do: the byte 0 stands for the lowest number."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = (state["code"].float() / 127.5 - 1) * state["largest"].amax() if state else 0.0
                momentum = 0.9 * momentum + p.grad
                state["largest"] = momentum.abs().amax() + torch.zeros(5)  # one number per block
                state["code"] = ((momentum / state["largest"][0] + 1) * 127.5).round().to(torch.uint8)
                p.data.add_(momentum, alpha=-group["lr"])


def test_codes_of_quantized_moments_are_no_numbers() -> None:
    model, x = small()
    optimizer: Any = OTO(model, x).attach(CodedMomentum(model.parameters(), lr=0.01), **PLAN)
    for _ in range(START + STEPS + 30):
        step(model, optimizer, x)
    units = optimizer.removed["0"]
    assert len(units) == 10
    assert (model[0].weight[units] == 0).all()  # type: ignore[union-attr, index]
    codes = optimizer.state[model[0].weight]["code"][units].int()  # type: ignore[union-attr]
    assert (codes - 128).abs().max() <= 8  # what they stand for is near 0, as the moments of units without gradient


def test_what_is_no_torch_optimizer_is_refused() -> None:
    from schedulefree import ScheduleFreeWrapper

    model, x = small()
    wrapped = ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="cannot attach to 'ScheduleFreeWrapper'"):
        OTO(model, x).attach(wrapped, **PLAN)
