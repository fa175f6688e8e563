"""Capture: what a graph records, what it leaves alone, and when it does not trust itself."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from only_train_once.errors import ConfigurationError, TraceError
from only_train_once.graph import Expr, ValueKind
from only_train_once.groups import find_groups
from only_train_once.sizes import SizeInt, SizeLog
from only_train_once.trace import trace

from .zoo import ZOO, FusedAttention, Reshaped


@pytest.mark.parametrize("name", ZOO)
def test_graph_is_complete_and_model_untouched(name: str) -> None:
    case = ZOO[name]
    model, inputs = case.build().train(), case.inputs()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before = copy.deepcopy(inputs)
    attributes = {path: dict(vars(m)) for path, m in model.named_modules()}
    graph = trace(model, inputs)
    assert graph.provenance, "the network did not run with instrumented sizes"
    assert not graph.untrusted
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            assert type(value) is type(attributes[path][key]), (path, key)
    for value, now in zip(pytree.tree_leaves(before), pytree.tree_leaves(inputs), strict=True):
        assert torch.equal(value, now) if isinstance(value, Tensor) else value == now
    made = {v.index for v in graph.values if v.kind is not ValueKind.RESULT}
    for node in graph.nodes:  # single assignment: what is read was made before
        assert set(node.inputs) <= made, node
        made |= {o for o in node.outputs if o is not None} | {new for new, _ in node.updates}
    assert set(graph.outputs) <= made


def test_nodes_know_their_module() -> None:
    graph = trace(ZOO["convnet"].build(), torch.randn(2, 3, 8, 8))
    assert {n.module for n in graph.nodes if n.name == "aten.convolution"} == {"conv1", "conv2"}
    assert next(n for n in graph.nodes if n.name == "aten.addmm").module == "fc"
    assert "aten.addmm" in str(graph)


def test_tied_and_unused_parameters() -> None:
    graph = trace(ZOO["tied"].build(), torch.randint(0, 20, (2, 5)))
    assert graph.aliases["embed.weight"] == ("embed.weight", "head.weight")
    assert trace(ZOO["unused"].build(), torch.randn(3, 6)).unused == ("never.bias", "never.weight", "spare")


def test_sizes_remember_attributes_and_dims() -> None:
    uses = {str(u.expr) for u in trace(FusedAttention(), torch.randn(2, 5, 16)).uses}
    assert {"num_heads", "head_dim", "(num_heads * head_dim)"} <= uses
    graph = trace(Reshaped(), torch.randn(2, 5, 6))
    assert any(u.expr.kind == "//" and str(u.expr).endswith("// heads)") for u in graph.uses)


def test_size_arithmetic_keeps_and_loses_its_origin() -> None:
    log = SizeLog()
    n = SizeInt(12, Expr("attr", ("attn", "heads", None)), log)
    assert str((3 * n // 2 - 1).expr) == "(((3 * attn.heads) // 2) - 1)"
    assert (n % 5, -n, n + 1, 20 - n) == (2, -12, 13, 8)
    log.guards.clear()
    assert n / 2 == 6.0
    assert n**-0.5 == pytest.approx(12**-0.5)
    assert float(n) == 12.0
    # three times a float was computed from it, so its value has to stay
    assert log.guards == [(n.expr, Expr("const", (12,)))] * 3
    assert {n: 1}[12] == 1


class _ByHand(nn.Module):
    """Each operator's result depends on something that no operator shows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if self.kind == "numpy":  # memory changed behind the operators' back
            y = y.clone()
            y.numpy()[...] *= 2
        elif self.kind == "random":
            y = F.dropout(y, 0.5, training=True)
        elif self.kind == "python":
            y = y * random.random()
        return self.b(y)


def test_what_a_replay_does_not_reproduce_freezes() -> None:
    graph = trace(_ByHand("numpy"), torch.randn(3, 6))
    assert graph.untrusted
    groups = find_groups(graph)
    assert not groups.prunable
    assert any("another result when it runs again" in (g.reason or "") for g in groups)


def test_randomness_alone_is_no_mismatch() -> None:
    graph = trace(_ByHand("python"), torch.randn(3, 6))
    assert not graph.untrusted
    assert len(find_groups(graph).prunable) == 1


def test_what_is_drawn_per_channel_stays_but_is_no_mismatch() -> None:
    """With fewer channels other numbers would be drawn for those that are left."""
    graph = trace(_ByHand("random"), torch.randn(3, 6))
    assert not graph.untrusted
    groups = find_groups(graph)
    assert not groups.prunable
    assert any("drawn" in (g.reason or "") for g in groups), groups


