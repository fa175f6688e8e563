"""HESSO, hybrid efficient structured sparse optimizer (arXiv 2409.09085), on top of any torch optimizer.

Steps are counted from 0 inside ``step()``. Pruning runs over the steps ``start_pruning_step ..
start_pruning_step + pruning_steps - 1``, in ``pruning_periods`` periods of ``T = pruning_steps // pruning_periods``
steps (the last one takes the remainder). K = floor(sparsity * units) units go in all, as evenly as possible.

1.  At a period's first step, before any weight changes: score all live units from the gradients averaged over the
    last ``window`` steps, this one included (``min(T, 10)`` unless told), and choose the lowest.
2.  At step t = 0 .. T-1 of the period: the base optimizer's step, then the chosen units' ``zero`` entries (the paper's
    group) times ``(T - t - 1) / (T - t)``: the product telescopes to a linear ramp, exactly 0 after the last step.
3.  After the last step the units are committed: their ``zero`` entries, the ``consumer`` entries that read them and now
    multiply zeros, and those of the optimizer's state are set to 0. From
    then on their gradients vanish and nothing is touched any more, except slices that are ``pinned``, which are set
    back to 0 after every step.

``follow`` entries are never changed. Before and after pruning a step costs what the base optimizer's costs, within 2 %
(``benchmarks/results/step_cost.md``); while units are driven to zero it costs up to 1.9 times that. The gradient sums
of a window are kept only inside it, and nothing waits for the device except at a period's first step.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.errors import CheckpointError, ConfigurationError, NumericalError
from only_train_once.groups import ParamSlice, PruningGroup, Role
from only_train_once.importance import Criteria, needs_gradients, resolve, score_groups
from only_train_once.masking import Region, regions
from only_train_once.optim.base import (
    Candidates,
    GradientAverage,
    Method,
    attach,
    damaged,
    params_of,
    register_method,
    saved_count,
    split_units,
    zero_entries_,
)
from only_train_once.optim.selection import nearest_total, select, units_for
from only_train_once.schedules import decay_factor, period_start, position, units_due

logger = logging.getLogger(__name__)

_OWNED = (Role.ZERO, Role.CONSUMER)  # what goes to zero with a unit
_MAX_WINDOW = 10
_PINS = ("auto", "always")


@dataclass(frozen=True)
class _Schedule:
    """The arguments that fix which step does what; a saved state only fits the same ones."""

    target_group_sparsity: float
    start_pruning_step: int
    pruning_steps: int
    pruning_periods: int
    group_divisible: int

    def __post_init__(self) -> None:
        for f in fields(self)[1:]:
            _whole(f.name, getattr(self, f.name), 0 if f.name == "start_pruning_step" else 1)
        sparsity = self.target_group_sparsity
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)) or not 0 <= sparsity < 1:
            raise ConfigurationError(f"target_group_sparsity is {sparsity!r}; the rule is 0 <= sparsity < 1")
        if self.pruning_steps < self.pruning_periods:
            raise ConfigurationError(
                f"pruning_steps ({self.pruning_steps}) < pruning_periods ({self.pruning_periods}); every period needs "
                f"at least one step: raise pruning_steps or lower pruning_periods"
            )
        # Plain numbers: numpy's would make a saved state unreadable under weights_only=True.
        for f in fields(self):
            plain = float if f.name == "target_group_sparsity" else int
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))

    @property
    def when(self) -> dict[str, int]:
        return {"start": self.start_pruning_step, "steps": self.pruning_steps, "periods": self.pruning_periods}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigurationError(f"{name} is {value!r}; it has to be a whole number, at least {least}")


def _tensor_roles(value: Any) -> tuple[Role, ...]:
    known = [r.value for r in Role if r.is_tensor]
    # A lone string would be taken apart into letters.
    roles = tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else ()
    if Role.ZERO not in roles or not all(r in known for r in roles):
        raise ConfigurationError(f"importance_roles is {value!r}; give a tuple of {known}, 'zero' among them")
    return tuple(Role(r) for r in roles)


@register_method
class Hesso(Method):
    """The method of the top of this file.

    Args:
        candidates: what may be pruned.
        target_group_sparsity: share of the candidates' units to remove, in [0, 1).
        start_pruning_step: first step of pruning.
        pruning_steps: number of steps it takes.
        pruning_periods: number of periods.
        group_divisible: a touched group ends with a multiple of this many units.
        fixed_zero_groups: set pinned slices of removed units back to 0 after every step.
        pin: "auto" (the slices that are ``pinned``, and what the optimizer makes necessary, see `_is_pinned`) or
            "always" (all ``zero`` and ``consumer`` slices of removed units).
        importance_score_criteria: see ``importance.resolve``.
        importance_roles: slices the scores look at.
        window: steps the gradients are averaged over, this many at most T; None for ``min(T, 10)``.
    """

    name = "hesso"

    def __init__(
        self,
        candidates: Candidates,
        *,
        target_group_sparsity: float = 0.5,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        pin: str = "auto",
        importance_score_criteria: Criteria = "default",
        importance_roles: Collection[Role] = (Role.ZERO,),
        window: int | None = None,
    ) -> None:
        super().__init__(candidates)
        self.schedule = _Schedule(
            target_group_sparsity, start_pruning_step, pruning_steps, pruning_periods, group_divisible
        )
        if pin not in _PINS:
            raise ConfigurationError(f"pin is {pin!r}; it has to be one of {_PINS}")
        if not isinstance(fixed_zero_groups, (bool, np.bool_)):
            raise ConfigurationError(f"fixed_zero_groups is {fixed_zero_groups!r}; it has to be True or False")
        roles = _tensor_roles(importance_roles)
        self.pin, self.fixed_zero_groups, self.roles = pin, fixed_zero_groups, roles
        self.criteria = resolve(importance_score_criteria)
        length = pruning_steps // pruning_periods
        if window is not None:
            _whole("window", window, 1)
        self.window = min(length, window or _MAX_WINDOW) if needs_gradients(self.criteria) else 1
        seen = tuple(Role) if callable(self.criteria) else roles
        self.average = GradientAverage(params_of(self.groups, seen, self.trained))

        sizes = [g.size for g in self.groups]
        self.units = sum(sizes)
        requested = units_for(self.units, target_group_sparsity)
        self.multiples = [g.multiple for g in self.groups]
        self.total = nearest_total(sizes, [0] * len(sizes), requested, group_divisible, multiples=self.multiples)
        self.shortfall = requested - self.total
        if self.shortfall:
            logger.warning(
                "%d of %d units were requested, %d will be removed: no combination over the %d groups (each keeps at "
                "least one unit, and a multiple of group_divisible=%d once touched%s) removes exactly %d",
                requested,
                self.units,
                self.total,
                len(sizes),
                group_divisible,
                "; some lose units only in multiples, see PruningGroup.multiple" if max(self.multiples) > 1 else "",
                requested,
            )
        # 0: live; p + 1: chosen in period p.  (units of all groups in order,)
        self.chosen: NDArray[np.int32] = np.zeros(self.units, dtype=np.int32)
        self._ramp: tuple[Region, ...] | None = None  # scaled in the period under way; None: not computed
        self._pinned: tuple[Region, ...] | None = None  # of committed units; None: not computed

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """First step after pruning."""
        return self.schedule.start_pruning_step + self.schedule.pruning_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.end or self.total == 0

    @property
    def period(self) -> int:
        s = self.schedule
        return sum(period_start(p, **s.when) < self.step for p in range(s.pruning_periods))

    @property
    def redundant(self) -> dict[str, list[int]]:
        return {n: u.tolist() for n, u in split_units(self.groups, self.chosen > 0).items()}

    @property
    def removed(self) -> dict[str, list[int]]:
        return {n: u.tolist() for n, u in split_units(self.groups, self._committed(self.step)).items()}

    def _committed(self, steps: int) -> NDArray[np.bool_]:
        """One flag per unit: its period is over once ``steps`` steps were taken.  (units,)"""
        s = self.schedule
        done = sum(period_start(p + 1, **s.when) <= steps for p in range(s.pruning_periods))
        return (self.chosen > 0) & (self.chosen <= done)

    # -- a step ----------------------------------------------------------------------------------------------------

    def before(self, optimizer: Optimizer) -> None:
        """Collect gradients inside a window; choose units at a period's first step."""
        if self.finished:
            return
        scoring = self._next_scoring()
        if scoring is None or self.step <= scoring - self.window:
            return
        if self.step == scoring:
            self._choose(optimizer)
            self.average.reset()
        elif self.average.count <= self.step - (scoring - self.window + 1):
            # One more would be this step's, added before something interrupted it.
            self.average.add(optimizer, self.tensors)

    def _next_scoring(self) -> int | None:
        """The first step >= this one at which a period begins, or None."""
        s, begin = self.schedule, self.schedule.start_pruning_step
        if self.step <= begin:
            return begin
        length = s.pruning_steps // s.pruning_periods
        period = -(-(self.step - begin) // length)
        return period_start(period, **s.when) if period < s.pruning_periods else None

    def _choose(self, optimizer: Optimizer) -> None:
        """Score all live units and choose this period's: the one place that waits for the device."""
        where = position(self.step, **self.schedule.when)
        assert where is not None
        self._ramp = None  # `after` finds the period's units; also when they were chosen before an interrupted step
        count = units_due(where.period, self.schedule.pruning_periods, self.total) - int((self.chosen > 0).sum())
        if count == 0:
            return
        gradients = self.average.mean_with(optimizer, self.tensors)
        names = list(gradients)
        finite = [torch.isfinite(gradients[n]).all() for n in names]
        scores = score_groups(self.groups, self.tensors, gradients, self.criteria, self.roles)
        device = scores[0].device
        packed = torch.cat([s.double().to(device) for s in scores] + [torch.stack([f.to(device) for f in finite])])
        values = packed.cpu().numpy()
        bad = [n for n, ok in zip(names, values[self.units :], strict=True) if not ok]
        if bad:
            steps = self.average.count + 1
            self.average.reset_unless_finite()
            raise NumericalError(
                f"step {self.step}: the gradients averaged over {steps} step(s) are not finite in "
                f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}; no unit can be scored. No weight was changed: "
                f"skip this batch, lower the learning rate, or use a GradScaler"
            )
        flat = values[: self.units]
        bounds = np.cumsum([g.size for g in self.groups])[:-1]
        per_group = np.split(flat, bounds)
        gone = np.split(self.chosen > 0, bounds)
        for group, score, lost in zip(self.groups, per_group, gone, strict=True):
            strange = np.flatnonzero(~np.isfinite(score) & ~lost)
            if len(strange):
                raise NumericalError(
                    f"step {self.step}: the score of unit {strange[0]} of group {group.name!r} is {score[strange[0]]}; "
                    f"no weight was changed. Look for NaN or infinite weights in "
                    f"{', '.join(s.param for s in group.with_role(Role.ZERO))}"
                )
        picked = select(per_group, gone, count, self.total, self.schedule.group_divisible, multiples=self.multiples)
        for offset, units in zip([0, *bounds], picked, strict=True):
            self.chosen[offset + units] = where.period + 1
        logger.info("step %d: period %d chooses %d units", self.step, where.period, count)

    def after(self, optimizer: Optimizer) -> None:
        """Scale the chosen units, commit them at the period's end, hold pinned slices at zero."""
        if self.total == 0:
            return
        where = position(self.step, **self.schedule.when)
        if where is not None:
            active = self.chosen == where.period + 1
            if where.t < where.length - 1:
                if self._ramp is None:
                    self._ramp = self._regions(active, lambda group, s: s.role is Role.ZERO)
                for region in self._ramp:
                    region.scale_(self.tensors[region.name], decay_factor(where.t, where.length))
            else:
                zero_entries_(self._regions(active), self.tensors, optimizer.state)
                self._ramp, self._pinned = None, None
        if self.step >= self.schedule.start_pruning_step:
            if self._pinned is None:
                self._pinned = self._pins(optimizer)
            zero_entries_(self._pinned, self.tensors, optimizer.state)

    def _regions(self, flags: NDArray[np.bool_], only: Any = lambda group, s: True) -> tuple[Region, ...]:
        return regions(
            self.groups,
            split_units(self.groups, flags),
            self.tensors,
            _OWNED,
            lambda group, s: s.param in self.trained and only(group, s),
        )

    def _pins(self, optimizer: Optimizer) -> tuple[Region, ...]:
        """Entries to hold at zero, of the units that are committed when this step is over."""
        if not self.fixed_zero_groups:
            return ()
        flags = self._committed(self.step + 1)
        if self.pin == "always" or _mixes_entries(optimizer):
            return self._regions(flags)
        return self._regions(flags, self._is_pinned)

    def _is_pinned(self, group: PruningGroup, s: ParamSlice) -> bool:
        """Whether a slice gets gradients although its unit is at zero.

        The analysis says so; and so does a downstream column that is not trained, hence not zero: the unit's own
        entries then see a gradient through it.
        """
        if s.pinned:
            return True
        return s.role is Role.ZERO and any(c.param not in self.trained for c in group.with_role(Role.CONSUMER))

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "schedule": asdict(self.schedule),
            "chosen": torch.from_numpy(self.chosen.copy()),
            "window_count": self.average.count,
        }

    @property
    def gradient_sums(self) -> dict[str, Tensor]:
        return self.average.sums

    def check_state(self, state: Mapping[str, Any]) -> None:
        saved, own = state.get("schedule"), asdict(self.schedule)
        if not isinstance(saved, Mapping):
            raise damaged("schedule", saved, "a dictionary of the schedule's arguments")
        saved_count(state, "window_count")
        chosen = self._saved_choice(state.get("chosen"))
        different = [k for k in own if saved.get(k) != own[k]]
        untouched = not bool((chosen > 0).any())
        if different and not (untouched and state["step"] <= self.schedule.start_pruning_step):
            listed = ", ".join(f"{k} was {saved.get(k)!r} and is {own[k]!r}" for k in different)
            raise CheckpointError(
                f"the optimizer state was saved in the middle of another schedule: {listed}; build the optimizer with "
                f"the arguments of the saved run"
            )
        s, step = self.schedule, saved_count(state, "step")
        begun = sum(period_start(p, **s.when) <= step for p in range(s.pruning_periods))
        kept = [int((part == 0).sum()) for part in np.split(chosen, np.cumsum([g.size for g in self.groups])[:-1])]
        if not untouched and (chosen.max() > begun or int((chosen > 0).sum()) > self.total or not all(kept)):
            raise CheckpointError(
                f"the optimizer state is damaged: at step {step} with {begun} period(s) begun at most {self.total} "
                f"units are chosen and every group keeps one; it says {int((chosen > 0).sum())} units, the last of "
                f"them in period {int(chosen.max())}"
            )

    def _saved_choice(self, value: Any) -> NDArray[np.int64]:
        """The period each unit was chosen in, 0 for none.  (units,)"""
        try:
            chosen = torch.as_tensor(value).detach().cpu().numpy()
        except (TypeError, ValueError, RuntimeError) as error:
            raise damaged("chosen", value, "a tensor of whole numbers") from error
        if chosen.shape != (self.units,):
            raise CheckpointError(
                f"the optimizer state is damaged: it has to say for {self.units} units when each was chosen, and holds "
                f"a tensor of shape {tuple(chosen.shape)}"
            )
        if chosen.dtype.kind not in "iu" or chosen.min() < 0:
            raise damaged("chosen", value, "a tensor of whole numbers, none of them negative")
        return chosen.astype(np.int64)

    def load_state(self, state: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
        self.chosen = torch.as_tensor(state["chosen"]).cpu().numpy().astype(np.int32).copy()
        self._ramp, self._pinned = None, None
        self.average.reset()
        count = int(state["window_count"])
        if count and not sums and needs_gradients(self.criteria):
            logger.warning(
                "the saved state lies %d step(s) into an averaging window, but its gradient sums were not saved with "
                "it: the average starts afresh",
                count,
            )
            return
        self.average.sums = {n: v.to(self.tensors[n].device, copy=True) for n, v in sums.items()}
        self.average.count = count


def _mixes_entries(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps state that is not one number per entry of a parameter (L-BFGS, factored moments).

    Zeroing a unit's state is then impossible, and its entries have to be held at zero.
    """
    for parameter, entries in optimizer.state.items():
        for value in entries.values() if isinstance(entries, dict) else ():
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and v.dim() for v in value):
                return True
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                return True
    return False


# -- the builder ---------------------------------------------------------------------------------------------------

_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
    "adam": {"betas": (0.9, 0.999), "weight_decay": 0.0},
    "adamw": {"betas": (0.9, 0.999), "weight_decay": 1e-2},
}


def _optimizer_class(variant: str | type[Optimizer]) -> type[Optimizer]:
    if isinstance(variant, type) and issubclass(variant, Optimizer):
        return variant
    known = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if not isinstance(variant, str) or variant.lower() not in known:
        raise ConfigurationError(
            f"variant is {variant!r}; give a torch.optim.Optimizer class or one of {sorted(known)}, or make the "
            f"optimizer yourself and attach to it"
        )
    return known[variant.lower()]


def _optimizer_arguments(
    cls: type[Optimizer],
    defaults: Mapping[str, Any],
    weight_decay: float | None,
    first_momentum: float | None,
    second_momentum: float | None,
    dampening: float | None,
) -> dict[str, Any]:
    """The reference library's argument names as those of the torch optimizer."""
    accepted = inspect.signature(cls).parameters
    out = dict(defaults)
    if weight_decay is not None:
        out["weight_decay"] = weight_decay
    if dampening is not None:
        out["dampening"] = dampening
    if "betas" in accepted and (first_momentum is not None or second_momentum is not None):
        first, second = out.get("betas", accepted["betas"].default)
        out["betas"] = (
            first if first_momentum is None else first_momentum,
            second if second_momentum is None else second_momentum,
        )
    elif first_momentum is not None:
        out["momentum"] = first_momentum
    if second_momentum is not None and "betas" not in accepted:
        raise ConfigurationError(f"second_momentum={second_momentum!r} is given, but {cls.__name__} has only one")
    unknown = sorted(set(out) - set(accepted))
    if unknown:
        raise ConfigurationError(f"{cls.__name__} has no argument {', '.join(unknown)}; leave it at None")
    return out


def _finite(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse what is no finite number, or below ``least``."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        rule = "" if least == -math.inf else f", at least {least}"
        raise ConfigurationError(f"{name} is {value!r}; it has to be a finite number{rule}")


def build_hesso(
    named_tensors: Mapping[str, Tensor],
    groups: Iterable[PruningGroup],
    variant: str | type[Optimizer] = "sgd",
    lr: float = 0.1,
    weight_decay: float | None = None,
    first_momentum: float | None = None,
    second_momentum: float | None = None,
    dampening: float | None = None,
    target_group_sparsity: float = 0.5,
    start_pruning_step: int = 0,
    pruning_steps: int = 1,
    pruning_periods: int = 1,
    device: Any = None,
    group_divisible: int = 1,
    fixed_zero_groups: bool = True,
    importance_score_criteria: Criteria = "default",
    *,
    pin: str = "auto",
    importance_roles: Collection[Role] = (Role.ZERO,),
    window: int | None = None,
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Build a torch optimizer over all trainable parameters and attach HESSO to it.

    Args:
        named_tensors: name -> parameter or buffer of the model.
        groups: what can be removed.
        variant: "sgd", "adam", "adamw", any other name in ``torch.optim``, or an optimizer class.
        lr: learning rate.
        weight_decay: None for 0, and 1e-2 for "adamw".
        first_momentum: momentum of SGD (None: 0), first beta of Adam (None: 0.9).
        second_momentum: second beta of Adam (None: 0.999).
        dampening: of SGD.
        device: accepted for the reference library's scripts; the tensors' own device is used.
        **optimizer_kwargs: passed to the optimizer class (``nesterov``, ``fused``, ``eps``, ...).

    The other arguments are those of `Hesso`.
    """
    rate: Any = lr  # a tensor where the step is captured in a CUDA graph
    _finite("lr", rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate, 0)
    for name, value in (
        ("weight_decay", weight_decay),
        ("first_momentum", first_momentum),
        ("second_momentum", second_momentum),
    ):
        if value is not None:
            _finite(name, value, 0)
    if dampening is not None:
        _finite("dampening", dampening)
    cls = _optimizer_class(variant)
    defaults = _DEFAULTS.get(cls.__name__.lower(), {})
    arguments = _optimizer_arguments(cls, defaults, weight_decay, first_momentum, second_momentum, dampening)
    trained = [t for t in named_tensors.values() if t.requires_grad]
    if not trained:
        raise ConfigurationError("no tensor has requires_grad=True, so there is nothing to train")
    arguments = {"lr": lr, **arguments, **optimizer_kwargs}
    try:
        optimizer = cls(trained, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{cls.__name__} refuses its arguments {arguments}: {error}; change them, or make the optimizer yourself "
            f"and attach to it"
        ) from error
    return attach(
        optimizer,
        groups,
        named_tensors,
        method=Hesso.name,
        target_group_sparsity=target_group_sparsity,
        start_pruning_step=start_pruning_step,
        pruning_steps=pruning_steps,
        pruning_periods=pruning_periods,
        group_divisible=group_divisible,
        fixed_zero_groups=fixed_zero_groups,
        pin=pin,
        importance_score_criteria=importance_score_criteria,
        importance_roles=importance_roles,
        window=window,
    )
