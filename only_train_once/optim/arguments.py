"""Checks of arguments: each names the argument, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from only_train_once.errors import ConfigurationError
from only_train_once.groups import Role


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

    target_group_sparsity: float
    start_pruning_step: int
    pruning_steps: int
    pruning_periods: int
    group_divisible: int

    def __post_init__(self) -> None:
        for f in fields(self)[1:]:
            whole(f.name, getattr(self, f.name), 0 if f.name == "start_pruning_step" else 1)
        share("target_group_sparsity", self.target_group_sparsity)
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
        """Start, length and number of periods, as the functions of ``schedules`` take them."""
        return {"start": self.start_pruning_step, "steps": self.pruning_steps, "periods": self.pruning_periods}