class _Strict(nn.Module):
    """Refuses anything but plain ints."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.width) is not int:
            raise TypeError("plain ints only")
        return self.b(F.relu(self.a(x)).view(-1, self.width))


def test_a_model_that_refuses_instrumented_sizes_is_traced_without() -> None:
    graph = trace(_Strict(), torch.randn(3, 6))
    assert not graph.provenance
    groups = find_groups(graph)
    assert not groups.prunable or all("a." not in s.param for g in groups.prunable for s in g.slices)


class _Cached(nn.Module):
    """Keeps a tensor from its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = F.relu(self.a(x))
        return self.b(self.cache)


def test_caches_of_the_given_model_stay_empty() -> None:
    model = _Cached()
    trace(model, torch.randn(3, 6))
    assert model.cache is None


def test_meta_tensors_need_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 100_000), nn.ReLU(), nn.Linear(100_000, 4))
        x = torch.randn(2, 64)
    groups = find_groups(trace(model, x))
    assert [g.size for g in groups.prunable] == [100_000]


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (None, ConfigurationError, "None"),
        ((), ConfigurationError, "empty"),
        ({}, ConfigurationError, "empty"),
        ((3, "a"), ConfigurationError, "no tensor"),
        (torch.randn(2, 7), TraceError, r"does not run on the example inputs \[\[2, 7\] float32\]"),
        ({"y": torch.randn(2, 6)}, TraceError, "unexpected keyword argument 'y'"),
    ],
)
def test_bad_inputs_are_named(inputs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        trace(ZOO["mlp"].build(), inputs)


def test_uncopyable_model_is_named() -> None:
    model = ZOO["mlp"].build()
    model.handle = open(__file__)  # noqa: SIM115
    try:
        with pytest.raises(TraceError, match="MLP cannot be copied"):
            trace(model, torch.randn(3, 6))
    finally:
        model.handle.close()


class Scaled(nn.Module):
    """Computes with the number of its hidden channels, in the way it is given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.function = nn.Linear(6, 10), nn.Linear(10, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x).relu()))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h / h.shape[1], id="divided"),
        pytest.param(lambda h: h.shape[1] * h, id="multiplied"),
        pytest.param(lambda h: h.pow(h.size(1)), id="power"),
        pytest.param(lambda h: torch.add(h, 1, alpha=h.shape[1]), id="alpha"),
        pytest.param(lambda h: h / torch.sqrt(torch.tensor(h.shape[1])), id="tensor"),
        pytest.param(lambda h: h * torch.full((1,), h.shape[1]), id="full"),
        pytest.param(lambda h: h * h.new_full((1,), fill_value=h.shape[1]), id="new_full"),
        pytest.param(lambda h: h * math.sqrt(h.shape[1]), id="math"),
        pytest.param(lambda h: h * float(np.sqrt(h.shape[1])), id="numpy"),
        pytest.param(lambda h: h * int(h.shape[1]) ** -0.5, id="int"),
        pytest.param(lambda h: h / round(h.shape[1]), id="round"),
        pytest.param(lambda h: h / (h.shape[1] >> 1), id="shift"),
        pytest.param(lambda h: h / h[0].numel(), id="numel"),
        pytest.param(lambda h: h / len(h[0]), id="len"),
    ],
)
def test_a_size_that_is_computed_with_has_to_stay(function: Callable[[Tensor], Tensor]) -> None:
    groups = find_groups(trace(Scaled(function), torch.randn(3, 6)))
    assert "fc1" not in {g.name for g in groups.prunable}
    assert "fc1" in {g.name for g in find_groups(trace(Scaled(torch.tanh), torch.randn(3, 6))).prunable}


def test_a_size_from_numel_is_followed() -> None:
    model = Scaled(lambda h: h.view(-1, h.numel() // h.shape[0]))
    assert "fc1" in {g.name for g in find_groups(trace(model, torch.randn(3, 6))).prunable}


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (10**6, 60, 2000)])
def test_the_collector_is_left_as_it_was(before: tuple[int, int, int]) -> None:
    usual, seen = gc.get_threshold(), []

    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.get_threshold())
            return super().forward(x)

    try:
        gc.set_threshold(*before)
        trace(Asking(3, 3), torch.randn(2, 3))
        after = gc.get_threshold()
        with pytest.raises(TraceError):
            trace(Asking(3, 3), torch.randn(2, 5))
        assert gc.get_threshold() == after == before
    finally:
        gc.set_threshold(*usual)
    assert all(s == before if before[0] == 0 else s[0] >= max(before[0], 10_000) for s in seen)
