"""Depth and size: work grows with the number of operators, nothing recurses, a 70B configuration is found right."""

from __future__ import annotations

import cProfile
import pstats
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from only_train_once.groups import GroupList, Role, find_groups
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import choose, randomize, zero
from .scale import DeepCNN, llama, llama_inputs


def calls(function: Callable[[], object]) -> int:
    """How many Python and built-in functions a call makes: work, without a clock."""
    profile = cProfile.Profile()
    profile.runcall(function)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("wide", [False, True])
def test_work_grows_with_depth(wide: bool) -> None:
    graphs = {}

    def analyse(layers: int) -> None:
        graphs[layers] = trace(llama(layers, large=False), llama_inputs())
        find_groups(graphs[layers], wide=wide)

    analyse(2)  # what is done once and kept
    work = {layers: calls(lambda n=layers: analyse(n)) for layers in (4, 8, 16)}  # type: ignore[misc]
    assert (work[16] - work[8]) / (work[8] - work[4]) < 2.2  # twice the layers, twice the work: 2.0


def test_a_thousand_layers_are_analysed_and_cut() -> None:
    torch.manual_seed(0)
    model, x = DeepCNN(1000, width=4).eval(), torch.randn(2, 3, 4, 4)
    randomize(model)
    for norm in model.norms:
        torch.nn.init.constant_(norm.weight, 0.1)  # or a thousand random norms overflow
    groups = find_groups(trace(model, x))
    assert len(groups.prunable) == 501
    zero(model, groups, choose(groups))
    subnet, _ = construct_subnet(model, groups)
    assert verify_subnet(model, subnet, x, tolerance=1e-9, samples=1).max_relative_difference <= 1e-9


def outline(groups: GroupList) -> list[tuple[str, str, bool, tuple[tuple[str, int, Role], ...]]]:
    """Groups without their sizes."""
    return [(g.name, g.kind.value, g.prunable, tuple((s.param, s.dim, s.role) for s in g.slices)) for g in groups]


@pytest.mark.parametrize("wide", [False, True])
def test_a_large_configuration_has_the_groups_of_the_small_one(wide: bool) -> None:
    """Layers of the 70B width, four of them; `benchmarks/scaling.py` runs all eighty."""
    large = find_groups(trace(llama(4, large=True), llama_inputs()), wide=wide)
    small = find_groups(trace(llama(4, large=False), llama_inputs()), wide=wide)
    assert outline(large) == outline(small)
    sizes = {re.sub(r"\.\d+\.", ".", g.name): g.size for g in large.prunable}
    assert sizes["model.layers.mlp.gate_proj"] == 28672
    # a key-value head leaves with its eight query heads
    assert sizes[f"model.layers.self_attn.{'q' if wide else 'v'}_proj:heads"] == 8
    assert sizes.get("model.embed_tokens:width") == (8192 if wide else None)


class Clamped(nn.Module):
    """An MLP with an operator that no other test has asked how it treats zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).clamp(-0.7123, 0.9321))


def test_on_the_meta_device_of_the_caller() -> None:
    """The usual way to make a model without weights is also around the analysis."""
    with torch.device("meta"):
        groups = find_groups(trace(Clamped(), torch.zeros(2, 4)))
    assert [g.size for g in groups.prunable] == [6]
