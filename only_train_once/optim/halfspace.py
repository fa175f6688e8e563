"""Half-space projection: which units a step has carried past the origin, decided on the device.

A step takes a unit from x to x~. It is projected to zero when x~ has left the half-space that x spans,
``<x~, x> < epsilon ||x||^2`` (OTOv1, arXiv 2107.07467, and HSPG, arXiv 2009.12078). The units at zero are a vector of
flags on the device, so that no step waits for it; the host asks for them where a period begins and where a user does.

The papers project whatever leaves its half-space, and the number of zeros is a result. Here it is bounded: of the units
that a step would project, those that went farthest go first, as long as their group and the total have room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import ConfigurationError
from only_train_once.masking import Names, rows
from only_train_once.optim.candidates import Candidates
from only_train_once.sharding import local, locals_of
from only_train_once.unitwise import Sum, Units

Rates = Mapping[str, "float | Tensor"]  # tensor -> learning rate of the param group that trains it


@dataclass(frozen=True)
class StepSums:
    """``||x||^2``, ``<x~, x>`` and the sum of ``rate * ||x||^2`` over the tensors.  (units,) each"""

    square: Tensor
    inner: Tensor
    weighted: Tensor


class HalfSpace:
    """The units of a run with the values they had before the step.

    Attributes:
        units: their ``zero`` entries in the tensors that are trained.
        zero: (units,) True for units at zero.
        ceiling: (groups,) units each group may have at zero.
        total: units that may be at zero in all.
    """

    def __init__(self, candidates: Candidates, ceiling: Sequence[int], total: int) -> None:
        self.tensors = candidates.tensors
        self.units = Units(candidates.groups, self.tensors, among=candidates.trained)
        self.zero = torch.zeros(self.units.count, dtype=torch.bool, device=self.units.device)
        self._most = total
        self.limit(ceiling)
        self._before: dict[str, Tensor] = {}

    def limit(self, ceiling: Sequence[int]) -> None:
        """Set how many units each group may have at zero, and with that how many may be in all."""
        self.total = min(self._most, sum(ceiling))
        self.ceiling = torch.tensor(list(ceiling), device=self.units.device)

    # -- a step ----------------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """Keep the present values: they are the x of the step to come."""
        names = self.units.names
        if not self._before:
            self._before = {n: torch.empty_like(local(self.tensors[n])) for n in names}
        torch._foreach_copy_([self._before[n] for n in names], locals_of(self.tensors, names))

    @property
    def before(self) -> Mapping[str, Tensor]:
        """The values that `remember` kept, of the parts that are here."""
        return self._before

    def forget(self) -> None:
        """Free what `remember` keeps."""
        self._before = {}

    def step_sums(self, rates: Rates) -> StepSums:
        """What a half-space step has to know of x and x~."""

        def pairs(name: Names, block: slice) -> list[tuple[Tensor, Tensor]]:
            x = rows(self.before, name, block)
            return [(x, x), (x, rows(self.tensors, name, block))]

        return StepSums(*self.units.dots(pairs, [Sum(0), Sum(1), Sum(0, rates)], bundled=True))

    def step(
        self,
        coefficient: Tensor,
        rates: Rates,
        sums: StepSums,
        epsilon: float,
        *,
        among: Tensor | None = None,
        still: Tensor | None = None,
    ) -> None:
        """Add ``rate * coefficient * x``, and project the units that have left their half-space.

        Args:
            coefficient: (units,) 0 for those that are ``still``.
            rates: tensor -> rate.
            sums: of x and x~, before that.
            epsilon: 0 for the half-space through the origin, up to 1 for one that touches x.
            among: (units,) the units that may be projected; None for all.
            still: (units,) units that get their x back first.
        """
        units, square, inner = self.units, sums.square, sums.inner
        known = len(units.apart) == len(units.names)  # else other units have moved entries of a unit, too
        if known:
            inner = (inner if still is None else torch.where(still, square, inner)) + coefficient * sums.weighted
        else:
            units.change_(self.tensors, self.before, coefficient, rates, back=still)
            inner = units.dot(self.tensors, self.before)
        gone = (inner < epsilon * square) | (square == 0)
        distance = inner / torch.where(square > 0, square, 1)
        self.zero = self.zero | self.within_limits(gone if among is None else among & gone, distance)
        if known:
            units.change_(self.tensors, self.before, coefficient, rates, back=still, zero=self.zero)
        else:
            self.hold()

    def within_limits(self, flags: Tensor, key: Tensor) -> Tensor:
        """Of the flagged units that are not at zero, the lowest by ``key`` for which there is room.  (units,)"""
        room = (self.ceiling - self.units.count_by_group(self.zero)).clamp_(min=0)
        left = (self.total - self.zero.sum()).clamp_(min=0)
        return lowest_with_room(self.units, flags & ~self.zero, key, room, left)

    def hold(self) -> None:
        """Set the entries of units at zero back to 0."""
        self.units.zero_(self.tensors, self.zero)

    # -- the host --------------------------------------------------------------------------------------------------

    def fetch(self) -> NDArray[np.bool_]:
        """Which units are at zero; waits for the device.  (units,)"""
        return self.zero.cpu().numpy()

    def agree(self) -> None:
        """Take the flags of the first process, which those of the others equal but for rounding."""
        self.zero = self.units.shares.agreed(self.zero.to(torch.int32)) > 0

    def restore(self, zero: NDArray[np.bool_]) -> None:
        """Take over saved flags."""
        self.zero = torch.from_numpy(zero.copy()).to(self.units.device)
        self.forget()


def lowest_with_room(units: Units, flags: Tensor, key: Tensor, room: Tensor, left: Tensor | int) -> Tensor:
    """The flagged units with the lowest ``key``, ``room`` of each group and ``left`` in all, at most.  (units,)"""
    position = torch.arange(len(flags), device=flags.device)
    key = torch.where(flags, key, torch.inf)
    order = torch.argsort(key, stable=True)
    by_group = order[torch.argsort(units.group_of[order], stable=True)]
    rank = torch.empty_like(position).index_copy_(0, by_group, position - units.starts[units.group_of])
    fits = flags & (rank < room[units.group_of])
    order = torch.argsort(torch.where(fits, key, torch.inf), stable=True)
    return fits & (torch.empty_like(position).index_copy_(0, order, position) < left)


def learning_rates(optimizer: Optimizer, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Rates:
    """Name -> learning rate of the param group that trains the tensor."""
    if not all("lr" in group for group in optimizer.param_groups):
        raise ConfigurationError(
            f"{type(optimizer).__name__} has param_groups without 'lr'; the penalty of this method is scaled by it"
        )
    rates: dict[int, float | Tensor] = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {n: rates[id(tensors[n])] for n in names}


def shrinkage(norm: Tensor, strength: float) -> Tensor:
    """``strength / norm``, and 0 for what has no norm: the sub-gradient of ``strength * ||x||`` over x.  (units,)"""
    return torch.where(norm > 0, strength / torch.where(norm > 0, norm, 1), 0)
