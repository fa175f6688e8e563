"""Entries at zero: set there with the optimizer's state, and held there where something would move them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from only_train_once.masking import Region
from only_train_once.sharding import local


def zero_entries_(
    regions: Iterable[Region], tensors: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Set regions to 0 in the tensors and in every optimizer state tensor of the same shape that holds numbers.

    Codes of quantized moments are left alone: 0 among them stands for some number.
    """
    for region in regions:
        tensor = tensors[region.name]
        region.zero_(tensor)
        for value in state.get(tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == tensor.shape and _holds_numbers(value):
                assert local(value).shape == local(tensor).shape, f"the state of {region.name} lies elsewhere"
                region.zero_(value)


def slow_weights(optimizer: Optimizer, tensor: Tensor) -> tuple[Tensor, ...]:
    """Other values of these weights that the optimizer keeps, and that have to change along.

    Schedule-free optimizers train at y and are evaluated at x, both of which are made of each other and of z.
    """
    if "train_mode" not in optimizer.param_groups[0]:
        return ()
    kept = optimizer.state.get(tensor, {}).get("z")
    return (kept,) if isinstance(kept, Tensor) and kept.shape == tensor.shape else ()


def _holds_numbers(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def mixes_entries(optimizer: Optimizer) -> bool:
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
