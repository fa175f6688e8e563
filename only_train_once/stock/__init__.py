"""Subnets as ordinary models of transformers and timm: a smaller configuration, the same class, the same names.

`to_stock` gives the model, `save_pretrained` writes it. What a configuration can say is in ``families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import folder
from ..errors import CheckpointError, ConfigurationError
from ..inputs import Inputs, validate_inputs
from . import timm_models, transformers_models
from .freezing import reasons_to_stay
from .layers import zero_layers
from .timm_models import is_of_timm

__all__ = ["reasons_to_stay", "save_pretrained", "to_stock", "zero_layers"]


def to_stock(
    model: nn.Module, inputs: Inputs | None, *, pad: bool = False, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """The subnet ``model`` as what its library builds from a smaller configuration, compared with it.

    Args:
        inputs: example inputs for the comparison.
        pad: fill up with zeros what a configuration has no number for: layers that are narrower than the widest,
            heads where their number is fixed.
        arguments: further arguments for ``timm.create_model``.

    Raises:
        StockError: the configuration cannot say what the subnet is; names the layer and the field.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if inputs is None:
        raise ConfigurationError(
            "a stock model is compared with the subnet before it is given out: pass inputs=, example inputs as for "
            "OTO(model, dummy_input=...)"
        )
    validate_inputs(inputs)
    if not isinstance(pad, bool):
        raise ConfigurationError(f"pad={pad!r}: True or False")
    if is_of_timm(model):
        return timm_models.convert(model, inputs, pad=pad, arguments=dict(arguments or {}))
    if arguments:
        raise ConfigurationError(f"arguments={dict(arguments)!r}: only models of timm take them")
    return transformers_models.convert(model, inputs, pad=pad)


def save_pretrained(model: nn.Module, inputs: Inputs | None, out_dir: str | Path, **options: Any) -> Path:
    """Write `to_stock` in the format of its library; returns the folder.

    A model of transformers is read by ``from_pretrained(folder)``, one of timm by
    ``create_model("local-dir:folder", pretrained=True)``.

    Raises:
        StockError: as for `to_stock`; nothing was written then.
        CheckpointError: the folder cannot be written.
    """
    directory = folder(out_dir)
    if directory.is_file():
        raise ConfigurationError(f"{directory} is a file: give a folder's path")
    stock: Any = to_stock(model, inputs, **options)
    try:
        (timm_models if is_of_timm(model) else transformers_models).save(stock, directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; give another folder") from error
    return directory
