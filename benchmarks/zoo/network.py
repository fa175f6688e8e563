"""`Network`: one network of the zoo, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from only_train_once.inputs import Inputs


@dataclass(frozen=True)
class Network:
    """A network and what it takes.

    Attributes:
        model: in evaluation mode, with random weights.
        inputs: seed -> inputs; another seed gives other values in the same shapes.
        note: what is unusual about it, for the table of results.
    """

    model: nn.Module
    inputs: Callable[[int], Inputs]
    note: str = ""
