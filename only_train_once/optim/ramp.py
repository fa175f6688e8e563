"""Units on their way to zero: regions that are multiplied by another number after every step, prepared once.

What a ramp costs is memory traffic and, for the many small tensors, calls. So whatever does not change from step to
step is made once: one buffer holds the numbers of all tensors that are multiplied as a whole (1 for entries that stay),
and is filled with one call. Where few rows of a tensor are on their way, only those are read and written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from only_train_once.masking import HALF, Region
from only_train_once.sharding import is_dtensor

_CACHED = 1 << 16  # entries of rows that are multiplied together, in a copy that stays in the cache
# What visiting a row costs on a CPU, in entries of a tensor walked as a whole: by itself, and per entry of it.
_ROW, _ENTRY = 300, 4.5
_FEW_ROWS, _FEW_COLUMNS = 4, 16  # elsewhere: one in so many positions at least, or they are copied out and back


@dataclass
class _Numbers:
    """What tensors of one device and precision that are walked as a whole are multiplied by, one after the other."""

    values: Tensor
    filled: Tensor  # positions that get the factor


@dataclass
class _Rows:
    """Some rows of a tensor, multiplied by NumPy: torch has no operator for that but one in beta."""

    tensor: Tensor
    parts: list[NDArray[np.int64]]

    def scale_(self, factor: float) -> None:
        array = self.tensor.detach().numpy()  # anew: the tensor may have got other memory
        array = array.reshape(len(array), -1) if self.tensor.is_contiguous() else array
        for rows in self.parts:
            array[rows] *= factor


@dataclass
class _Plan:
    """What a step does to tensors that are not spread over processes.

    Attributes:
        first: the first of the tensors, and the device and precision it had when the plan was made.
        numbers: what fills the ``multipliers``.
        whole: tensors that are walked as a whole.
        multipliers: their parts of the numbers, which broadcast over them.
        rows: what is multiplied row by row.
        rest: what is left to `Region.scale_`.
    """

    first: tuple[Tensor, torch.device, torch.dtype] | None = None
    numbers: list[_Numbers] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)
    multipliers: list[Tensor] = field(default_factory=list)
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
        for rows in self.rows:
            rows.scale_(factor)
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
        return {**vars(self), "_plan": None}  # pickled, its numbers would be no part of one buffer any more

    def scale_(self, factor: float) -> None:
        """Multiply the regions in place."""
        if self._plan is None or not self._plan.fits:
            # What the base step has changed last is in the cache still: begin with that.
            self._plan = _planned({region: self.tensors[region.name] for region in reversed(self.regions)})
        self._plan.scale_(factor)


def _planned(regions: Mapping[Region, Tensor]) -> _Plan:
    plan = _Plan()
    whole: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int, Tensor]]] = {}
    for region, tensor in regions.items():
        if plan.first is None:
            plan.first = (tensor, tensor.device, tensor.dtype)
        dim, positions = next(iter(region.index.items()))
        count = len(positions)
        if len(region.index) > 1 or is_dtensor(tensor):  # what is here of a DTensor is asked for anew every time
            plan.rest.append((region, tensor))
        elif dim == 0 and _visits_rows(tensor, count):
            size = max(_CACHED // tensor[0].numel(), 1)
            plan.rows.append(_Rows(tensor, [part.numpy() for part in positions.cpu().split(size)]))
        elif tensor.dim() == 1 or _is_walked(tensor, dim, count):
            # In half precision the factor itself would lose most of its digits.
            dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
            whole.setdefault((tensor.device, dtype), []).append((tensor, dim, positions))
        else:
            plan.rest.append((region, tensor))
    for (device, dtype), entries in whole.items():
        _walk_whole(plan, entries, device, dtype)
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


def _visits_rows(tensor: Tensor, count: int) -> bool:
    """Whether single rows are multiplied, in memory that NumPy knows."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in (torch.float32, torch.float64)
    if not plain or tensor.device.type != "cpu" or tensor.dim() == 1:
        return False
    return count * (_ROW + _ENTRY * tensor[0].numel()) < tensor.numel()


def _is_walked(tensor: Tensor, dim: int, count: int) -> bool:
    """Whether the tensor is multiplied as a whole: times 1 changes nothing, and is faster than many copies."""
    few = _FEW_COLUMNS if dim or tensor.device.type == "cpu" else _FEW_ROWS
    return few * count >= tensor.shape[dim]
