"""`SurgeryRecord`: everything surgery does to a model, as data that can be saved.

Reading one back trusts nothing: every entry is checked before it is used, and no array is made before its size is
known to fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, ConfigurationError

Runs: TypeAlias = "tuple[tuple[int, int], ...]"
"""Sorted positions as half-open intervals: (0, 3), (5, 6) are 0, 1, 2, 5."""

RECORD_FORMAT = 1
ATTRIBUTE_PATH = re.compile(
    r"(?:(?P<path>[^\s.\[\]]+(?:\.[^\s.\[\]]+)*)\.)?(?P<name>[A-Za-z_]\w*)(?:\[(?P<place>\d+)\])?"
)
NORM_KINDS = (
    "layer",
    "rms",
    "gated rms",
    "rms of gated",
    "scaled rms",
    "rescale",
    "group",
    "whole groups",
    "response",
)  # see `surgery._NORM_CHANGES`
_LARGEST = 2**53  # sizes beyond it are no sizes; JSON readers would also round them
_FEW = 2**20


def to_runs(positions: Iterable[int]) -> Runs:
    """Positions as sorted half-open intervals.

    Example::

        >>> to_runs([0, 1, 2, 5])
        ((0, 3), (5, 6))
    """
    index = np.unique(np.fromiter(positions, dtype=np.int64))
    if not len(index):
        return ()
    breaks = np.flatnonzero(np.diff(index) != 1)
    starts, stops = index[np.r_[0, breaks + 1]], index[np.r_[breaks, len(index) - 1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def from_runs(runs: Runs) -> NDArray[np.int64]:
    """The positions of ``to_runs``, sorted."""
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in runs] or [np.empty(0, np.int64)])


def count(runs: Runs) -> int:
    return sum(b - a for a, b in runs)


@dataclass(frozen=True)
class TensorCut:
    """What stays of one parameter or buffer.

    Attributes:
        shape: in the full model.
        kept: dim -> positions that stay, for the dims that are cut.
        aliases: the other names of a tied tensor.
        follow: dim -> of the positions that left, those that did not have to be zero for it.
    """

    shape: tuple[int, ...]
    kept: Mapping[int, Runs]
    aliases: tuple[str, ...] = ()
    follow: Mapping[int, Runs] = field(default_factory=dict)

    @property
    def new_shape(self) -> tuple[int, ...]:
        """Shape in the subnet."""
        return tuple(count(self.kept[d]) if d in self.kept else size for d, size in enumerate(self.shape))


@dataclass(frozen=True)
class AttributeChange:
    """An ``int`` of a module before and after."""

    full: int
    kept: int


@dataclass(frozen=True)
class NormChange:
    """How a norm goes on computing with the statistics of its full width, see [Note: full width] in ``norms.py``.

    Attributes:
        kind: a key of `NORM_KINDS`.
        width: channels left (n).
        full_width: channels counted (N); for group norms per norm group.
        dim: position of the channels in the norm's input.
        shape: normalized shape after the cut.
        num_groups: norm groups after the cut, for group norms.
        offset: what the class adds to its weight before use (0, or 1 where it stores ``weight - 1``).
        eps_name: attribute that holds eps, where it has to be read or rewritten.
        eps: its value after the cut; None keeps what is there.
    """

    kind: str
    width: int
    full_width: int
    dim: int
    shape: tuple[int, ...]
    num_groups: int | None = None
    offset: int = 0
    eps_name: str | None = None
    eps: float | None = None


@dataclass(frozen=True)
class SurgeryRecord:
    """Everything surgery does to a model, as data; `surgery.apply_record` does it.

    Attributes:
        tensors: first name -> what stays of it; only tensors that are cut.
        attributes: path -> change.
        norms: module path -> change.
        removed: group name -> units removed.
        sizes: group name -> units the group had.
        versions: of this library and of torch.
    """

    tensors: Mapping[str, TensorCut] = field(default_factory=dict)
    attributes: Mapping[str, AttributeChange] = field(default_factory=dict)
    norms: Mapping[str, NormChange] = field(default_factory=dict)
    removed: Mapping[str, Runs] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def kept(self, name: str) -> dict[int, NDArray[np.int64]]:
        """Dim -> which positions of the full tensor are still there, in order; dims that are whole are left out.

        Example::

            >>> cut = TensorCut((4, 8), {1: ((0, 2), (5, 6))})
            >>> SurgeryRecord(tensors={"fc.weight": cut}).kept("fc.weight")
            {1: array([0, 1, 5])}

        Args:
            name: of a parameter or buffer that lost something, by any of its names; see ``tensors``.
        """
        cuts = {each: cut for first, cut in self.tensors.items() for each in (first, *cut.aliases)}
        return {dim: from_runs(runs) for dim, runs in _looked_up(cuts, name, "tensor").kept.items()}

    def removed_units(self, group: str) -> NDArray[np.int64]:
        """Units of a group that left, by the numbers they had in the full model."""
        return from_runs(_looked_up(self.removed, group, "group"))

    def kept_units(self, group: str) -> NDArray[np.int64]:
        """Units of a group that are still there, by the numbers they had: the first of them is now unit 0."""
        return np.setdiff1d(np.arange(self.sizes[group], dtype=np.int64), self.removed_units(group))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; ``from_dict`` reads them back."""
        return {
            "format": RECORD_FORMAT,
            "tensors": {
                name: {
                    "shape": list(cut.shape),
                    "kept": {str(dim): [list(run) for run in runs] for dim, runs in cut.kept.items()},
                    "aliases": list(cut.aliases),
                    "follow": {str(dim): [list(run) for run in runs] for dim, runs in cut.follow.items()},
                }
                for name, cut in self.tensors.items()
            },
            "attributes": {path: [change.full, change.kept] for path, change in self.attributes.items()},
            "norms": {path: {**vars(norm), "shape": list(norm.shape)} for path, norm in self.norms.items()},
            "removed": {name: [list(run) for run in runs] for name, runs in self.removed.items()},
            "sizes": dict(self.sizes),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: object) -> SurgeryRecord:
        """The record that ``to_dict`` wrote.

        Raises:
            CheckpointError: ``data`` is none; names the entry and the rule it breaks.
        """
        top = _typed(data, dict, "record")
        version = _size(top.get("format"), "record.format", low=1)
        if version > RECORD_FORMAT:
            raise CheckpointError(
                f"the surgery record has format {version}, this library reads up to {RECORD_FORMAT}: update it"
            )
        tensors = {}
        for name, entry in _typed(top.get("tensors"), dict, "record.tensors").items():
            where = f"record.tensors[{name!r}]"
            entry = _typed(entry, dict, where)
            shape = tuple(_size(n, f"{where}.shape") for n in _typed(entry.get("shape"), list, f"{where}.shape"))
            if len(shape) > 64 or math.prod(max(n, 1) for n in shape) > _LARGEST:
                raise CheckpointError(f"{where}.shape is that of no tensor: {str(list(shape))[:100]}")
            kept = _runs_by_dim(entry.get("kept"), shape, f"{where}.kept")
            follow = _runs_by_dim(entry.get("follow", {}), shape, f"{where}.follow")
            tensors[name] = TensorCut(shape, kept, _names(entry.get("aliases"), f"{where}.aliases"), follow)
        attributes = {}
        for path, pair in _typed(top.get("attributes"), dict, "record.attributes").items():
            where = f"record.attributes[{path!r}]"
            if not ATTRIBUTE_PATH.fullmatch(path) or any(part.startswith("__") for part in path.split(".")):
                raise CheckpointError(f"{where} is no path of a public attribute")
            if len(_typed(pair, list, where)) != 2:
                raise CheckpointError(f"{where} is {pair!r}; expected [before, after]")
            full = _size(pair[0], where, low=1)
            attributes[path] = AttributeChange(full, _size(pair[1], where, low=1, high=full))
        norms = {
            path: _norm_change(entry, f"record.norms[{path!r}]")
            for path, entry in _typed(top.get("norms"), dict, "record.norms").items()
        }
        # A group has no more units than what it cuts has places.
        most = max([_FEW, *(n for cut in tensors.values() for n in cut.shape), *(a.full for a in attributes.values())])
        sizes = {
            name: _size(n, f"record.sizes[{name!r}]", high=most)
            for name, n in _typed(top.get("sizes"), dict, "sizes").items()
        }
        removed = {}
        for name, runs in _typed(top.get("removed"), dict, "record.removed").items():
            if name not in sizes:
                raise CheckpointError(f"record.removed[{name!r}]: record.sizes does not know the group")
            removed[name] = _runs(runs, sizes[name], f"record.removed[{name!r}]")
        versions = {str(k): str(v) for k, v in _typed(top.get("versions"), dict, "record.versions").items()}
        return cls(tensors, attributes, norms, removed, sizes, versions)

    def __str__(self) -> str:
        lines = [f"{name}: {count(runs)} of {self.sizes[name]} units removed" for name, runs in self.removed.items()]
        lines += [
            f"{name}: {list(cut.shape)} -> {list(cut.new_shape)}"
            + (f" (also {', '.join(cut.aliases)})" if cut.aliases else "")
            for name, cut in self.tensors.items()
        ]
        lines += [f"{path}: {change.full} -> {change.kept}" for path, change in self.attributes.items()]
        lines += [f"{path}: counts {n.full_width} with {n.width} left ({n.kind})" for path, n in self.norms.items()]
        return "\n".join(lines) or "nothing removed"


