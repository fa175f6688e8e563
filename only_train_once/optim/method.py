"""What a pruning method is to the optimizer it is attached to."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup
from only_train_once.optim.arguments import Budget
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.cutting import Kept

Companions = Mapping[str, Mapping[str, Any]]  # what it is -> parameter name -> tensor, or a dictionary of tensors


class Method(ABC):
    """A pruning method: what happens before and after the base optimizer's step.

    It holds parameters by reference, so ``copy.deepcopy((model, optimizer))`` copies it consistently.

    [Note: numbers of units]
    Units can leave the network for good while it trains. Whatever counts units (schedules, choices, ``removed``, saved
    states) goes on with ``groups`` and their numbers; what indexes tensors goes by ``current``, the groups of the units
    that are ``present``. So everything that is said about a unit says it under the number that it always had.

    Attributes:
        groups: the candidates, as they were found.
        present: one flag per unit of them, False once it has left.  (units,)
        current: the same groups without the units that have left; their slices fit the tensors.
    """

    name: ClassVar[str]

    def __init__(self, candidates: Candidates) -> None:
        self.groups = self.current = candidates.groups
        self.present = np.ones(sum(g.size for g in self.groups), dtype=np.bool_)
        self.dropped = candidates.dropped
        self.tensors = candidates.tensors
        self.trained = candidates.trained
        self.named_tensors = candidates.named_tensors
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
    def settled(self) -> NDArray[np.bool_]:
        """One flag per unit: nothing would change if it left the network now.  (units,)"""
        units = [np.isin(np.arange(g.size), self.removed[g.name]) for g in self.groups]
        return np.concatenate(units)

    @property
    def just_settled(self) -> bool:
        """Whether the step that was just taken settled units."""
        return False

    @property
    def follows(self) -> bool:
        """Whether units may leave now that another method over the same tensors settled."""
        return True

    def leave(self, groups: Sequence[PruningGroup], present: NDArray[np.bool_], kept: Kept) -> None:
        """Units have left: take over what is left of the groups, and cut what has a tensor's shape.

        Args:
            groups: those of ``current`` without the units.
            present: flags by the numbers of ``groups``.
            kept: tensor -> dim -> positions that stayed.
        """
        self.current, self.present = tuple(groups), present

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether counting steps no longer matters."""

    def ready(self) -> None:  # noqa: B027
        """Called before the forward pass of the step ``self.step``: when a step is over, when the method was attached
        or copied, when a state was loaded.
        """

    @abstractmethod
    def before(self, optimizer: Optimizer) -> None:
        """Called once per step, when gradients are there and no weight has changed."""

    @abstractmethod
    def after(self, optimizer: Optimizer) -> None:
        """Called after the base step; ``self.step`` is still the number of this step."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What has to be saved: numbers, strings, lists, small tensors."""

    @property
    def companions(self) -> Companions:
        """What has to be saved with the state of single parameters."""
        return {}

    def expect(self, optimizer: Optimizer, what: Mapping[str, Collection[str]]) -> None:  # noqa: B027
        """Make room among the `companions`: what they are -> the parameters for which they will be loaded."""

    @abstractmethod
    def check_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        """Raise CheckpointError unless `load_state` can take these."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any], companions: Companions) -> None:
        """Take over a saved state."""


METHODS: dict[str, Callable[..., Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Make a method known to `attach` under its ``name``."""
    assert cls.name not in METHODS, f"method {cls.name!r} is registered twice"
    METHODS[cls.name] = cls
    return cls


def accepted_arguments(method: str) -> list[str]:
    """Names of the arguments a method takes from users."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    own = [p.name for p in parameters if p.name != "candidates" and p.kind is not p.VAR_KEYWORD]
    takes_budget = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return own + [f.name for f in fields(Budget) if takes_budget]
