"""Numbers per unit of many groups at once, for what happens at every step: prepared once, then only tensor operations.

`Units` turns tensors into numbers per unit (`dots`) and a number per unit into changes of tensors (`change_`, `scale_`,
`zero_`). The units of all groups stand in one vector, in order. What belongs to a unit is what ``masking`` says,
[Note: entries of a unit]; nothing here waits for the device, and sums gather instead of scattering. Tensors are walked
through some rows at a time: what is done to the same entries is done while they are in the cache, and takes no memory.

Where tensors are spread over processes, the parts that are here are changed, and sums are added up with one message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import (
    HALF,
    Pairs,
    Positions,
    Tensors,
    blocks,
    inner_products,
    local_positions,
    positions_by_dim,
    precise,
    rows,
    slices_by_tensor,
)
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

    group: int
    sign: int
    dims: tuple[int, ...]
    index: tuple[Tensor, ...]  # per dim (units, positions), shaped to broadcast against each other
    once: tuple[Tensor, ...]  # False where a position repeats an earlier one of its unit, or is away
    whole: bool  # unit u has position u of the only dim, and there are no others


@dataclass(frozen=True)
class Sum:
    """A sum per unit: of the pair with this number; with ``scale``, each tensor's part times a number."""

    pair: int
    scale: Mapping[str, float | Tensor] | None = None


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
        apart: those of them in which no entry belongs to two units.
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
        self._terms: dict[str, list[_Term]] = {}
        self._here: dict[str, tuple[int, ...]] = {}  # shapes of the parts that are here
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
                    self._terms.setdefault(name, []).extend(_terms(number, dims, here.shape, tensor.device))
                    self._here[name] = tuple(here.shape)
                for dim, positions in dims.items():
                    for owner in _owners(positions.index, positions.once, here.shape[dim]):
                        numbered = np.where(owner < 0, self.count, owner + starts[number])
                        part = _Part(dim, torch.from_numpy(numbered).to(tensor.device))
                        self._parts[name].append(part)
        self.names = tuple(self._parts)
        self.apart = frozenset(self.names) - _overlapping(groups, tensors, roles)
        self._dims = {name: tensors[name].dim() for name in self.names}
        self._dtype = torch.float32  # what sums are in at least, the same in every process
        for name in self.names:
            self._dtype = torch.promote_types(self._dtype, tensors[name].dtype).to_real()
        self._bits = {name: _INTEGERS[tensors[name].dtype.to_real().itemsize] for name in self.names}
        self.device = tensors[self.names[0]].device
        self._sizes = sizes
        self.group_of = torch.repeat_interleave(torch.arange(self.groups), torch.tensor(sizes)).to(self.device)
        self.starts = torch.from_numpy(starts[:-1].copy()).to(self.device)

    # -- tensors -> one number per unit ----------------------------------------------------------------------------

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        """Per unit, the inner product of two sets of tensors (real part for complex ones).  (count,)"""

        def pair(name: str, block: slice) -> list[tuple[Tensor, Tensor]]:
            x = rows(a, name, block)
            return [(x, x if b is a else rows(b, name, block))]

        return self.dots(pair, [Sum(0)])[0]

    def dots(self, pairs: Pairs, wanted: Sequence[Sum]) -> list[Tensor]:
        """Sums of inner products of pairs of tensors, in one walk over them and with one message.  (count,) each

        Args:
            pairs: name, rows -> pairs of tensors.
            wanted: which sums.
        """
        sums: list[dict[int, Tensor]] = [{} for _ in wanted]
        for name, terms in self._terms.items():
            kept = dict.fromkeys(term.dims for term in terms)
            found = inner_products(self._here[name], kept, partial(pairs, name))
            for total, sum_ in zip(sums, wanted, strict=True):
                reduced = found[sum_.pair]
                if sum_.scale is not None:
                    reduced = {dims: part * sum_.scale[name] for dims, part in reduced.items()}
                for term in terms:
                    part = reduced[term.dims] if term.whole else _gather(reduced[term.dims], term)
                    part = part if part.device == self.device else part.to(self.device)
                    part = part if term.sign > 0 else -part
                    total[term.group] = total[term.group] + part if term.group in total else part
        dtype = self._dtype if self.shares.split else torch.float32
        for total in sums:
            for part in total.values():
                dtype = torch.promote_types(dtype, part.dtype)
        nothing = [torch.zeros(n, device=self.device, dtype=dtype) for n in self._sizes]
        parts = [torch.cat([total.get(g, nothing[g]).to(dtype) for g in range(self.groups)]) for total in sums]
        return self.shares.sum(parts)

    def square(self, tensors: Tensors) -> Tensor:
        """Per unit, the sum of squares of its entries.  (count,)"""
        return self.dot(tensors, tensors)

    def count_by_group(self, flags: Tensor) -> Tensor:
        """How many units of each group are flagged.  (groups,)"""
        done = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.cumsum(0)])
        ends = torch.cat([self.starts[1:], self.starts.new_full((1,), self.count)])
        return done[ends] - done[self.starts]

    # -- one number per unit -> tensors ----------------------------------------------------------------------------

    def change_(
        self,
        tensors: Tensors,
        values: Tensors,
        coefficient: Tensor,
        rates: Mapping[str, float | Tensor],
        *,
        back: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> None:
        """Add to each unit's entries, in one walk over the tensors; an entry of two units gets both.

        Args:
            tensors: changed in place.
            values: of the parts that are here.
            coefficient: (count,) ``rate * coefficient * values`` is added.
            rates: name -> rate.
            back: (count,) flagged units get their ``values`` before that.
            zero: (count,) flagged units are set to 0 after that (also where they are not finite).
        """
        adds = {n: self._total(n, _extended(coefficient, 0), rates[n], local(tensors[n])) for n in self._parts}
        returns = {} if back is None else {n: self._spread(n, _extended(back, 0)) for n in self._parts}
        masks = {} if zero is None else self._masks(zero)
        for name in self.names:
            tensor, value = local(tensors[name]).detach(), local(values[name])
            total = adds[name]
            if total is None:  # nothing of it is here
                continue
            for block in blocks(tensor.shape):
                into, what = tensor[block], value[block]
                for part in returns.get(name, ()):
                    into.copy_(torch.where(_at(part, block), what, into))
                factor = _at(total, block)
                if into.dtype == what.dtype and into.dtype not in HALF:
                    into.addcmul_(what, factor)
                else:  # the product in float32, rounded once
                    into.add_((precise(what) * factor).to(into.dtype))
                for part in masks.get(name, ()):
                    _clear_(into, part, block)

    def _total(self, name: str, extended: Tensor, rate: float | Tensor, like: Tensor) -> Tensor | None:
        """What `change_` multiplies values by, as a tensor that broadcasts over ``name``."""
        total: Tensor | None = None
        for part in self._spread(name, extended):
            total = part if total is None else total + part
        if total is None:
            return None
        total = total * rate
        return total if like.dtype in (total.dtype, *HALF) else total.to(like.dtype)

    def scale_(self, tensors: Tensors, factors: Mapping[str, Tensor], zero: Tensor | None = None) -> None:
        """Multiply each unit's entries in each tensor by the unit's factor there; an entry of two units gets both.

        Args:
            tensors: changed in place.
            factors: name -> (count,).
            zero: (count,) flagged units are set to 0 after that (also where they are not finite).
        """
        masks = {} if zero is None else self._masks(zero)
        for name in self.names:
            tensor = local(tensors[name]).detach()
            parts = [part.to(tensor.dtype) for part in self._spread(name, _extended(factors[name], 1))]
            for block in blocks(tensor.shape) if parts else ():
                for part in parts:
                    tensor[block].mul_(_at(part, block))
                for part in masks.get(name, ()):
                    _clear_(tensor[block], part, block)

    def scaled(self, name: str, factors: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """What `scale_` makes of some rows of a tensor, as a function of the rows."""
        parts = self._spread(name, _extended(factors, 1))

        def scaled(values: Tensor, block: slice) -> Tensor:
            for part in parts:
                values = values * _at(part, block).to(values.dtype)
            return values

        return scaled

    def zero_(self, tensors: Tensors, flags: Tensor) -> None:
        """Set the entries of flagged units to 0 (also where they are not finite)."""
        masks = self._masks(flags)
        for name in self.names:
            tensor = local(tensors[name]).detach()
            for part in masks[name]:
                _clear_(tensor, part, slice(None))

    def _masks(self, flags: Tensor) -> dict[str, list[Tensor]]:
        """Per tensor all bits where entries stay, and none where they go."""
        # Bits are cleared by an integer operation, which is vectorised where the mask broadcasts; masked_fill_ is not.
        keep = {dtype: _extended(flags.to(dtype) - 1, -1) for dtype in set(self._bits.values())}
        return {name: self._spread(name, keep[bits]) for name, bits in self._bits.items()}

    def _spread(self, name: str, extended: Tensor) -> list[Tensor]:
        """A value per unit, `_extended`, as tensors that broadcast over ``name``, each unit's value once per entry."""
        out: list[Tensor] = []
        owners: list[Tensor] = []
        for part in self._parts[name]:
            shape = [-1 if d == part.dim else 1 for d in range(self._dims[name])]
            owner = part.owner.view(shape)
            value = extended if extended.device == part.owner.device else extended.to(part.owner.device)
            value = value[part.owner].view(shape)
            for earlier in owners:  # the same unit's row and column meet here
                value = torch.where(owner == earlier, extended[-1], value)
            owners.append(owner)
            out.append(value)
        return out


def _at(part: Tensor, block: slice) -> Tensor:
    """What of a tensor that broadcasts goes with some rows."""
    return part[block] if part.shape[0] > 1 else part


def _clear_(tensor: Tensor, mask: Tensor, block: slice) -> None:
    """Keep the bits that a mask, which goes with the whole tensor, has in some rows of it."""
    pairs = tensor.is_complex()
    bits = (torch.view_as_real(tensor) if pairs else tensor).view(mask.dtype)
    mask = _at(mask, block)
    bits.bitwise_and_(mask.unsqueeze(-1) if pairs else mask)


def _overlapping(groups: Sequence[PruningGroup], tensors: Tensors, roles: Collection[Role]) -> set[str]:
    """Names of the tensors in which an entry may belong to two units, whoever has it."""
    owned: dict[str, dict[int, list[NDArray[np.int64]]]] = {}
    for group in groups:
        for name, slices in slices_by_tensor(group, roles).items():
            for dim, positions in positions_by_dim(slices, tensors[name].shape).items():
                owned.setdefault(name, {}).setdefault(dim, []).append(positions.index[positions.once])
    out = set()
    for name, dims in owned.items():
        together = [np.concatenate(parts) for parts in dims.values()]
        if len(together) > 1 or len(np.unique(together[0])) < len(together[0]):
            out.add(name)
    return out


def _extended(values: Tensor, none: float) -> Tensor:
    """A value per unit, and at the end the one of entries that belong to none.  (count + 1,)"""
    return torch.cat([values, values.new_full((1,), none)])


def _gather(part: Tensor, term: _Term) -> Tensor:
    """Per unit, the sum over the entries that lie in its positions in all of the term's dims.  (units,)"""
    part = part[term.index]
    for keep in term.once:
        part = torch.where(keep, part, 0)
    return part.flatten(1).sum(1)


def _terms(group: int, dims: Mapping[int, Positions], here: Sequence[int], device: torch.device) -> list[_Term]:
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
            out.append(_Term(group, 1 if n % 2 else -1, subset, tuple(index), tuple(once), whole))
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