def _looked_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        known = ", ".join(list(table)[:5]) or "none"
        raise ConfigurationError(
            f"no {what} {name!r} lost anything; it is whole, or there is none. Those that did: {known}"
        )
    return table[name]


def _typed(value: object, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{where} is a {type(value).__name__}, expected a {kind.__name__}: damaged or foreign")
    return value


def _size(value: object, where: str, low: int = 0, high: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{where} holds {value!r}, expected an integer from {low} to {high}")
    return value


def _names(value: object, where: str) -> tuple[str, ...]:
    return tuple(_typed(name, str, where) for name in _typed(value, list, where))


def _runs_by_dim(value: object, shape: tuple[int, ...], where: str) -> dict[int, Runs]:
    found = {}
    for dim, runs in _typed(value, dict, where).items():
        if dim not in {str(d) for d in range(len(shape))}:
            raise CheckpointError(f"{where}[{dim!r}]: the tensor has dims 0 to {len(shape) - 1}")
        found[int(dim)] = _runs(runs, shape[int(dim)], f"{where}[{dim!r}]")
    return found


def _runs(value: object, size: int, where: str) -> Runs:
    """Intervals inside ``range(size)``, sorted and apart; no array is made before they are known to fit."""
    out: list[tuple[int, int]] = []
    end = 0
    for run in _typed(value, list, where):
        if not isinstance(run, list) or len(run) != 2:
            raise CheckpointError(f"{where} holds {run!r}, expected [start, stop]")
        start, stop = _size(run[0], where), _size(run[1], where)
        if not end <= start < stop:
            raise CheckpointError(f"{where}: the run {run} overlaps the one before it, is unsorted or empty")
        if stop > size:
            raise CheckpointError(f"{where}: the run {run} is out of range, the size is {size}")
        out.append((start, stop))
        end = stop
    if not out:
        raise CheckpointError(f"{where} is empty")
    return tuple(out)


def _norm_change(entry: object, where: str) -> NormChange:
    data = _typed(entry, dict, where)
    missing = set(NormChange.__dataclass_fields__) ^ set(data)
    if missing:
        raise CheckpointError(f"{where}: entries {sorted(missing)} are missing or unknown")
    if data["kind"] not in NORM_KINDS:
        raise CheckpointError(f"{where}.kind is {data['kind']!r}, expected one of {sorted(NORM_KINDS)}")
    eps, eps_name, groups = data["eps"], data["eps_name"], data["num_groups"]
    if eps is not None and not (isinstance(eps, float) and math.isfinite(eps) and eps >= 0):
        raise CheckpointError(f"{where}.eps is {eps!r}, expected a finite number that is not negative")
    if eps_name is not None and not (isinstance(eps_name, str) and eps_name.isidentifier() and "__" not in eps_name):
        raise CheckpointError(f"{where}.eps_name is {eps_name!r}, expected an attribute's name")
    dim = data["dim"]
    if isinstance(dim, bool) or not isinstance(dim, int) or not -8 <= dim <= 8:
        raise CheckpointError(f"{where}.dim is {dim!r}, expected a dim")
    return NormChange(
        kind=data["kind"],
        width=_size(data["width"], f"{where}.width", low=1),
        full_width=_size(data["full_width"], f"{where}.full_width", low=1),
        dim=dim,
        shape=tuple(_size(n, f"{where}.shape", low=1) for n in _typed(data["shape"], list, f"{where}.shape")),
        num_groups=None if groups is None else _size(groups, f"{where}.num_groups", low=1),
        offset=_size(data["offset"], f"{where}.offset", high=1),
        eps_name=eps_name,
        eps=eps,
    )
