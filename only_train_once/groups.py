"""`ParamSlice` and `PruningGroup`: the one value that analysis hands to everything else.

[Note: roles]
A unit is removed by cutting the positions that its slices name. What must hold for the cut to be exact:

- ``zero``       parameter entries that must be 0 for the unit to contribute nothing.
- ``follow``     entries that leave with the unit and need not be 0 (running statistics, query and key
                 rows of a head whose value rows are 0). Buffers are always ``follow``.
- ``consumer``   columns that read the unit downstream. They multiply zeros, so any value is exact, but
                 when they are 0 as well the unit's gradients vanish and it stays at zero by itself.
- ``attribute``  no tensor: an ``int`` of a module (``blocks.0.attn.num_heads``) that counts these
                 positions, written as a virtual tensor with that many positions in dim 0.
- ``norm``       no tensor: a normalization module whose statistics run over these positions and which
                 has to remember the full count (``surgery.py`` says how); also a virtual tensor.

Counts are never additive by assumption: several groups may cut the same dim (heads and head-dims do).
What is left of a dim is what no group removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from .axes import Axes, analyse
from .collector import few_collections
from .errors import ConfigurationError
from .graph import Graph, ValueKind
from .labels import Kind, Solution, kinds_of
from .multiples import leave_in_multiples
from .workload import Later, Workload


class Role(str, Enum):
    """What a slice is to its unit, see [Note: roles]."""

    ZERO = "zero"
    FOLLOW = "follow"
    CONSUMER = "consumer"
    ATTRIBUTE = "attribute"
    NORM = "norm"

    @property
    def is_tensor(self) -> bool:
        """Whether the slice cuts a parameter or a buffer (and not an attribute or a norm's count)."""
        return self not in (Role.ATTRIBUTE, Role.NORM)


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """The positions of every unit of a group in one dim of one tensor.

    Attributes:
        param: name of a parameter or buffer as ``named_parameters`` / ``named_buffers`` gives it (the first
            name of a tied tensor); for ``attribute`` the attribute's path, ``"attn.num_heads"`` or
            ``"attn.sizes[1]"``; for ``norm`` the path of the normalization module.
        dim: position in the tensor's shape.
        index: (units, positions per unit) int64; row ``u`` holds unit ``u``'s positions in ``dim``.
        role: see [Note: roles].
        length: size of ``dim`` in the full tensor.
        pinned: whether the entries get a gradient though the unit is at zero (layer norm statistics, a
            non-zero constant behind the unit), so that an optimizer has to hold them at zero.
    """

    param: str
    dim: int
    index: NDArray[np.int64]
    role: Role
    length: int
    pinned: bool = False

    def __str__(self) -> str:
        where = f"{self.param}[{self.dim}]" if self.role.is_tensor else self.param
        width = self.index.shape[1]
        return f"{where} ({self.role.value}{f', {width} per unit' if width > 1 else ''})"


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the units of a group come from that lost some of them.

    Attributes:
        group: as it was found.
        numbers: (units,) of the units that are left, their numbers there.
        shapes: name -> shape of the group's tensors at that time.
    """

    group: PruningGroup
    numbers: NDArray[np.int64]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class PruningGroup:
    """Units that share one set of slices; any subset of them can be removed.

    Example, with its printed form::

        >>> import numpy as np
        >>> rows = np.arange(3)[:, None]
        >>> print(PruningGroup("fc1", Kind.CHANNEL, (
        ...     ParamSlice("fc1.weight", 0, rows, Role.ZERO, 3),
        ...     ParamSlice("fc1.bias", 0, rows, Role.ZERO, 3),
        ...     ParamSlice("fc2.weight", 1, rows, Role.CONSUMER, 3))))
        fc1: 3 units (channel) in fc1.weight[0], fc1.bias[0], fc2.weight[1]

    Attributes:
        name: stable, unique, readable; the module that produces the units.
        kind: what one unit is.
        slices: where the units live.
        prunable: whether units may be removed.
        reason: why not, when not prunable: names module and operator.
        multiple: units leave in multiples of this, because an operator wants rows of such a length.
        origin: what the group was before units of it left the network for good, if some did.
    """

    name: str
    kind: Kind
    slices: tuple[ParamSlice, ...]
    prunable: bool = True
    reason: str | None = None
    multiple: int = 1
    origin: Origin | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = {s.index.shape[0] for s in self.slices}
        if len(sizes) != 1:
            raise ValueError(f"group {self.name!r}: slices disagree on the number of units: {sorted(sizes)}")
        if self.multiple < 1:
            raise ValueError(
                f"group {self.name!r}: units leave in multiples of {self.multiple}; the rule is at least 1"
            )
        object.__setattr__(self, "size", sizes.pop())

    @property
    def most(self) -> int:
        """The largest number of units that may leave: one stays."""
        return (self.size - 1) // self.multiple * self.multiple

    def with_role(self, *roles: Role) -> tuple[ParamSlice, ...]:
        """The slices that have one of ``roles``."""
        return tuple(s for s in self.slices if s.role in roles)

    @property
    def pinned(self) -> bool:
        """Whether some slice has to be held at zero after its unit was removed."""
        return any(s.pinned for s in self.slices)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the tensors the group cuts, in order, each once."""
        return tuple(dict.fromkeys(s.param for s in self.slices if s.role.is_tensor))

    def __str__(self) -> str:
        where = ", ".join(f"{s.param}[{s.dim}]" for s in self.slices if s.role.is_tensor)
        frozen = "" if self.prunable else f" [frozen: {self.reason}]"
        multiple = f", in multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.name}: {self.size} units ({self.kind.value}{multiple}) in {where}{frozen}"


class GroupList(Sequence[PruningGroup]):
    """An immutable, printable sequence of groups that can also be asked by name."""

    def __init__(self, groups: Sequence[PruningGroup], workload: Later | None = None) -> None:
        self._groups = tuple(groups)
        self._workload = workload
        self._by_name = {g.name: g for g in self._groups}
        if len(self._by_name) != len(self._groups):
            seen: set[str] = set()
            twice = sorted({g.name for g in self._groups if g.name in seen or seen.add(g.name)})  # type: ignore[func-returns-value]
            raise ValueError(f"group names must be unique, these occur twice: {twice}")

    @overload
    def __getitem__(self, key: int) -> PruningGroup: ...
    @overload
    def __getitem__(self, key: slice) -> GroupList: ...
    @overload
    def __getitem__(self, key: str) -> PruningGroup: ...
    def __getitem__(self, key: int | slice | str) -> PruningGroup | GroupList:
        if isinstance(key, str):
            return self._by_name[key]
        if isinstance(key, slice):
            return self.of(self._groups[key])
        return self._groups[key]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[PruningGroup]:
        return iter(self._groups)

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._groups

    @property
    def workload(self) -> Workload | None:
        """What a forward pass takes, as a function of the units; None where that is not known (groups by hand)."""
        return None if self._workload is None else self._workload.get()

    def of(self, groups: Sequence[PruningGroup]) -> GroupList:
        """Other groups of the same analysis: some of these, or these with another word on whether they are prunable."""
        return GroupList(groups, self._workload)

    @property
    def prunable(self) -> GroupList:
        """Only the groups whose units may be removed."""
        return self.of([g for g in self._groups if g.prunable])

    def __str__(self) -> str:
        return "\n".join(str(g) for g in self._groups)

    def __repr__(self) -> str:
        return f"<GroupList of {len(self)} groups, {len(self.prunable)} prunable>"


# ---------------------------------------------------------------- from axes to groups


@few_collections()
def find_groups(
    graph: Graph,
    *,
    wide: bool = False,
    strict_outputs: bool = False,
    skip_operators: Collection[str] = (),
    skip_nodes: Collection[int] = (),
) -> GroupList:
    """Find the groups of a traced model.

    Args:
        graph: from `trace`.
        wide: offer the width of normalized residual streams and the positions inside attention heads too. Off by
            default: channels, neurons and heads are what shrinks a model without touching what every layer shares.
        strict_outputs: only outputs that no operator reads again count as outputs; others may shrink.
        skip_operators: operators (``"aten.add"`` or ``"add"``) that are to be treated as unknown.
        skip_nodes: indices of nodes that are to be treated as unknown.

    Returns:
        prunable groups and frozen ones (with reasons), in network order.
    """
    if not isinstance(graph, Graph):
        raise ConfigurationError(f"graph is a {type(graph).__name__}: give what trace(model, inputs) returns")
    # Operators are asked by running them on a few numbers, which ``with torch.device("meta")`` would take away.
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere else nullcontext():
        axes = analyse(
            graph, wide=wide, strict_outputs=strict_outputs, skip_operators=skip_operators, skip_nodes=skip_nodes
        )
    prunable, units = _prunable_groups(axes)
    return GroupList(prunable + _frozen_groups(axes), Later(axes, units))


_Places = list[tuple[str, int, Role, NDArray[np.int64]]]  # name, dim, role, ids


def _places(axes: Axes) -> _Places:
    """Every dim that carries ids, with its role, in network order."""
    places: _Places = []
    graph = axes.graph
    for (name, dim), ids in axes.tensors.items():
        role = Role.FOLLOW
        if (name, dim) in axes.zero:
            role = Role.ZERO
        elif (name, dim) in axes.consumers:
            role = Role.CONSUMER
        places.append((name, dim, role, ids))
    order = {name: position for position, name in enumerate(graph.tensors)}
    places.sort(key=lambda place: (order[place[0]], place[1]))
    places += [(name, 0, Role.ATTRIBUTE, ids) for name, ids in axes.attributes.items()]
    seen: set[tuple[str, int]] = set()
    for site in axes.norms:
        if (site.module, site.dim) not in seen:
            seen.add((site.module, site.dim))
            places.append((site.module, site.dim, Role.NORM, site.ids))
    return places


def _prunable_groups(axes: Axes) -> tuple[list[PruningGroup], dict[str, NDArray[np.int64]]]:
    """The groups, and the classes of the units of each by its name."""
    solution = axes.solution
    places = _places(axes)
    free = np.zeros(len(solution.frozen), dtype=bool)
    free[np.unique(solution.members.indices)] = True
    free &= ~solution.frozen
    leaking = np.zeros(len(solution.frozen), dtype=bool)
    if len(axes.leaks):
        leaking[solution.removed_by(axes.leaks)[0]] = True
    kind = _kinds(solution)

    # (unit, place, position) for everything a unit removes
    sizes = [len(ids) for _, _, _, ids in places]
    removed, entries = solution.removed_by(np.concatenate([ids for _, _, _, ids in places] or [np.empty(0, np.int64)]))
    keep = free[removed]
    if not keep.any():
        return [], {}
    units, entries = removed[keep], entries[keep]
    at = np.repeat(np.arange(len(places)), sizes)[entries]
    positions = entries - np.repeat(np.cumsum(sizes) - sizes, sizes)[entries]
    order = np.argsort(units, kind="stable")  # places and positions are in order already
    units, at, positions = units[order], at[order], positions[order]
    starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    lengths = np.diff(np.r_[starts, len(units)])
    first_units = units[starts]
    alike = _alike(at, starts, lengths, kind[first_units], leaking[first_units], _factor_axes(solution)[first_units])
    multiples = leave_in_multiples(solution, axes.multiples, [first_units[members] for members in alike])
    groups: list[tuple[tuple[int, int], PruningGroup]] = []
    classes: dict[str, NDArray[np.int64]] = {}
    names: dict[str, int] = {}
    firsts = [members[np.argmin(positions[starts[members]])] for members in alike]
    for number in sorted(range(len(alike)), key=lambda n: (at[starts[firsts[n]]], positions[starts[firsts[n]]])):
        members = alike[number]
        members = members[np.argsort(positions[starts[members]], kind="stable")]
        start, length = int(starts[members[0]]), int(lengths[members[0]])
        unit = int(units[start])
        table = positions[starts[members][:, None] + np.arange(length)]
        columns = at[start : start + length]
        pinned = bool(leaking[unit])
        slices = []
        for place in np.unique(columns):
            name, dim, role, ids = places[place]
            slices.append(
                ParamSlice(
                    name,
                    dim,
                    np.ascontiguousarray(table[:, columns == place]),
                    role,
                    len(ids),
                    pinned=pinned and role is Role.ZERO,
                )
            )
        if not any(s.role is Role.ZERO for s in slices):
            continue  # nothing that could be driven to zero: only buffers or attributes
        name = _group_name(axes.graph, slices, list(Kind)[kind[unit]])
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        multiple = multiples[number]
        why = _all_stay(len(members), multiple)
        group = PruningGroup(name, list(Kind)[kind[unit]], tuple(slices), why is None, why, multiple or 1)
        groups.append(((int(at[start]), int(positions[start])), group))
        classes[name] = first_units[members]
    return [group for _, group in groups], classes


def _all_stay(size: int, multiple: int | None) -> str | None:
    """Why no number of units of a group may leave, if so."""
    if multiple is None:
        return "its units lie unevenly in rows whose length has to be a multiple of a number"
    if size == 1:
        return "is a single unit, and one unit has to stay"
    if size <= multiple:
        return f"units leave in multiples of {multiple}, there are {size}, and one unit has to stay"
    return None


def _alike(
    at: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], *features: NDArray[np.generic]
) -> list[NDArray[np.int64]]:
    """Units with the same footprint (places and positions per place) and features, as indices into ``starts``.

    Footprints are sums of random numbers, two of 63 bits per place, and then compared in full: two that differ
    and collide would be an error, never a wrong group.
    """
    random = np.random.default_rng(0).integers(0, 2**62, (2, int(at.max()) + 1), dtype=np.int64)
    sums = [np.add.reduceat(numbers[at], starts) for numbers in random]  # wraps around, which is fine
    order = np.lexsort((*features, lengths, *sums))
    keys = [key[order] for key in (*features, lengths, *sums)]
    borders = np.flatnonzero(np.r_[True, np.any([key[1:] != key[:-1] for key in keys], axis=0)])
    found = [np.sort(members) for members in np.split(order, borders[1:])]
    for members in found:
        rows = starts[members][:, None] + np.arange(lengths[members[0]])
        if not (at[rows] == at[rows[0]]).all():
            raise RuntimeError("two footprints share their sums; this is a bug of only_train_once")
    return found


