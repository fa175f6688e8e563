"""Criteria: (group, parameters, gradients, roles) -> score per unit, low for what can go.

``gradients`` are gradients of the loss, averaged over a window of steps, never momentum or a preconditioned
direction. With x the unit's entries, g their gradients and E[g^2] the mean of their squares over the window's steps
(inner products over the ``roles`` asked for):

==========================  ==============================  ========================================================
``magnitude``               ||x||
``avg_magnitude``           ||x|| / number of entries       the papers' formula; see `avg_magnitude` for its bias
``cosine_similarity``       1 - <x, g> / (||x|| ||g||)      in [0, 2]
``taylor_first_order``      |<x, g>|                        how much the loss moves, to first order
``taylor_second_order``     <x, g>^2 / 2                    to second order, with g g^T for the Hessian
``fisher_diagonal``         <x^2, E[g^2]> / 2               to second order, with the Fisher diagonal for the Hessian
``batch_norm_scale``        ||gamma||                       of the unit's batch norms (network slimming, 2017)
``lamp``                    ||x||^2 / (sum of it over the unit and the longer ones of its group) (LAMP, 2021)
``fpgm``                    sum of the distances to the other units of the group (FPGM, 2019)
``negative_cosine``         -<x, g> / (||x|| ||g||)         OTOv2's released code takes high cosines as redundant ...
``inverse_avg_magnitude``   -1 / (avg_magnitude + 1e-6)     ... and high inverses of the average magnitude
==========================  ==============================  ========================================================

Sign of the cosine: moving x to 0 changes the loss by -<x, g> to first order, so a large positive <x, g> marks a unit
whose removal *helps*, and it has to score low. A unit at zero has nothing left to lose: no unit scores lower. It scores
0, but for the last two rows, whose scores are negative.

To add one, give ``importance_score_criteria`` a function (group, parameters, gradients) -> scores. Criteria that look
at activations are such functions: they bring the hooks that collect what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Tensors, precise, unit_dot, unit_numel, unit_sq_norm

_ZERO = (Role.ZERO,)


def magnitude(group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO) -> Tensor:
    """Norm of the unit, ``||x||``.  (units,)"""
    return unit_sq_norm(group, parameters, roles).sqrt()


def avg_magnitude(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Norm of the unit over its number of entries, ``||x|| / |x|``.  (units,)

    The norm of n entries of equal size grows with sqrt(n), so dividing by n favours removal in wide groups: this is
    the formula of the papers, kept for comparison, and the reason not to use it alone.
    """
    numel = torch.from_numpy(unit_numel(group, parameters, roles))
    norm = magnitude(group, parameters, gradients, roles)
    return norm / numel.to(norm)


def cosine_similarity(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """One minus the cosine between unit and gradient; 0 for a unit at zero, 1 without a gradient.  (units,)"""
    norm = unit_sq_norm(group, parameters, roles).sqrt()
    scale = norm * unit_sq_norm(group, gradients, roles).sqrt()
    cosine = unit_dot(group, parameters, gradients, roles) / torch.where(scale > 0, scale, 1)
    # A NaN has to come out as a NaN: it would hide behind the comparison.
    return torch.where(norm == 0, 0, 1 - cosine + 0 * scale)


def taylor_first_order(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """First-order change of the loss when the unit goes, ``|<x, g>|``.  (units,)"""
    return unit_dot(group, parameters, gradients, roles).abs()


def taylor_second_order(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Second-order change with the Hessian taken as g g^T, ``<x, g>^2 / 2``.  (units,)"""
    return unit_dot(group, parameters, gradients, roles).square() / 2


def fisher_diagonal(
    group: PruningGroup, parameters: Tensors, squares: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Second-order change with the mean of squared gradients for the Hessian's diagonal.  (units,)"""
    entries = {s.param: precise(parameters[s.param]).abs().square() for s in group.with_role(*roles)}
    return unit_dot(group, entries, squares, roles) / 2


def batch_norm_scale(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Norm of the scales of the unit's batch norms; the roles do not matter.  (units,)"""
    scales = batch_norm_scales(group)
    if not scales:
        raise ConfigurationError(
            f"group {group.name!r} has no batch norm with a scale, so 'batch_norm_scale' cannot score it; use another "
            f"criterion, or mark the group unprunable"
        )
    kept = tuple(s for s in group.slices if s.param in scales)
    return unit_sq_norm(replace(group, slices=kept), parameters, tuple({s.role for s in kept})).sqrt()


def batch_norm_scales(group: PruningGroup) -> set[str]:
    """Names of the weights among the group's tensors that scale what running statistics have normalized."""
    names = {s.param for s in group.slices if s.role.is_tensor}
    norms = {n.removesuffix("running_mean") for n in names if n.endswith("running_mean")}
    return {prefix + "weight" for prefix in norms} & names


def lamp(group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO) -> Tensor:
    """Squared norm over the sum of squared norms from this unit upwards; 1 for the longest of each group.  (units,)"""
    square = unit_sq_norm(group, parameters, roles)
    order = torch.argsort(square, stable=True)
    ascending = square[order]
    rest = ascending.flip(0).cumsum(0).flip(0)
    score = ascending / torch.where(rest > 0, rest, 1)
    return torch.empty_like(score).index_copy_(0, order, score)


def fpgm(group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO) -> Tensor:
    """Sum of the distances to the other units of the group that are not at zero; 0 for a unit at zero.  (units,)

    Short for the unit nearest the group's geometric median: the others can stand in for it. Entries are compared slice
    by slice; where a tensor is cut in several dims, those that lie in both count in both.
    """
    vectors = [
        precise(parameters[s.param]).movedim(s.dim, 0)[torch.from_numpy(s.index).to(parameters[s.param].device)]
        for s in group.with_role(*roles)
        if s.role.is_tensor
    ]
    x = torch.cat([v.reshape(group.size, -1).to(vectors[0].device, vectors[0].dtype) for v in vectors], dim=1)
    live = x.ne(0).any(1)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(live, (distances * live).sum(1), 0 * x.sum(1))


def negative_cosine(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Minus the cosine between unit and gradient; -1 for a unit at zero, 0 without a gradient.  (units,)"""
    return cosine_similarity(group, parameters, gradients, roles) - 1


def inverse_avg_magnitude(
    group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
) -> Tensor:
    """Minus the inverse of the average magnitude, which is kept away from 0 by 1e-6.  (units,)"""
    return -1 / (avg_magnitude(group, parameters, gradients, roles) + 1e-6)


CRITERIA: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude,
    "avg_magnitude": avg_magnitude,
    "cosine_similarity": cosine_similarity,
    "taylor_first_order": taylor_first_order,
    "taylor_second_order": taylor_second_order,
    "fisher_diagonal": fisher_diagonal,
    "batch_norm_scale": batch_norm_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "negative_cosine": negative_cosine,
    "inverse_avg_magnitude": inverse_avg_magnitude,
}
AT_ZERO = {"negative_cosine": -1.0, "inverse_avg_magnitude": -1 / 1e-6}  # scores of units at zero, where not 0
WITHOUT_GRADIENTS = {"magnitude", "avg_magnitude", "batch_norm_scale", "lamp", "fpgm", "inverse_avg_magnitude"}
WITH_SQUARES = {"fisher_diagonal"}  # given the mean of squared gradients in the place of the mean gradient
