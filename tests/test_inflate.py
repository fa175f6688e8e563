"""From the subnet back to the full network: the same function, and the same subnet again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from only_train_once import OTO, checkpoint, inflate
from only_train_once.errors import CheckpointError, ConfigurationError, VerificationError
from only_train_once.groups import GroupList, find_groups
from only_train_once.record import SurgeryRecord, TensorCut
from only_train_once.surgery import construct_subnet, named_tensors
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import choose, randomize, zero
from .test_subnet import prepared
from .zoo import ZOO, Case


def cut(case: Case, wide: bool = False) -> tuple[nn.Module, Any, Any, GroupList]:
    """Subnet with its record, the network that it is from, inputs and groups."""
    model, inputs, groups = prepared(case, wide)
    zero(model, groups, choose(groups))
    subnet, record = construct_subnet(model, groups)
    return model, inputs, SimpleNamespace(model=subnet, record=record), groups


# What wide=True offers includes what is offered by default.
CASES = [pytest.param(case, id=name) for name, case in ZOO.items()]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: Case) -> None:
    """The same function, the same subnet again, and the record says what is where."""
    model, inputs, subnet, groups = cut(case, wide=True)
    record = subnet.record
    full = inflate(subnet, case.build)
    assert type(full) is type(model)
    before, after = named_tensors(model), named_tensors(subnet.model)
    assert {name: t.shape for name, t in named_tensors(full).items()} == {name: t.shape for name, t in before.items()}
    assert verify_subnet(full, subnet.model, inputs, tolerance=1e-9).max_relative_difference <= 1e-9

    removed = {group: record.removed_units(group) for group in record.removed}
    again, same_record = construct_subnet(full, groups, removed)
    assert same_record == record
    rescaled = {f"{path}.weight" for path, norm in record.norms.items() if norm.kind == "rescale"}
    found = named_tensors(again)
    for name, tensor in after.items():
        if name in rescaled:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(found[name], tensor), name
        assert found[name].requires_grad == tensor.requires_grad

    chosen = choose(groups)
    assert set(removed) == set(chosen)
    for group, units in removed.items():
        assert units.tolist() == chosen[group].tolist()
        assert sorted([*units.tolist(), *record.kept_units(group).tolist()]) == list(range(groups[group].size))
    for name in {name for first, c in record.tensors.items() for name in (first, *c.aliases)} - rescaled:
        value = before[name]
        for dim, positions in record.kept(name).items():
            value = value.index_select(dim, torch.from_numpy(positions))
        assert torch.equal(value, after[name]), name


def test_a_rescaled_norm_is_scaled_back() -> None:
    """In float64 the norm keeps its class, and the weight takes the ratio of the widths."""
    build, inputs = lambda: ZOO["hand_rms_norm"].build().double(), ZOO["hand_rms_norm"].inputs().double()
    model = build()
    randomize(model)
    groups = find_groups(trace(model, inputs), wide=True)
    zero(model, groups, choose(groups))
    subnet, record = construct_subnet(model, groups)
    path = next(path for path, norm in record.norms.items() if norm.kind == "rescale")
    full = inflate(SimpleNamespace(model=subnet, record=record), build, inputs=inputs)
    places = record.kept(f"{path}.weight")[0]
    weights = (m.get_submodule(path).weight[places] for m in (full, model))
    torch.testing.assert_close(*weights, rtol=1e-15, atol=0)


def test_what_lost_nothing_is_not_on_the_map() -> None:
    record = SurgeryRecord(tensors={"a": TensorCut((4,), {0: ((1, 3),)}, ("b",))})
    assert record.kept("b")[0].tolist() == [1, 2]
    with pytest.raises(ConfigurationError, match=r"no tensor 'c' lost anything.*Those that did: a, b"):
        record.kept("c")
    with pytest.raises(ConfigurationError, match=r"no group 'g' lost anything.*Those that did: none"):
        record.removed_units("g")


@pytest.mark.parametrize("name", ["tied", "weight_norm_hook", "mlp"])
def test_from_a_folder(name: str, tmp_path: Any) -> None:
    case = ZOO[name]
    _, inputs, subnet, _ = cut(case)
    checkpoint.save(subnet.model, subnet.record, {}, tmp_path, max_shard_size=200)
    assert (tmp_path / checkpoint.INDEX_FILE).exists()
    full, other = inflate(tmp_path, case.build, inputs=inputs), inflate(subnet, case.build())
    expected = named_tensors(other)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in named_tensors(full).items())
    assert not full.training


class _Dtypes(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("steps", (torch.arange(24) % 2).reshape(4, 6).to(dtype))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8, torch.bool, torch.uint16],
)
def test_dtypes(dtype: torch.dtype) -> None:
    kept = {1: ((0, 2), (5, 6))}
    record = SurgeryRecord(tensors={"steps": TensorCut((4, 6), kept, (), {1: ((2, 4),)})})
    small: Any = _Dtypes(dtype)
    whole = small.steps
    small.steps = whole.view(torch.uint8 if dtype.itemsize == 1 else dtype)[:, [0, 1, 5]].view(dtype)
    full: Any = inflate(SimpleNamespace(model=small, record=record), lambda: _Dtypes(dtype))
    assert full.steps.dtype is dtype
    neutral = torch.tensor(4 / 24 if dtype.is_floating_point or dtype.is_complex else 0).to(dtype)
    row = [float(x.abs()) for x in full.steps[1].to(torch.complex64)]
    middle = float(neutral.to(torch.complex64).abs())
    assert row == [float(i % 2) if i in (0, 1, 5) else middle if i in (2, 3) else 0.0 for i in range(6)]


def test_a_wrong_source_or_model_has_a_name(tmp_path: Any) -> None:
    case = ZOO["mlp"]
    _, _, subnet, _ = cut(case)
    with pytest.raises(ConfigurationError, match="source is a int: give a Subnet"):
        inflate(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"how the full model is made is not known.*give build="):
        inflate(subnet)
    with pytest.raises(CheckpointError, match="the record does not fit the model"):
        inflate(subnet, lambda: nn.Linear(2, 2))
    checkpoint.save(subnet.model, subnet.record, {}, tmp_path)
    with pytest.raises(CheckpointError, match=r"subnet.json does not fit the model"):
        inflate(tmp_path, lambda: nn.Linear(2, 2))


def test_what_does_not_compute_the_same_is_not_handed_out() -> None:
    """A constructor that gives another function of the same tensors."""
    case = ZOO["mlp"]
    _, inputs, subnet, _ = cut(case)

    def other() -> nn.Module:
        model = case.build()
        model.register_forward_hook(lambda _module, _given, out: out + 1)
        return model

    inflate(subnet, case.build, inputs=inputs)
    with pytest.raises(VerificationError, match="differs in eval mode"):
        inflate(subnet, other, inputs=inputs)


def test_a_full_model_of_absurd_size_is_refused(tmp_path: Any) -> None:
    def large() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 2**22, bias=False), nn.Linear(2**22, 1, bias=False))

    record = SurgeryRecord(
        tensors={
            "0.weight": TensorCut((2**22, 1), {0: ((0, 1),)}),
            "1.weight": TensorCut((1, 2**22), {1: ((0, 1),)}),
        }
    )
    small = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with pytest.raises(CheckpointError, match="more than 1000 times what is left"):
        inflate(SimpleNamespace(model=small, record=record), large)


def test_the_facade(tmp_path: Any) -> None:
    make: Callable[[], nn.Module] = ZOO["mlp"].build
    oto = OTO(make(), ZOO["mlp"].inputs())
    oto.random_set_zero_groups(0.5, seed=0)
    subnet = oto.construct_subnet()
    full = inflate(subnet, make, inputs=ZOO["mlp"].inputs())
    again = OTO(full, ZOO["mlp"].inputs()).construct_subnet()
    assert again.record == subnet.record
