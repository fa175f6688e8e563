"""What `explain` says: every reason names a way out, and taking it frees the dim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import ConfigurationError
from only_train_once.explain import coverage, way_out, what_stays
from only_train_once.groups import GroupList, find_groups
from only_train_once.trace import trace

from . import pruning
from .zoo import MLP, ZOO
from .zoo.basics import HandRMSNorm, NormedStream


def groups_of(model: nn.Module, inputs: object, wide: bool = False) -> GroupList:
    return find_groups(trace(model, inputs), wide=wide)  # type: ignore[arg-type]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ZOO)
def test_every_reason_of_the_zoo_has_a_way_out(name: str) -> None:
    model = ZOO[name].build()
    reasons = {g.reason for g in groups_of(model, ZOO[name].inputs()) if not g.prunable}
    assert {reason for reason in reasons if not way_out(reason)} == set()


class Hidden(nn.Module):
    """fc1, something in between, fc2."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(6, 12), nn.Linear(12, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


@pytest.mark.parametrize(
    ("stuck", "freed", "says"),
    [
        pytest.param(lambda h: h.view(-1, 12), lambda h: h.view(-1, h.shape[1]), "x.shape[i]", id="literal"),
        pytest.param(lambda h: h / h.norm(p=0), lambda h: h / h.norm(p=2), "order 1 or 2", id="norm"),
        pytest.param(
            lambda h: h - h.mean(1, keepdim=True), lambda h: h - h.sum(1, keepdim=True), "a sum, or a mean", id="mean"
        ),
        pytest.param(lambda h: h[:, torch.arange(11, -1, -1)], lambda h: h.flip(0), "another dim", id="index"),
    ],
)
def test_the_way_out_frees(stuck: Callable[[Tensor], Tensor], freed: Callable[[Tensor], Tensor], says: str) -> None:
    x = torch.randn(4, 6)
    frozen = [g for g in groups_of(Hidden(stuck), x) if "fc1.weight" in g.params]
    assert frozen
    assert not any(g.prunable for g in frozen)
    assert any(says in way_out(g.reason) for g in frozen), [g.reason for g in frozen]
    assert any(g.prunable and g.size == 12 for g in groups_of(Hidden(freed), x))


def test_wide_frees_what_it_says() -> None:
    case = ZOO["layer_norm"]
    model, inputs = case.build(), case.inputs()
    (stays,) = [s for s in what_stays(groups_of(model, inputs), shapes_of(model)) if s.way_out == "wide=True"]
    assert stays.share > 0
    assert not [
        s for s in what_stays(groups_of(model, inputs, wide=True), shapes_of(model)) if s.way_out == "wide=True"
    ]


@pytest.mark.parametrize("name", ["mlp", "residual", "fused_attention", "unet", "tied"])
def test_shares_add_up(name: str) -> None:
    model = ZOO[name].build()
    groups, shapes = groups_of(model, ZOO[name].inputs()), shapes_of(model)
    assert coverage(groups, shapes) == pytest.approx(pruning.coverage(model, groups))
    assert coverage(groups, shapes) + sum(s.share for s in what_stays(groups, shapes)) >= 1 - 1e-9


def test_explain_names_what_is_cut_what_stays_and_how_much() -> None:
    oto = OTO(MLP(), torch.randn(3, 6))
    text = oto.explain()
    for part in ("fc1", "fc1.weight[0] (zero)", "is a dim of the model's output 0", "97.1% of the parameters"):
        assert part in text
    assert "to free it" in oto.explain("fc2")


class _HelpedNorm(HandRMSNorm):
    """Its eps is in a function that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return x * _inverse_root(x) * self.weight


def _inverse_root(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + 3e-4)


def test_a_norm_that_cannot_lose_channels_is_known_before_training() -> None:
    """Or the target would be planned with units that cannot leave, and missed."""

    def named(eps: float) -> HandRMSNorm:
        norm = _HelpedNorm()
        norm.variance_epsilon = eps
        return norm

    for eps, free in ((1e-3, False), (3e-4, True)):
        oto = OTO(NormedStream(lambda eps=eps: named(eps)), dummy_input=torch.randn(3, 6), wide=True)  # type: ignore[misc]
        width = oto.groups["stem:width"]
        assert width.prunable is free
        if not free:
            assert "norm 'norm' (_HelpedNorm) with 8 of 16 channels left cannot be made" in str(width.reason)
            assert "eps in an attribute" in way_out(width.reason)
            optimizer = torch.optim.SGD(oto.model.parameters(), lr=0.1)
            with pytest.raises(ConfigurationError, match="target_flops"):
                oto.attach(optimizer, target_flops=0.2, pruning_steps=10)
