"""Read, scale and zero the slices of units: the one place that indexes tensors by unit.

[Note: entries of a unit]
The entries of a unit in a tensor are the *union* of what its slices name. A weight that one group cuts in dim 0 and
in dim 1 (a square layer inside a residual stream) has entries that lie in a unit's row and in its column; they are
one entry each: sums count them once (inclusion and exclusion over the dims), scaling multiplies them once. An entry
shared by two *different* units counts for both in their sums, and is still scaled once when both are chosen.

Everything here is vectorised over units, works on the device of the tensors and never waits for it; only `zero_units`
answers on the host. Sums are taken in float32 for half precision, else in the tensor's own precision. They gather
instead of scattering, so that they are deterministic on every device.

Tensors may be spread over processes (`sharding`): then the part that is here is read and written, and sums are added up
over the processes. What begins with ``partial_`` is this process's contribution to such a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from only_train_once.errors import ConfigurationError
from only_train_once.groups import ParamSlice, PruningGroup, Role
from only_train_once.sharding import held, is_dtensor, local, shares_of

Tensors = Mapping[str, Tensor]


def check(groups: Iterable[PruningGroup], tensors: Tensors) -> None:
    """Refuse groups that do not fit the tensors.

    Raises:
        ConfigurationError: a tensor is missing, has another shape, or a position lies outside it.
    """
    for group in groups:
        for s in group.slices:
            if s.role.is_tensor:
                _check_slice(group, s, tensors)


def _check_slice(group: PruningGroup, s: ParamSlice, tensors: Tensors) -> None:
    tensor = tensors.get(s.param)
    if tensor is None:
        raise ConfigurationError(
            f"group {group.name!r} cuts {s.param!r}, which is not among the {len(tensors)} tensors given; pass "
            f"dict(model.named_parameters()) and dict(model.named_buffers()) of the model that was analysed"
        )
    shape = tuple(tensor.shape)
    if not -len(shape) <= s.dim < len(shape) or shape[s.dim] != s.length:
        raise ConfigurationError(
            f"group {group.name!r} expects {s.length} positions in dim {s.dim} of {s.param!r}, found shape {shape}; "
            f"analyse the model again in its present form"
        )
    if s.index.size and (s.index.min() < 0 or s.index.max() >= s.length):
        raise ConfigurationError(
            f"group {group.name!r}: positions of {s.param!r} in dim {s.dim} run from {s.index.min()} to "
            f"{s.index.max()}, the rule is 0 <= position < {s.length}"
        )


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of every unit of a group in one dim of one tensor, slices of the same dim merged."""

    index: NDArray[np.int64]  # (units, positions)
    once: NDArray[np.bool_]  # (units, positions), False where a position repeats an earlier one of its unit, or is away


