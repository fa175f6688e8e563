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
``group_fisher``            E[<x, g>^2] / 2                 the same, of one gate for all of the unit's entries
``batch_norm_scale``        ||gamma||                       of the unit's batch norms (network slimming, 2017)
``activation``              mean |a|                        a: what readers of the unit are given (``optim/watching``)
``lamp``                    ||x||^2 / (sum of it over the unit and the longer ones of its group) (LAMP, 2021)
``fpgm``                    sum of the distances to the other units of the group (FPGM, 2019)
``negative_cosine``         -<x, g> / (||x|| ||g||)         OTOv2's released code takes high cosines as redundant ...
``inverse_avg_magnitude``   -1 / (avg_magnitude + 1e-6)     ... and high inverses of the average magnitude
==========================  ==============================  ========================================================

Sign of the cosine: moving x to 0 changes the loss by -<x, g> to first order, so a large positive <x, g> marks a unit
whose removal *helps*, and it has to score low. A unit at zero has nothing left to lose: no unit scores lower. It scores
0, but for the last two rows, whose scores are negative.

Each is a formula over sums that `_PRODUCTS` or `SUMS` knows, or that whoever scores brings (`BROUGHT`). Tensors may be
spread over processes: each adds up what it has, and the formulas see what all of them have (`sums_of`).

To add one, give ``importance_score_criteria`` a function (group, parameters, gradients) -> scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import (
    BLOCK,
    Names,
    Pairs,
    Tensors,
    partial_dot,
    partial_live,
    partial_products,
    precise,
    rows,
    unit_numel,
)
from only_train_once.sharding import local, shares_of, unsplit
from only_train_once.unitwise import Sum, Units

_ZERO = (Role.ZERO,)
Sums = Mapping[str, Tensor]  # a name in `_PRODUCTS` or `SUMS` -> number per unit, or per pair of units


# -- sums ------------------------------------------------------------------------------------------------------------


# Of the rows of x, g and E[g^2], functions that make them: what the inner products are between.
_Rows = Callable[[], Tensor]
_PRODUCTS: dict[str, Callable[[_Rows, _Rows, _Rows], tuple[Tensor, Tensor]]] = {
    "lengths": lambda x, g, squares: (x(), x()),  # ||x||^2
    "products": lambda x, g, squares: (x(), g()),  # <x, g>
    "slopes": lambda x, g, squares: (g(), g()),  # ||g||^2
    "curvatures": lambda x, g, squares: (x().abs().square(), squares()),  # <x^2, E[g^2]>
}


def _pairs(names: Sequence[str], x: Tensors, g: Tensors, squares: Tensors) -> Pairs:
    """The pairs of `_PRODUCTS`; rows are made once for all of them."""

    def pairs(name: Names, block: slice) -> list[tuple[Tensor, Tensor]]:
        made = [cache(partial(rows, tensors, name, block)) for tensors in (x, g, squares)]
        return [_PRODUCTS[wanted](*made) for wanted in names]

    return pairs


def _scales(group: PruningGroup, x: Tensors, g: Tensors, squares: Tensors, roles: Collection[Role]) -> Tensor:
    """``||gamma||^2`` of the unit's batch norms; the roles do not matter.  (units,)"""
    scales = batch_norm_scales(group)
    if not scales:
        raise ConfigurationError(
            f"group {group.name!r} has no batch norm with a scale, so 'batch_norm_scale' cannot score it; use another "
            f"criterion, or mark the group unprunable"
        )
    kept = tuple(s for s in group.slices if s.param in scales)
    return partial_dot(replace(group, slices=kept), x, x, tuple({s.role for s in kept}))


def _live(group: PruningGroup, x: Tensors, g: Tensors, squares: Tensors, roles: Collection[Role]) -> Tensor:
    """Not 0 for a unit that is not at zero.  (units,)"""
    return partial_live(group, x, roles)


def _apart(group: PruningGroup, x: Tensors, g: Tensors, squares: Tensors, roles: Collection[Role]) -> Tensor:
    """Squared distances between units, slice by slice.  (units, units)"""
    total: Tensor | None = None
    for s in group.with_role(*roles):
        if not s.role.is_tensor:
            continue
        # Rows of two processes cannot be subtracted: such a tensor is split along another dim first.
        tensor, counted = unsplit(x[s.param].detach(), s.dim)
        here = local(tensor)
        if total is None:
            total = precise(here.new_zeros(group.size, group.size))
        if here.numel() and counted and shares_of(x).counts(s.param):
            for part in _vectors(here.movedim(s.dim, 0), torch.from_numpy(s.index).to(here.device)):
                distances = torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square()
                total = total + distances.to(total.device)
    assert total is not None
    return total


