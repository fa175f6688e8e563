"""Numbers per unit of many groups at once, for what happens at every step: prepared once, then only tensor operations.

`Units` turns tensors into numbers per unit (`dots`) and a number per unit into changes of tensors (`change_`, `scale_`,
`zero_`). The units of all groups stand in one vector, in order. What belongs to a unit is what ``masking`` says,
[Note: entries of a unit]; nothing here waits for the device, and sums gather instead of scattering. Tensors are walked
through some rows at a time: what is done to the same entries is done while they are in the cache, and takes no memory.

Where tensors are spread over processes, the parts that are here are changed, and sums are added up with one message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import (
    HALF,
    Names,
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
from only_train_once.sharding import is_dtensor, local, shares_of

_INTEGERS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes of a real number -> its bits


@dataclass(eq=False)
class _Term:
    """One summand of a group's sums: entries of a tensor in the positions of its units in all of ``dims``."""

    dims: tuple[int, ...]
    sign: int
    unit: NDArray[np.int64]  # per entry that is here, each once, the unit that it belongs to ...
    place: NDArray[np.int64]  # ... and its position in the tensor that is reduced to ``dims``


@dataclass(eq=False)
class _Bucket:
    """Units whose sums have equally many summands."""

    index: Tensor  # (units, summands) positions in all reduced tensors, one after the other
    sign: Tensor | None  # (units, summands); None where all are added


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
        self._terms: dict[str, list[_Term]] = {}  # of the tensors that this process counts
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
                    self._terms.setdefault(name, []).extend(_terms(int(starts[number]), dims, here.shape))
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
        self._layout = {name: list(dict.fromkeys(t.dims for t in terms)) for name, terms in self._terms.items()}
        self._buckets, self._bucketed = self._sums()
        self._bundles = self._vectors(tensors)
        bundled = set(chain.from_iterable(self._bundles))
        self._walked: tuple[Names, ...] = (*self._bundles, *(name for name in self.names if name not in bundled))
        simple = [n for n in self._walked if not isinstance(n, str) or self._is_simple(n)]
        owners = [self._parts[n][0].owner for names in simple for n in _each(names)]
        self._simple = {n: sum(len(self._parts[k][0].owner) for k in _each(n)) for n in simple}
        self._owners = torch.cat(owners) if owners else None
        self.group_of = torch.repeat_interleave(torch.arange(self.groups), torch.tensor(sizes)).to(self.device)
        self.starts = torch.from_numpy(starts[:-1].copy()).to(self.device)

    def _is_simple(self, name: str) -> bool:
        """Whether entries belong to one unit at most, and numbers for them can be made together with others'."""
        return len(self._parts[name]) == 1 and self._parts[name][0].owner.device == self.device

    def _vectors(self, tensors: Tensors) -> list[tuple[str, ...]]:
        """Vectors of one precision, to be taken together: one by one, they would cost more calls than work."""
        alike: dict[torch.dtype, list[str]] = {}
        if self.shares.split:
            return []
        for name in self.names:
            if tensors[name].dim() == 1 and self._is_simple(name) and not is_dtensor(tensors[name]):
                alike.setdefault(tensors[name].dtype, []).append(name)
        return [tuple(names) for names in alike.values() if len(names) > 1]

    def _sums(self) -> tuple[list[_Bucket], Tensor]:
        """How reduced tensors, one after the other, are added up to numbers per unit; units in the buckets' order."""
        start, begin = 0, {}
        for name, kept in self._layout.items():
            for dims in kept:
                begin[name, dims] = start
                start += math.prod(self._here[name][d] for d in dims)
        terms = [(t, begin[name, t.dims]) for name, terms in self._terms.items() for t in terms]
        nothing = np.zeros(0, dtype=np.int64)
        unit = np.concatenate([nothing, *(t.unit for t, _ in terms)])
        place = np.concatenate([nothing, *(t.place + at for t, at in terms)])
        sign = np.concatenate([nothing, *(np.full(len(t.unit), t.sign) for t, _ in terms)])
        order = np.argsort(unit, kind="stable")
        place, sign, number = place[order], sign[order], np.bincount(unit, minlength=self.count)
        first = np.cumsum(number) - number
        buckets, units = [], []
        for n in np.unique(number):
            members = np.flatnonzero(number == n)
            at = first[members][:, None] + np.arange(n)
            signs = None if (sign[at] > 0).all() else torch.from_numpy(sign[at]).to(self.device)
            buckets.append(_Bucket(torch.from_numpy(place[at]).to(self.device), signs))
            units.append(members)
        return buckets, torch.from_numpy(np.argsort(np.concatenate(units), kind="stable")).to(self.device)

    # -- tensors -> one number per unit ----------------------------------------------------------------------------

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        """Per unit, the inner product of two sets of tensors (real part for complex ones).  (count,)"""

        def pair(name: Names, block: slice) -> list[tuple[Tensor, Tensor]]:
            x = rows(a, name, block)
            return [(x, x if b is a else rows(b, name, block))]

        return self.dots(pair, [Sum(0)], bundled=True)[0]

    def dots(self, pairs: Pairs, wanted: Sequence[Sum], bundled: bool = False) -> list[Tensor]:
        """Sums of inner products of pairs of tensors, in one walk over them and with one message.  (count,) each

        Args:
            pairs: name, rows -> pairs of tensors.
            wanted: which sums.
            bundled: ``pairs`` takes several names, too, and returns what belongs to all of these vectors together.
        """
        found: dict[str, list[dict[tuple[int, ...], Tensor]]] = {}
        for names in self._walked if bundled else self.names:
            here = [self._here[n] for n in _each(names) if n in self._here]
            if isinstance(names, str):
                if here:
                    found[names] = inner_products(here[0], self._layout[names], partial(pairs, names))
                continue
            products = [x * y.conj() for x, y in pairs(names, slice(None))]
            parts = [(p.real if p.is_complex() else p).split([n for (n,) in here]) for p in products]
            found.update({name: [{(0,): part[k]} for part in parts] for k, name in enumerate(names)})
        if not found:
            nothing = torch.zeros(self.count, dtype=self._dtype, device=self.device)
            return self.shares.sum([nothing] * len(wanted))
        # Sums of one pair differ by a number, unless its tensors have different ones.
        numbers = [_common(sum_.scale) for sum_ in wanted]
        kinds = [s.pair if n is not None else (s.pair, k) for k, (s, n) in enumerate(zip(wanted, numbers, strict=True))]
        flat: dict[Any, Tensor] = {}
        for kind, sum_, number in zip(kinds, wanted, numbers, strict=True):
            if kind not in flat:
                flat[kind] = self._laid_out(found, sum_.pair, sum_.scale if number is None else None)
        added = dict(zip(flat, self._added_up(torch.stack([*flat.values()])), strict=True))
        totals = [
            added[k] if n is None or s.scale is None else added[k] * n
            for k, n, s in zip(kinds, numbers, wanted, strict=True)
        ]
        least = self._dtype if self.shares.split else torch.float32
        return self.shares.sum([t.to(torch.promote_types(least, t.dtype)) for t in totals])

    def _laid_out(
        self,
        found: Mapping[str, Sequence[Mapping[tuple[int, ...], Tensor]]],
        pair: int,
        scale: Mapping[str, float | Tensor] | None,
    ) -> Tensor:
        """The reduced tensors of a pair, one after the other."""
        parts = []
        for name, kept in self._layout.items():
            for dims in kept:
                part = found[name][pair][dims].reshape(-1)
                part = part if scale is None else part * scale[name]
                parts.append(part if part.device == self.device else part.to(self.device))
        return torch.cat(parts)

    def _added_up(self, flat: Tensor) -> Tensor:
        """(sums, reduced entries) -> (sums, count)"""
        parts = []
        for bucket in self._buckets:
            part = flat[:, bucket.index]
            parts.append((part if bucket.sign is None else part * bucket.sign).sum(2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, self._bucketed]

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
        rate = _common(rates)
        add = self._spread_all(_extended(coefficient if rate is None else coefficient * rate, 0))
        returns = None if back is None else self._spread_all(_extended(back, 0))
        masks = None if zero is None else self._masks(zero)
        for names, tensor in self._changing(tensors, bundled=rate is not None):
            total = _total(add(names), None if rate is not None else rates[cast(str, names)], tensor)
            if total is None:  # nothing of it is here
                continue
            value = _taken(values, names)
            restored, hidden = returns(names) if returns else (), masks(names) if masks else ()
            for block in blocks(tensor.shape):
                into, what = tensor[block], value[block]
                for part in restored:
                    into.copy_(torch.where(_at(part, block), what, into))
                factor = _at(total, block)
                if into.dtype == what.dtype and into.dtype not in HALF:
                    into.addcmul_(what, factor)
                else:  # the product in float32, rounded once
                    into.add_((precise(what) * factor).to(into.dtype))
                for part in hidden:
                    _clear_(into, part, block)

    def _changing(self, tensors: Tensors, bundled: bool = True) -> Iterator[tuple[Names, Tensor]]:
        """The parts of the tensors that are here, to be changed in place; of vectors taken together a copy that is
        written back when the next one is asked for.
        """
        for names in self._walked if bundled else self.names:
            if isinstance(names, str):
                yield names, local(tensors[names]).detach()
                continue
            vectors = [tensors[n].detach() for n in names]
            together = torch.cat(vectors)
            yield names, together
            torch._foreach_copy_(vectors, together.split([len(v) for v in vectors]))

    def scale_(self, tensors: Tensors, factors: Mapping[str, Tensor], zero: Tensor | None = None) -> None:
        """Multiply each unit's entries in each tensor by the unit's factor there; an entry of two units gets both.

        Args:
            tensors: changed in place.
            factors: name -> (count,).
            zero: (count,) flagged units are set to 0 after that (also where they are not finite).
        """
        made = {id(f): self._spread_all(_extended(f, 1)) for f in {id(f): f for f in factors.values()}.values()}
        masks = None if zero is None else self._masks(zero)
        for names, tensor in self._changing(tensors, bundled=len(made) == 1):
            name = names if isinstance(names, str) else names[0]
            parts = [part.to(tensor.dtype) for part in made[id(factors[name])](names)]
            hidden = masks(names) if masks else []
            for block in blocks(tensor.shape) if parts else ():
                for part in parts:
                    tensor[block].mul_(_at(part, block))
                for part in hidden:
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
        for names, tensor in self._changing(tensors):
            for part in masks(names):
                _clear_(tensor, part, slice(None))

    def _masks(self, flags: Tensor) -> Callable[[Names], list[Tensor]]:
        """All bits where entries stay, and none where they go, as `_spread_all` has it."""
        # Bits are cleared by an integer operation, which is vectorised where the mask broadcasts; masked_fill_ is not.
        keep = {bits: self._spread_all(_extended(flags.to(bits) - 1, -1)) for bits in set(self._bits.values())}
        return lambda names: keep[self._bits[names if isinstance(names, str) else names[0]]](names)

    def _spread_all(self, extended: Tensor) -> Callable[[Names], list[Tensor]]:
        """`_spread` of a tensor, or of vectors that are taken together; most of it is made with one call."""
        made: dict[Names, Tensor] = {}
        if self._owners is not None:
            parts = extended[self._owners].split([*self._simple.values()])
            made = dict(zip(self._simple, parts, strict=True))

        def spread(names: Names) -> list[Tensor]:
            if names in made:
                if not isinstance(names, str):
                    return [made[names]]
                dim = self._parts[names][0].dim
                return [made[names].view([-1 if d == dim else 1 for d in range(self._dims[names])])]
            return [v for n in _each(names) for v in self._spread(n, extended)]

        return spread

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


def _each(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _taken(tensors: Tensors, names: Names) -> Tensor:
    """The part of a tensor that is here, or vectors one after the other."""
    return local(tensors[names]) if isinstance(names, str) else torch.cat([tensors[n] for n in names])


def _common(numbers: Mapping[str, float | Tensor] | None) -> float | Tensor | None:
    """The number that all tensors have; None where they differ."""
    if numbers is None:
        return 1.0
    first, *others = numbers.values()
    if isinstance(first, Tensor):
        return first if all(n is first for n in others) else None
    return first if all(not isinstance(n, Tensor) and n == first for n in others) else None


def _total(parts: Sequence[Tensor], rate: float | Tensor | None, like: Tensor) -> Tensor | None:
    """What `Units.change_` multiplies values by, as a tensor that broadcasts over ``like``."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        return None
    total = total if rate is None else total * rate
    return total if like.dtype in (total.dtype, *HALF) else total.to(like.dtype)


def _terms(first: int, dims: Mapping[int, Positions], here: Sequence[int]) -> list[_Term]:
    """Inclusion and exclusion over the dims a group, whose units begin with ``first``, cuts in one tensor, of which the
    part ``here`` is that large.
    """
    out = []
    for n in range(1, len(dims) + 1):
        for subset in combinations(dims, n):
            place: NDArray[np.int64] = np.zeros((), dtype=np.int64)
            once: NDArray[np.bool_] = np.ones((), dtype=np.bool_)
            for k, dim in enumerate(subset):
                shape = [-1] + [1] * n
                shape[k + 1] = dims[dim].index.shape[1]
                place = place * here[dim] + dims[dim].index.reshape(shape)
                once = once & dims[dim].once.reshape(shape)
            unit, *_ = np.nonzero(once)
            out.append(_Term(subset, 1 if n % 2 else -1, unit + first, place[once]))
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
