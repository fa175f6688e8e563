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
made of numbers, strings, lists and one tensor. Gradient sums of an averaging window, tensors of a parameter's shape,
travel as an extra entry of that parameter's state. ``param_groups`` and ``state`` that users see hold neither.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import CheckpointError, ConfigurationError, NothingPrunableError
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import Region, check, unit_is_zero, unit_sq_norm

logger = logging.getLogger(__name__)

ENTRY = "only_train_once"  # the method's entry in the first param group of a state_dict
SUM_ENTRY = "only_train_once_gradient_sum"  # in the state of a parameter, inside an averaging window only
STATE_VERSION = 1

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


@dataclass(frozen=True)
class Candidates:
    """What a method may work on.

    Attributes:
        groups: prunable groups whose ``zero`` tensors are all trained.
        dropped: name of every other group -> why not.
        tensors: every tensor of ``groups`` by name.
        trained: names of those the optimizer trains.
    """

    groups: tuple[PruningGroup, ...]
    dropped: dict[str, str]
    tensors: dict[str, Tensor]
    trained: frozenset[str]


def find_candidates(optimizer: Optimizer, groups: Iterable[PruningGroup], tensors: Mapping[str, Tensor]) -> Candidates:
    """Choose the groups that can be pruned with this optimizer.

    Raises:
        ConfigurationError: a tensor is missing or has another shape; a trainable tensor of a group is not in the
            optimizer's param_groups.
        NothingPrunableError: no group is left; the message lists the reasons.
    """
    groups = tuple(groups)
    prunable = [g for g in groups if g.prunable]
    check(prunable, tensors)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept: list[PruningGroup] = []
    dropped = {g.name: g.reason or "marked unprunable" for g in groups if not g.prunable}
    missing: dict[str, str] = {}
    for group in prunable:
        zero = [s.param for s in group.with_role(Role.ZERO)]
        for name in [*zero, *(s.param for s in group.with_role(Role.CONSUMER))]:
            if tensors[name].requires_grad and id(tensors[name]) not in owned:
                missing.setdefault(name, group.name)
        frozen = list(dict.fromkeys(name for name in zero if not tensors[name].requires_grad))
        if not zero:
            dropped[group.name] = "no slice has the role 'zero'"
        elif frozen:
            dropped[group.name] = f"not trained (requires_grad=False): {', '.join(frozen)}"
        else:
            kept.append(group)
    if missing:
        named = ", ".join(f"{name} (group {group})" for name, group in missing.items())
        raise ConfigurationError(
            f"these parameters have to be trained to prune their groups, but are in none of the optimizer's "
            f"param_groups: {named}; give them to the optimizer, set requires_grad_(False) on them, or mark their "
            f"groups unprunable"
        )
    for group in prunable:
        if group.name in dropped:
            logger.info("group %s is left alone: %s", group.name, dropped[group.name])
    if not kept:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in dropped.items()) or " there is no group at all"
        raise NothingPrunableError(f"no group can be pruned:{listed}")
    used = {name: tensors[name] for group in kept for name in group.params}
    return Candidates(tuple(kept), dropped, used, frozenset(n for n, t in used.items() if id(t) in owned))


class Method(ABC):
    """A pruning method: what happens before and after the base optimizer's step.

    It holds parameters by reference, so ``copy.deepcopy((model, optimizer))`` copies it consistently.
    """

    name: ClassVar[str]

    def __init__(self, candidates: Candidates) -> None:
        self.groups = candidates.groups
        self.dropped = candidates.dropped
        self.tensors = candidates.tensors
        self.trained = candidates.trained
        self.step = 0  # optimizer steps taken
        self.shortfall = 0  # units asked for minus units that will be removed

    @property
    @abstractmethod
    def period(self) -> int:
        """Periods begun."""

    @property
    @abstractmethod
    def redundant(self) -> dict[str, list[int]]:
        """Group name -> units chosen for removal so far, ascending."""

    @property
    @abstractmethod
    def removed(self) -> dict[str, list[int]]:
        """Group name -> units that are at zero for good, ascending."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether counting steps no longer matters."""

    @abstractmethod
    def before(self, optimizer: Optimizer) -> None:
        """Called once per step, when gradients are there and no weight has changed."""

    @abstractmethod
    def after(self, optimizer: Optimizer) -> None:
        """Called after the base step; ``self.step`` is still the number of this step."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What has to be saved: numbers, strings, lists, small tensors."""

    @abstractmethod
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless `load_state` can take ``state``."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
        """Take over a saved state; ``sums`` are the gradient sums saved with it."""

    @property
    def gradient_sums(self) -> dict[str, Tensor]:
        """Parameter name -> gradient sum to be saved, empty outside averaging windows."""
        return {}


