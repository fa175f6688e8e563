"""Units that leave in multiples: from the rows an operator wants to what is chosen, cut and refused."""

from __future__ import annotations

import itertools
import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import SurgeryError
from only_train_once.groups import GroupList, Kind, ParamSlice, PruningGroup, Role, find_groups
from only_train_once.labels import Label, LabelStore
from only_train_once.multiples import leave_in_multiples
from only_train_once.report import groups_table, render
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import choose, randomize, zero
from .zoo.experts import INNER, WIDTH, Fused, GroupedExperts, GroupedTransposed

ENDS = torch.tensor([2, 5], dtype=torch.int32)
BOTH_LAYOUTS = pytest.mark.parametrize("build", [GroupedExperts, GroupedTransposed])


def groups_of(model: nn.Module, x: Tensor, wide: bool = True) -> GroupList:
    return find_groups(trace(model, x), wide=wide)


# ---------------------------------------------------------------- from dims to groups


def multiples(store: LabelStore, *dims: Label) -> list[int | None]:
    """For each dim, the units it is made of."""
    solution = store.solve()
    return leave_in_multiples(solution, store.multiples, [np.unique(solution.of_id[dim.ids]) for dim in dims])


def test_one_unit_at_an_index() -> None:
    store = LabelStore()
    wanted, other = store.fresh(16, True), store.fresh(16, True)
    store.multiple(wanted.ids, 8)
    store.multiple(wanted.ids, 12)
    assert multiples(store, wanted, other) == [24, 1]


@pytest.mark.parametrize(("copies", "expected"), [(2, 4), (3, 8), (6, 4), (8, 1)])
def test_several_indices_per_unit(copies: int, expected: int) -> None:
    store = LabelStore()
    unit = store.fresh(16, True)
    store.multiple(np.tile(unit.ids, copies), 8)
    assert multiples(store, unit) == [expected]


def test_side_by_side_each_group_keeps_to_it() -> None:
    store = LabelStore()
    a, b = store.fresh(16, True), store.fresh(12, True)
    store.multiple(np.concatenate([a.ids, b.ids, b.ids]), 8)
    assert multiples(store, a, b) == [8, 4]


@pytest.mark.parametrize(("heads", "dims", "n"), [(4, 4, 8), (6, 4, 8), (4, 16, 8), (8, 8, 8), (3, 8, 4), (16, 3, 2)])
def test_products_stay_multiples_whatever_leaves(heads: int, dims: int, n: int) -> None:
    """Every number of heads and positions that may leave: what is left of the merged dim is a multiple."""
    store = LabelStore()
    head, position = store.fresh(heads, True), store.fresh(dims, True)
    merged = store.merge([head, position], [heads, dims])
    assert merged is not None
    store.multiple(merged.ids, n)
    of_head, of_position = multiples(store, head, position)
    assert of_head is not None
    assert of_position is not None
    assert heads * dims % n == 0
    for r in range(0, heads, of_head):
        for s in range(0, dims, of_position):
            assert (heads - r) * (dims - s) % n == 0
    assert n in (of_head, of_position) or max(of_head, of_position) < n


def test_uneven_units_have_no_multiple() -> None:
    store = LabelStore()
    unit = store.fresh(16, True)
    store.multiple(np.concatenate([unit.ids, unit.ids[:8]]), 8)
    assert multiples(store, unit) == [None]