def _vectors(values: Tensor, index: Tensor) -> Iterator[Tensor]:
    """What units have in their positions of the first dim, some of the entries at a time.  (units, entries)"""
    if values.dim() == 1:
        yield precise(values[index])
        return
    step = max(BLOCK // (len(index) * values[0, 0].numel()), 1)
    for positions in index.unbind(1):
        for first in range(0, values.shape[1], step):
            yield precise(values[:, first : first + step][positions]).flatten(1)


SUMS: dict[str, Callable[[PruningGroup, Tensors, Tensors, Tensors, Collection[Role]], Tensor]] = {
    "scales": _scales,
    "live": _live,
    "apart": _apart,
}


@dataclass(frozen=True)
class Prepared:
    """What makes scoring the same groups at every step faster: their units, and how many entries each has."""

    units: Units
    entries: tuple[Tensor, ...]


def prepare(groups: Sequence[PruningGroup], parameters: Tensors, roles: Collection[Role]) -> Prepared | None:
    """For many scores by the same roles; None where a group has nothing to score."""
    if not all(any(s.role.is_tensor for s in g.with_role(*roles)) for g in groups):
        return None
    units = Units(groups, parameters, roles)
    return Prepared(units, tuple(entries_of(g, parameters, roles).to(units.device) for g in groups))


def sums_of(
    groups: Sequence[PruningGroup],
    names: Collection[str],
    parameters: Tensors,
    gradients: Tensors,
    squares: Tensors,
    roles: Collection[Role] = _ZERO,
    units: Units | None = None,
) -> list[dict[str, Tensor]]:
    """The named sums of every group but for those that are `BROUGHT`, inner products in one walk.

    All processes ask together.

    ``units`` are those of the groups by these roles, if they were prepared for many sums.
    """
    products = [name for name in names if name in _PRODUCTS]
    others = [name for name in names if name not in _PRODUCTS and name not in BROUGHT]
    keys: list[tuple[int, str]] = []
    parts: list[Tensor] = []
    pairs = _pairs(products, parameters, gradients, squares)
    out: list[dict[str, Tensor]] = [{} for _ in groups]
    if units is not None and products:
        sums = units.dots(pairs, [Sum(k) for k in range(len(products))], bundled=True)
        for name, total in zip(products, sums, strict=True):
            for known, value in zip(out, total.split([g.size for g in groups]), strict=True):
                known[name] = value
    for number, group in enumerate(groups):
        if units is None and products:
            parts += partial_products(group, parameters, pairs, roles)
            keys += [(number, name) for name in products]
        parts += [SUMS[name](group, parameters, gradients, squares, roles) for name in others]
        keys += [(number, name) for name in others]
    for (number, name), value in zip(keys, shares_of(parameters).sum(parts), strict=True):
        out[number][name] = value
    return out


# -- formulas --------------------------------------------------------------------------------------------------------


ACTIVATIONS, PRODUCT_SQUARES = "activations", "product_squares"
BROUGHT = (ACTIVATIONS, PRODUCT_SQUARES)  # by whoever scores: no sums over entries as they are now
_COSINE = ("lengths", "slopes", "products")
Formula = Callable[[Sums, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A score per unit from sums over its entries.

    Attributes:
        sums: names in `_PRODUCTS` or `SUMS`.
        formula: (sums, number of entries per unit) -> score per unit.
    """

    sums: tuple[str, ...]
    formula: Formula

    def of(self, sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
        """The scores of a group whose sums are known.  (units,)"""
        return self.formula(sums, numel)

    def __call__(
        self, group: PruningGroup, parameters: Tensors, gradients: Tensors, roles: Collection[Role] = _ZERO
    ) -> Tensor:
        """The scores of one group; ``gradients`` are mean squares where the formula wants those.  (units,)"""
        (sums,) = sums_of([group], self.sums, parameters, gradients, gradients, roles)
        return self.of(sums, lambda: entries_of(group, parameters, roles))


def entries_of(group: PruningGroup, parameters: Tensors, roles: Collection[Role]) -> Tensor:
    """Number of entries of every unit.  (units,)"""
    return torch.from_numpy(unit_numel(group, parameters, roles))


def criterion(*sums: str) -> Callable[[Formula], Criterion]:
    """Make a criterion of a formula over the named sums."""
    return lambda formula: Criterion(sums, formula)


@criterion("lengths")
def magnitude(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Norm of the unit, ``||x||``.  (units,)"""
    return sums["lengths"].sqrt()


@criterion("lengths")
def avg_magnitude(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Norm of the unit over its number of entries, ``||x|| / |x|``.  (units,)

    The norm of n entries of equal size grows with sqrt(n), so dividing by n favours removal in wide groups: this is
    the formula of the papers, kept for comparison, and the reason not to use it alone.
    """
    norm = sums["lengths"].sqrt()
    return norm / numel().to(norm)


@criterion(*_COSINE)
def cosine_similarity(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """One minus the cosine between unit and gradient; 0 for a unit at zero, 1 without a gradient.  (units,)"""
    norm = sums["lengths"].sqrt()
    scale = norm * sums["slopes"].sqrt()
    cosine = sums["products"] / torch.where(scale > 0, scale, 1)
    # A NaN has to come out as a NaN: it would hide behind the comparison.
    return torch.where(norm == 0, 0, 1 - cosine + 0 * scale)


@criterion("products")
def taylor_first_order(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """First-order change of the loss when the unit goes, ``|<x, g>|``.  (units,)"""
    return sums["products"].abs()


@criterion("products")
def taylor_second_order(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Second-order change with the Hessian taken as g g^T, ``<x, g>^2 / 2``.  (units,)"""
    return sums["products"].square() / 2


@criterion("curvatures")
def fisher_diagonal(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Second-order change with the mean of squared gradients for the Hessian's diagonal.  (units,)"""
    return sums["curvatures"] / 2


@criterion("products", "live", PRODUCT_SQUARES)
def group_fisher(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Half the mean over the window's steps of ``<x, g>^2``; of this one step where no more is known.  (units,)

    0 for a unit at zero, whatever it was in the window's first steps.

    The Fisher information of a gate that multiplies the whole unit (Group Fisher pruning, arXiv 2108.00708, and the
    squares of arXiv 1906.10771): unlike the diagonal it sees how the unit's entries work together, and unlike the
    Taylor scores of a mean gradient it does not vanish where the training has converged.
    """
    squares = sums[PRODUCT_SQUARES] if PRODUCT_SQUARES in sums else sums["products"].square()
    return torch.where(sums["live"] == 0, 0, squares / 2)  # a NaN is no zero


@criterion("scales")
def batch_norm_scale(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Norm of the scales of the unit's batch norms.  (units,)"""
    return sums["scales"].sqrt()


def batch_norm_scales(group: PruningGroup) -> set[str]:
    """Names of the weights among the group's tensors that scale what running statistics have normalized."""
    names = {s.param for s in group.slices if s.role.is_tensor}
    norms = {n.removesuffix("running_mean") for n in names if n.endswith("running_mean")}
    return {prefix + "weight" for prefix in norms} & names


@criterion(ACTIVATIONS, "live")
def activation(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Mean size of what the unit puts out; 0 for a unit at zero, whatever constant it leaves.  (units,)"""
    return torch.where(sums["live"] > 0, sums[ACTIVATIONS], 0)


@criterion("lengths")
def lamp(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Squared norm over the sum of squared norms from this unit upwards; 1 for the longest of each group.  (units,)"""
    square = sums["lengths"]
    order = torch.argsort(square, stable=True)
    ascending = square[order]
    rest = ascending.flip(0).cumsum(0).flip(0)
    score = ascending / torch.where(rest > 0, rest, 1)
    return torch.empty_like(score).index_copy_(0, order, score)


@criterion("live", "apart")
def fpgm(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Sum of the distances to the other units of the group that are not at zero; 0 for a unit at zero.  (units,)

    Short for the unit nearest the group's geometric median: the others can stand in for it. Entries are compared slice
    by slice; where a tensor is cut in several dims, those that lie in both count in both.
    """
    live, distances = sums["live"] > 0, sums["apart"].sqrt()
    return torch.where(live, (distances * live).sum(1), 0)


@criterion(*_COSINE)
def negative_cosine(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Minus the cosine between unit and gradient; -1 for a unit at zero, 0 without a gradient.  (units,)"""
    return cosine_similarity.formula(sums, numel) - 1


@criterion("lengths")
def inverse_avg_magnitude(sums: Sums, numel: Callable[[], Tensor]) -> Tensor:
    """Minus the inverse of the average magnitude, which is kept away from 0 by 1e-6.  (units,)"""
    return -1 / (avg_magnitude.formula(sums, numel) + 1e-6)


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "avg_magnitude": avg_magnitude,
    "cosine_similarity": cosine_similarity,
    "taylor_first_order": taylor_first_order,
    "taylor_second_order": taylor_second_order,
    "fisher_diagonal": fisher_diagonal,
    "group_fisher": group_fisher,
    "batch_norm_scale": batch_norm_scale,
    "activation": activation,
    "lamp": lamp,
    "fpgm": fpgm,
    "negative_cosine": negative_cosine,
    "inverse_avg_magnitude": inverse_avg_magnitude,
}
AT_ZERO = {"negative_cosine": -1.0, "inverse_avg_magnitude": -1 / 1e-6}  # scores of units at zero, where not 0
_OF_GRADIENTS, _OF_SQUARES = {"products", "slopes"}, {"curvatures"}
WITHOUT_GRADIENTS = {n for n, c in CRITERIA.items() if not {*c.sums} & (_OF_GRADIENTS | _OF_SQUARES)}
WITH_ACTIVATIONS = {n for n, c in CRITERIA.items() if ACTIVATIONS in c.sums}
WITH_PRODUCTS = {n for n, c in CRITERIA.items() if PRODUCT_SQUARES in c.sums}
WITHOUT_MEANS = WITHOUT_GRADIENTS | WITH_PRODUCTS  # that want no gradient averaged over steps
WITH_SQUARES = {n for n, c in CRITERIA.items() if {*c.sums} & _OF_SQUARES}
"""Criteria that look at the mean of squared gradients: they are given it in the place of the mean gradient."""
