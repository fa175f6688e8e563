"""Units on their way to zero: regions that are multiplied by another number after every step, prepared once.

What a ramp costs is memory traffic and, for the many small tensors, calls. So whatever does not change from step to
step is made once: one buffer holds the numbers of all tensors that are multiplied as a whole (1 for entries that stay),
and is filled with one call. Where few rows of a tensor are on their way, only those are read and written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from only_train_once.masking import HALF, Region
from only_train_once.sharding import is_dtensor

_CACHED = 1 << 16  # entries of rows that are brought into the cache together
# What visiting single rows costs on a CPU, in entries of a tensor walked as a whole: per row, and per entry of it.
_ONE_BY_ONE, _TOGETHER = (2000, 1.4), (700, 2.4)
_FEW_ROWS, _FEW_COLUMNS = 4, 16  # elsewhere: one in so many positions at least, or they are copied out and back


@dataclass
class _Numbers:
    """What tensors of one device and precision that are walked as a whole are multiplied by, one after the other."""

    values: Tensor
    filled: Tensor  # positions that get the factor


@dataclass
class _Rows:
    """Some rows of a tensor, and the factor once for each of their entries."""

    tensor: Tensor
    positions: Tensor
    source: Tensor
    together: bool  # brought into the cache first: short rows are waited for one after the other


@dataclass
class _Plan:
    """What a step does to tensors that are not spread over processes.

    Attributes:
        first: the first of the tensors, and the device and precision it had when the plan was made.
        numbers: what fills the ``multipliers``.
        whole: tensors that are walked as a whole.
        multipliers: their parts of the numbers, which broadcast over them.
        single: the factor alone, per precision.
        rows: what is multiplied row by row.
        rest: what is left to `Region.scale_`.
    """

    first: tuple[Tensor, torch.device, torch.dtype] | None = None
    numbers: list[_Numbers] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)
    multipliers: list[Tensor] = field(default_factory=list)
    single: list[Tensor] = field(default_factory=list)
    rows: list[_Rows] = field(default_factory=list)
    rest: list[tuple[Region, Tensor]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.first is None or (self.first[0].device, self.first[0].dtype) == self.first[1:]

    def scale_(self, factor: float) -> None:
        for numbers in self.numbers:
            numbers.values.index_fill_(0, numbers.filled, factor)
        if self.whole:
            torch._foreach_mul_(self.whole, self.multipliers)
        for single in self.single:
            single.fill_(factor)
        for rows in self.rows:
            if rows.together:
                rows.tensor.index_select(0, rows.positions)
            rows.tensor.index_reduce_(0, rows.positions, rows.source, "prod")
        for region, tensor in self.rest:
            region.scale_(tensor, factor)


class Ramp:
    """Multiplies the entries of regions by a factor, each once, see [Note: entries of a unit].

    Args:
        regions: what is multiplied.
        tensors: by name; the same ones as long as this is used.
    """

    def __init__(self, regions: Iterable[Region], tensors: Mapping[str, Tensor]) -> None:
        self.regions, self.tensors = tuple(regions), tensors
        self._plan: _Plan | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_plan": None}

    def scale_(self, factor: float) -> None:
        """Multiply the regions in place."""
        if self._plan is None or not self._plan.fits:
            # What the base step has changed last is in the cache still: begin with that.
            self._plan = _planned({region: self.tensors[region.name] for region in reversed(self.regions)})
        self._plan.scale_(factor)


def _planned(regions: Mapping[Region, Tensor]) -> _Plan:
    plan = _Plan()
    whole: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int, Tensor]]] = {}
    single: dict[torch.dtype, Tensor] = {}
    for region, tensor in regions.items():
        if plan.first is None:
            plan.first = (tensor, tensor.device, tensor.dtype)
        dim, positions = next(iter(region.index.items()))
        count = len(positions)
        if len(region.index) > 1 or is_dtensor(tensor):  # what is here of a DTensor is asked for anew every time
            plan.rest.append((region, tensor))
        elif dim == 0 and _visits_rows(tensor, count):
            factor = single.setdefault(tensor.dtype, torch.ones((), dtype=tensor.dtype))
            length = tensor[0].numel()
            together = _cost(_TOGETHER, length) < _cost(_ONE_BY_ONE, length)
            size = max(_CACHED // length, 1) if together else count
            for part in positions.to(tensor.device).split(size):
                plan.rows.append(_Rows(tensor, part, factor.expand(len(part), *tensor.shape[1:]), together))
        elif tensor.dim() == 1 or _is_walked(tensor, dim, count):
            # In half precision the factor itself would lose most of its digits.
            dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
            whole.setdefault((tensor.device, dtype), []).append((tensor, dim, positions))
        else:
            plan.rest.append((region, tensor))
    plan.single = list(single.values())
    for (device, dtype), entries in whole.items():
        _walk_whole(plan, entries, device, dtype)
    if plan.rows:
        _announce()
    return plan


def _walk_whole(
    plan: _Plan, entries: list[tuple[Tensor, int, Tensor]], device: torch.device, dtype: torch.dtype
) -> None:
    """Tensors whose units are the same ones share their numbers."""
    starts: dict[tuple[int, bytes], int] = {}
    filled, placed, total = [], [], 0
    for tensor, dim, positions in entries:
        key = (tensor.shape[dim], np.asarray(positions.cpu()).tobytes())
        if key not in starts:
            starts[key] = total
            filled.append(positions.to(device) + total)
            total += tensor.shape[dim]
        placed.append((tensor, dim, starts[key]))
    values = torch.ones(total, dtype=dtype, device=device)
    plan.numbers.append(_Numbers(values, torch.cat(filled)))
    for tensor, dim, start in placed:
        mine = values[start : start + tensor.shape[dim]]
        plan.whole.append(tensor)
        plan.multipliers.append(mine.view([-1 if d == dim else 1 for d in range(tensor.dim())]))


def _cost(prices: tuple[float, float], length: int) -> float:
    return prices[0] + prices[1] * length


def _visits_rows(tensor: Tensor, count: int) -> bool:
    """Whether single rows are multiplied; on a GPU this would take atomic operations."""
    if tensor.device.type != "cpu" or tensor.dim() == 1 or tensor.dtype not in (torch.float32, torch.float64):
        return False
    length = tensor[0].numel()
    return count * min(_cost(_ONE_BY_ONE, length), _cost(_TOGETHER, length)) < tensor.numel()


def _is_walked(tensor: Tensor, dim: int, count: int) -> bool:
    """Whether the tensor is multiplied as a whole: times 1 changes nothing, and is faster than many copies."""
    few = _FEW_COLUMNS if dim or tensor.device.type == "cpu" else _FEW_ROWS
    return few * count >= tensor.shape[dim]


def _announce() -> None:
    """Have the warning that ``index_reduce_`` gives once: users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones(1).index_reduce_(0, torch.zeros(1, dtype=torch.int64), torch.ones(1), "prod")
