"""Numbers per unit of many groups at once, for what happens at every step: prepared once, then only tensor operations.

`Units` turns tensors into one number per unit (`dot`) and a number per unit into changes of tensors (`add_`,
`scale_`, `zero_`). The units of all groups stand in one vector, in order. What belongs to a unit is what
``masking`` says, [Note: entries of a unit]; nothing here waits for the device, and sums gather instead of scattering.

Where tensors are spread over processes, the parts that are here are changed, and each sum is added up with one message.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import HALF, Positions, Tensors, local_positions, precise, slices_by_tensor
from only_train_once.sharding import local, shares_of

_INTEGERS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes of a real number -> its bits


@dataclass(eq=False)
class _Term:
    """One summand of a group's sums: entries of a tensor in the positions of its units in all of ``dims``."""

    name: str
    group: int
    sign: int
    dims: tuple[int, ...]
    index: tuple[Tensor, ...]  # per dim (units, positions), shaped to broadcast against each other
    once: tuple[Tensor, ...]  # False where a position repeats an earlier one of its unit, or is away
    whole: bool  # unit u has position u of the only dim, and there are no others


@dataclass(eq=False)
class _Part:
    """Which unit each position of one dim of a tensor belongs to."""

    dim: int
    owner: Tensor  # (positions of the dim,) number of the unit, or the number of all units for none


class Units:
    """The units of ``groups`` by their slices with ``roles`` in the tensors named in ``among``.

    Attributes:
        count: number of units.
        names: the tensors they own entries of.
        group_of: (count,) number of each unit's group.
        starts: (groups,) number of each group's first unit.
    """

    def __init__(
        self,
        groups: Sequence[PruningGroup],
        tensors: Tensors,
        roles: Collection[Role] = (Role.ZERO,),
        among: Collection[str] | None = None,
    ) -> None:
        sizes = [g.size for g in groups]
        self.count, self.groups = sum(sizes), len(groups)
        self.shares = shares_of(tensors)
        self._terms: list[_Term] = []
        self._parts: dict[str, list[_Part]] = {}
        starts = np.cumsum([0, *sizes])
        for number, group in enumerate(groups):
            for name, slices in slices_by_tensor(group, roles).items():
                if among is not None and name not in among:
                    continue
                tensor = tensors[name]
                dims, here = local_positions(slices, tensor), local(tensor)
                self._parts.setdefault(name, [])
                if not here.numel():
                    continue
                if self.shares.counts(name):
                    self._terms += _terms(name, number, dims, here.shape, tensor.device)
                for dim, positions in dims.items():
                    for owner in _owners(positions.index, positions.once, here.shape[dim]):
                        numbered = np.where(owner < 0, self.count, owner + starts[number])
                        part = _Part(dim, torch.from_numpy(numbered).to(tensor.device))
                        self._parts[name].append(part)
        self._terms.sort(key=lambda t: t.name)
        self.names = tuple(self._parts)
        self._dims = {name: tensors[name].dim() for name in self.names}
        self._bits = {name: _INTEGERS[tensors[name].dtype.to_real().itemsize] for name in self.names}
        self.device = tensors[self.names[0]].device
        self._sizes = sizes
        self.group_of = torch.repeat_interleave(torch.arange(self.groups), torch.tensor(sizes)).to(self.device)
        self.starts = torch.from_numpy(starts[:-1].copy()).to(self.device)

    # -- tensors -> one number per unit ----------------------------------------------------------------------------

    def dot(self, a: Tensors, b: Tensors, scale: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """Per unit, the inner product of two sets of tensors (real part for complex ones).  (count,)

        With ``scale``, each tensor's part of it is multiplied by a number.
        """
        sums: list[Tensor | None] = [None] * self.groups
        reduced: dict[tuple[int, ...], Tensor] = {}  # of the tensor under way: several groups may cut the same dims
        name = ""
        for term in self._terms:
            if term.name != name:
                name, reduced = term.name, {}
                x, y = precise(local(a[name])), precise(local(b[name]))
            if term.dims not in reduced:
                part = _reduce(x, y, term.dims)
                reduced[term.dims] = part if scale is None else part * scale[name]
            part = reduced[term.dims] if term.whole else _gather(reduced[term.dims], term)
            part = part.to(self.device) if term.sign > 0 else -part.to(self.device)
            have = sums[term.group]
            sums[term.group] = part if have is None else have + part
        zeros = (torch.zeros(n, device=self.device) for n in self._sizes)
        parts = [zero if s is None else s for s, zero in zip(sums, zeros, strict=True)]
        dtype = self._dtype(a) if self.shares.split else parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        return self.shares.sum([torch.cat([p.to(dtype) for p in parts])])[0]

    def _dtype(self, tensors: Tensors) -> torch.dtype:
        """What sums over these tensors are in, the same in every process."""
        dtype = torch.float32
        for name in self.names:
            dtype = torch.promote_types(dtype, tensors[name].dtype)
        return dtype.to_real()

    def square(self, tensors: Tensors) -> Tensor:
        """Per unit, the sum of squares of its entries.  (count,)"""
        return self.dot(tensors, tensors)

    def count_by_group(self, flags: Tensor) -> Tensor:
        """How many units of each group are flagged.  (groups,)"""
        done = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.cumsum(0)])
        ends = torch.cat([self.starts[1:], self.starts.new_full((1,), self.count)])
        return done[ends] - done[self.starts]

    # -- one number per unit -> tensors ----------------------------------------------------------------------------

    def add_(self, tensors: Tensors, values: Tensors, coefficient: Tensor, rates: Mapping[str, float | Tensor]) -> None:
        """Add ``rate * coefficient * values`` to the entries of each unit; an entry of two units gets both."""
        extended = _extended(coefficient, 0)
        for name in self.names:
            total: Tensor | None = None
            for part in self._spread(name, extended):
                total = part if total is None else total + part
            if total is None:  # nothing of it is here
                continue
            tensor, value, factor = local(tensors[name]), local(values[name]), total * rates[name]
            if tensor.dtype == value.dtype and tensor.dtype not in HALF:
                tensor.addcmul_(value, factor.to(tensor.dtype))
            else:  # the product in float32, rounded once
                tensor.add_((precise(value) * factor).to(tensor.dtype))

    def scale_(self, tensors: Tensors, factors: Mapping[str, Tensor]) -> None:
        """Multiply each unit's entries in each tensor by the unit's factor there; an entry of two units gets both.

        Args:
            tensors: changed in place.
            factors: name -> (count,).
        """
        for name in self.names:
            for part in self._spread(name, _extended(factors[name], 1)):
                tensor = local(tensors[name])
                tensor.mul_(part.to(tensor.dtype))

    def zero_(self, tensors: Tensors, flags: Tensor) -> None:
        """Set the entries of flagged units to 0 (also where they are not finite)."""
        # Bits are cleared by an integer operation, which is vectorised where the mask broadcasts; masked_fill_ is not.
        keep = {dtype: _extended(flags.to(dtype) - 1, -1) for dtype in self._bits.values()}
        for name, bits in self._bits.items():
            tensor = local(tensors[name]).detach()
            pairs = tensor.is_complex()
            tensor = (torch.view_as_real(tensor) if pairs else tensor).view(bits)
            for part in self._spread(name, keep[bits]):
                tensor.bitwise_and_(part.unsqueeze(-1) if pairs else part)

    def copy_(self, tensors: Tensors, values: Tensors, flags: Tensor) -> None:
        """Set the entries of flagged units to those of ``values``."""
        extended = _extended(flags, 0)
        for name in self.names:
            for part in self._spread(name, extended):
                tensor = local(tensors[name])
                tensor.copy_(torch.where(part, local(values[name]), tensor))

    def _spread(self, name: str, extended: Tensor) -> list[Tensor]:
        """A value per unit, `_extended`, as tensors that broadcast over ``name``, each unit's value once per entry."""
        out: list[Tensor] = []
        owners: list[Tensor] = []
        for part in self._parts[name]:
            shape = [-1 if d == part.dim else 1 for d in range(self._dims[name])]
            owner = part.owner.view(shape)
            value = extended.to(part.owner.device)[part.owner].view(shape)
            for earlier in owners:  # the same unit's row and column meet here
                value = torch.where(owner == earlier, extended[-1], value)
            owners.append(owner)
            out.append(value)
        return out


