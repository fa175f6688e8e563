"""Attach a pruning method to any torch optimizer.

`attach` changes the class of the optimizer it is given to a subclass made on the fly and returns the same object::

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(optimizer, groups, dict(model.named_parameters()), method="hesso", target_group_sparsity=0.7)
    isinstance(optimizer, torch.optim.AdamW)        # True: schedulers, scalers, trainers keep working

[Note: how a method is attached]
The work is done in a step pre hook and a step post hook: everything that calls the optimizer, a learning-rate
scheduler that has replaced ``optimizer.step`` included, ends in the step of the base class, which runs the hooks. With
a closure the pre hook wraps the closure, because the gradients exist only after its first evaluation. Hooks alone are
lost by ``copy.deepcopy`` and by pickling, and cannot add to ``state_dict``; so the class is a subclass that overrides
``__getstate__``/``__setstate__`` (carry the method, hang the hooks in again) and ``state_dict``/``load_state_dict``
(the method's state). It adds no step of its own beyond noticing that a new step begins.

[Note: the method's state]
It lives in ``optimizer._method`` and appears in files only: as one extra entry of the first param group in
``state_dict()`` (``torch.distributed.checkpoint`` drops extra top-level keys and keeps extra param group entries),
made of numbers, strings, lists and a few small tensors. What has a parameter's shape, gradient sums of an averaging
window for one, travels as an extra entry of that parameter's state. ``param_groups`` and ``state`` that users see hold
neither.

[Note: units that leave while training goes on]
The optimizer knows when units are settled and whose state has to shrink with them; what a cut does to the modules is
known further down (``only_train_once/cutting.py``). So a `Cutter` hangs at the optimizer: it is called after a step
that settled units, and before a state is loaded that was saved without them.
"""

from __future__ import annotations

import functools
import logging
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.groups import PruningGroup
from only_train_once.masking import unit_is_zero, unit_sq_norm
from only_train_once.optim.candidates import find_candidates, fingerprint
from only_train_once.optim.method import METHODS, Method, accepted_arguments
from only_train_once.optim.state import STATE_VERSION, check_entry, check_state_dict, saved_per_unit
from only_train_once.sharding import whole

logger = logging.getLogger(__name__)

ENTRY = "only_train_once"  # the method's entry in the first param group of a state_dict
COMPANION = ENTRY + "_"  # begins the names of what is saved with the state of a parameter

_O = TypeVar("_O", bound=Optimizer)


@dataclass(frozen=True)
class Metrics:
    """Facts about a network in training; a *group* in these names, the reference library's, is a unit of ours."""

    group_sparsity: float  # units at zero / units of all candidates
    norm_params: float  # norm of the zero-role entries of all candidates
    num_zero_groups: int
    norm_important_groups: float  # the same over units not chosen for removal
    norm_redundant_groups: float  # and over the chosen ones
    num_important_groups: int
    num_redundant_groups: int
    period: int  # periods begun
    step: int  # optimizer steps taken


class Cutter(ABC):
    """Lets units leave a network; see [Note: units that leave while training goes on]."""

    @abstractmethod
    def leave(self, optimizer: AttachedOptimizer) -> object:
        """Cut what is settled, after a step that settled units."""

    @abstractmethod
    def prepare(self, optimizer: AttachedOptimizer, absent: NDArray[np.bool_]) -> PendingCut:
        """Get ready to cut these units, whatever their values are; changes nothing.

        Raises:
            CheckpointError: they cannot leave this network.
        """

    @abstractmethod
    def also(self, *others: object) -> None:
        """Cut these along, too."""


@dataclass(frozen=True)
class PendingCut:
    """Shapes of the tensors that a cut changes, and what performs it."""

    shapes: Mapping[str, tuple[int, ...]]
    perform: Callable[[], object]


