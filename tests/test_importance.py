"""Every criterion against its definition, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from only_train_once import criteria, importance
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


def norm(v: Tensor) -> float:
    return math.sqrt(float(v @ v))


def longer(x: list[Tensor], u: int) -> list[Tensor]:
    return [v for v in x if norm(v) >= norm(x[u])]


# (entries of all units of the group, their gradients or squared gradients, unit) -> score
DEFINITIONS: dict[str, Callable[[list[Tensor], list[Tensor], int], float]] = {
    "magnitude": lambda x, g, u: norm(x[u]),
    "avg_magnitude": lambda x, g, u: norm(x[u]) / len(x[u]),
    "cosine_similarity": lambda x, g, u: 1 - float(x[u] @ g[u]) / norm(x[u]) / norm(g[u]),
    "taylor_first_order": lambda x, g, u: abs(float(x[u] @ g[u])),
    "taylor_second_order": lambda x, g, u: float(x[u] @ g[u]) ** 2 / 2,
    "fisher_diagonal": lambda x, g, u: sum(float(a * a * b) for a, b in zip(x[u], g[u], strict=True)) / 2,
    "group_fisher": lambda x, g, u: float(x[u] @ g[u]) ** 2 / 2,  # of a single step; more in test_optim.py
    "lamp": lambda x, g, u: norm(x[u]) ** 2 / sum(norm(v) ** 2 for v in longer(x, u)),
    "fpgm": lambda x, g, u: sum(norm(v - x[u]) for v in x),
    "negative_cosine": lambda x, g, u: -float(x[u] @ g[u]) / norm(x[u]) / norm(g[u]),
    "inverse_avg_magnitude": lambda x, g, u: -1 / (norm(x[u]) / len(x[u]) + 1e-6),
}


def test_every_criterion_has_a_definition_here() -> None:
    assert set(criteria.CRITERIA) == {*DEFINITIONS, "batch_norm_scale", "activation"}  # test_activations.py


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("roles", [(Z,), (Z, C)])
def test_criterion_is_its_definition(name: str, roles: tuple[Role, ...]) -> None:
    x, g = values(0), values(1)
    for group in GROUPS:
        found = criteria.CRITERIA[name](group, x, g, roles)
        vectors = [[vector(group, u, of, roles) for u in range(group.size)] for of in (x, g)]
        wanted = [DEFINITIONS[name](*vectors, u) for u in range(group.size)]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_distances_do_not_depend_on_how_many_entries_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [criteria.fpgm(group, values(0), {}, (Z, C)) for group in GROUPS]
    monkeypatch.setattr(criteria, "BLOCK", 1)
    for group, expected in zip(GROUPS, whole, strict=True):
        torch.testing.assert_close(criteria.fpgm(group, values(0), {}, (Z, C)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("roles", [(Z,), (Z, C)])
def test_prepared_scores_are_the_scores(roles: tuple[Role, ...]) -> None:
    x, g = values(0), values(1)
    prepared = criteria.prepare(GROUPS, x, roles)
    assert prepared is not None
    wanted = dict.fromkeys(DEFINITIONS, 0.3)
    squares = {n: t.square() for n, t in g.items()}
    plain, faster = (
        importance.score_groups(GROUPS, x, g, wanted, roles, squares, prepared=p) for p in (None, prepared)
    )
    for one, other in zip(plain, faster, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-15)
    nothing = make("none", 2, [("w1", 0, Role.FOLLOW)], {"w1": 2})
    assert criteria.prepare([*GROUPS, nothing], x, roles) is None


def test_batch_norm_scale_is_the_norm_of_the_scales_of_batch_norms_alone() -> None:
    lengths = {"conv.weight": 3, "a.weight": 3, "a.running_mean": 3, "b.weight": 3, "b.running_mean": 3, "ln.weight": 3}
    cuts = [(name, 0, Role.FOLLOW if name.endswith("mean") else Z) for name in lengths]
    group = make("bn", 3, cuts, lengths)
    x = {name: torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for name in lengths}
    x["conv.weight"] = torch.randn(3, 4, dtype=torch.float64)
    found = criteria.batch_norm_scale(group, x, {})
    np.testing.assert_allclose(found, [math.hypot(x["a.weight"][u], x["b.weight"][u]) for u in range(3)], rtol=1e-12)
    importance.check_groups([group], {"batch_norm_scale": 1.0})
    with pytest.raises(ConfigurationError, match="'batch_norm_scale' cannot score a, b: no batch norm with a scale"):
        importance.check_groups(GROUPS, {"batch_norm_scale": 1.0})
    with pytest.raises(ConfigurationError, match="group 'a' has no batch norm"):
        criteria.batch_norm_scale(GROUPS[0], values(0), {})


def test_cosine_is_low_where_shrinking_lowers_the_loss() -> None:
    """Compared with the loss itself: L(w) = |w - t|^2 / 2 per row, one row overshoots its target, one falls short."""
    group = make("a", 2, [("w", 0, Z)], {"w": 2})
    w = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0.2, 0.1], [3.0, 2.0]], dtype=torch.float64)
    gradient = w - target
    smaller = 0.99 * w
    change = ((smaller - target).square() - (w - target).square()).sum(1) / 2
    assert change[0] < 0 < change[1]
    score = criteria.cosine_similarity(group, {"w": w}, {"w": gradient})
    assert score[0] < 1 < score[1]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_no_unit_scores_lower_than_one_at_zero(name: str) -> None:
    x, g = values(0), values(1)
    x["w1"][2], x["b1"][2] = 0, 0
    g = {n: t.square() for n, t in g.items()} if name in criteria.WITH_SQUARES else g
    scores = criteria.CRITERIA[name](GROUPS[0], x, g)
    assert scores.argmin() == 2
    assert (scores[2] == 0) == (name not in ("negative_cosine", "inverse_avg_magnitude"))


def test_cosine_without_a_gradient() -> None:
    assert criteria.cosine_similarity(GROUPS[0], values(0), {n: torch.zeros(s) for n, s in SHAPES.items()})[0] == 1


def test_units_at_zero_are_no_neighbours() -> None:
    """What was removed does not make the units that stay look alike, or different."""
    x = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)}
    group = make("g", 3, [("w", 0, Z)], {"w": 3})
    assert criteria.fpgm(group, x, {}).tolist() == [5, 0, 5]
    assert criteria.lamp(group, x, {}).tolist() == [9 / 25, 0, 1]


def test_default_is_the_mean_of_normalised_criteria() -> None:
    x, g = values(0), values(1)
    total = np.zeros(7)
    for name, weight in importance.PRESETS["default"].items():
        assert weight == 0.2
        score = np.concatenate([criteria.CRITERIA[name](k, x, g).numpy() for k in GROUPS])
        total += 0.2 * score / np.sqrt((score**2).sum())
    found = importance.score_groups(GROUPS, x, g)
    assert [len(f) for f in found] == [5, 2]
    np.testing.assert_allclose(torch.cat(found).numpy(), total, rtol=1e-12)


def test_the_released_code_of_otov2_as_it_ranks() -> None:
    """High cosines and high inverses go first there: the reverse of these scores."""
    x, g = values(0), values(1)
    both = [[vector(k, u, of, (Z,)) for k in GROUPS for u in range(k.size)] for of in (x, g)]
    cosine = np.array([float(a @ b) / norm(a) / norm(b) for a, b in zip(*both, strict=True)])
    inverse = np.array([1 / (norm(a) / len(a) + 1e-6) for a in both[0]])
    redundancy = 0.5 * cosine / np.linalg.norm(cosine) + 0.5 * inverse / np.linalg.norm(inverse)
    found = torch.cat(importance.score_groups(GROUPS, x, g, "otov2")).numpy()
    np.testing.assert_allclose(-found, redundancy, rtol=1e-12)


def test_squares_go_where_squares_are_needed() -> None:
    x, g, q = values(0), values(1), {n: t.abs() for n, t in values(2).items()}
    fisher = torch.cat([criteria.fisher_diagonal(k, x, q) for k in GROUPS])
    taylor = torch.cat([criteria.taylor_first_order(k, x, g) for k in GROUPS])
    weights = {"fisher_diagonal": 1.0, "taylor_first_order": 0.5}
    found = torch.cat(importance.score_groups(GROUPS, x, g, weights, squares=q))
    torch.testing.assert_close(found, fisher / fisher.norm() + 0.5 * taylor / taylor.norm())
    assert importance.needs_squares(weights)
    assert not importance.needs_squares({"magnitude": 1.0})


def test_squares_of_products_go_where_they_are_needed() -> None:
    x, g, squares = values(0), values(1), [torch.rand(k.size, dtype=torch.float64) for k in GROUPS]
    taylor = torch.cat([criteria.taylor_first_order(k, x, g) for k in GROUPS])
    brought = torch.cat(squares) / 2
    weights = {"group_fisher": 1.0, "taylor_first_order": 0.5}
    found = torch.cat(importance.score_groups(GROUPS, x, g, weights, product_squares=squares))
    torch.testing.assert_close(found, brought / brought.norm() + 0.5 * taylor / taylor.norm())
    needs = [importance.needs_products, importance.needs_gradients, importance.needs_means, importance.needs_squares]
    assert [need({"group_fisher": 1.0}) for need in needs] == [True, True, False, False]
    assert [need(weights) for need in needs] == [True, True, True, False]


def test_dict_weights_single_name_and_function() -> None:
    x, g = values(0), values(1)
    magnitudes = torch.cat([criteria.magnitude(k, x, g) for k in GROUPS])
    taylor = torch.cat([criteria.taylor_first_order(k, x, g) for k in GROUPS])
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
