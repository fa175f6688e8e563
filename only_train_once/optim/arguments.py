"""Checks of arguments: each names the argument, its value and the rule."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from only_train_once.budgets import MEASURES, shown
from only_train_once.errors import ConfigurationError
from only_train_once.groups import Role
from only_train_once.latency import LatencyTable
from only_train_once.schedules import RAMPS


class Unstated(float):
    """A default that can be told from the same number given by a user."""


SPARSITY = Unstated(0.5)  # target_group_sparsity, unless another target is given
RANKINGS = ("global", "per_layer", "per_block")


def whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigurationError(f"{name} is {value!r}; it has to be a whole number, at least {least}")


def tensor_roles(value: Any) -> tuple[Role, ...]:
    """Roles of tensor slices, ``zero`` among them."""
    known = [r.value for r in Role if r.is_tensor]
    # A lone string would be taken apart into letters.
    roles = tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else ()
    if Role.ZERO not in roles or not all(r in known for r in roles):
        raise ConfigurationError(f"importance_roles is {value!r}; give a tuple of {known}, 'zero' among them")
    return tuple(Role(r) for r in roles)


def finite(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse what is no finite number, or below ``least``."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        rule = "" if least == -math.inf else f", at least {least}"
        raise ConfigurationError(f"{name} is {value!r}; it has to be a finite number{rule}")


def share(name: str, value: Any) -> None:
    """Refuse what is not in [0, 1)."""
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        rule = "0 <= sparsity < 1" if "sparsity" in name else f"0 <= {name} < 1"
        raise ConfigurationError(f"{name} is {value!r}; the rule is {rule}")


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """Refuse a name that is not known."""
    if not isinstance(value, str) or value not in known:
        raise ConfigurationError(f"{name} is {value!r}; it has to be one of {tuple(known)}")


def flag(name: str, value: Any) -> None:
    """Refuse what is no truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigurationError(f"{name} is {value!r}; it has to be True or False")


