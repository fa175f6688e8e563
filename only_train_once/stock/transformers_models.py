"""Models of transformers: their row in `FAMILIES`, and building one from its configuration with other settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StockError
from ..inputs import Inputs, dtype_of
from .convert import WAY_OUT, Maker, stock_model
from .families import FAMILIES, Family


def family_of(model: nn.Module) -> Family:
    """The row of `FAMILIES` that a model of transformers belongs to.

    Raises:
        StockError: it is no model of transformers, or of a type without a row.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    bases = [base for base in type(model).__mro__ if base.__name__ == "PreTrainedModel"]
    if not any(base.__module__.startswith("transformers.") for base in bases):
        raise StockError(
            f"{type(model).__name__} is no model of transformers or timm, so there is no configuration to write: "
            f"{WAY_OUT}"
        )
    if not type(model).__module__.startswith("transformers."):
        raise StockError(
            f"{type(model).__name__} is a class of {type(model).__module__}, which others cannot load by transformers "
            f"alone: {WAY_OUT}"
        )
    if kind not in FAMILIES:
        raise StockError(
            f"no table says how a {kind!r} configuration holds its widths; known are {', '.join(sorted(FAMILIES))}. "
            f"Add a row to only_train_once/stock/families.py, or {WAY_OUT}"
        )
    return FAMILIES[kind]


def convert(model: Any, inputs: Inputs, *, pad: bool) -> Any:
    """See `stock.to_stock`."""
    family = family_of(model)
    config = model.config
    maker = Maker(
        name=type(config).__name__,
        build=lambda settings: _construct(model, settings),
        full=lambda field: getattr(config, field, None),
        per_layer=hasattr(type(config), "per_layer_config"),
    )
    stock = stock_model(model, inputs, family, maker, pad=pad)
    if getattr(model, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


def _construct(model: Any, settings: Mapping[str, Any]) -> Any:
    """A model of the same class from its configuration with other settings, as it would be read from a file."""
    kind = type(model.config)
    config = kind.from_dict(kind.from_dict(model.config.to_dict() | dict(settings)).to_dict())
    options: dict[str, Any] = {"dtype": dtype_of(model)}
    attention = getattr(model.config, "_attn_implementation", None)
    if attention is not None:
        options["attn_implementation"] = attention
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        stock = type(model)._from_config(config, **options)
    return stock.to(next((p.device for p in model.parameters()), torch.device("cpu")))


def save(stock: Any, directory: Path) -> None:
    stock.save_pretrained(directory)
