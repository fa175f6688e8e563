"""Cutting what belongs to parameters: optimizer state and sums of gradients, by shape.

An entry of the optimizer's state is one number per entry of its parameter (moments, momentum, the slow weights of an
average), or one per index of some of its dims with size 1 in the others (Adafactor's rows and columns), or a number.
Each is cut where its parameter is. Anything else (the history of L-BFGS, preconditioners, blocks of quantized
moments) mixes entries in a way that only the optimizer knows, and is refused before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from only_train_once.errors import ConfigurationError

Kept: TypeAlias = "Mapping[str, Mapping[int, NDArray[np.int64]]]"  # tensor -> dim -> positions that stay


def cut(tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """What stays of a tensor, laid out in memory as it was; dims of size 1 stand for all positions and stay."""
    out = tensor
    for dim, positions in kept.items():
        if tensor.shape[dim] > 1:
            out = out.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return out
    return out.contiguous(memory_format=layout)


def refuse_uncuttable(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigurationError where cuts can be seen to be impossible before there is any state."""
    if isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            "units cannot leave physically under LBFGS: its state is a history of all parameters in one vector; use "
            "another optimizer, or physical_cuts=False"
        )
    strange = {n: type(t.detach()).__name__ for n, t in tensors.items() if _is_exotic(t)}
    if strange:
        name, kind = next(iter(strange.items()))
        raise ConfigurationError(
            f"units cannot leave physically: {name!r} is a {kind}, not a plain tensor (sharded and quantized ones keep "
            f"their size); use physical_cuts=False, and construct_subnet at the end"
        )


def _is_exotic(tensor: Tensor) -> bool:
    data = tensor.detach()
    return type(data) is not Tensor or data.layout is not torch.strided or data.is_quantized


def state_cuts(optimizer: Optimizer, tensors: Mapping[str, Tensor], kept: Kept) -> list[Callable[[], None]]:
    """What is to be called to cut the optimizer's state; changes nothing.

    Args:
        optimizer: the state's owner; parameters it does not train are passed over.
        tensors: name -> parameter, in the shape that it still has.
        kept: see `Kept`.

    Raises:
        ConfigurationError: an entry's shape does not say how it goes with its parameter.
    """
    refuse_uncuttable(optimizer, {})
    for name, tensor in tensors.items():
        for key, value, _ in _leaves(optimizer.state.get(tensor, {})):
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and v.numel() > 1 for v in value):
                raise _refusal(optimizer, name, key, "a list of tensors", tensor)
    actions: list[Callable[[], None]] = []
    for name, dims in kept.items():
        tensor = tensors[name]
        for key, value, owner in _leaves(optimizer.state.get(tensor, {})):
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue
            fits = value.dim() == tensor.dim() and all(
                n in (1, m) for n, m in zip(value.shape, tensor.shape, strict=True)
            )
            if not fits or _is_exotic(value):
                raise _refusal(optimizer, name, key, f"of shape {list(value.shape)}", tensor)
            actions.append(_replacing(owner, key, value, dims))
    return actions


def _leaves(state: Any) -> Iterator[tuple[Any, Any, dict[Any, Any]]]:
    """Key, value and dictionary of every entry, those of dictionaries inside included."""
    for key, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value, state


def _replacing(
    owner: dict[Any, Any], key: Any, value: Tensor, dims: Mapping[int, NDArray[np.int64]]
) -> Callable[[], None]:
    def act() -> None:
        owner[key] = cut(value, dims)

    return act


def _refusal(optimizer: Optimizer, name: str, key: Any, what: str, tensor: Tensor) -> ConfigurationError:
    return ConfigurationError(
        f"{type(optimizer).__name__} keeps {key!r} {what} for {name!r} of shape {list(tensor.shape)}, and nothing says "
        "how to cut it; nothing was changed. Use another optimizer, or physical_cuts=False"
    )
