"""Models of timm: the arguments of ``create_model`` that give smaller layers.

timm writes down with what arguments a model was created; a subnet is the same name with other ones. Where the
constructor takes a ratio, n of ``embed_dim`` neurons are (n + 1/2) / embed_dim: times ``embed_dim`` and rounded down
that is n, whatever the division rounds to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StockError
from ..inputs import Inputs, dtype_of
from .convert import WAY_OUT, Maker, reach, stock_model
from .families import TIMM, Family


def is_of_timm(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.")


def family_of(model: nn.Module) -> Family:
    """The row of `TIMM` that the model belongs to.

    Raises:
        StockError: its class has none.
    """
    kind = type(model).__name__
    if kind not in TIMM:
        raise StockError(
            f"no table says which arguments of timm.create_model hold the widths of a {kind}; known are "
            f"{', '.join(sorted(TIMM))}. Add a row to only_train_once/stock/families.py, or {WAY_OUT}"
        )
    return TIMM[kind][0]


def convert(model: Any, inputs: Inputs, *, pad: bool, arguments: Mapping[str, Any]) -> Any:
    """See `stock.to_stock`."""
    family = family_of(model)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise StockError(f"this {type(model).__name__} was not made by timm.create_model, so it has no name: {WAY_OUT}")
    given = {**getattr(model, "_model_args", {}), "num_classes": model.num_classes, **arguments}
    maker = Maker(
        name=f"timm.create_model({name!r})",
        build=lambda settings: _construct(model, name, given, settings),
        full=given.get,
    )
    return stock_model(model, inputs, family, maker, pad=pad)


def _construct(model: Any, name: str, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    import timm

    family, widths = TIMM[type(model).__name__]
    stack = family.stacks[0]
    ratios = tuple((settings[width] + 0.5) / model.embed_dim for width in widths)
    arguments = {**given, "mlp_ratio": ratios if len(ratios) > 1 else ratios[0]}
    if settings[stack.count] != len(reach(model, stack.layers)):
        arguments[stack.count] = settings[stack.count]
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        stock = timm.create_model(name, pretrained=False, **arguments)
    return stock.to(next((p.device for p in model.parameters()), torch.device("cpu")), dtype_of(model))


def save(stock: Any, directory: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(stock, str(directory), safe_serialization=True)
