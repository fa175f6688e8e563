"""`LiveCuts`: units leave a network while it trains, so that training itself gets cheaper.

[Note: what stays the same]
A cut changes the user's model itself. Its parameters and buffers stay the objects they are and get smaller, with
their gradients and the optimizer's state of them, so the model, the optimizer, its schedulers and whoever else holds
them go on. Only units that are settled leave (at zero for good, with the columns that read them), so the rest trains
as it would have; norms over a cut width go on counting the full one (``norms.py``) and are never rescaled.

[Note: what is checked]
Each cut is first made on a copy and compared with the model (``exact.py``). A group that cannot be cut exactly keeps
its units, at zero, and is named in a warning. Then the same record is applied to the model. Everything that could
refuse, the optimizer's state for one, is asked before anything is changed.

[Note: the full network]
It can be had back (`LiveCuts.full_model`) with zeros where units left, and what only left with them (running
statistics, query and key rows) as it was then. So the subnet is constructed, compared and recorded against the
network that the constructor builds, however many cuts it took to get there.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .copying import copy_module
from .errors import CheckpointError, ConfigurationError, SurgeryError, VerificationError
from .exact import Attempt
from .groups import GroupList, Origin, ParamSlice, PruningGroup, Role
from .inputs import dtype_of, inputs_for
from .masking import regions, zero_units
from .optim.base import AttachedOptimizer, Cutter, PendingCut
from .optim.cutting import refuse_uncuttable, state_cuts
from .optim.scoring import split, units_by_group
from .record import SurgeryRecord, from_runs
from .surgery import (
    apply_record,
    check_fits,
    compute_weight,
    layout_of,
    named_tensors,
    plan,
    removed_positions,
    set_attribute,
    slice_key,
    ties,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutEvent:
    """What has just left a network.

    Attributes:
        step: optimizer steps taken.
        removed: group name -> units that left now, by the numbers that they always had.
        shapes: tensor -> its shape before and after.
        record: all that was done to the model as it was before, see `SurgeryRecord` (which numbers units by the groups
            as they were just before).
        model: the module that was cut.
    """

    step: int
    removed: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    record: SurgeryRecord
    model: nn.Module

    def __str__(self) -> str:
        units = ", ".join(f"{len(units)} of {name}" for name, units in self.removed.items())
        return f"step {self.step}: {units} left; {len(self.shapes)} tensors are smaller"


class LiveCuts(Cutter):
    """The cuts made in one model.

    Args:
        model: cut in place.
        groups: as they were found in it.
        inputs: example inputs, for the comparison.
        other_outputs_may_shrink: see `verify_subnet`.

    Attributes:
        full_groups: the groups as they were found.
        groups: those of the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: GroupList,
        inputs: Any,
        *,
        other_outputs_may_shrink: bool = False,
    ) -> None:
        self.model, self.groups, self.full_groups = model, groups, groups
        self.inputs, self.dtype = inputs, dtype_of(model)
        self.other_outputs_may_shrink = other_outputs_may_shrink
        self._history = _History()
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._others: list[weakref.ref[nn.Module]] = []
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # What was to be cut along belongs to the original, not to a copy of it.
        return {**vars(self), "_optimizers": [], "_others": []}

    @property
    def cut(self) -> bool:
        """Whether any unit has left."""
        return bool(self._history.kept)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are told when units leave."""
        return _alive(self._optimizers)

    # -- who is cut ------------------------------------------------------------------------------------------------

    def attach(self, optimizer: AttachedOptimizer, by_itself: bool) -> None:
        """Make an optimizer's settled units leave, at the end of every period or only when told to."""
        refuse_uncuttable(optimizer, optimizer._method.tensors)
        optimizer._cutter, optimizer._cuts_by_itself = self, by_itself
        self.also(optimizer)

    def also(self, *others: object) -> None:
        """Cut these along whenever units leave; they are not kept alive.

        Copies of the model (averaged weights, plain or as `AveragedModel`) lose the same units. A wrapper around the
        model itself that keeps sizes of gradients (`DistributedDataParallel`) is rebuilt in place; those that torch
        knows of are found without being named. Other optimizers over the same parameters lose the same state.
        """
        for other in others:
            if isinstance(other, Optimizer):
                refuse_uncuttable(other, {})
                self._check_groups(other)
                self._optimizers.append(weakref.ref(other))
            elif isinstance(other, nn.Module):
                self._others.append(weakref.ref(other))
            else:
                raise ConfigurationError(
                    f"cut_also was given a {type(other).__name__}; it takes modules and optimizers. For anything else "
                    "register_cut_hook(function) calls you"
                )

    def _check_groups(self, optimizer: Optimizer) -> None:
        for group in optimizer._method.groups if isinstance(optimizer, AttachedOptimizer) else ():
            if group.name not in self.groups or self.groups[group.name].size != group.size:
                raise ConfigurationError(
                    f"the method attached to this {type(optimizer).__name__} has another group {group.name!r} than the "
                    "one whose units leave: attach both with the same OTO object"
                )

    # -- cutting ---------------------------------------------------------------------------------------------------

    def leave(self, optimizer: AttachedOptimizer, verify: bool = True) -> CutEvent | None:
        """Cut the units of this optimizer that are settled; returns what was done, None if nothing was.

        Raises:
            ConfigurationError: an optimizer's state cannot be cut, or a parameter is no plain tensor.
            SurgeryError: a module that is to be cut along is no copy of the model. Nothing was changed then.
        """
        wanted = self._settled(optimizer)
        if not wanted:
            return None
        inputs = inputs_for(self.model, self.inputs, self.dtype)
        attempt = Attempt(
            self.model, self.groups, inputs, wanted, verify, self.other_outputs_may_shrink, rescale_norms=False
        )
        try:
            kept, excluded = attempt.largest_exact(list(wanted), [])
            if not kept:
                attempt.largest_exact([], [])  # when even the uncut copy differs, say that instead
        except VerificationError as error:
            logger.warning("no unit leaves at step %d: %s", optimizer._method.step, error)
            return None
        for name in excluded:
            if name not in self._reported:
                logger.warning("units of group %s stay, at zero: %s", name, attempt.reasons[name])
            self._reported.add(name)
        if not kept:
            return None
        _, record, _ = attempt.built(kept)
        return self._prepared(optimizer, record)()

    def _settled(self, optimizer: AttachedOptimizer) -> dict[str, list[int]]:
        """Group -> units that can leave now, by their present numbers."""
        method = optimizer._method
        settled = units_by_group((method.settled & method.present)[method.present], method.current)
        zero = zero_units(method.current, method.tensors)
        out = {}
        for group in method.current:
            units = np.intersect1d(settled[group.name], zero.get(group.name, []))
            units = units[: min(len(units) // group.multiple * group.multiple, group.most)]
            if len(units):
                out[group.name] = units.tolist()
        return out

    def prepare(self, optimizer: AttachedOptimizer, absent: NDArray[np.bool_]) -> PendingCut:
        method = optimizer._method
        removed = {}
        for group, now, gone in zip(method.groups, method.current, split(absent, method.groups), strict=True):
            units = np.flatnonzero(np.isin(_numbers(now), _numbers(group)[gone]))
            if len(units):
                removed[group.name] = units.tolist()
        try:
            record = plan(self.model, self.groups, removed, rescale_norms=False)
            if {n: from_runs(r).tolist() for n, r in record.removed.items()} != removed:
                raise SurgeryError("they would leave some tensor empty")
            perform = self._prepared(optimizer, record)
        except SurgeryError as error:
            raise CheckpointError(
                f"the saved state says that units {str(removed)[:200]} have left the network, but they cannot leave "
                f"this one: {error}"
            ) from error
        return PendingCut({name: cut.new_shape for name, cut in record.tensors.items()}, perform)

    def _prepared(self, optimizer: AttachedOptimizer, record: SurgeryRecord) -> Callable[[], CutEvent]:
        """Everything checked, ready to be done."""
        tensors = _first_tensors(self.model)
        cut_tensors = {name: tensors[name] for name in record.tensors}
        kept = {name: {d: from_runs(runs) for d, runs in cut.kept.items()} for name, cut in record.tensors.items()}
        left = {name: from_runs(runs) for name, runs in record.removed.items()}
        optimizers = _alive([*self._optimizers, weakref.ref(optimizer)])
        copies, wrappers = self._modules()
        check_fits(record, self.model)
        for module in copies:
            check_fits(record, module)
        groups = self._groups_without(left)
        actions: list[Callable[[], object]] = []
        for each in optimizers:
            if each is not optimizer and isinstance(each, AttachedOptimizer) and not each._method.follows:
                raise ConfigurationError(
                    f"units settled by one optimizer cannot leave while {each._method.name!r}, attached to another, is "
                    "at work: cut with oto.compact(optimizer) when both have finished. Nothing was changed"
                )
            refuse_uncuttable(each, cut_tensors)
            actions += state_cuts(each, tensors, kept)
        for wrapper in wrappers:
            _check_rebuildable(wrapper)

        def perform() -> CutEvent:
            before = {g.name: _numbers(g) for g in self.groups}
            self._history.note(self.model, record, self._follow())
            with self._history.watching(self.model):
                apply_record(record, self.model, same_tensors=True)
            for module in copies:
                apply_record(record, module, same_tensors=True)
            for action in actions:
                action()
            torch.clear_autocast_cache()  # it knows weights by the objects that they are
            self.groups = groups
            for each in optimizers:
                if isinstance(each, AttachedOptimizer):
                    self._tell(each, kept)
            for wrapper in wrappers:
                _rebuild(wrapper)
            event = CutEvent(
                optimizer._method.step,
                {name: tuple(before[name][units].tolist()) for name, units in left.items()},
                {name: (cut.shape, cut.new_shape) for name, cut in record.tensors.items()},
                record,
                self.model,
            )
            logger.info("%s", event)
            for hook in list(optimizer._cut_hooks.values()):
                hook(event)
            return event

        return perform

    def _tell(self, optimizer: AttachedOptimizer, kept: Any) -> None:
        method = optimizer._method
        present = []
        for group in method.groups:
            present.append(np.isin(_numbers(group), _numbers(self.groups[group.name])))
        method.leave([self.groups[g.name] for g in method.groups], np.concatenate(present), kept)

    def _follow(self) -> set[str]:
        """Tensors with values that need not be zero when their units leave."""
        return {s.param for g in self.groups for s in g.with_role(Role.FOLLOW)}

    def _groups_without(self, left: Mapping[str, NDArray[np.int64]]) -> GroupList:
        """The groups when these units, by their present numbers, have left."""
        tensors = named_tensors(self.model)
        first, _ = ties(tensors)
        gone = removed_positions({g.name: g for g in self.groups}, left, first)
        shapes = {**{name: tuple(t.shape) for name, t in tensors.items()}, **self._history.shapes}
        return GroupList([self._without(group, left.get(group.name), gone, first, shapes) for group in self.groups])

    def _without(
        self,
        group: PruningGroup,
        units: NDArray[np.int64] | None,
        gone: Mapping[Any, NDArray[np.bool_]],
        first: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> PruningGroup:
        touched = {name for _, name, _ in gone}
        if not any(first.get(s.param, s.param) in touched for s in group.slices):
            return group
        numbers = np.delete(np.arange(group.size), [] if units is None else units)
        slices = []
        for s in group.slices:
            mask = gone.get(slice_key(s, first))
            index = s.index[numbers]
            if mask is None:
                slices.append(replace(s, index=index))
                continue
            stays = ~mask[index]
            if len(set(stays.sum(axis=1).tolist())) > 1:  # another group took more of one unit than of another
                raise SurgeryError(f"the units of {group.name!r} would be of different sizes in {s}")
            renumbered = np.cumsum(~mask) - 1
            index = renumbered[index[stays]].reshape(len(numbers), -1)
            if index.size:
                slices.append(ParamSlice(s.param, s.dim, index, s.role, int((~mask).sum()), s.pinned))
        full = group if group.origin is None else group.origin.group
        origin = Origin(full, _numbers(group)[numbers], {name: shapes[name] for name in full.params})
        return replace(group, slices=tuple(slices), origin=origin)

    def _modules(self) -> tuple[list[nn.Module], list[DistributedDataParallel]]:
        """Copies of the model, and wrappers around it that have to be rebuilt."""
        copies: dict[int, nn.Module] = {}
        wrappers = {id(w): w for w in _wrappers_of(self.model)}
        for other in _alive(self._others):
            if isinstance(other, DistributedDataParallel):
                wrappers[id(other)] = other
            inner = other
            while isinstance(inner, _WRAPPERS) and isinstance(inner.module, nn.Module):
                inner = inner.module
            inner = getattr(inner, "_orig_mod", inner)  # torch.compile's
            if inner is not self.model:
                copies[id(inner)] = inner
        return list(copies.values()), list(wrappers.values())

    # -- the full network ------------------------------------------------------------------------------------------

    def full_model(self) -> nn.Module:
        """A copy of the model with all units back, those that left at zero; see [Note: the full network]."""
        full = self._history.undone(self.model)
        tensors = _first_tensors(full)
        absent = {g.name: np.setdiff1d(np.arange(g.size), _numbers(self.groups[g.name])) for g in self.full_groups}
        with torch.no_grad():
            # What left with one unit may be what another has to have at zero, a direction and a column for one.
            for region in regions(self.full_groups, absent, tensors, (Role.ZERO, Role.CONSUMER)):
                region.zero_(tensors[region.name])
        return full


_MISSING = object()
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass
class _Before:
    """A module as it was before a cut changed it: its class, the attributes and the parameters that changed."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]


@dataclass(frozen=True)
class _Lost:
    """Values that left: of one tensor, at these positions of every dim of the full one."""

    name: str
    positions: tuple[NDArray[np.int64], ...]
    values: Tensor


@dataclass
class _History:
    """What is needed to put everything back.

    Attributes:
        shapes: tensor -> its full shape, of those that were cut.
        kept: tensor -> per dim the positions of the full tensor that are left.
        lost: values that need not be zero, see `_Lost`.
        attributes: path -> what it was, of what the records changed.
        modules: path -> what it was, of all that changed with that.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)
    lost: list[_Lost] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)
    modules: dict[str, _Before] = field(default_factory=dict)

    def note(self, model: nn.Module, record: SurgeryRecord, follow: set[str]) -> None:
        """Keep what the record is about to take away."""
        tensors = named_tensors(model)
        for name, cut in record.tensors.items():
            tensor = tensors[name].detach()
            self.shapes.setdefault(name, cut.shape)
            own = self.kept.setdefault(name, [np.arange(n, dtype=np.int64) for n in cut.shape])
            for dim, runs in cut.kept.items():
                stays = from_runs(runs)
                leaves = np.delete(np.arange(cut.shape[dim]), stays)
                if name in follow:
                    values = tensor.index_select(dim, torch.from_numpy(leaves).to(tensor.device))
                    positions = [own[d][leaves] if d == dim else own[d] for d in range(len(own))]
                    self.lost.append(_Lost(name, tuple(positions), values))
            for dim, runs in cut.kept.items():
                own[dim] = own[dim][from_runs(runs)]
        for path, change in record.attributes.items():
            self.attributes.setdefault(path, change.full)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep what the block changes in modules, tensors apart."""
        before = {p: (type(m), dict(vars(m)), dict(m._parameters)) for p, m in model.named_modules()}
        yield
        for path, module in model.named_modules():
            kind, attributes, parameters = before[path]
            now = vars(module)
            changed = {
                key: attributes.get(key, _MISSING)
                for key in attributes.keys() | now.keys()
                if not _same(attributes.get(key, _MISSING), now.get(key, _MISSING))
            }
            if not changed and kind is type(module) and parameters.keys() == module._parameters.keys():
                continue
            known = self.modules.setdefault(path, _Before(kind, {}, parameters))
            for key, value in changed.items():
                known.attributes.setdefault(key, value)

    def undone(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` as it was before all cuts, zeros where nothing is known."""
        tensors = named_tensors(model)
        copied = copy_module(model, instead={id(tensors[name]): self._full(name, tensors[name]) for name in self.kept})
        for path, before in self.modules.items():
            module = copied.get_submodule(path)
            module.__class__ = before.kind
            for name in before.parameters.keys() ^ module._parameters.keys():
                if name in before.parameters:
                    module._parameters[name] = copy.deepcopy(before.parameters[name])
                else:
                    del module._parameters[name]
            for key, value in before.attributes.items():
                if value is _MISSING:
                    vars(module).pop(key, None)
                else:
                    vars(module)[key] = copy.copy(value)
        for path, full in self.attributes.items():
            set_attribute(copied, path, full)
        for module in copied.modules():
            compute_weight(module)
        return copied

    def _full(self, name: str, tensor: Tensor) -> Tensor:
        full = torch.zeros(self.shapes[name], dtype=tensor.dtype, device=tensor.device)
        full = full.contiguous(memory_format=layout_of(tensor))
        for lost in self.lost:
            if lost.name == name:
                full[_grid(lost.positions, tensor.device)] = lost.values.to(tensor.device, tensor.dtype)
        full[_grid(tuple(self.kept[name]), tensor.device)] = tensor.detach()
        return nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return True  # computed from parameters, and computed again
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


def _grid(positions: tuple[NDArray[np.int64], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Indices of all combinations of positions, to be broadcast against each other."""
    rank = len(positions)
    return tuple(
        torch.from_numpy(p).to(device).view([-1 if d == dim else 1 for d in range(rank)])
        for dim, p in enumerate(positions)
    )


_WRAPPERS = (DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)


def _first_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _numbers(group: PruningGroup) -> NDArray[np.int64]:
    """The numbers that the units of a group always had."""
    return np.arange(group.size, dtype=np.int64) if group.origin is None else group.origin.numbers


def _alive(references: list[Any]) -> list[Any]:
    found = {id(each): each for each in (reference() for reference in references) if each is not None}
    return list(found.values())


def _wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel around ``model``: as it is, it would not reduce the gradients of what was cut."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    candidates = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [w for w in candidates if any(part is model for part in w.modules())]


def _check_rebuildable(wrapper: DistributedDataParallel) -> None:
    if wrapper.mixed_precision is not None or wrapper._delay_all_reduce_params:
        raise ConfigurationError(
            "units cannot leave physically under a DistributedDataParallel with mixed_precision or delayed reductions: "
            "it cannot be rebuilt in place. Use torch.autocast, or physical_cuts=False; nothing was changed"
        )


def _rebuild(wrapper: DistributedDataParallel) -> None:
    """Make the reducer anew: it holds sizes, and the nodes that accumulate gradients.

    What torch does when a wrapper is unpickled, followed by the hooks that were registered.
    """
    del wrapper.logger, wrapper.reducer  # the old reducer takes its hooks away with it
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper.reducer._set_static_graph()
        assert wrapper.logger is not None  # made with the reducer
        wrapper.logger._set_static_graph()
        wrapper._static_graph_delay_allreduce_enqueued = False  # the new reducer's first backward pass is yet to come
    wrapper._has_rebuilt_buckets = False
    for hook, state in wrapper._comm_hooks:
        torch.distributed._register_comm_hook(wrapper.reducer, state, hook)