class AttachedOptimizer(Optimizer):
    """What `attach` adds to an optimizer; see [Note: how a method is attached]."""

    _method: Method
    _depth: int
    _skipping: bool
    _base: ClassVar[type[Optimizer]]
    _cutter: Cutter | None = None
    _cuts_by_itself: bool = False  # at the end of every period; otherwise when it is told to
    _cut_hooks: OrderedDict[int, Callable[[Any], object]]

    # -- survival -------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self._base,), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_method": self._method, "_cutter": self._cutter, "_cuts_by_itself": self._cuts_by_itself}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _hang_in(self)

    # -- the method's state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state with the method's, see [Note: the method's state]."""
        out = dict(super().state_dict())
        method = self._method
        entry = {
            "version": STATE_VERSION,
            "method": method.name,
            "step": method.step,
            "group_names": [g.name for g in method.groups],
            "group_sizes": [g.size for g in method.groups],
            "group_fingerprints": [fingerprint(g) for g in method.groups],
            "absent": torch.from_numpy(~method.present).int(),
            **method.state(),
        }
        first, *rest = out["param_groups"]
        out["param_groups"] = [{**first, ENTRY: entry}, *rest]
        keys = {
            id(p): key
            for group, saved in zip(self.param_groups, out["param_groups"], strict=True)
            for p, key in zip(group["params"], saved["params"], strict=True)
        }
        out["state"] = dict(out["state"])
        for what, values in method.companions.items():
            for name, value in values.items():
                key = keys[id(method.named_tensors[name])]
                out["state"][key] = {**out["state"].get(key, {}), COMPANION + what: value}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this optimizer with this method, or of the base optimizer alone.

        If units had left the network when the state was saved, they leave this one first: load the model's state after
        the optimizer's.

        Raises:
            CheckpointError: the state is damaged or foreign, or belongs to other parameters, to another partition
                into groups or to another schedule. Nothing was changed then.
        """
        check_state_dict(state_dict)
        clean = dict(state_dict)
        entries = [g[ENTRY] for g in clean["param_groups"] if ENTRY in g]
        clean["param_groups"] = [{k: v for k, v in g.items() if k != ENTRY} for g in clean["param_groups"]]
        extra, clean["state"] = _without_companions(clean["state"])
        method = self._method
        # One to one, or the base optimizer refuses below.
        keys = chain.from_iterable(g["params"] for g in clean["param_groups"])
        own = chain.from_iterable(g["params"] for g in self.param_groups)
        key_of = {id(p): key for key, p in zip(keys, own, strict=False)}
        named = {name: key_of.get(id(t)) for name, t in method.named_tensors.items()}
        companions = {
            what: {name: values[key] for name, key in named.items() if key in values} for what, values in extra.items()
        }
        pending: PendingCut | None = None
        if entries:
            check_entry(ENTRY, entries[0], method)
            pending = self._pending_cut(entries[0])
            with _expecting(method, pending):
                method.check_state(entries[0], companions)
        try:
            super().load_state_dict(clean)  # changes nothing before its checks are over
        except ValueError as error:
            raise CheckpointError(
                f"the state_dict belongs to another {self._base.__name__}: {error}. Build the optimizer over the same "
                "parameters in the same param_groups."
            ) from error
        if pending is not None:
            pending.perform()  # the state that was loaded is small already
        if not entries:
            logger.warning(
                "the state_dict has no state of method %r (it was saved by the base optimizer alone): the method goes "
                "on at its step %d",
                method.name,
                method.step,
            )
            return
        method.step = int(entries[0]["step"])
        method.load_state(entries[0], companions)
        method.ready()

    def _pending_cut(self, entry: Mapping[str, Any]) -> PendingCut | None:
        """What has to leave before a saved state fits."""
        present = self._method.present
        absent = saved_per_unit({"absent": np.zeros(len(present), np.int64), **entry}, "absent", len(present)) > 0
        if (absent == ~present).all():
            return None
        if (~present & ~absent).any():
            raise CheckpointError(
                f"{int((~present).sum())} units have left this network, {int(absent.sum())} had when the state was "
                "saved; units cannot come back: build model and optimizer anew and load the state into those"
            )
        if self._cutter is None:
            raise CheckpointError(
                f"{int(absent.sum())} units had left the network when the state was saved; make the optimizer with "
                "physical_cuts=True, as in the saved run, and they leave this one, too"
            )
        return self._cutter.prepare(self, absent)

    # -- members ---------------------------------------------------------------------------------------------------

    def register_cut_hook(self, hook: Callable[[Any], object]) -> RemovableHandle:
        """Call ``hook(event)`` whenever units have left the network; see `cutting.CutEvent`.

        Everything is cut by then. The handle's ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._cut_hooks)
        self._cut_hooks[handle.id] = hook
        return handle

    def cut_also(self, *others: object) -> None:
        """Whenever units leave, cut these, too: copies of the model, wrappers around it, other optimizers.

        See `cutting.LiveCuts.also`.
        """
        if self._cutter is None:
            raise ConfigurationError("no units leave under this optimizer; make it with physical_cuts=True")
        self._cutter.also(*others)

    @property
    def redundant(self) -> dict[str, list[int]]:
        """Group name -> units chosen for removal so far, ascending."""
        return self._method.redundant

    @property
    def removed(self) -> dict[str, list[int]]:
        """Group name -> units that are at zero for good, ascending."""
        return self._method.removed

    @property
    def shortfall(self) -> int:
        """Units asked for minus units that will be removed; negative when the nearest reachable total lies above."""
        return self._method.shortfall

    def compute_group_sparsity_param_norm(self) -> tuple[float, float, int]:
        """Share of units at zero, norm of all units, number of units at zero."""
        metrics = self.compute_metrics()
        return metrics.group_sparsity, metrics.norm_params, metrics.num_zero_groups

    def compute_norm_groups(self) -> tuple[float, float, int, int]:
        """Norm of the units not chosen and of the chosen ones; number of units not chosen and of the chosen ones."""
        m = self.compute_metrics()
        return m.norm_important_groups, m.norm_redundant_groups, m.num_important_groups, m.num_redundant_groups

    @torch.no_grad()
    def compute_metrics(self) -> Metrics:
        """Facts about the network as it stands; waits for the device.

        Where parameters are sharded, all processes call it together.
        """
        method = self._method
        zero = important = redundant = chosen = 0.0
        listed = method.redundant
        present = np.split(method.present, np.cumsum([g.size for g in method.groups])[:-1])
        for group, now, there in zip(method.groups, method.current, present, strict=True):
            squares = np.zeros(group.size)
            squares[there] = unit_sq_norm(now, method.tensors).double().cpu().numpy()
            mask = np.zeros(group.size, dtype=np.bool_)
            mask[listed[group.name]] = True
            zero += group.size - now.size + int(unit_is_zero(now, method.tensors).sum())
            chosen += int(mask.sum())
            redundant += float(squares[mask].sum())
            important += float(squares[~mask].sum())
        units = sum(g.size for g in method.groups)
        return Metrics(
            group_sparsity=zero / units,
            norm_params=float(np.sqrt(important + redundant)),
            num_zero_groups=int(zero),
            norm_important_groups=float(np.sqrt(important)),
            norm_redundant_groups=float(np.sqrt(redundant)),
            num_important_groups=units - int(chosen),
            num_redundant_groups=int(chosen),
            period=method.period,
            step=method.step,
        )

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of every param group."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def get_learning_rate(self) -> float:
        """Learning rate of the first param group."""
        return float(self.param_groups[0]["lr"])


