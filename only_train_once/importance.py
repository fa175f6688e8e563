"""Importance: scores of all units, comparable across groups, from named criteria or a user's function.

Named criteria (``criteria.py``) are combined as ``sum_c weight_c * score_c / ||score_c||_2``, the norm over all units
of all groups, those that have left the network for good included (HESSO, arXiv 2409.09085). A user's function
(group, parameters, gradients) -> scores is used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from only_train_once.criteria import (
    ACTIVATIONS,
    AT_ZERO,
    CRITERIA,
    PRODUCT_SQUARES,
    WITH_ACTIVATIONS,
    WITH_PRODUCTS,
    WITH_SQUARES,
    WITHOUT_GRADIENTS,
    WITHOUT_MEANS,
    Prepared,
    batch_norm_scales,
    entries_of,
    sums_of,
)
from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Tensors
from only_train_once.sharding import whole

Score = Callable[[PruningGroup, Tensors, Tensors], Tensor]
Criteria = str | Mapping[str, float] | Score

PRESETS: dict[str, dict[str, float]] = {
    "default": dict.fromkeys(  # the papers' five
        ("magnitude", "avg_magnitude", "cosine_similarity", "taylor_first_order", "taylor_second_order"), 0.2
    ),
    "otov2": {"negative_cosine": 0.5, "inverse_avg_magnitude": 0.5},  # of OTOv2's released code
}


def resolve(criteria: Criteria) -> dict[str, float] | Score:
    """Criterion names with their weights, or the user's function as it is.

    Raises:
        ConfigurationError: an unknown name, a weight that is no finite number, or no criterion at all.
    """
    if callable(criteria):
        return criteria
    if isinstance(criteria, str) and criteria in PRESETS:
        return dict(PRESETS[criteria])
    weights = {criteria: 1.0} if isinstance(criteria, str) else criteria
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigurationError(
            f"importance_score_criteria is {criteria!r}; give one of {sorted(PRESETS)} or {sorted(CRITERIA)}, a dict "
            f"from the latter to weights, or a function (group, parameters, gradients) -> scores"
        )
    for name, weight in weights.items():
        if name not in CRITERIA:
            raise ConfigurationError(
                f"importance_score_criteria names {name!r}; known are {sorted(PRESETS)} and {sorted(CRITERIA)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigurationError(f"the weight of criterion {name!r} is {weight!r}; it has to be a finite number")
    if not any(weights.values()):
        raise ConfigurationError(
            f"importance_score_criteria is {dict(weights)!r}: every unit would score 0; give a criterion a weight"
        )
    return dict(weights)


def needs_gradients(criteria: dict[str, float] | Score) -> bool:
    """Whether the scores look at gradients (a user's function is taken to)."""
    return callable(criteria) or not set(criteria) <= WITHOUT_GRADIENTS


def needs_means(criteria: dict[str, float] | Score) -> bool:
    """Whether the scores look at gradients, or their squares, averaged over steps."""
    return callable(criteria) or not set(criteria) <= WITHOUT_MEANS


def needs_products(criteria: dict[str, float] | Score) -> bool:
    """Whether the scores look at each step's inner products of units and gradients."""
    return not callable(criteria) and bool(set(criteria) & WITH_PRODUCTS)


def needs_squares(criteria: dict[str, float] | Score) -> bool:
    """Whether the scores look at the mean of squared gradients."""
    return not callable(criteria) and bool(set(criteria) & WITH_SQUARES)


def needs_activations(criteria: dict[str, float] | Score) -> bool:
    """Whether the scores look at what units put out."""
    return not callable(criteria) and bool(set(criteria) & WITH_ACTIVATIONS)


def check_groups(groups: Sequence[PruningGroup], criteria: dict[str, float] | Score) -> None:
    """Raise ConfigurationError if a criterion cannot score a group."""
    if not callable(criteria) and "batch_norm_scale" in criteria:
        without = [g.name for g in groups if not batch_norm_scales(g)]
        if without:
            raise ConfigurationError(
                f"criterion 'batch_norm_scale' cannot score {', '.join(without[:5])}{', ...' if without[5:] else ''}: "
                f"no batch norm with a scale; use another criterion, or mark these groups unprunable"
            )


def score_groups(
    groups: Sequence[PruningGroup],
    parameters: Tensors,
    gradients: Tensors,
    criteria: Criteria = "default",
    roles: Collection[Role] = (Role.ZERO,),
    squares: Tensors | None = None,
    activations: Sequence[Tensor] | None = None,
    product_squares: Sequence[Tensor] | None = None,
    prepared: Prepared | None = None,
) -> list[Tensor]:
    """Scores of all groups, one (units,) tensor each, comparable across groups.

    A user's function is used as it is; named criteria are normalised and combined as the top of this file says.
    ``squares`` are the means of squared gradients, and ``activations`` per group the mean sizes of what units put out,
    if a criterion needs them; ``product_squares`` the means of ``<x, g>^2`` over steps, instead of those of
    ``gradients`` alone; ``prepared`` is what was made for these groups and roles, if scores are asked for often.
    """
    resolved = resolve(criteria)
    if callable(resolved):
        return [_checked(g, resolved(g, parameters, gradients)) for g in groups]
    assert activations is not None or not needs_activations(resolved), "activations are needed"
    needed = dict.fromkeys(w for name in resolved for w in CRITERIA[name].sums)
    assert squares is not None or not set(resolved) & WITH_SQUARES, "squared gradients are needed"
    units = None if prepared is None else prepared.units
    sums = sums_of(groups, needed, parameters, gradients, gradients if squares is None else squares, roles, units)
    for name, values in {ACTIVATIONS: activations, PRODUCT_SQUARES: product_squares}.items():
        for known, value in zip(sums, values or (), strict=False):
            known[name] = value
    numel: list[Callable[[], Tensor]] = [
        partial(entries_of, g, parameters, roles) if prepared is None else partial(prepared.entries.__getitem__, k)
        for k, g in enumerate(groups)
    ]
    away = sum(g.origin.group.size - g.size for g in groups if g.origin is not None)
    total: Tensor | None = None
    for name, weight in resolved.items():
        parts = [CRITERIA[name].of(s, n) for s, n in zip(sums, numel, strict=True)]
        score = torch.cat([p.to(parts[0].device) for p in parts])
        norm = torch.linalg.vector_norm(score)
        if away and name in AT_ZERO:
            norm = torch.hypot(norm, norm.new_tensor(AT_ZERO[name] * math.sqrt(away)))
        score = weight * score / torch.where(norm == 0, 1, norm)  # all zero stays zero
        total = score if total is None else total + score
    assert total is not None
    return list(total.split([g.size for g in groups]))


def _checked(group: PruningGroup, score: Tensor) -> Tensor:
    if not isinstance(score, Tensor) or tuple(score.shape) != (group.size,):
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ConfigurationError(
            f"the importance function returned {found} for group {group.name!r}; it has to return a tensor of shape "
            f"({group.size},), one score per unit"
        )
    return whole(score.detach())
