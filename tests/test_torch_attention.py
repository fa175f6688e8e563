"""Attention of torch: the fused kernels compute what the operators one by one compute, after the cut as well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from only_train_once.groups import GroupList, Role, find_groups
from only_train_once.inputs import call_model, no_fast_paths, output_tensors
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace

from .pruning import choose, randomize, zero
from .zoo import ZOO
from .zoo.attention import Encoder, GivenMask, ReturnsWeights, SelfAttention

LAYER, ATTENTION = "aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def subnet_of(model: nn.Module, inputs: Any, wide: bool) -> tuple[nn.Module, nn.Module, GroupList]:
    """The network with removed units at zero, and without them; in evaluation mode."""
    randomize(model)
    groups = find_groups(trace(model, inputs), wide=wide)
    full = copy.deepcopy(model)
    units = choose(groups, 0.5)
    zero(full, groups, units)
    return full.eval(), construct_subnet(full, groups, units)[0].eval(), groups


def outputs(model: nn.Module, inputs: Any) -> tuple[list[Tensor], set[str]]:
    """As anybody runs it: no gradients, fused kernels on."""
    with torch.no_grad(), Operators() as operators:
        return list(output_tensors(call_model(model, inputs))), operators.seen & {LAYER, ATTENTION}


# network, its inputs, whether wide, the fused kernel that the full network runs, and the subnet
PATHS = [
    pytest.param(lambda: SelfAttention({}, 4, batch_first=True), "mha", True, ATTENTION, ATTENTION, id="attention"),
    pytest.param(lambda: Encoder(False), "encoder_norm_last", False, LAYER, LAYER, id="norm last"),
    pytest.param(lambda: Encoder(True), "encoder_norm_first", False, LAYER, LAYER, id="norm first"),
    pytest.param(lambda: Encoder(False, True), "encoder_padded", False, LAYER, LAYER, id="padded"),
    # a norm that remembers its width is none that the fused layer knows
    pytest.param(lambda: Encoder(False), "encoder_norm_last", True, LAYER, ATTENTION, id="norm last, fewer heads"),
    pytest.param(lambda: Encoder(True), "encoder_norm_first", True, LAYER, ATTENTION, id="norm first, fewer heads"),
]


@pytest.mark.parametrize(("build", "case", "wide", "before", "after"), PATHS)
def test_a_subnet_on_its_fast_path(build: Any, case: str, wide: bool, before: str, after: str) -> None:
    inputs = ZOO[case].inputs()
    full, subnet, _ = subnet_of(build(), inputs, wide)
    assert outputs(full, inputs)[1] == {before}
    with no_fast_paths():
        expected, none = outputs(full, inputs)
    assert not none
    found, kernels = outputs(subnet, inputs)
    assert kernels == {after}
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("heads", "packed"), [(0, True), (1, False), (2, False)])
def test_tokens_are_packed_only_where_every_layer_is_fused(heads: int, packed: bool) -> None:
    """Packed tokens run through the fused layer and nothing else."""
    ids = ZOO["encoder_padded"].inputs()
    model = Encoder(False, padded=True, packed=True)
    randomize(model)
    groups = find_groups(trace(model, ids), wide=True)
    units = {"embed:width": list(range(heads)), "encoder.layers.0.linear1": [0, 3]}
    full: Any = copy.deepcopy(model).eval()
    zero(full, groups, units)  # type: ignore[arg-type]
    subnet: Any = construct_subnet(full, groups, units)[0]
    assert subnet.encoder.layers[1].self_attn.num_heads == 4 - heads
    assert full.encoder.use_nested_tensor
    assert subnet.encoder.use_nested_tensor is packed
    with no_fast_paths():
        expected = outputs(full, ids)[0][0]
    found = outputs(subnet, ids)[0][0]
    assert torch.allclose(expected[ids != 0], found[ids != 0], rtol=1e-4, atol=1e-5)


def test_heads_leave_unless_somebody_counts_them() -> None:
    """The average over heads divides by their count; where nobody reads it, it does not matter.

    A mask for every head that comes from outside keeps them all.
    """
    x = torch.randn(2, 5, 6)
    unread = find_groups(trace(SelfAttention({}, batch_first=True), x))
    assert "stem:heads" in unread.prunable
    read = find_groups(trace(ReturnsWeights(), x), wide=True)
    assert [group.name for group in read.prunable] == ["attn.out_proj"]
    given = find_groups(trace(GivenMask(), ZOO["mha_given_mask"].inputs()), wide=True)
    assert [group.name for group in given.prunable] == ["attn.out_proj"]


def test_the_width_a_module_gives_is_free_of_its_heads() -> None:
    model: Any = SelfAttention({}, 4, batch_first=True)
    groups = find_groups(trace(model, torch.randn(2, 5, 6)))
    subnet: Any = construct_subnet(model, groups, {"attn.out_proj": [0, 1], "stem:heads": [3]})[0]
    attn = subnet.attn
    assert (attn.embed_dim, attn.num_heads, attn.head_dim, attn.out_proj.out_features) == (9, 3, 3, 10)


class RepeatedValues(nn.Module):
    """Every key-value head serves as many query heads as an attribute says, by repetition."""

    def __init__(self, heads: int = 3, times: int = 2, head_dim: int = 4) -> None:
        super().__init__()
        self.times, self.head_dim, self.scale = times, head_dim, head_dim**-0.5
        self.q = nn.Linear(6, heads * times * head_dim)
        self.kv, self.o = nn.Linear(6, 2 * heads * head_dim), nn.Linear(heads * times * head_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        k, v = (t.view(b, n, -1, 1, self.head_dim) for t in self.kv(x).chunk(2, dim=-1))
        k, v = (t.expand(b, n, t.shape[2], self.times, self.head_dim).flatten(2, 3).transpose(1, 2) for t in (k, v))
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_repeated_head_is_zero_where_its_values_are() -> None:
    groups = find_groups(trace(RepeatedValues(), torch.randn(2, 5, 6)))
    (group,) = groups.prunable
    assert (group.name, group.size, group.pinned) == ("kv:heads", 3, False)
    assert {s.param: s.role for s in group.slices}["o.weight"] is Role.CONSUMER