def _extended(values: Tensor, none: float) -> Tensor:
    """A value per unit, and at the end the one of entries that belong to none.  (count + 1,)"""
    return torch.cat([values, values.new_full((1,), none)])


def _reduce(x: Tensor, y: Tensor, dims: Sequence[int]) -> Tensor:
    """Inner products over all dims but ``dims``, which stay in order (real part for complex tensors)."""
    if tuple(dims) == (0,) and x.dim() > 1:  # the usual case, in the fastest way
        x, y = x.flatten(1), y.flatten(1)
        if x is y or x.data_ptr() == y.data_ptr():
            return torch.linalg.vector_norm(x, dim=1).square()
        return torch.linalg.vecdot(y, x).real if x.is_complex() else torch.linalg.vecdot(x, y)
    product = (x * y.conj()).real if x.is_complex() else x * y
    rest = [d for d in range(product.dim()) if d not in dims]
    return product.sum(dim=rest) if rest else product


def _gather(part: Tensor, term: _Term) -> Tensor:
    """Per unit, the sum over the entries that lie in its positions in all of the term's dims.  (units,)"""
    part = part[term.index]
    for keep in term.once:
        part = torch.where(keep, part, 0)
    return part.flatten(1).sum(1)


def _terms(
    name: str, group: int, dims: Mapping[int, Positions], here: Sequence[int], device: torch.device
) -> list[_Term]:
    """Inclusion and exclusion over the dims a group cuts in one tensor, of which the part ``here`` is that large."""
    out = []
    for n in range(1, len(dims) + 1):
        for subset in combinations(dims, n):
            index, once = [], []
            (dim, *others) = subset
            every = not others and np.array_equal(dims[dim].index[:, 0], np.arange(here[dim]))
            whole = every and dims[dim].index.shape[1] == 1 and bool(dims[dim].once.all())
            for k, dim in enumerate(subset):
                shape = [-1] + [1] * n
                shape[k + 1] = dims[dim].index.shape[1]
                index.append(torch.from_numpy(dims[dim].index).to(device).view(shape))
                if not dims[dim].once.all():
                    once.append(torch.from_numpy(dims[dim].once).to(device).view(shape))
            out.append(_Term(name, group, 1 if n % 2 else -1, subset, tuple(index), tuple(once), whole))
    return out


def _owners(index: NDArray[np.int64], once: NDArray[np.bool_], length: int) -> list[NDArray[np.int64]]:
    """Position -> unit (-1 for none); one array unless positions belong to several units.  (length,) each"""
    units = np.broadcast_to(np.arange(len(index))[:, None], index.shape)
    positions, units = index[once], units[once]
    out: list[NDArray[np.int64]] = []
    while len(positions):
        owner = np.full(length, -1, dtype=np.int64)
        first = np.unique(positions, return_index=True)[1]
        owner[positions[first]] = units[first]
        out.append(owner)
        positions, units = np.delete(positions, first), np.delete(units, first)
    return out