@functools.cache
def _attached_class(base: type[Optimizer]) -> type[AttachedOptimizer]:
    """The subclass of ``base`` that carries a method; it keeps the name, which trainers and loggers look at."""
    if not getattr(base.step, "hooked", False):  # unpickled where no instance of the base was ever made
        base.step = Optimizer.profile_hook_step(base.step)  # type: ignore[method-assign, assignment]
        base.step.hooked = True  # type: ignore[attr-defined]

    @functools.wraps(base.step)
    def step(self: AttachedOptimizer, *args: Any, **kwargs: Any) -> Any:
        self._depth = 0  # a step that raised half-way has left its mark
        return base.step(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # the base step runs the hooks: do not wrap this one, too
    body = {"_base": base, "step": step, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return cast("type[AttachedOptimizer]", type(base.__name__, (AttachedOptimizer, base), body))


def _new(base: type[Optimizer]) -> AttachedOptimizer:
    cls = _attached_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _hang_in(optimizer: AttachedOptimizer) -> None:
    optimizer._depth, optimizer._skipping = 0, False
    vars(optimizer).setdefault("_cut_hooks", OrderedDict())  # also called when a state is loaded
    before, after = _hooks()
    if before not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
    optimizer._method.ready()


@functools.cache
def _hooks() -> tuple[Any, Any]:
    """The two hooks; they decide by values, so a compiled step runs them as they are."""
    return torch.compiler.disable(_before_step), torch.compiler.disable(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    assert isinstance(optimizer, AttachedOptimizer)
    optimizer._depth += 1
    if optimizer._depth > 1:  # the step of a subclass that calls the hooked step of its parent
        return None
    method = optimizer._method
    optimizer._skipping = not method.finished and (_overflowed(optimizer) or _only_initialises(optimizer))
    if optimizer._skipping:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        with torch.no_grad():
            method.before(optimizer)
        return None
    evaluated = False

    @functools.wraps(closure)
    def first_then_method(*closure_args: Any, **closure_kwargs: Any) -> Any:
        nonlocal evaluated
        loss = closure(*closure_args, **closure_kwargs)
        if not evaluated:  # an optimizer may evaluate the closure several times per step
            evaluated = True
            with torch.no_grad():
                method.before(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], first_then_method, *args[2:]), kwargs
    return args, {**kwargs, "closure": first_then_method}


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert isinstance(optimizer, AttachedOptimizer)
    optimizer._depth -= 1
    if optimizer._depth > 0 or optimizer._skipping:
        return
    with torch.no_grad():
        optimizer._method.after(optimizer)
    optimizer._method.step += 1
    if optimizer._cuts_by_itself and optimizer._cutter is not None and optimizer._method.just_settled:
        optimizer._cutter.leave(optimizer)
    optimizer._method.ready()


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused kernel is about to skip this step.

    GradScaler calls ``step`` of an optimizer that unscales by itself even when a gradient overflowed. Reading its
    verdict waits for the device, as GradScaler itself does with every other optimizer.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found != 0)


def _only_initialises(optimizer: Optimizer) -> bool:
    """Whether this step is the one by which ``torch.distributed.checkpoint`` creates optimizer state.

    It calls ``step`` on an optimizer without state after setting every learning rate and every gradient to zero.
    """
    if optimizer.state:
        return False
    if any("lr" in g and float(g["lr"]) != 0 for g in optimizer.param_groups):
        return False
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(whole(g.any())) for g in gradients)


