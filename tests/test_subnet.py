"""The property of the library, over the zoo of small networks: what is cut changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import only_train_once
from only_train_once import checkpoint
from only_train_once.copying import copy_module
from only_train_once.errors import NothingPrunableError
from only_train_once.groups import GroupList, Kind, Role, find_groups
from only_train_once.inputs import call_model, output_tensors
from only_train_once.optim import attach
from only_train_once.optim.selection import nearest_total
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import choose, randomize, zero
from .zoo import ZOO, Case

CASES = [pytest.param(case, wide, id=f"{name}{'-wide' if wide else ''}") for name, case in ZOO.items()
         for wide in (False, True)]  # fmt: skip


def prepared(case: Case, wide: bool) -> tuple[nn.Module, Any, GroupList]:
    model, inputs = case.build(), case.inputs()
    randomize(model)
    return model, inputs, find_groups(trace(model, inputs), wide=wide)


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    return sum((t.square().mean() for t in output_tensors(call_model(model, inputs))), torch.zeros(()))


@pytest.mark.parametrize(("case", "wide"), CASES)
def test_finds_what_it_should(case: Case, wide: bool) -> None:
    _, _, groups = prepared(case, wide)
    expected = max(case.prunable, case.wide) if wide else case.prunable
    found = sum(g.size for g in groups.prunable)
    assert found >= expected, f"{found} prunable units\n{groups}"
    if expected == 0:
        assert found == 0, f"expected everything frozen\n{groups}"
    assert all(g.reason and "rule for this operator failed" not in g.reason for g in groups if not g.prunable)
    if case.reason:
        assert any(case.reason in (g.reason or "") for g in groups), groups


@pytest.mark.parametrize("name", ["data_branch", "data_branches", "written_branch"])
def test_what_the_example_does_not_decide_is_exact_too(name: str) -> None:
    model, inputs, groups = prepared(ZOO[name], wide=False)
    zero(model, groups, choose(groups))
    subnet, _ = construct_subnet(model, groups)
    unlike = [1e10 * torch.randn_like(inputs) for _ in range(8)]
    layer = model.get_submodule("a")
    ran: list[bool] = []
    layer.register_forward_hook(lambda *_: ran.append(True))
    for x in unlike:
        assert verify_subnet(model, subnet, x, tolerance=1e-9).max_relative_difference <= 1e-9
    assert ran, "the example decides as the other inputs do"


@pytest.mark.parametrize(("case", "wide"), CASES)
def test_zeroed_full_network_equals_subnet(case: Case, wide: bool) -> None:
    model, inputs, groups = prepared(case, wide)
    untouched = copy_module(model)
    zero(model, groups, choose(groups))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    subnet, _ = construct_subnet(model, groups)
    result = verify_subnet(model, subnet, inputs, tolerance=1e-9)
    assert result.max_relative_difference <= 1e-9
    assert type(subnet) is type(model)
    assert subnet.training == model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    if groups.prunable:
        # not vacuous: the removed units did something, and are gone
        with torch.no_grad():
            full, zeroed = (next(output_tensors(call_model(m.eval(), inputs))) for m in (untouched, copy_module(model)))
        assert not torch.allclose(full, zeroed, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in subnet.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("case", "wide"), CASES)
def test_subnet_trains_a_step_saves_and_loads(case: Case, wide: bool, tmp_path: Any) -> None:
    model, inputs, groups = prepared(case, wide)
    zero(model, groups, choose(groups))
    subnet, record = construct_subnet(model, groups)
    trained = copy_module(subnet).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    loss_of(trained, inputs).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), subnet.parameters(), strict=True))
    checkpoint.save(subnet, record, {}, tmp_path)
    loaded = only_train_once.load(tmp_path, build=case.build)
    with torch.no_grad():
        expected = list(output_tensors(call_model(subnet.eval(), inputs)))
        found = list(output_tensors(call_model(loaded.eval(), inputs)))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("case", "wide"), CASES)
def test_removed_units_stay_at_zero_while_training_goes_on(case: Case, wide: bool) -> None:
    """Per operator family: zero once, zero for good, and nothing rewrites what is not pinned."""
    # a training of each network for each optimizer is enough
    base = partial(SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2) if wide else partial(AdamW, lr=3e-3)
    model, inputs, groups = prepared(case, wide)
    if not groups.prunable:
        with pytest.raises(NothingPrunableError, match="no group can be pruned"):
            attach(base(model.parameters()), groups, dict(model.named_parameters()), method="hesso")
        return
    model.requires_grad_(True)  # nobody zeroes what does not train
    model.train()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    optimizer = attach(
        base(model.parameters()), groups, named, method="hesso", target_group_sparsity=0.4, start_pruning_step=2,
        pruning_steps=4, pruning_periods=2,
    )  # fmt: skip
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        if step >= 6:
            for group in groups.prunable:
                units = optimizer.redundant.get(group.name, [])  # type: ignore[attr-defined]
                for s in group.with_role(Role.ZERO, Role.CONSUMER):
                    index = torch.from_numpy(s.index[units].reshape(-1))
                    assert not named[s.param].index_select(s.dim, index).any(), (group.name, str(s), step)
    sizes, multiples = [g.size for g in groups.prunable], [g.multiple for g in groups.prunable]
    total = nearest_total(sizes, [0] * len(sizes), int(0.4 * sum(sizes)), multiples=multiples)
    assert total == int(0.4 * sum(sizes)) or max(multiples) > 1
    assert sum(len(u) for u in optimizer.redundant.values()) == total  # type: ignore[attr-defined]
    subnet, _ = construct_subnet(model, groups)
    verify_subnet(model, subnet, inputs, tolerance=1e-9)


def test_reasons_name_operator_and_module() -> None:
    _, _, groups = prepared(ZOO["unknown_operator"], False)
    reasons = {g.reason for g in groups if not g.prunable}
    assert "no rule for this operator at aten._linalg_svd in the model (UnknownOperator)" in reasons


def test_kinds_follow_what_a_reader_expects() -> None:
    _, _, groups = prepared(ZOO["grouped_query"], True)
    kinds = {g.name: (g.kind, g.size) for g in groups.prunable}
    assert kinds["stem:width"] == (Kind.WIDTH, 16)
    assert kinds["q:heads"] == (Kind.HEAD, 2), kinds
    assert any(kind is Kind.HEAD_DIM for kind, _ in kinds.values())


def test_rotary_pairs_leave_together() -> None:
    """Queries and keys lose the dims d and d + D / 2 at once, and the tables lose them too."""
    _, _, groups = prepared(ZOO["grouped_query"], True)
    pair = next(g for g in groups.prunable if any(s.param == "cos" for s in g.slices))
    assert {tuple(row) for row in next(s for s in pair.slices if s.param == "cos").index.tolist()} == {
        (0, 3), (1, 4), (2, 5)
    }  # fmt: skip


def test_tied_weight_stays_tied() -> None:
    model, _, groups = prepared(ZOO["tied"], False)
    zero(model, groups, choose(groups))
    subnet, _ = construct_subnet(model, groups)
    assert subnet.head.weight is subnet.embed.weight
    assert subnet.embed.embedding_dim == subnet.embed.weight.shape[1] < model.embed.embedding_dim


def test_auxiliary_head_of_training_is_cut_too() -> None:
    model, inputs, groups = prepared(ZOO["train_only"], False)
    zero(model, groups, choose(groups))
    subnet, _ = construct_subnet(model, groups)
    assert subnet.aux.in_features == subnet.fc1.out_features < 10
    subnet.train()(inputs)
