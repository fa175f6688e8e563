"""Recurrent layers of torch: recorded as one call, and ordinary layers after the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once.flops import count_flops
from only_train_once.groups import find_groups
from only_train_once.norms import FullWidthGatedRMSNorm, FullWidthRMSNorm
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import randomize, zero
from .zoo.recurrent import Cells, GatedNorm, Layer, Packed, every_step

LAYERS = {
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True),
    "lstm_projected": lambda: nn.LSTM(6, 20, 2, proj_size=16),
    "gru": lambda: nn.GRU(6, 8, bias=False, bidirectional=True),
    "rnn": lambda: nn.RNN(6, 16, 2, nonlinearity="relu"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_the_layer_that_its_constructor_makes(layer: Callable[[], nn.Module]) -> None:
    """Attributes and weights after the cut are those of a layer built with the smaller sizes."""
    model: Any = Layer(layer(), every_step, 16)
    groups = find_groups(trace(model, torch.randn(4, 2, 5)))
    removed = {"stem": [0, 2], "layer": [1, 4, 5]}
    zero(model, groups, removed)
    subnet: Any = construct_subnet(model, groups, removed)[0]
    cut = subnet.layer
    options: dict[str, Any] = {"bias": cut.bias, "bidirectional": cut.bidirectional}
    options |= {"proj_size": 13} if cut.proj_size else {}
    options |= {"nonlinearity": cut.nonlinearity} if isinstance(cut, nn.RNN) else {}
    hidden = model.layer.hidden_size - (0 if cut.proj_size else 3)
    built = type(cut)(4, hidden, cut.num_layers, **options)
    for name in ("input_size", "hidden_size", "proj_size", "num_layers", "_flat_weights_names", "_all_weights"):
        assert getattr(cut, name) == getattr(built, name), name
    assert {n: p.shape for n, p in cut.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert all(w is getattr(cut, name) for w, name in zip(cut._flat_weights, cut._flat_weights_names, strict=True))
    built.load_state_dict(cut.state_dict())
    x = torch.randn(3, 2, 4)
    assert torch.equal(cut(x)[0], built(x)[0])


def test_operations_shrink_with_the_hidden_units() -> None:
    model = Layer(nn.LSTM(6, 8, 2, bidirectional=True), every_step, 16)
    x = torch.randn(4, 2, 5)
    subnet = construct_subnet(model, find_groups(trace(model, x)), {"layer": [0, 3, 5]})[0]
    per_step = 5 * 6 + 2 * 4 * 5 * (6 + 5) + 2 * 4 * 5 * (10 + 5) + 10 * 3
    assert count_flops(subnet, x).total == 2 * 8 * per_step


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_one_call_however_long_the_sequence(layer: Callable[[], nn.Module]) -> None:
    model = Layer(layer(), every_step, 16)
    graphs = [trace(model, torch.randn(length, 2, 5)) for length in (2, 50)]
    assert len(graphs[0].nodes) == len(graphs[1].nodes) < 20


def test_calls_are_recorded_whole() -> None:
    calls = trace(Cells(), torch.randn(2, 4, 5)).operators()
    assert {calls.get(f"aten.{kind}_cell") for kind in ("lstm", "gru", "rnn_relu")} == {4}
    calls = trace(Packed(nn.GRU(6, 16, batch_first=True), 0.0), torch.randn(3, 5, 5)).operators()
    assert (calls["aten.gru"], calls["aten._pad_packed_sequence"]) == (1, 1)
    assert "aten.addmm" in calls  # the linear layers, and nothing of the inside
    assert not {"aten.unsafe_split", "aten.full", "aten.sigmoid"} & set(calls)


def test_a_cut_layer_is_copied_cast_and_trained() -> None:
    model: Any = Layer(nn.LSTM(6, 8), every_step)
    groups = find_groups(trace(model, torch.randn(4, 2, 5)))
    subnet = construct_subnet(model, groups, {"layer": [0]})[0]
    twin = copy.deepcopy(subnet).double().train()
    before = [p.clone() for p in twin.parameters()]
    twin(torch.randn(4, 2, 5, dtype=torch.float64)).square().mean().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert all(not torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))
    assert all(p.dtype is torch.float32 for p in subnet.parameters())


class Gates(nn.Module):
    """A gated norm between linear layers."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = (
            nn.Linear(5, 12),
            nn.Linear(5, 12),
            GatedNorm(12, first),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x), self.b(x)))


@pytest.mark.parametrize("first", [True, False])
def test_a_gated_norm_remembers_its_width_and_the_order(first: bool) -> None:
    """In float32, where a rescaled weight would round."""
    model: Any = Gates(first)
    randomize(model)
    x = torch.randn(2, 4, 5)
    (group,) = find_groups(trace(model, x), wide=True).prunable
    removed = {group.name: [0, 4, 7]}
    zero(model, [group], removed)  # type: ignore[arg-type]
    subnet: Any = construct_subnet(model, [group], removed)[0]
    assert type(subnet.norm) is FullWidthGatedRMSNorm
    assert f"full_width=12, dim=-1, offset=0, gate_first={first}" in repr(subnet.norm)
    assert subnet.head.in_features == 9
    verify_subnet(model, subnet, x)
    assert torch.equal(subnet.norm(y := torch.randn(2, 9)), FullWidthRMSNorm.forward(subnet.norm, y))  # no gate