def _kinds(solution: Solution) -> NDArray[np.int64]:
    """(units,) index into ``list(Kind)``."""
    kind = np.zeros(len(solution.frozen), dtype=np.int64)
    for found, flags in kinds_of(solution).items():
        kind[flags] = list(Kind).index(found)
    return kind


def _factor_axes(solution: Solution) -> NDArray[np.int64]:
    """(units,) at which places of products a class is a factor, as bits.

    Heads and head-dims differ though they meet the same tensors.
    """
    axes = np.zeros(len(solution.frozen), dtype=np.int64)
    for product in solution.products:
        for axis, factor in enumerate(product.factors):
            axes[factor] |= 1 << axis
    return axes


_SUFFIX = {
    Kind.CHANNEL: "",
    Kind.HEAD: ":heads",
    Kind.HEAD_DIM: ":head_dim",
    Kind.EXPERT: ":experts",
    Kind.WIDTH: ":width",
}


def _group_name(graph: Graph, slices: Sequence[ParamSlice], kind: Kind) -> str:
    """The module that produces the units: the owner of the first tensor that has to be zero."""
    first = next(s for s in slices if s.role is Role.ZERO)
    owner = first.param.rpartition(".")[0] or first.param
    owner = owner.removesuffix(".parametrizations.weight")
    return f"{owner}{_SUFFIX[kind]}"


