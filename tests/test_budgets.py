"""The cost model says what the constructed subnet says, to the last digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from only_train_once import OTO, construct_subnet, find_groups, trace
from only_train_once.budgets import CostModel
from only_train_once.errors import ConfigurationError
from only_train_once.flops import _FORMULAS, count_flops
from only_train_once.groups import GroupList
from only_train_once.report import count_parameters
from only_train_once.workload import _FORMULAS as WORKLOAD_FORMULAS

from .pruning import choose
from .zoo import MLP, ZOO

# Which experts, or which of two ways, a subnet takes is decided by data, and others are counted.
DECIDED_BY_DATA = {"exit_early"}
# A second result that nothing reads carries no label, so a few bytes of it do not shrink.
MEMORY_DIFFERS = {"weight_norm"}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def two_left(groups: GroupList, share: float, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random units of every group, two of which stay: torch replaces products over one index by other operators."""
    chosen = choose(groups, share, seed)
    most = {n: max(groups[n].size - 2 * groups[n].multiple, 0) for n in chosen}
    return {n: u[: most[n] // groups[n].multiple * groups[n].multiple] for n, u in chosen.items()}


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("name", ZOO)
def test_costs_are_those_of_the_subnet(name: str, wide: bool) -> None:
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    groups = find_groups(trace(model, inputs), wide=wide)
    costs = CostModel(groups, tensors_of(model))
    full = costs.costs()
    assert (full.params, full.flops) == (count_parameters(model), count_flops(model, inputs).total)
    for seed in range(3):
        removed = two_left(groups, [0.2, 0.5, 0.9][seed], seed)
        subnet, record = construct_subnet(model, groups, removed)
        found = costs.costs(removed)
        assert found.params == count_parameters(subnet)
        if name not in DECIDED_BY_DATA:
            assert found.flops == count_flops(subnet, inputs).total
        if not record.norms and name not in DECIDED_BY_DATA | MEMORY_DIFFERS:  # norms that remember run other operators
            again = find_groups(trace(subnet, inputs), wide=wide)
            assert found.memory == CostModel(again, tensors_of(subnet)).costs().memory


def test_every_counted_operator_is_in_the_workload() -> None:
    assert {str(op) for op in _FORMULAS} <= set(WORKLOAD_FORMULAS)


def test_memory_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 4))
    groups = find_groups(trace(model, torch.zeros(3, 6)))
    # weights 70 + 44; the input stays; at the last call the hidden layer and the output are there as well
    assert CostModel(groups, tensors_of(model)).costs().memory == 4 * (114 + 3 * (6 + 10 + 4))
    removed = {groups.prunable[0].name: [1, 2, 5]}
    assert CostModel(groups, tensors_of(model)).costs(removed).memory == 4 * (81 + 3 * (6 + 7 + 4))
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))  # the ReLU has a result of its own
    groups = find_groups(trace(model, torch.zeros(3, 6)))
    assert CostModel(groups, tensors_of(model)).costs().memory == 4 * (114 + 3 * (6 + 10 + 10))


def test_savings_are_differences() -> None:
    model, inputs = ZOO["residual"].build().eval(), ZOO["residual"].inputs()
    groups = find_groups(trace(model, inputs)).prunable
    costs = CostModel(groups, tensors_of(model))
    for measure in ("params", "flops", "memory"):
        gone = costs.flags({groups[0].name: [0, 1]})
        saved = costs.savings(measure, gone)
        for number, group in enumerate(groups):
            units = list(range(3)) if number == 0 else list(range(group.multiple))
            fewer = costs.flags({groups[0].name: [0, 1], group.name: units})
            expected = costs.cost(measure, gone) - costs.cost(measure, fewer)
            assert saved[number] * (len(units) if number else 1) == expected


def test_groups_alone_know_parameters_only() -> None:
    model = MLP()
    groups = list(OTO(model, torch.zeros(3, 6)).groups)
    costs = CostModel(groups, tensors_of(model))
    assert costs.costs().params == count_parameters(model)
    assert costs.costs().flops is None
    with pytest.raises(ConfigurationError, match=r"flops of a subnet cannot be told.*find_groups"):
        costs.cost("flops", costs.flags({}))
