"""Every criterion against its definition, one unit at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from only_train_once import importance
from only_train_once.errors import ConfigurationError
from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role

Z, C = Role.ZERO, Role.CONSUMER


def make(name: str, units: int, params: list[tuple[str, int, Role]], lengths: dict[str, int]) -> PruningGroup:
    slices = tuple(
        ParamSlice(p, d, np.arange(lengths[p], dtype=np.int64).reshape(units, -1), r, lengths[p]) for p, d, r in params
    )
    return PruningGroup(name, Kind.CHANNEL, slices)


GROUPS = [
    make("a", 5, [("w1", 0, Z), ("b1", 0, Z), ("w2", 1, C)], {"w1": 5, "b1": 5, "w2": 5}),
    make("b", 2, [("w2", 0, Z)], {"w2": 4}),
]
SHAPES = {"w1": (5, 3), "b1": (5,), "w2": (4, 5)}


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def vector(group: PruningGroup, unit: int, of: dict[str, Tensor], roles: tuple[Role, ...]) -> Tensor:
    return torch.cat([of[s.param].movedim(s.dim, 0)[s.index[unit]].flatten() for s in group.with_role(*roles)])


DEFINITIONS = {
    "magnitude": lambda x, g: math.sqrt(float(x @ x)),
    "avg_magnitude": lambda x, g: math.sqrt(float(x @ x)) / len(x),
    "cosine_similarity": lambda x, g: 1 - float(x @ g) / math.sqrt(float(x @ x) * float(g @ g)),
    "taylor_first_order": lambda x, g: abs(float(x @ g)),
    "taylor_second_order": lambda x, g: float(x @ g) ** 2 / 2,
}


@pytest.mark.parametrize("name", importance.CRITERIA)
@pytest.mark.parametrize("roles", [(Z,), (Z, C)])
def test_criterion_is_its_definition(name: str, roles: tuple[Role, ...]) -> None:
    x, g = values(0), values(1)
    for group in GROUPS:
        found = importance.CRITERIA[name](group, x, g, roles)
        wanted = [DEFINITIONS[name](vector(group, u, x, roles), vector(group, u, g, roles)) for u in range(group.size)]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_cosine_is_low_where_shrinking_lowers_the_loss() -> None:
    """Compared with the loss itself: L(w) = |w - t|^2 / 2 per row, one row overshoots its target, one falls short."""
    group = make("a", 2, [("w", 0, Z)], {"w": 2})
    w = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0.2, 0.1], [3.0, 2.0]], dtype=torch.float64)
    gradient = w - target
    smaller = 0.99 * w
    change = ((smaller - target).square() - (w - target).square()).sum(1) / 2
    assert change[0] < 0 < change[1]
    score = importance.cosine_similarity(group, {"w": w}, {"w": gradient})
    assert score[0] < 1 < score[1]


def test_a_unit_at_zero_scores_zero_everywhere() -> None:
    x, g = values(0), values(1)
    x["w1"][2], x["b1"][2] = 0, 0
    for criterion in importance.CRITERIA.values():
        assert criterion(GROUPS[0], x, g)[2] == 0
    assert importance.cosine_similarity(GROUPS[0], values(0), {n: torch.zeros(s) for n, s in SHAPES.items()})[0] == 1


def test_default_is_the_mean_of_normalised_criteria() -> None:
    x, g = values(0), values(1)
    total = np.zeros(7)
    for name, definition in DEFINITIONS.items():
        assert importance.DEFAULT[name] == 0.2
        score = np.array(
            [definition(vector(k, u, x, (Z,)), vector(k, u, g, (Z,))) for k in GROUPS for u in range(k.size)]
        )
        total += 0.2 * score / np.sqrt((score**2).sum())
    found = importance.score_groups(GROUPS, x, g)
    assert [len(f) for f in found] == [5, 2]
    np.testing.assert_allclose(torch.cat(found).numpy(), total, rtol=1e-12)


def test_dict_weights_single_name_and_function() -> None:
    x, g = values(0), values(1)
    magnitudes = torch.cat([importance.magnitude(k, x, g) for k in GROUPS])
    taylor = torch.cat([importance.taylor_first_order(k, x, g) for k in GROUPS])
    single = torch.cat(importance.score_groups(GROUPS, x, g, "magnitude"))
    torch.testing.assert_close(single, magnitudes / magnitudes.norm())
    both = torch.cat(importance.score_groups(GROUPS, x, g, {"magnitude": 2.0, "taylor_first_order": -1.0}))
    torch.testing.assert_close(both, 2 * magnitudes / magnitudes.norm() - taylor / taylor.norm())
    own = importance.score_groups(GROUPS, x, g, lambda k, p, q: torch.arange(k.size) * 7.0)
    assert [o.tolist() for o in own] == [[0, 7, 14, 21, 28], [0, 7]]


def test_all_scores_zero_is_no_division_by_zero() -> None:
    zero = {n: torch.zeros(s) for n, s in SHAPES.items()}
    assert torch.cat(importance.score_groups(GROUPS, zero, zero)).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ("magnitud", "names 'magnitud'; known are"),
        ({"magnitude": 1, "loss": 1}, "names 'loss'"),
        ({}, r"importance_score_criteria is \{\}"),
        (3, "importance_score_criteria is 3"),
        ({"magnitude": float("nan")}, "weight of criterion 'magnitude' is nan"),
    ],
)
def test_unknown_criteria_are_refused(criteria: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        importance.resolve(criteria)  # type: ignore[arg-type]


def test_a_function_with_the_wrong_shape_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"returned \(3,\) for group 'a'; .* shape \(5,\)"):
        importance.score_groups(GROUPS, values(0), values(1), lambda k, p, q: torch.zeros(3))
