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
    """Set regions to 0 in the tensors and in every optimizer state tensor of the same shape."""
    for region in regions:
        tensor = tensors[region.name]
        region.zero_(tensor)
        for value in state.get(tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                assert local(value).shape == local(tensor).shape, f"the state of {region.name} lies elsewhere"
                region.zero_(value)


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
