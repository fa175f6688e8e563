"""Copies of models: equal to what ``copy.deepcopy`` makes, and borrowed ones leave the originals as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once.copying import borrowed, copy_module
from only_train_once.errors import SurgeryError
from only_train_once.inputs import call_model, output_tensors

from .zoo import ZOO


def _facts(value: Any, seen: dict[int, int], path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything a module consists of; what was met before by where it was met."""
    if isinstance(value, (nn.Module, Tensor, dict, list, set)):
        if id(value) in seen:
            yield path, seen[id(value)]
            return
        seen[id(value)] = len(seen)
    if isinstance(value, nn.Module):
        yield path, type(value)
        for name, each in vars(value).items():
            yield from _facts(each, seen, f"{path}.{name}")
    elif isinstance(value, Tensor):
        yield path, (type(value), value.dtype, value.shape, value.stride(), value.requires_grad, value.is_leaf)
        yield path, vars(value).keys() if isinstance(value, nn.Parameter) else ()
    elif isinstance(value, dict):
        yield path, type(value)
        for key, each in value.items():
            yield from _facts(each, seen, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield path, (type(value), len(value))
        for place, each in enumerate(value):
            yield from _facts(each, seen, f"{path}[{place}]")
    elif isinstance(value, (int, float, str, bool, type(None))):
        yield path, value


def _mutable(value: Any) -> set[int]:
    """Tensors, modules and tables by identity."""
    found: set[int] = set()
    for m in value.modules():
        tables = [t for t in vars(m).values() if isinstance(t, (dict, list, set))]
        found |= {id(x) for x in (m, *m._parameters.values(), *m._buffers.values(), *tables) if x is not None}
    return found


def _reference(model: nn.Module) -> nn.Module:
    """What ``copy.deepcopy`` makes, once weights that are computed are kept without their graph."""
    computed = [t for m in model.modules() for t in (*vars(m).values(), *m._buffers.values()) if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_a_copy_is_what_deepcopy_makes(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    expected = list(_facts(_reference(model), {}))
    for copied in (copy_module(model), _kept(model)):
        assert list(_facts(copied, {})) == expected
        assert not _mutable(copied) & _mutable(model)
    ours = copy_module(model).eval()
    with torch.no_grad():
        one, two = (list(output_tensors(call_model(m, inputs))) for m in (ours, _reference(model).eval()))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def _kept(model: nn.Module) -> nn.Module:
    """A borrowed copy whose weights were written to."""
    with borrowed(model) as copied:
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        kept = copy_module(copied)
    return kept


class Holder(nn.Module):
    """What makes copying difficult: weights that are read, views, ties, marks, methods, cycles, computed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.one.weight.mark = "kept"  # type: ignore[attr-defined]
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.repeated = nn.Parameter(torch.randn(1, 4).expand(3, 4))
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("first", self.whole[:3])
        self.method = self.one.forward
        self.table = self.same = []
        self.parts = [self.one, self.whole]
        self.computed = self.one.weight * 2
        object.__setattr__(self, "owner", self)  # a cycle that is no submodule


def test_what_is_shared_inside_a_model_is_shared_inside_its_copy() -> None:
    model = Holder()
    for copied in (copy_module(model), _kept(model)):
        assert copied.two.weight is copied.one.weight
        assert copied.one.weight.mark == "kept"
        assert copied.owner is copied
        assert copied.parts[0] is copied.one
        assert copied.parts[1] is copied.whole
        assert copied.table is copied.same
        assert copied.method.__self__ is copied.one
        assert copied.whole.untyped_storage().data_ptr() == copied.first.untyped_storage().data_ptr()
        assert copied.computed.is_leaf
        assert torch.equal(copied.computed, model.computed)
        assert copied.transposed.stride() == model.transposed.stride()


def test_writing_to_a_borrowed_copy_leaves_the_original() -> None:
    model = Holder()
    before = {n: (p.detach().clone(), p.data_ptr(), p._version) for n, p in model.named_parameters()}
    with borrowed(model) as copied:
        with torch.no_grad():
            copied.one.bias.numpy()[:] = 7.0  # not through an operator
            copied.transposed.add_(1)
            torch.nn.init.zeros_(copied.one.weight)
        assert torch.equal(copied.two.bias, model.two.bias)
        assert copied.one.bias.eq(7).all()
        assert copied.one.weight.eq(0).all()
    for name, p in model.named_parameters():
        value, address, version = before[name]
        assert torch.equal(p, value)
        assert p.data_ptr() == address
        assert p._version == version
        assert not torch._C._is_cow_tensor(p)  # type: ignore[attr-defined]


def test_a_copy_given_back_holds_nothing() -> None:
    model = nn.Linear(3, 3)
    with borrowed(model) as copied:
        pass
    assert copied.weight.numel() == 0
    assert model.weight.shape == (3, 3)


def test_memory_that_cannot_be_lent_is_copied() -> None:
    model = nn.Module()
    model.numpys = nn.Parameter(torch.from_numpy(torch.randn(4).numpy().copy()))
    model.shared = nn.Parameter(torch.randn(4).share_memory_())
    before = [p.detach().clone() for p in model.parameters()]
    with borrowed(model) as copied, torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].generator = (i for i in range(3))
    with pytest.raises(SurgeryError, match=r"Sequential cannot be copied \(TypeError: .*generator"):
        copy_module(model)
