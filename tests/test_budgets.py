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
from only_train_once.flops import count_flops
from only_train_once.groups import GroupList
from only_train_once.report import count_parameters

from .pruning import zero
from .zoo import MLP, ZOO

# Which experts, or which of two ways, run: data that removed units take part in, so they are at zero when it is traced.
DECIDED_BY_DATA = {"exit_early", "switch", "mixtral", "rarely_chosen", "shared_expert"}
# A second result that nothing reads carries no label, so a few bytes of it do not shrink.
MEMORY_DIFFERS = {"weight_norm"}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def two_left(groups: GroupList, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random numbers of random units, two of which stay: torch replaces products over one index by other operators."""
    random = np.random.default_rng(seed)
    chosen = {}
    for group in groups.prunable:
        times = max(group.size - 2 * group.multiple, 0) // group.multiple
        chosen[group.name] = np.sort(random.permutation(group.size)[: random.integers(times + 1) * group.multiple])
    return chosen


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("name", ZOO)
def test_costs_are_those_of_the_subnet(name: str, wide: bool) -> None:
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    groups = find_groups(trace(model, inputs), wide=wide)
    costs = CostModel(groups, tensors_of(model))
    full = costs.costs()
    assert (full.params, full.flops) == (count_parameters(model), count_flops(model, inputs).total)
    for seed in range(3):
        removed = two_left(groups, seed)
        if name in DECIDED_BY_DATA - {"rarely_chosen"}:
            zero(model, groups, removed)
            costs = CostModel(find_groups(trace(model, inputs), wide=wide), tensors_of(model))
        subnet, record = construct_subnet(model, groups, removed)
        found = costs.costs(removed)
        assert found.params == count_parameters(subnet)
        if name != "rarely_chosen" or not wide:  # at zero, other experts are chosen, and the groups are others
            assert found.flops == count_flops(subnet, inputs).total
        if not record.norms and name not in MEMORY_DIFFERS | DECIDED_BY_DATA:  # norms that remember run other operators
            again = find_groups(trace(subnet, inputs), wide=wide)
            assert found.memory == CostModel(again, tensors_of(subnet)).costs().memory


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


class TwoHeadDims(nn.Module):
    """Keys and values lose positions of their own; after that, torch takes other kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_attention_is_counted_by_both_head_dims() -> None:
    model, x = TwoHeadDims().eval(), torch.randn(2, 3, 6)
    groups = find_groups(trace(model, x), wide=True)
    for removed in ({"q:head_dim": [1]}, {"v:head_dim": [0, 3]}, {"q:head_dim": [0, 2], "q:heads": [1]}):
        subnet, _ = construct_subnet(model, groups, removed)
        assert CostModel(groups, tensors_of(model)).costs(removed).flops == count_flops(subnet, x).total


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 6, 1, bias=False), nn.Linear(30, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).transpose(1, 2).reshape(len(x), -1))


def test_memory_of_what_is_copied_to_be_reshaped() -> None:
    groups = find_groups(trace(Reshaped(), torch.zeros(3, 2, 5)))
    # the input stays, and beside it at most the convolution's result and its copy in the other order
    assert CostModel(groups, tensors_of(Reshaped())).costs().memory == 4 * (12 + 120 + 30 + 2 * 3 * 6 * 5)


class Repeated(nn.Module):
    """One number per image, repeated for every unit, times a matrix that reads the units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        repeated = x.mean(1, keepdim=True).expand_as(hidden)
        return self.out(hidden) + torch.mm(repeated, self.out.weight.t())


def test_a_repeated_dim_is_as_long_as_what_it_meets() -> None:
    model, x = Repeated(), torch.randn(5, 4)
    groups = find_groups(trace(model, x))
    costs = CostModel(groups, tensors_of(model))
    flops = [costs.costs({"up": units}).flops for units in ([], [0, 3])]
    assert flops == [2 * 5 * 6 * (4 + 3 + 3), 2 * 5 * 4 * (4 + 3 + 3)]


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