@dataclass(frozen=True)
class Schedule:
    """The arguments that fix which step does what; a saved state only fits the same ones."""

    target_group_sparsity: float | None  # None: the target is another, see `Budget`
    start_pruning_step: int
    pruning_steps: int
    pruning_periods: int
    group_divisible: int

    def __post_init__(self) -> None:
        for f in fields(self)[1:]:
            whole(f.name, getattr(self, f.name), 0 if f.name == "start_pruning_step" else 1)
        if self.target_group_sparsity is not None:
            share("target_group_sparsity", self.target_group_sparsity)
        if self.pruning_steps < self.pruning_periods:
            raise ConfigurationError(
                f"pruning_steps ({self.pruning_steps}) < pruning_periods ({self.pruning_periods}); every period needs "
                f"at least one step: raise pruning_steps or lower pruning_periods"
            )
        # Plain numbers: numpy's would make a saved state unreadable under weights_only=True.
        for f in fields(self):
            plain = float if f.name == "target_group_sparsity" else int
            if getattr(self, f.name) is not None:
                object.__setattr__(self, f.name, plain(getattr(self, f.name)))

    @property
    def when(self) -> dict[str, int]:
        """Start, length and number of periods, as the functions of ``schedules`` take them."""
        return {"start": self.start_pruning_step, "steps": self.pruning_steps, "periods": self.pruning_periods}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The arguments, common to all methods, that say how much is left in the end, and of what.

    At most one of the targets is given, ``target_group_sparsity`` included. Each says what is *kept*: a number up to 1
    is the share of the full model, a larger one the parameters, FLOPs or bytes themselves; seconds are written with
    their unit, ``"5 ms"``.

    Args:
        target_params: parameters.
        target_flops: FLOPs of a forward pass on the example inputs, two per multiply-accumulate.
        target_memory: bytes of weights and activations of such a pass, see ``budgets``.
        target_latency: seconds of such a pass by ``latency_table``.
        latency_table: a `LatencyTable`, or the dictionary of one.
        min_units: units every group keeps; below 1 a share of its units. A dictionary gives it by group, module or
            parameter name (``*`` for any letters), for those that it names.
        max_units: units a group has in the end at most, written in the same ways; None for any number.
        ranking: "global": all units compete. "per_layer": all groups lose the same share. "per_block": the groups
            that are the same layer of a repeated block compete, and all such sets lose the same share.
        scarcity: scores count times (full size / size now of the group) to this power.
        cost_exponent: and are divided by what the unit saves to this power, for a target in a cost.
        ramp: "linear": all periods take the same; "geometric": the same share of what is left.
        uniform: the groups that are the same layer of a repeated block all end with the same number of units.
        align: the multiple that layers prefer to be wide; 1 for any width, "auto" for what kernels of the device and
            dtype like (less for groups of few units). No target is missed for it: where it cannot be met with all
            layers aligned, the widest are not.
    """

    target_params: float | None = None
    target_flops: float | None = None
    target_memory: float | None = None
    target_latency: float | str | None = None
    latency_table: Any = None
    min_units: Any = 1
    max_units: Any = None
    ranking: str = "global"
    scarcity: float = 0.0
    cost_exponent: float = 0.0
    ramp: str = "linear"
    uniform: bool = False
    align: int | str = "auto"

    def __post_init__(self) -> None:
        given = [f"target_{m}" for m in MEASURES if getattr(self, f"target_{m}") is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} are given; a network has one target: leave one of them")
        for m in MEASURES:
            value = getattr(self, f"target_{m}")
            if value is not None:
                _checked_target(m, value)
                plain = value if isinstance(value, str) else float(value)
                object.__setattr__(self, f"target_{m}", plain)
        table = self.latency_table
        if table is not None and not isinstance(table, LatencyTable):
            object.__setattr__(self, "latency_table", LatencyTable.from_dict(table))
        if self.target_latency is not None and table is None:
            raise ConfigurationError(
                "target_latency is given without a latency_table: give oto.measure_latency(), or a table from elsewhere"
            )
        one_of("ranking", self.ranking, RANKINGS)
        one_of("ramp", self.ramp, RAMPS)
        flag("uniform", self.uniform)
        if self.align != "auto":
            if isinstance(self.align, str):
                raise ConfigurationError(f"align is {self.align!r}; it has to be a whole number, at least 1, or 'auto'")
            whole("align", self.align, 1)
            object.__setattr__(self, "align", int(self.align))
        for name in ("scarcity", "cost_exponent"):
            finite(name, getattr(self, name), 0)
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.cost_exponent and self.measure is None:
            raise ConfigurationError(
                f"cost_exponent is {self.cost_exponent}, but the target is a share of units, which cost the same: give "
                f"target_flops or another cost, or leave it at 0"
            )
        object.__setattr__(self, "min_units", _units_to_keep("min_units", self.min_units))
        if self.max_units is not None:
            object.__setattr__(self, "max_units", _units_to_keep("max_units", self.max_units))

    @classmethod
    def of(cls, target_group_sparsity: Any, arguments: Mapping[str, Any]) -> tuple[Budget, Any]:
        """The budget, and the target in units: the given one, or None where the target is another."""
        budget = cls(**arguments)
        if budget.measure is None:
            share("target_group_sparsity", target_group_sparsity)
            return budget, target_group_sparsity
        if not isinstance(target_group_sparsity, Unstated):
            raise ConfigurationError(
                f"target_group_sparsity ({target_group_sparsity!r}) and target_{budget.measure} "
                f"({budget.target!r}) are given; a network has one target: leave one of them"
            )
        return budget, None

    @property
    def measure(self) -> str | None:
        """What the target is in; None for units."""
        return next((m for m in MEASURES if getattr(self, f"target_{m}") is not None), None)

    @property
    def target(self) -> Any:
        """The target as it was given."""
        return None if self.measure is None else getattr(self, f"target_{self.measure}")

    def level(self, full: float) -> float:
        """The target as a number of parameters, FLOPs, bytes or seconds, of a model that has ``full``."""
        assert self.measure is not None
        value = _seconds(self.target) if isinstance(self.target, str) else self.target
        if not isinstance(self.target, str) and value <= 1:
            return value * full
        if value > full:
            raise ConfigurationError(
                f"target_{self.measure} is {self.target!r}; the full model has {shown(self.measure, full)}, and "
                f"nothing is added to it: give less, or a share of it up to 1"
            )
        return value

    def saved(self) -> dict[str, Any]:
        """What a saved state has to agree in: all that is not the default, as plain values."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.latency_table is not None:
            table = json.dumps(self.latency_table.to_dict(), sort_keys=True)
            out["latency_table"] = hashlib.sha256(table.encode()).hexdigest()[:16]
        return out


_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def _seconds(text: str) -> float:
    """``"5 ms"``; 0 for what is no such text."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?) *(s|ms|us)", text.strip())
    return float(match[1]) * _SECONDS[match[2]] if match else 0.0


def _checked_target(measure: str, value: Any) -> None:
    name = f"target_{measure}"
    if measure == "latency":
        number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and 0 < value <= 1
        if not number and not (isinstance(value, str) and _seconds(value) > 0):
            raise ConfigurationError(
                f"{name} is {value!r}; the rule is 0 < {name} <= 1, the share that is kept, or a text like '5 ms'"
            )
        return
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{name} is {value!r}; the rule is 0 < {name} <= 1, the share that is kept, or the number itself above 1"
        )


def _units_to_keep(name: str, value: Any) -> Any:
    """Plain numbers: whole ones, shares below 1, or a dictionary of them."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ConfigurationError(f"{name} has the keys {list(value)[:5]}; they have to be names")
        return {key: _units_to_keep(f"{name}[{key!r}]", each) for key, each in value.items()}
    whole_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
    if whole_number:
        return int(value)
    if isinstance(value, (float, np.floating)) and 0 < value < 1:
        return float(value)
    raise ConfigurationError(f"{name} is {value!r}; it has to be a whole number from 1 on, or a share between 0 and 1")
