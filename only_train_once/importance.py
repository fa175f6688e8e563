"""Importance: (group, parameters, gradients) -> score per unit; the lowest scores are removed first.

``gradients`` are gradients of the loss, averaged over a window of steps, never momentum or a preconditioned
direction. With x the unit's entries and g their gradients (inner products over the ``roles`` asked for):

========================  ==============================  =======================================================
``magnitude``             ||x||
``avg_magnitude``         ||x|| / number of entries       the papers' formula; see `avg_magnitude` for its bias
``cosine_similarity``     1 - <x, g> / (||x|| ||g||)      in [0, 2]
``taylor_first_order``    |<x, g>|                        how much the loss moves, to first order
``taylor_second_order``   <x, g>^2 / 2
========================  ==============================  =======================================================

Sign of the cosine: moving x to 0 changes the loss by -<x, g> to first order, so a large positive <x, g> marks a unit
whose removal *helps*, and it has to score low. A unit at zero scores 0 in every row: there is nothing left to lose.

Criteria are combined as ``sum_c weight_c * score_c / ||score_c||_2``, the norm over all units of all groups
(HESSO, arXiv 2409.09085).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Tensors, unit_dot, unit_numel, unit_sq_norm

Score = Callable[[PruningGroup, Tensors, Tensors], Tensor]
Criteria = str | Mapping[str, float] | Score


def magnitude(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = (Role.ZERO,)
) -> Tensor:
    """Norm of the unit, ``||x||``.  (units,)"""
    return unit_sq_norm(group, parameters, roles).sqrt()


def avg_magnitude(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = (Role.ZERO,)
) -> Tensor:
    """Norm of the unit over its number of entries, ``||x|| / |x|``.  (units,)

    The norm of n entries of equal size grows with sqrt(n), so dividing by n favours removal in wide groups: this is
    the formula of the papers, kept for comparison, and the reason not to use it alone.
    """
    numel = torch.from_numpy(unit_numel(group, parameters, roles))
    norm = magnitude(group, parameters, gradients, roles)
    return norm / numel.to(norm)


def cosine_similarity(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = (Role.ZERO,)
) -> Tensor:
    """One minus the cosine between unit and gradient; 0 for a unit at zero, 1 without a gradient.  (units,)"""
    norm = unit_sq_norm(group, parameters, roles).sqrt()
    scale = norm * unit_sq_norm(group, gradients, roles).sqrt()
    cosine = unit_dot(group, parameters, gradients, roles) / torch.where(scale > 0, scale, 1)
    # A NaN has to come out as a NaN: it would hide behind the comparison.
    return torch.where(norm == 0, 0, 1 - cosine + 0 * scale)


def taylor_first_order(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = (Role.ZERO,)
) -> Tensor:
    """First-order change of the loss when the unit goes, ``|<x, g>|``.  (units,)"""
    return unit_dot(group, parameters, gradients, roles).abs()


def taylor_second_order(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = (Role.ZERO,)
) -> Tensor:
    """Second-order change with the Hessian taken as g g^T, ``<x, g>^2 / 2``.  (units,)"""
    return unit_dot(group, parameters, gradients, roles).square() / 2


CRITERIA: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude,
    "avg_magnitude": avg_magnitude,
    "cosine_similarity": cosine_similarity,
    "taylor_first_order": taylor_first_order,
    "taylor_second_order": taylor_second_order,
}
DEFAULT = dict.fromkeys(CRITERIA, 0.2)
_WITHOUT_GRADIENTS = {"magnitude", "avg_magnitude"}


def resolve(criteria: Criteria) -> dict[str, float] | Score:
    """Criterion names with their weights, or the user's function as it is.

    Raises:
        ConfigurationError: an unknown name, a weight that is no finite number, or no criterion at all.
    """
    if callable(criteria):
        return criteria
    if criteria == "default":
        return dict(DEFAULT)
    weights = {criteria: 1.0} if isinstance(criteria, str) else criteria
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigurationError(
            f"importance_score_criteria is {criteria!r}; give 'default', one of {sorted(CRITERIA)}, a dict from these "
            f"names to weights, or a function (group, parameters, gradients) -> scores"
        )
    for name, weight in weights.items():
        if name not in CRITERIA:
            raise ConfigurationError(
                f"importance_score_criteria names {name!r}; known are 'default' and {sorted(CRITERIA)}"
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
    return callable(criteria) or not set(criteria) <= _WITHOUT_GRADIENTS


def score_groups(
    groups: Sequence[PruningGroup],
    parameters: Tensors,
    gradients: Tensors,
    criteria: Criteria = "default",
    roles: Collection[Role] = (Role.ZERO,),
) -> list[Tensor]:
    """Scores of all groups, one (units,) tensor each, comparable across groups.

    A user's function is used as it is; named criteria are normalised and combined as the top of this file says.
    """
    resolved = resolve(criteria)
    if callable(resolved):
        return [_checked(g, resolved(g, parameters, gradients)) for g in groups]
    total: Tensor | None = None
    for name, weight in resolved.items():
        parts = [CRITERIA[name](g, parameters, gradients, roles) for g in groups]
        score = torch.cat([p.to(parts[0].device) for p in parts])
        norm = torch.linalg.vector_norm(score)
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
    return score.detach()