def attach(
    optimizer: _O,
    groups: Iterable[PruningGroup],
    named_tensors: Mapping[str, Tensor],
    method: str = "hesso",
    process_group: Any = None,
    model: nn.Module | None = None,
    **config: Any,
) -> _O:
    """Attach a pruning method to a torch optimizer and return the same object.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its class, param groups, state and hooks stay as they are.
        groups: what can be removed; groups that are not prunable are left out.
        named_tensors: name -> parameter or buffer, the very tensors that the optimizer trains.
        method: a name in `METHODS`.
        process_group: the processes that train these tensors together, where ``torch.distributed`` runs; None for
            all of them. Each of them attaches, in the same order.
        model: the module that was analysed; only criteria that look at activations need it.
        **config: the method's arguments, see its class.

    Raises:
        ConfigurationError: an argument is out of range or does not fit. The optimizer was not changed then.
        NothingPrunableError: no group can be pruned.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigurationError(f"method is {method!r}; known methods are {sorted(METHODS)}")
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"cannot attach to {type(optimizer).__name__!r}; it has to be a torch.optim.Optimizer")
    if isinstance(optimizer, AttachedOptimizer):
        raise ConfigurationError(
            f"method {optimizer._method.name!r} is attached to this {type(optimizer).__name__} already; make a new one"
        )
    accepted = accepted_arguments(method)
    unknown = [name for name in config if name not in accepted]
    if unknown:
        raise ConfigurationError(f"method {method!r} has no argument {', '.join(unknown)}; it has {accepted}")
    made = METHODS[method](find_candidates(optimizer, groups, named_tensors, process_group, model), **config)
    base = type(optimizer)
    optimizer.__class__ = _attached_class(base)  # type: ignore[assignment, arg-type]
    attached = cast(AttachedOptimizer, optimizer)
    attached._method = made
    _hang_in(attached)
    _note_steps_of_instance(attached)
    return optimizer


def _note_steps_of_instance(optimizer: AttachedOptimizer) -> None:
    """Notice new steps also where a learning-rate scheduler replaced ``step`` on the instance before `attach`."""
    replaced = vars(optimizer).get("step")
    if replaced is None:
        return
    reference = weakref.ref(optimizer)

    @functools.wraps(replaced)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        if owner is not None:
            owner._depth = 0
        return replaced(*args, **kwargs)

    optimizer.step = step  # type: ignore[method-assign]


@contextmanager
def _expecting(method: Method, pending: PendingCut | None) -> Iterator[None]:
    """Inside, the method sees tensors of the shapes that they will have."""
    shapes = {} if pending is None else pending.shapes
    seen = (method.tensors, method.named_tensors)
    held = [{name: tensors[name] for name in shapes if name in tensors} for tensors in seen]
    try:
        for tensors, own in zip(seen, held, strict=True):
            tensors.update({name: torch.empty(shapes[name], device="meta") for name in own})
        yield
    finally:
        for tensors, own in zip(seen, held, strict=True):
            tensors.update(own)


def _without_companions(state: Mapping[Any, Any]) -> tuple[dict[str, dict[Any, Any]], dict[Any, Any]]:
    """What a method saved with parameters (what it is -> key -> value), and the state without it."""
    found: dict[str, dict[Any, Any]] = {}
    clean = dict(state)
    for key, entries in state.items():
        if not isinstance(entries, dict):
            continue
        ours = [n for n in entries if isinstance(n, str) and n.startswith(COMPANION)]
        for name in ours:
            found.setdefault(name.removeprefix(COMPANION), {})[key] = entries[name]
        if ours:
            clean[key] = {n: x for n, x in entries.items() if n not in ours}
            if not clean[key]:
                del clean[key]
    return found, clean
