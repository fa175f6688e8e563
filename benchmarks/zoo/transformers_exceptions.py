"""`Exception_`: what a model type needs beside the general shrinking and the general inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from .transformers_inputs import Draw
from .transformers_shrink import parts


@dataclass(frozen=True)
class Exception_:
    """What is different for a type.

    Attributes:
        config: dotted field -> value, set after shrinking, wherever a configuration of this type occurs (so what is
            set for ``clip_vision_model`` also holds inside ``llava``; the outer type is set last). A callable gets
            the configuration that holds the field and returns the value.
        inputs: argument -> maker, or None to leave it out. Arguments that the forward does not name may be given too.
        cls: name of the class in transformers, or ``module:class`` for one that its modeling module keeps to itself.
        make: the configuration before shrinking, where the default cannot be made.
        small: what ``make`` gives is small already and stays as it is.
        note: for the table.
    """

    config: dict[str, Any | Callable[[Any], Any]] = field(default_factory=dict)
    inputs: dict[str, Callable[[Draw], Any] | None] = field(default_factory=dict)
    cls: str = ""
    make: Callable[[], PretrainedConfig] | None = None
    small: bool = False
    note: str = ""


def configure(config: PretrainedConfig, table: dict[str, Exception_]) -> None:
    """Set the fields that the exceptions of a configuration and of those inside it name, the inner ones first."""
    for part in reversed(list(parts(config))):
        for path, value in (table[part.model_type].config if part.model_type in table else {}).items():
            *holders, name = path.split(".")
            holder = part
            for each in holders:
                holder = holder[each] if isinstance(holder, dict) else getattr(holder, each)
            value = value(holder) if callable(value) else value
            if isinstance(holder, dict):
                holder[name] = value
            else:
                setattr(holder, name, value)