def _frozen_groups(axes: Axes) -> list[PruningGroup]:
    """What cannot be removed and why: one group for all the parameter dims that share the axis."""
    solution, kinds = axes.solution, _kinds(axes.solution)
    found: dict[tuple[bytes, int], list[ParamSlice]] = {}
    kind_of: dict[tuple[bytes, int], Kind] = {}
    for name, dim, role, ids in _places(axes):
        if not role.is_tensor or axes.graph.values[axes.graph.tensors[name]].kind is not ValueKind.PARAMETER:
            continue
        classes = solution.of_id[ids]
        stuck = solution.frozen[classes]
        if not stuck.any():
            continue
        reasons = solution.reason[classes[stuck]]
        for reason in reasons[:1] if (reasons == reasons[0]).all() else np.unique(reasons):
            positions = np.flatnonzero(stuck & (solution.reason[classes] == reason))
            key = (classes[positions].tobytes(), int(reason))
            kind_of.setdefault(key, list(Kind)[int(kinds[classes[positions[0]]])])
            found.setdefault(key, []).append(ParamSlice(name, dim, positions[:, None], role, len(ids)))
    groups: list[PruningGroup] = []
    names: dict[str, int] = {}
    for (key, slices), kind in zip(found.items(), kind_of.values(), strict=True):
        made = [s for s in slices if s.role is Role.ZERO or (s.role is Role.FOLLOW and _makes(axes.graph, s))]
        if not made:
            continue  # only read, or inside of a kernel: no layer of this network makes the axis
        first = made[0]
        label = f"{first.param}[{first.dim}]"
        names[label] = names.get(label, 0) + 1
        label = label if names[label] == 1 else f"{label}#{names[label]}"
        text = solution.reasons[key[1]] if key[1] >= 0 else "is fixed"
        groups.append(PruningGroup(label, kind, tuple(slices), False, text))
    return groups


def _makes(graph: Graph, s: ParamSlice) -> bool:
    """Whether a layer could make the axis with this dim: the last dims of a larger weight are those of a kernel."""
    return s.dim == 0 or len(graph.values[graph.tensors[s.param]].shape) <= 2