METHODS: dict[str, Callable[..., Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Make a method known to `attach` under its ``name``."""
    assert cls.name not in METHODS, f"method {cls.name!r} is registered twice"
    METHODS[cls.name] = cls
    return cls


class GradientAverage:
    """The mean of the true gradients over a window of steps, as the optimizer sees them.

    Gradients count after accumulation, unscaling and clipping, and negated under ``maximize=True``: they are gradients
    of what the step makes smaller. A parameter without a gradient in a step counts as zero in that step. Sums are in
    float32 for half precision, else in the parameter's own dtype; they exist between `add` and `reset` only.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Add the gradients of this step."""
        maximized = {id(p) for g in optimizer.param_groups if g.get("maximize") for p in g["params"]}
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when the kernel itself unscales
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for name in self.names:
            parameter = tensors[name]
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach()
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            if id(parameter) in maximized:
                gradient = -gradient
            if name in self.sums:
                sums.append(self.sums[name])
                gradients.append(gradient)
            else:
                half = gradient.dtype in (torch.float16, torch.bfloat16)
                self.sums[name] = gradient.to(torch.float32 if half else gradient.dtype, copy=True)
        if sums:
            torch._foreach_add_(sums, gradients)
        self.count += 1

    def mean_with(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average over the steps added and this one, which is not added: its gradients may turn out to be bad."""
        total = GradientAverage(self.names)
        total.sums, total.count = {n: t.clone() for n, t in self.sums.items()}, self.count
        total.add(optimizer, tensors)
        return {
            n: total.sums[n].div_(total.count) if n in total.sums else torch.zeros_like(tensors[n].detach())
            for n in self.names
        }

    def reset_unless_finite(self) -> None:
        """Forget everything if an earlier step of the window brought a NaN or an infinity."""
        if not all(bool(torch.isfinite(t).all()) for t in self.sums.values()):
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.count = {}, 0


def zero_entries_(
    regions: Iterable[Region], tensors: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Set regions to 0 in the tensors and in every optimizer state tensor of the same shape."""
    for region in regions:
        tensor = tensors[region.name]
        region.zero_(tensor)
        for value in state.get(tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                region.zero_(value)


def fingerprint(group: PruningGroup) -> str:
    """A short digest of what a group cuts where; changes when the partition does."""
    digest = hashlib.sha256()
    for s in group.slices:
        digest.update(f"{s.param}|{s.dim}|{s.role.value}|{s.length}|{s.index.shape}".encode())
        digest.update(np.ascontiguousarray(s.index, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


class AttachedOptimizer(Optimizer):
    """What `attach` adds to an optimizer; see [Note: how a method is attached]."""

    _method: Method
    _depth: int
    _skipping: bool
    _base: ClassVar[type[Optimizer]]

    # -- survival -------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self._base,), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_method": self._method}

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
            **method.state(),
        }
        first, *rest = out["param_groups"]
        out["param_groups"] = [{**first, ENTRY: entry}, *rest]
        sums = method.gradient_sums
        if sums:
            keys = {
                id(p): key
                for group, saved in zip(self.param_groups, out["param_groups"], strict=True)
                for p, key in zip(group["params"], saved["params"], strict=True)
            }
            out["state"] = dict(out["state"])
            for name, value in sums.items():
                key = keys[id(method.tensors[name])]
                out["state"][key] = {**out["state"].get(key, {}), SUM_ENTRY: value}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this optimizer with this method, or of the base optimizer alone.

        Raises:
            CheckpointError: the state is damaged or foreign, or belongs to other parameters, to another partition
                into groups or to another schedule. Nothing was changed then.
        """
        _check_state_dict(state_dict)
        clean = dict(state_dict)
        entries = [g[ENTRY] for g in clean["param_groups"] if ENTRY in g]
        clean["param_groups"] = [{k: v for k, v in g.items() if k != ENTRY} for g in clean["param_groups"]]
        saved_sums = {k: v[SUM_ENTRY] for k, v in clean["state"].items() if isinstance(v, dict) and SUM_ENTRY in v}
        if saved_sums:
            without = {k: {n: x for n, x in clean["state"][k].items() if n != SUM_ENTRY} for k in saved_sums}
            clean["state"] = {k: without.get(k, v) for k, v in clean["state"].items() if without.get(k, v)}
        method = self._method
        if entries:
            _check_entry(entries[0], method)
        # One to one, or the base optimizer refuses below.
        keys = chain.from_iterable(g["params"] for g in clean["param_groups"])
        own = chain.from_iterable(g["params"] for g in self.param_groups)
        key_of = {id(p): key for key, p in zip(keys, own, strict=False)}
        trained = {name: key_of.get(id(t)) for name, t in method.tensors.items() if name in method.trained}
        sums = {name: saved_sums[key] for name, key in trained.items() if key in saved_sums}
        for name, value in sums.items():
            if not isinstance(value, Tensor) or value.shape != method.tensors[name].shape:
                shape = tuple(method.tensors[name].shape)
                raise damaged(f"{SUM_ENTRY} of {name}", getattr(value, "shape", value), f"a tensor of shape {shape}")
        try:
            super().load_state_dict(clean)  # changes nothing before its checks are over
        except ValueError as error:
            raise CheckpointError(
                f"the state_dict belongs to another {self._base.__name__}: {error}. Build the optimizer over the same "
                "parameters in the same param_groups."
            ) from error
        if not entries:
            logger.warning(
                "the state_dict has no state of method %r (it was saved by the base optimizer alone): the method goes "
                "on at its step %d",
                method.name,
                method.step,
            )
            return
        method.step = int(entries[0]["step"])
        method.load_state(entries[0], sums)

    # -- members ---------------------------------------------------------------------------------------------------

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
        """Facts about the network as it stands; waits for the device."""
        method = self._method
        zero = important = redundant = chosen = 0.0
        for group in method.groups:
            squares = unit_sq_norm(group, method.tensors).double().cpu().numpy()
            mask = np.zeros(group.size, dtype=np.bool_)
            mask[method.redundant[group.name]] = True
            zero += int(unit_is_zero(group, method.tensors).sum())
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
    if _before_step not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(_before_step)
        optimizer.register_step_post_hook(_after_step)


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
    return bool(gradients) and not any(bool(g.any()) for g in gradients)


def damaged(name: str, value: Any, expected: str) -> CheckpointError:
    """What to raise for an entry of a saved state that no run can have written."""
    return CheckpointError(
        f"the optimizer state is damaged: {name!r} is {str(value)[:80]!r}, expected {expected}; load another copy"
    )


def saved_count(state: Mapping[str, Any], name: str) -> int:
    """A whole number, at least 0, from a saved state."""
    value = state.get(name)
    try:
        number = -1 if value is None or isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise damaged(name, value, "a whole number, at least 0")
    return number


def _check_state_dict(state_dict: Any) -> None:
    """Raise CheckpointError unless this is what an optimizer's ``state_dict`` returns."""
    found = state_dict if isinstance(state_dict, Mapping) else {}
    groups, state = found.get("param_groups"), found.get("state")
    sound = isinstance(groups, (list, tuple)) and all(
        isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in groups
    )
    if not sound or not isinstance(state, Mapping):
        what = f"a dictionary with {list(found)[:5]}" if found else f"{type(state_dict).__name__} {state_dict!r:.80}"
        raise CheckpointError(
            f"the state_dict is foreign or damaged: an optimizer's has the entries 'state' and 'param_groups', this is "
            f"{what}; give what optimizer.state_dict() returned"
        )


def _check_entry(entry: Mapping[str, Any], method: Method) -> None:
    if not isinstance(entry, Mapping):
        raise damaged(ENTRY, entry, "a dictionary")
    if entry.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"the optimizer state has format version {entry.get('version')!r}, this library reads {STATE_VERSION}"
        )
    if entry.get("method") != method.name:
        raise CheckpointError(
            f"the optimizer state was saved by method {entry.get('method')!r}, not by {method.name!r}; attach that one"
        )
    saved_count(entry, "step")
    lists: list[Any] = [entry.get(key) for key in ("group_names", "group_sizes", "group_fingerprints")]
    if not all(isinstance(each, (list, tuple)) for each in lists) or len({len(each) for each in lists}) != 1:
        raise CheckpointError(
            "the optimizer state is damaged: group_names, group_sizes and group_fingerprints have to be lists of one "
            f"length, they are {str(lists)[:200]}"
        )
    facts = zip(entry["group_sizes"], entry["group_fingerprints"], strict=True)
    saved = dict(zip(entry["group_names"], facts, strict=True))
    own = {g.name: (g.size, fingerprint(g)) for g in method.groups}
    differences = [f"{name!r} is only in the saved state" for name in saved.keys() - own.keys()]
    differences += [f"{name!r} is only in this optimizer" for name in own.keys() - saved.keys()]
    for name in saved.keys() & own.keys():
        if saved[name][0] != own[name][0]:
            differences.append(f"{name!r} has {saved[name][0]} units in the saved state and {own[name][0]} here")
        elif saved[name][1] != own[name][1]:
            differences.append(f"{name!r} cuts other tensors or positions in the saved state")
    if not differences and list(saved) != list(own):
        differences.append(f"the groups come in another order: {list(saved)[:3]}... and {list(own)[:3]}...")
    if differences:
        raise CheckpointError(
            "the optimizer state belongs to another partition into groups: "
            + "; ".join(sorted(differences)[:8])
            + ("; ..." if len(differences) > 8 else "")
            + ". Build the optimizer from the same model with the same groups marked unprunable."
        )
    method.check_state(entry)


def attach(
    optimizer: _O,
    groups: Iterable[PruningGroup],
    named_tensors: Mapping[str, Tensor],
    method: str = "hesso",
    **config: Any,
) -> _O:
    """Attach a pruning method to a torch optimizer and return the same object.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its class, param groups, state and hooks stay as they are.
        groups: what can be removed; groups that are not prunable are left out.
        named_tensors: name -> parameter or buffer, the very tensors that the optimizer trains.
        method: a name in `METHODS`.
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
    accepted = [name for name in inspect.signature(METHODS[method]).parameters if name != "candidates"]
    unknown = [name for name in config if name not in accepted]
    if unknown:
        raise ConfigurationError(f"method {method!r} has no argument {', '.join(unknown)}; it has {accepted}")
    made = METHODS[method](find_candidates(optimizer, groups, named_tensors), **config)
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


def split_units(groups: Sequence[PruningGroup], flat: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
    """Group name -> units, from one flag per unit of all groups in order."""
    out, at = {}, 0
    for group in groups:
        out[group.name] = np.flatnonzero(flat[at : at + group.size]).astype(np.int64)
        at += group.size
    return out


def params_of(groups: Iterable[PruningGroup], roles: Collection[Role], among: Collection[str]) -> list[str]:
    """Names of the tensors the groups cut in slices with these roles, in order, each once."""
    return list(dict.fromkeys(s.param for g in groups for s in g.with_role(*roles) if s.param in among))
