"""The parts of the half-space methods, one at a time."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from only_train_once.groups import Role
from only_train_once.optim.dhspg import bounded
from only_train_once.optim.halfspace import lowest_with_room, shrinkage
from only_train_once.optim.selection import ceilings
from only_train_once.unitwise import Units
from tests.reference.nets import group, make, tensors_of


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_lowest_for_which_there_is_room(data: st.DataObject) -> None:
    model = make("layer_norm")
    groups = model.groups()  # type: ignore[operator]
    units = Units(groups, tensors_of(model))
    n = units.count
    flags = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    key = data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))  # few levels: many ties
    room = data.draw(st.lists(st.integers(0, 6), min_size=len(groups), max_size=len(groups)))
    left = data.draw(st.integers(0, n))
    found = lowest_with_room(
        units, torch.tensor(flags), torch.tensor(key, dtype=torch.float64), torch.tensor(room), torch.tensor(left)
    )
    owner = [i for i, g in enumerate(groups) for _ in range(g.size)]
    wanted, have = [], list(room)
    for unit in sorted((u for u in range(n) if flags[u]), key=lambda u: (key[u], u)):
        if have[owner[unit]] > 0 and len(wanted) < left:
            have[owner[unit]] -= 1
            wanted.append(unit)
    assert found.nonzero().flatten().tolist() == sorted(wanted)


@given(st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_a_bounded_weight_shortens_the_unit_and_still_goes_down(seed: int) -> None:
    """Between the bounds of OTOv2 the penalized direction makes ||x|| smaller and has <., d> > 0."""
    generator = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    if float(x @ d) >= 0:
        d = -d
    dot, norm, square = x @ d, x.norm(), d @ d
    for amplify in (1.5, 3.0, 1e6):
        weight = bounded(norm[None], dot[None], square[None], 1e-9, amplify, 1e12)
        step = -(d + weight * x / norm)
        assert float(step @ x) < 0
        assert float(step @ d) < 0


def test_a_unit_that_shrinks_by_itself_gets_the_plain_weight() -> None:
    one = torch.ones(1)
    assert bounded(one, one, one, 0.25, 2.0, 10.0).item() == 0.25
    assert bounded(0 * one, -one, one, 0.25, 2.0, 10.0).item() == 0.25  # no length, no direction to shrink along
    assert bounded(one, -one, 4 * one, 0.25, 2.0, 4.0).item() == 1.0  # clipped at lambda * hat


def test_shrinkage_of_nothing_is_nothing() -> None:
    assert shrinkage(torch.tensor([0.0, 2.0]), 3.0).tolist() == [0, 1.5]


def test_ceilings_leave_a_unit_or_follow_the_plan() -> None:
    scores = [np.arange(6.0), np.arange(6.0) + 0.5]
    gone = [np.zeros(6, dtype=bool)] * 2
    assert ceilings(scores, gone, 6) == [5, 5]
    assert ceilings(scores, gone, 6, divisible=2) in ([4, 2], [2, 4])
    assert ceilings([np.arange(3.0)], [np.zeros(3, dtype=bool)], 1, min_units=2) == [1]


def test_units_of_groups_without_a_trained_tensor_count_as_nothing() -> None:
    model = make("mlp")
    two = [*model.groups(), group("bias", 4, model, [("fc2.bias", 0, Role.ZERO)])]  # type: ignore[operator]
    units = Units(two, tensors_of(model), among=["fc1.weight"])
    assert units.square(tensors_of(model))[12:].tolist() == [0, 0, 0, 0]