# ---------------------------------------------------------------- what the kernel wants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_wants_rows_of_whole_16_bytes(dtype: torch.dtype) -> None:
    """Both operands, along the dim that is contiguous; the backward pass the columns of the result as well."""
    entries = 16 // dtype.itemsize
    sizes = (16, 16 - entries // 2)
    for k, m, transposed in itertools.product(sizes, sizes, (False, True)):
        a = torch.randn(5, k, dtype=dtype, requires_grad=True)
        b = torch.randn(*((2, m, k) if transposed else (2, k, m)), dtype=dtype, requires_grad=True)

        def forward(a: Tensor = a, b: Tensor = b, transposed: bool = transposed) -> Tensor:
            return torch._grouped_mm(a, b.mT if transposed else b, offs=ENDS)

        rows = k if transposed else m
        if k % entries or rows % entries:
            with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
                forward()
        elif m % entries:
            with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
                forward().square().sum().backward()
        else:
            forward().square().sum().backward()


@BOTH_LAYOUTS
def test_groups_leave_in_multiples(build: Any) -> None:
    groups = groups_of(build(), torch.randn(2, 5, 8))
    assert {g.name: (g.size, g.multiple, g.most) for g in groups.prunable} == {
        "stem:width": (WIDTH, 8, 8),
        "gate_up": (INNER, 8, 16),
    }
    assert str(groups["gate_up"]).startswith("gate_up: 24 units (channel, in multiples of 8) in ")
    assert "24 (by 8)" in render(groups_table(groups))
    assert all(g.multiple == 1 for g in groups_of(Plain(), torch.randn(2, 5, 8)))


class Plain(Fused):
    """The same mixture through a kernel that takes any row."""

    def mix(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.expand(self.experts_count, -1, -1), self.gate_up).chunk(2, -1)
        return torch.bmm(gate * up, self.down).sum(0)


class HalfRows(nn.Module):
    """An operand that is half of a row, beside a part that nothing else limits."""

    def __init__(self, plain: int = 24) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, plain)
        self.weight, self.out = nn.Parameter(torch.randn(2, 16, 16)), nn.Linear(16 + plain, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        row = torch.cat([left, right], 1)
        left, right = row[:, : left.shape[1]], row[:, left.shape[1] :]
        return self.out(torch.cat([torch._grouped_mm(left, self.weight, offs=ENDS), right], 1))


def test_half_of_a_row_needs_the_whole_row() -> None:
    groups = groups_of(HalfRows(), torch.randn(5, 6))
    assert {g.name: g.multiple for g in groups.prunable} == {"left": 8, "right": 8, "weight": 8}


class Columns(nn.Module):
    """The columns of a transposed weight are rows of nothing but the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(2, 24, 8)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch._grouped_mm(x, self.weight.mT, offs=ENDS).relu())


def test_what_only_training_needs_is_a_multiple() -> None:
    model, x = Columns(), torch.randn(5, 8)
    groups = groups_of(model, x)
    assert {g.name: g.multiple for g in groups.prunable} == {"weight": 8}
    subnet, _ = construct_subnet(model, groups, {"weight": range(8)})
    subnet(x).square().sum().backward()


def test_too_few_units_to_leave() -> None:
    model = GroupedExperts()
    model.gate_up = nn.Parameter(torch.randn(4, WIDTH, 16) * 0.2)
    model.down = nn.Parameter(torch.randn(4, 8, WIDTH) * 0.2)
    group = groups_of(model, torch.randn(2, 5, 8))["gate_up"]
    assert not group.prunable
    assert group.reason == "units leave in multiples of 8, there are 8, and one unit has to stay"


# ---------------------------------------------------------------- who chooses units obeys


@BOTH_LAYOUTS
def test_subnets_are_exact_train_and_run_in_two_bytes(build: Any) -> None:
    model, x = build(), torch.randn(2, 5, 8)
    randomize(model)
    groups = groups_of(model, x)
    zero(model, groups, choose(groups))
    subnet, _ = construct_subnet(model, groups)
    assert subnet.down.numel() == 4 * 16 * 8  # of 24 x 16
    assert verify_subnet(model, subnet, x, tolerance=1e-9).max_relative_difference <= 1e-9
    for dtype in (torch.float32, torch.bfloat16):
        cast = subnet.to(dtype)
        cast(x.to(dtype)).float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in cast.parameters())
        cast.zero_grad()


def test_named_units_have_to_fit_before_anything_is_built() -> None:
    model, x = GroupedExperts(), torch.randn(2, 5, 8)
    groups = groups_of(model, x)
    with pytest.raises(SurgeryError, match=r"'gate_up': 10 units are to be removed, .* remove 8 or 16$"):
        construct_subnet(model, groups, {"gate_up": range(10)})
    with pytest.raises(SurgeryError, match=r"remove 16 or 16$"):
        construct_subnet(model, groups, {"gate_up": range(20)})


def test_units_that_are_too_many_stay_at_zero(caplog: pytest.LogCaptureFixture) -> None:
    model, x = GroupedExperts(), torch.randn(2, 5, 8)
    randomize(model)
    oto = OTO(model, x)
    zero(model, oto.groups, {"gate_up": np.arange(3, 14)})
    text = "gate_up: 3 of 11 units at zero stay in the subnet: units leave in multiples of 8"
    with caplog.at_level(logging.WARNING):
        plain, _ = construct_subnet(model, oto.groups)
        subnet = oto.construct_subnet()
    assert plain.down.shape == subnet.model.down.shape == (4, 16, WIDTH)
    assert caplog.text.count(text) == 2
    assert text in subnet.report.notes
    assert text in str(subnet.report)
    assert not subnet.report.excluded
    outcome = {g["name"]: g for g in json.loads(json.dumps(subnet.report.to_dict()))["groups"]}
    assert (outcome["gate_up"]["removed"], outcome["gate_up"]["multiple"]) == (8, 8)


def test_all_units_at_zero_leave_as_many_as_may(caplog: pytest.LogCaptureFixture) -> None:
    model, x = GroupedExperts(), torch.randn(2, 5, 8)
    groups = groups_of(model, x, wide=False)
    with caplog.at_level(logging.WARNING):
        subnet, _ = construct_subnet(model, groups, {"gate_up": range(INNER)})
    assert subnet.down.shape == (4, 8, WIDTH)
    assert f"units {list(range(8))} stay" in caplog.text


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99, None])
def test_random_units_fit(share: float | None) -> None:
    model = GroupedExperts()
    oto = OTO(model, torch.randn(2, 5, 8), wide=True)
    oto.random_set_zero_groups(share, seed=3)
    subnet = oto.construct_subnet()
    assert not subnet.report.notes
    for group, outcome in zip(oto.groups, subnet.report.groups, strict=True):
        if share is not None and group.prunable:
            assert outcome.removed == min(math.floor(group.size * share) // 8 * 8, group.most)


@pytest.mark.parametrize(("divisible", "sparsity", "removed"), [(1, 0.5, 20), (4, 0.6, 24), (3, 0.5, 21)])
def test_training_removes_exactly_what_was_asked_for(divisible: int, sparsity: float, removed: int) -> None:
    """16 units at 8 a time beside 24 that leave one by one: the second group makes up for the first.

    By threes the first can lose none, and the second not 20.
    """

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(6, 24), nn.Linear(24, 3)
            self.weight = nn.Parameter(torch.randn(2, 16, 8) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = torch._grouped_mm(torch.relu(self.a(x)), self.weight, offs=ENDS)
            return self.c(torch.relu(self.b(x))) + mixed[:, :3].contiguous()

    model, x = Both(), torch.randn(5, 6)
    oto = OTO(model, x)
    assert {g.name: g.multiple for g in oto.groups.prunable} == {"a": 8, "b": 1}
    optimizer: Any = oto.hesso(
        lr=1e-2, target_group_sparsity=sparsity, pruning_steps=6, pruning_periods=3, group_divisible=divisible
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    gone = {name: len(units) for name, units in optimizer.removed.items()}
    assert gone.get("a", 0) in (0, 8)
    assert not gone.get("b") or (24 - gone["b"]) % divisible == 0
    assert sum(gone.values()) == removed
    subnet = oto.construct_subnet()
    assert not subnet.report.excluded
    assert not subnet.report.notes
    assert subnet.report.units_removed == sum(gone.values())


def test_a_group_by_hand() -> None:
    rows = np.arange(12)[:, None]
    slices = (ParamSlice("fc.weight", 0, rows, Role.ZERO, 12),)
    assert PruningGroup("fc", Kind.CHANNEL, slices, multiple=4).most == 8
    with pytest.raises(ValueError, match="in multiples of 0"):
        PruningGroup("fc", Kind.CHANNEL, slices, multiple=0)
