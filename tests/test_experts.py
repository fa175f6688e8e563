"""Mixtures of experts: when an expert can leave, and experts that the example's tokens never reach."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once.groups import Kind, find_groups
from only_train_once.trace import trace

from .pruning import randomize
from .zoo.experts import (
    BatchedExperts,
    GatheredExperts,
    Mixtral,
    NeverChosen,
    NormalizedRelu,
    NormalizedSigmoid,
    RarelyChosen,
    ReluTop,
    SigmoidGates,
    SoftmaxGates,
)

LEAVES = (SigmoidGates, NormalizedRelu)
_SOFTMAX = "a zero still counts in a softmax over this dim"
STAYS = {
    NormalizedSigmoid: "a removed unit does not become 0 before aten.sum",
    SoftmaxGates: _SOFTMAX,
    BatchedExperts: _SOFTMAX,
    GatheredExperts: _SOFTMAX,
}
# Not seen by the analysis: the weight of an expert that is picked with the score 0 is 0, whichever it is.
UNSEEN = {ReluTop: "the largest of this dim are picked, a zero may be one"}


def at_zero_and_without(build: Any) -> tuple[Tensor, Tensor]:
    """Outputs in float64 with all of the first expert and its row of the router at zero, and without the two."""
    model, x = build().double().eval(), torch.randn(2, 50, 8, dtype=torch.float64)
    randomize(model)
    fewer = copy.deepcopy(model)
    with torch.no_grad():
        for owner, name in ((model, "gate_up"), (model, "down"), (model.router, "weight")):
            getattr(owner, name)[0] = 0
        for owner, name in ((fewer, "gate_up"), (fewer, "down"), (fewer.router, "weight")):
            setattr(owner, name, nn.Parameter(getattr(owner, name)[1:]))
        fewer.experts_count -= 1
        return model(x), fewer(x)


@pytest.mark.parametrize("build", [*LEAVES, *UNSEEN])
def test_gates_that_are_zero_let_an_expert_leave(build: Any) -> None:
    zeroed, without = at_zero_and_without(build)
    torch.testing.assert_close(zeroed, without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", STAYS)
def test_a_zero_row_of_the_router_is_not_enough(build: Any) -> None:
    """It takes probability from the others, or is chosen where the others score less."""
    zeroed, without = at_zero_and_without(build)
    assert ((zeroed - without).abs().amax(-1) > 1e-3).float().mean() > 0.2


@pytest.mark.parametrize("build", [*LEAVES, *STAYS, *UNSEEN])
def test_experts_are_units_where_they_can_leave(build: Any) -> None:
    groups = find_groups(trace(build(), torch.randn(2, 5, 8)))
    experts = [g for g in groups.prunable if g.kind is Kind.EXPERT]
    if build in LEAVES:
        assert [(g.name, g.size) for g in experts] == [("gate_up:experts", 6)]
        assert {s.param for s in experts[0].slices} == {"gate_up", "down", "router.weight"}
    else:
        assert not experts
        stays = {
            g.reason for g in groups if not g.prunable and any(str(s)[:16] == "router.weight[0]" for s in g.slices)
        }
        assert [reason for reason in stays if reason and (STAYS | UNSEEN)[build] in reason]


def test_experts_that_no_token_chose_are_followed_too() -> None:
    """Other inputs, then other weights; the model that was given keeps its own."""
    model, x = RarelyChosen(), torch.randn(2, 5, 8)
    randomize(model)
    with torch.no_grad():
        model.router.weight[5] = 0
        model.router.weight[:5] *= 30  # the largest score is then above 0 on nearly every input
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        many = model.stem(torch.randn(10_000, 8))
        assert not (model.scores(model.norm(many)).topk(2)[1] == 5).any()
    graph = trace(model, x)
    assert not graph.unused
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert {g.size for g in find_groups(graph).prunable if g.name.startswith("experts.")} == {6}
    assert len(find_groups(graph).prunable) == 16


def test_passes_that_show_nothing_new_are_dropped() -> None:
    """Evaluation and training are left of some ten passes: in all of them the fourth expert waits in vain."""
    model, x = NeverChosen(), torch.randn(8, 40, 8)
    randomize(model)
    graph = trace(model, x)
    assert graph.unused == tuple(f"experts.3.{name}.weight" for name in ("down", "gate", "up"))
    assert len(graph.nodes) < 2 * len(trace(Mixtral(), x).nodes)
