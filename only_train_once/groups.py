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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import overload

import numpy as np
from numpy.typing import NDArray


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


class Kind(str, Enum):
    """What the units of a group are to a reader."""

    CHANNEL = "channel"  # a channel of a convolution, a neuron of a linear layer
    HEAD = "head"  # an attention head (with its query heads, if keys and values are shared)
    HEAD_DIM = "head_dim"  # one position inside every head
    WIDTH = "width"  # a channel of a stream that a layer or RMS norm normalizes


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
    """

    name: str
    kind: Kind
    slices: tuple[ParamSlice, ...]
    prunable: bool = True
    reason: str | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = {s.index.shape[0] for s in self.slices}
        if len(sizes) != 1:
            raise ValueError(f"group {self.name!r}: slices disagree on the number of units: {sorted(sizes)}")
        object.__setattr__(self, "size", sizes.pop())

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
        return f"{self.name}: {self.size} units ({self.kind.value}) in {where}{frozen}"


class GroupList(Sequence[PruningGroup]):
    """An immutable, printable sequence of groups that can also be asked by name."""

    def __init__(self, groups: Sequence[PruningGroup]) -> None:
        self._groups = tuple(groups)
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
            return GroupList(self._groups[key])
        return self._groups[key]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[PruningGroup]:
        return iter(self._groups)

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._groups

    @property
    def prunable(self) -> GroupList:
        """Only the groups whose units may be removed."""
        return GroupList([g for g in self._groups if g.prunable])

    def __str__(self) -> str:
        return "\n".join(str(g) for g in self._groups)

    def __repr__(self) -> str:
        return f"<GroupList of {len(self)} groups, {len(self.prunable)} prunable>"