def positions_by_dim(slices: Sequence[ParamSlice], shape: Sequence[int]) -> dict[int, Positions]:
    by_dim: dict[int, list[NDArray[np.int64]]] = {}
    for s in slices:
        by_dim.setdefault(s.dim % len(shape), []).append(s.index)
    out = {}
    for dim in sorted(by_dim):
        index = np.concatenate(by_dim[dim], axis=1)
        order = np.argsort(index, axis=1, kind="stable")
        ordered = np.take_along_axis(index, order, axis=1)
        once = np.ones(index.shape, dtype=np.bool_)
        np.put_along_axis(once, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
        out[dim] = Positions(index, once)
    return out


def local_positions(slices: Sequence[ParamSlice], tensor: Tensor) -> dict[int, Positions]:
    """`positions_by_dim` in the part of the tensor that is here."""
    out, here = positions_by_dim(slices, tensor.shape), held(tensor)
    for dim in out.keys() & here.keys():
        place = _places(here[dim], tensor.shape[dim])[out[dim].index]
        out[dim] = Positions(place.clip(min=0), out[dim].once & (place >= 0))
    return out


def _places(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Position in the whole -> position here, -1 for what is away.  (length,)"""
    place = np.full(length, -1, dtype=np.int64)
    place[positions] = np.arange(len(positions))
    return place


def slices_by_tensor(group: PruningGroup, roles: Collection[Role]) -> dict[str, list[ParamSlice]]:
    out: dict[str, list[ParamSlice]] = {}
    for s in group.slices:
        if s.role in roles and s.role.is_tensor:
            out.setdefault(s.param, []).append(s)
    return out


# -- sums over entries -----------------------------------------------------------------------------------------------

BLOCK = 1 << 18  # entries of a tensor that are worked on at a time: what is made of them stays in the cache
Names = str | tuple[str, ...]  # of a tensor, or of vectors that are taken together, one after the other
Pairs = Callable[[Any, slice], Sequence[tuple[Tensor, Tensor]]]  # name (or names), rows -> tensors to be multiplied


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a tensor that are worked on together, in order; nothing larger than these is ever made."""
    step = max(BLOCK // max(math.prod(shape[1:]), 1), 1)
    return (slice(start, start + step) for start in range(0, shape[0], step))


def rows(tensors: Tensors, name: Names, block: slice) -> Tensor:
    """Some rows of the part of a tensor that is here, in a precision that holds sums; of several vectors everything."""
    made = getattr(tensors, "rows", None)  # means are made when they are asked for
    if not isinstance(name, str):
        return precise(torch.cat([local(tensors[n]) if made is None else made(n, block) for n in name]))
    return precise(local(tensors[name])[block] if made is None else made(name, block))


def inner_products(
    shape: Sequence[int], kept: Collection[tuple[int, ...]], pairs: Callable[[slice], Sequence[tuple[Tensor, Tensor]]]
) -> list[dict[tuple[int, ...], Tensor]]:
    """Of each pair, the inner products over all dims but those kept, for each choice of dims that are.

    Args:
        shape: of the tensors.
        kept: choices of dims, ascending.
        pairs: rows -> pairs of tensors (real parts count for complex ones).
    """
    found: list[dict[tuple[int, ...], list[Tensor]]] = []
    for block in blocks(shape):
        for number, (x, y) in enumerate(pairs(block)):
            if number == len(found):
                found.append({dims: [] for dims in kept})
            for dims in kept:
                part, known = _reduce(x, y, dims), found[number][dims]
                if 0 in dims or not known:
                    known.append(part)
                else:
                    known[0] = known[0] + part
    return [{d: parts[0] if len(parts) == 1 else torch.cat(parts) for d, parts in each.items()} for each in found]


def _reduce(x: Tensor, y: Tensor, dims: Sequence[int]) -> Tensor:
    """Inner products over all dims but ``dims``, which stay in order (real part for complex tensors)."""
    if tuple(dims) == (0,) and x.dim() > 1:  # the usual case, in the fastest way
        same = x is y
        x = x.flatten(1)
        if same:
            return torch.linalg.vector_norm(x, dim=1).square()
        y = y.flatten(1)
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        return torch.linalg.vecdot(y, x).real if x.is_complex() else torch.linalg.vecdot(x, y)
    product = (x * y.conj()).real if x.is_complex() else x * y
    rest = [d for d in range(product.dim()) if d not in dims]
    return product.sum(dim=rest) if rest else product


def partial_products(
    group: PruningGroup, tensors: Tensors, pairs: Pairs, roles: Collection[Role] = (Role.ZERO,)
) -> list[Tensor]:
    """Of each pair, per unit this process's part of the inner product over the unit's entries, each once.  (units,)

    ``tensors`` know shapes and who counts what.
    """
    totals: list[Tensor] = []

    def add(number: int, part: Tensor) -> None:
        if number == len(totals):
            totals.append(part)
        else:
            totals[number] = totals[number] + part.to(totals[number].device)

    shares = shares_of(tensors)
    for name, slices in slices_by_tensor(group, roles).items():
        _check_shared(name, tensors)
        here = local(tensors[name])
        if not shares.counts(name) or not here.numel():
            for number, (x, _) in enumerate(pairs(name, slice(0, 0))):  # of the same dtype in every process
                add(number, x.new_zeros(group.size, dtype=x.dtype.to_real()))
            continue
        dims = local_positions(slices, tensors[name])
        kept = [subset for n in range(1, len(dims) + 1) for subset in combinations(dims, n)]
        for number, found in enumerate(inner_products(here.shape, kept, partial(pairs, name))):
            for subset in kept:  # inclusion and exclusion
                part = _gather(found[subset], {d: dims[d] for d in subset})
                add(number, part if len(subset) % 2 else -part)
    if not totals:
        raise ConfigurationError(
            f"group {group.name!r} has no tensor slice with a role in {sorted(r.value for r in roles)}, so nothing "
            f"can be summed over its units"
        )
    return totals


def _gather(part: Tensor, dims: Mapping[int, Positions]) -> Tensor:
    """Per unit, the sum over what lies in its positions in *all* of ``dims``, which ``part`` has in order.  (units,)"""
    n, index, once = len(dims), [], []
    for k, positions in enumerate(dims.values()):
        shape = [-1] + [1] * n
        shape[k + 1] = positions.index.shape[1]
        index.append(torch.from_numpy(positions.index).to(part.device).view(shape))
        if not positions.once.all():
            once.append(torch.from_numpy(positions.once).to(part.device).view(shape))
    part = part[tuple(index)]  # (units, positions in dim 1, ...)
    for keep in once:
        part = torch.where(keep, part, 0)  # what is away is no factor of 0: it may be NaN
    return part.flatten(1).sum(1)


HALF = (torch.float16, torch.bfloat16)


def precise(tensor: Tensor) -> Tensor:
    """Without its history, in a precision that holds sums."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor.float() if tensor.dtype in HALF else tensor


def partial_dot(group: PruningGroup, a: Tensors, b: Tensors, roles: Collection[Role] = (Role.ZERO,)) -> Tensor:
    """This process's part of `unit_dot`.  (units,)"""

    def pair(name: str, block: slice) -> list[tuple[Tensor, Tensor]]:
        x = rows(a, name, block)
        return [(x, x if b is a else rows(b, name, block))]

    return partial_products(group, a, pair, roles)[0]


def _check_shared(name: str, tensors: Tensors) -> None:
    if is_dtensor(tensors[name]) and not hasattr(tensors, "shares"):
        raise ConfigurationError(
            f"{name!r} is spread over processes, and nothing says who counts which part of it; use the dictionaries "
            f"that importance functions are given, or gather the model first"
        )


def unit_dot(group: PruningGroup, a: Tensors, b: Tensors, roles: Collection[Role] = (Role.ZERO,)) -> Tensor:
    """Per unit, the inner product of two sets of tensors (real part for complex ones).  (units,)"""
    return shares_of(a).sum([partial_dot(group, a, b, roles)])[0]


def unit_sq_norm(group: PruningGroup, tensors: Tensors, roles: Collection[Role] = (Role.ZERO,)) -> Tensor:
    """Per unit, the sum of squares of its entries.  (units,)"""
    return unit_dot(group, tensors, tensors, roles)


def unit_numel(group: PruningGroup, tensors: Tensors, roles: Collection[Role] = (Role.ZERO,)) -> NDArray[np.int64]:
    """Per unit, how many entries it has, or had before others left the network for good.  (units,)"""
    if group.origin is not None:
        return _entries(group.origin.group, group.origin.shapes, roles)[group.origin.numbers]
    return _entries(group, {name: tuple(tensors[name].shape) for name in slices_by_tensor(group, roles)}, roles)


def _entries(group: PruningGroup, shapes: Mapping[str, Sequence[int]], roles: Collection[Role]) -> NDArray[np.int64]:
    total = np.zeros(group.size, dtype=np.int64)
    for name, slices in slices_by_tensor(group, roles).items():
        shape = shapes[name]
        cut = positions_by_dim(slices, shape)
        outside = np.ones(group.size, dtype=np.int64)  # of the dims cut: index combinations no slice names
        for dim, positions in cut.items():
            outside *= shape[dim] - positions.once.sum(axis=1)
        whole = math.prod(shape[d] for d in cut)
        total += (whole - outside) * math.prod(n for d, n in enumerate(shape) if d not in cut)
    return total


def unit_is_zero(group: PruningGroup, tensors: Tensors) -> Tensor:
    """Per unit, whether all its ``zero`` entries are exactly 0 (a NaN is not 0).  (units,) bool

    A group without a ``zero`` slice has no zero unit.  Compared by magnitude, not by norm: squares underflow.
    """
    if not any(s.role is Role.ZERO for s in group.slices):
        return torch.zeros(group.size, dtype=torch.bool)
    return shares_of(tensors).sum([partial_live(group, tensors)])[0] == 0


def partial_live(group: PruningGroup, tensors: Tensors, roles: Collection[Role] = (Role.ZERO,)) -> Tensor:
    """Per unit, 1 if an entry of it that is here is not 0, else 0.  (units,)"""
    largest: Tensor | None = None
    for name, slices in slices_by_tensor(group, roles).items():
        _check_shared(name, tensors)
        values = local(tensors[name]).detach()
        if not values.numel():
            part = values.new_zeros(group.size, dtype=values.dtype.to_real())
            largest = part if largest is None else largest
            continue
        for dim, positions in local_positions(slices, tensors[name]).items():
            part = _largest(values, dim)
            part = part[torch.from_numpy(positions.index).to(values.device)]
            if not positions.once.all():
                part = torch.where(torch.from_numpy(positions.once).to(values.device), part, 0)
            part = part.amax(dim=1)
            largest = part if largest is None else torch.maximum(largest, part.to(largest.device, largest.dtype))
    assert largest is not None
    return largest.ne(0).to(torch.int32)


def _largest(values: Tensor, dim: int) -> Tensor:
    """The largest size of an entry at every position of a dim."""
    rest = [d for d in range(values.dim()) if d != dim]
    parts = []
    for block in blocks(values.shape):
        size = values[block].abs()
        parts.append(size.amax(dim=rest) if rest else size)
    return torch.cat(parts) if dim == 0 else torch.stack(parts).amax(0)


def zero_units(groups: Iterable[PruningGroup], tensors: Tensors) -> dict[str, NDArray[np.int64]]:
    """For every prunable group, the units that are exactly zero, in ascending order."""
    return {
        g.name: np.flatnonzero(unit_is_zero(g, tensors).cpu().numpy()).astype(np.int64) for g in groups if g.prunable
    }


_LONG = 4096  # entries of a row from which on a call for each costs less than copying them out and back


@dataclass(eq=False)
class Region:
    """The entries that chosen units own in one tensor: unique positions in each of its dims.

    Attributes:
        name: name of the tensor.
        index: dim -> (positions,) int64, ascending, in the part of the tensor that is here; on the tensor's device
            after its first use.
    """

    name: str
    index: dict[int, Tensor]
    _views: tuple[int, list[Tensor]] | None = None  # address of the tensor, views of its chosen rows

    def __getstate__(self) -> dict[str, object]:
        return {"name": self.name, "index": self.index}  # a copy makes views of its own tensor

    def _rows(self, tensor: Tensor) -> list[Tensor] | None:
        """The chosen rows as views, where they are few and very long: then scaling them touches least memory."""
        if tensor.device.type != "cpu" or tensor.numel() < _LONG * tensor.shape[0] or len(self.index[0]) > 4096:
            return None
        if self._views is None or self._views[0] != tensor.data_ptr():
            positions = self.index[0].numpy()
            runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
            self._views = (tensor.data_ptr(), [tensor.detach()[run[0] : run[-1] + 1] for run in runs])
        return self._views[1] if 4 * len(self._views[1]) < tensor.shape[0] else None

    def _on(self, device: torch.device) -> dict[int, Tensor]:
        if any(i.device != device for i in self.index.values()):
            self.index = {d: i.to(device) for d, i in self.index.items()}
        return self.index

    def scale_(self, tensor: Tensor, factor: float) -> None:
        """Multiply the entries by ``factor`` in place, each once, see [Note: entries of a unit]."""
        tensor = local(tensor)
        index = self._on(tensor.device)
        if len(index) == 1:
            ((dim, positions),) = index.items()
            rows = self._rows(tensor) if dim == 0 else None
            if rows is not None:
                torch._foreach_mul_(rows, factor)
            elif tensor.dim() == 1 or (4 if dim == 0 else 16) * len(positions) >= tensor.shape[dim]:
                # Times 1 changes nothing, and is faster than copying many rows out and back, or some columns.
                factors = torch.ones(tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
                factors.index_fill_(0, positions, factor)
                tensor.mul_(factors.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
            else:
                tensor.index_copy_(dim, positions, tensor.index_select(dim, positions).mul_(factor))
            return
        covered: Tensor | None = None  # broadcasts over the tensor: entries an earlier dim has scaled
        for dim, positions in index.items():
            part = tensor.index_select(dim, positions)
            scaled = part * factor if covered is None else torch.where(covered, part, part * factor)
            tensor.index_copy_(dim, positions, scaled)
            mine = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            mine.index_fill_(0, positions, True)
            mine = mine.view([-1 if d == dim else 1 for d in range(tensor.dim())])
            covered = mine if covered is None else covered | mine

    def zero_(self, tensor: Tensor) -> None:
        """Set the entries to 0 in place (also where they are not finite)."""
        tensor = local(tensor)
        for dim, positions in self._on(tensor.device).items():
            tensor.index_fill_(dim, positions, 0)

    def zero_rows_(self, part: Tensor, first: int) -> None:
        """The same in some rows of the part of the tensor that is here, which begin with row ``first``."""
        for dim, positions in self.index.items():
            if dim == 0:
                positions = positions[(positions >= first) & (positions < first + part.shape[0])] - first
            part.index_fill_(dim, positions.to(part.device), 0)


def positions_of(
    groups: Iterable[PruningGroup],
    units: Mapping[str, NDArray[np.int64]],
    tensors: Tensors,
    roles: Collection[Role],
    only: Callable[[PruningGroup, ParamSlice], bool] = lambda group, s: True,
) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Tensor -> dim -> positions in the whole tensor, ascending, of what `regions` says of the same arguments."""
    found: dict[str, dict[int, list[NDArray[np.int64]]]] = {}
    for group in groups:
        chosen = units.get(group.name)
        if chosen is None or not len(chosen):
            continue
        for s in group.slices:
            if s.role in roles and s.role.is_tensor and only(group, s):
                dim = s.dim % tensors[s.param].dim()
                found.setdefault(s.param, {}).setdefault(dim, []).append(s.index[chosen].ravel())
    return {
        name: {d: np.unique(np.concatenate(parts)) for d, parts in sorted(dims.items())} for name, dims in found.items()
    }


def regions(
    groups: Iterable[PruningGroup],
    units: Mapping[str, NDArray[np.int64]],
    tensors: Tensors,
    roles: Collection[Role],
    only: Callable[[PruningGroup, ParamSlice], bool] = lambda group, s: True,
) -> tuple[Region, ...]:
    """What ``units`` (group name -> units) own in each tensor, over the slices with ``roles`` that pass ``only``."""
    out = []
    for name, index in positions_of(groups, units, tensors, roles, only).items():
        here = held(tensors[name])
        for d in index.keys() & here.keys():
            place = _places(here[d], tensors[name].shape[d])[index[d]]
            index[d] = np.sort(place[place >= 0])
        index = {d: positions for d, positions in index.items() if len(positions)}
        if index and local(tensors[name]).numel():
            out.append(Region(name, {d: torch.from_numpy(positions) for d, positions in index.items()}))
    return tuple(out)
