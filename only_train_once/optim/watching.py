"""Sizes of what units put out, averaged over the forward passes of a window.

What a unit puts out is looked at where it is read: in the inputs of the modules that own weights that read the unit;
where no module is given it whole, in what the last module that returns it returns. The mean is taken over all entries
of the unit in these tensors, over all forward passes of the window's steps in which gradients are recorded, and over
all processes.

[Note: hooks]
They hang at the modules only from before the window's first forward pass to its last step, and never wait for the
device. A copy of a module brings copies of its hooks along: those are dead, and take themselves away when they are
called. The copy of an optimizer, or one that is loaded, hangs in its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from only_train_once.activations import Sight
from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup, Role
from only_train_once.optim.candidates import Candidates
from only_train_once.sharding import Shares, is_dtensor
from only_train_once.workload import Extent, Workload

_INSTEAD = (
    "use a criterion of weights and gradients, like 'taylor_first_order' (with importance_roles=('zero', 'consumer') "
    "it sees the columns that read a unit, too)"
)


@dataclass(eq=False)
class _View:
    """Which positions of a sight's dim belong to the units of one group.

    Attributes:
        first: number of the group's first unit among the units of all groups.
        numbers: (units,) numbers of the group's units that are there.
        index: (units, positions)
    """

    group: int
    first: int
    numbers: NDArray[np.int64]
    index: Tensor


class _Hook:
    """Called by a module; see [Note: hooks]."""

    def __init__(self, owner: Activations | None, sight: int, given: bool) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._sight, self._given = sight, given

    def __call__(self, module: nn.Module, given: Any, returned: Any = None) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook is self]:
                    del hooks[key]
        elif torch.is_grad_enabled():
            owner.see(self._sight, given if self._given else returned)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None, self._sight, self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._sight, self._given)


class Activations:
    """Mean sizes of activations, ``|a|``, per unit.

    Args:
        candidates: their modules and the workload of their analysis are needed.

    Raises:
        ConfigurationError: the modules or the analysis are not known, or a group can nowhere be seen.
    """

    def __init__(self, candidates: Candidates) -> None:
        workload = None if candidates.analysis is None else candidates.analysis.workload
        if workload is None or not candidates.modules:
            missing = "the groups of find_groups(trace(model, x))" if workload is None else "attach(..., model=model)"
            raise ConfigurationError(
                f"criterion 'activation' looks at what modules are given and return, and {missing} would tell which: "
                f"attach with oto.attach(...), or {_INSTEAD}"
            )
        self.groups = candidates.groups
        found = {group.name: _sights_of(group, workload) for group in self.groups}
        unseen = [name for name, sights in found.items() if not sights]
        if unseen:
            raise ConfigurationError(
                f"criterion 'activation' cannot score {', '.join(unseen[:5])}{', ...' if unseen[5:] else ''}: no "
                f"module is given or returns what these units put out; {_INSTEAD}, or mark these groups unprunable"
            )
        self.sights = tuple(dict.fromkeys(sight for sights in found.values() for sight in sights))
        self.extents = [workload.extents[sight.extent] for sight in self.sights]
        self._wanted = [frozenset(n for n, sights in found.items() if sight in sights) for sight in self.sights]
        unknown = sorted({s.module for s in self.sights} - candidates.modules.keys())
        if unknown:
            raise ConfigurationError(
                f"the model has no module {unknown[0]!r}, which the analysed one had; give the model that was analysed"
            )
        self.modules = {s.module: candidates.modules[s.module] for s in self.sights}
        self.shares: Shares = candidates.shares
        self.device = next(t.device for t in candidates.tensors.values())
        self._starts = np.cumsum([0, *(g.size for g in self.groups)])
        self._handles: list[RemovableHandle] = []
        self.leave(np.ones(int(self._starts[-1]), dtype=np.bool_))
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}  # they hang at the modules of the original

    # -- which positions are whose ---------------------------------------------------------------------------------

    def leave(self, present: NDArray[np.bool_]) -> None:
        """Units have left the network, or none has."""
        self.present = present.copy()
        number = {g.name: n for n, g in enumerate(self.groups)}
        self._views: list[list[_View]] = []
        self._lengths: list[int] = []
        for extent, wanted in zip(self.extents, self._wanted, strict=True):
            gone = np.zeros(extent.length, dtype=np.bool_)
            for name in extent.units.keys() & number.keys():
                there = self._there(number[name])
                units, index = extent.units[name]
                gone[index[~there[units]]] = True
            place = np.cumsum(~gone) - 1
            views = []
            for name in sorted(wanted):
                units, index = extent.units[name]
                stays = ~gone[index]
                order = np.argsort(units[stays], kind="stable")
                numbers = np.flatnonzero(self._there(number[name]))
                table = torch.from_numpy(place[index[stays]][order].reshape(len(numbers), -1))
                views.append(_View(number[name], int(self._starts[number[name]]), numbers, table.to(self.device)))
            self._views.append(views)
            self._lengths.append(int((~gone).sum()))
        self._pending: list[tuple[Tensor, int] | None] = [None] * len(self.sights)

    def _there(self, group: int) -> NDArray[np.bool_]:
        return self.present[self._starts[group] : self._starts[group + 1]]

    # -- a window --------------------------------------------------------------------------------------------------

    def watch(self, on: bool) -> None:
        """Begin a step: hang the hooks in, or take them away; what was seen since the last `take` does not count."""
        self._pending = [None] * len(self.sights)
        if on and not self._handles:
            for number, sight in enumerate(self.sights):
                hook, module = _Hook(self, number, sight.given), self.modules[sight.module]
                hang = module.register_forward_pre_hook if sight.given else module.register_forward_hook
                self._handles.append(hang(hook))
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    @torch.no_grad()
    def see(self, number: int, value: Any) -> None:
        """A module was given, or has returned, something."""
        sight, length = self.sights[number], self._lengths[number]
        tensor = sight.of(value)
        spread = tensor is not None and is_dtensor(tensor)
        shape = () if tensor is None else tuple(tensor.shape)
        if tensor is None or spread or len(shape) != sight.rank or shape[sight.dim] != length:
            raise ConfigurationError(
                f"criterion 'activation' expects that {sight.module!r} {'is given' if sight.given else 'returns'} a "
                f"tensor of {sight.rank} dims with {length} positions in dim {sight.dim}, as in the analysis; this one "
                f"{'is spread over processes' if spread else f'has the shape {shape}'}: {_INSTEAD}"
            )
        rest = [d for d in range(tensor.dim()) if d != sight.dim]
        precise = tensor.dtype if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
        size = torch.linalg.vector_norm(tensor.detach(), 1, dim=rest, dtype=precise) if rest else tensor.detach().abs()
        known = self._pending[number]
        rows = tensor.numel() // length
        self._pending[number] = (size, rows) if known is None else (known[0] + size, known[1] + rows)

    def take(self) -> None:
        """What was seen belongs to the window."""
        self.sums, self.counts = self._with_pending()
        self._pending = [None] * len(self.sights)

    def _with_pending(self) -> tuple[Tensor, list[int]]:
        sums, counts = self.sums.clone(), list(self.counts)
        for views, pending in zip(self._views, self._pending, strict=True):
            if pending is None:
                continue
            size, rows = pending[0].to(self.device, torch.float64), pending[1]
            for view in views:
                at = torch.from_numpy(view.first + view.numbers).to(self.device)
                sums.index_copy_(0, at, sums[at] + size[view.index].sum(1))
                counts[view.group] += rows * view.index.shape[1]
        return sums, counts

    def means(self) -> list[Tensor]:
        """Per group the mean size over the window and what was seen since; 0 for what nothing ran through.

        All processes ask together, and one message adds up all of them.

        Raises:
            ConfigurationError: nothing was seen at all.
        """
        sums, counts = self._with_pending()
        if not any(counts):
            raise ConfigurationError(
                f"criterion 'activation': no forward pass with gradients went through {self.sights[0].module!r} or any "
                f"other module that was to be watched. A compiled model calls no hooks: {_INSTEAD}"
            )
        total = self.shares.total(torch.cat([sums, torch.tensor(counts, dtype=torch.float64, device=self.device)]))
        sums, count = total[: len(sums)], total[len(sums) :].clamp(min=1)
        sizes = [g.size for g in self.groups]
        present = torch.from_numpy(self.present)
        return [
            (s / n)[there.to(s.device)]
            for s, n, there in zip(sums.split(sizes), count, present.split(sizes), strict=True)
        ]

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(int(self._starts[-1]), dtype=torch.float64, device=self.device)
        self.counts = [0] * len(self.groups)
        self._pending = [None] * len(self.sights)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu(), "counts": list(self.counts)}

    def fits(self, state: Any) -> bool:
        """Whether `load_state` can take this."""
        if not isinstance(state, Mapping):
            return False
        sums, counts = state.get("sums"), state.get("counts")
        if not isinstance(sums, Tensor) or sums.shape != self.sums.shape or not sums.is_floating_point():
            return False
        if not isinstance(counts, (list, tuple)) or len(counts) != len(self.counts):
            return False
        return all(type(n) is int and n >= 0 for n in counts)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.sums = state["sums"].to(self.device, torch.float64, copy=True)
        self.counts = list(state["counts"])


def _sights_of(group: PruningGroup, workload: Workload) -> list[Sight]:
    """Where the units of a group are read; if that cannot be seen, where they were returned last."""
    whole: dict[tuple[str, bool, int], list[Sight]] = {}
    for sight in workload.sights:
        if group.name in workload.extents[sight.extent].units:
            whole.setdefault((sight.module, sight.given, sight.position), []).append(sight)
    sights = [s[0] for s in whole.values() if len(s) == 1 and _has_all(group, workload.extents[s[0].extent])]
    readers = {_owner(s.param) for s in group.with_role(Role.CONSUMER)}
    given = [s for s in sights if s.given and s.module in readers]
    return given or [s for s in sights if not s.given][-1:]


def _has_all(group: PruningGroup, extent: Extent) -> bool:
    """Whether every unit of the group is there, each in as many positions."""
    counts = np.bincount(extent.units[group.name][0], minlength=group.size)
    return len(counts) == group.size and counts[0] > 0 and bool((counts == counts[0]).all())


def _owner(param: str) -> str:
    """Path of the module that has a parameter, also where it is computed from others."""
    return param.partition(".parametrizations.")[0] if ".parametrizations." in param else param.rpartition(".")[0]
