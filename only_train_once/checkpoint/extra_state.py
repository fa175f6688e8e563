"""What modules keep beside their tensors (``get_extra_state``): as JSON, its tensors under names in the tensor files.

Only numbers, strings, lists, dicts and tensors are taken. Bytes are not, as a tensor of bytes neither: a module that
keeps a pickle in one would unpickle what it reads, and loading runs nothing that is in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_KEY = "tensor"  # {"tensor": name} stands for a tensor; a dict of the user's with this key only is refused


def collect(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Module path -> its extra state with names in place of tensors, and the tensors by these names.

    Raises:
        CheckpointError: an extra state holds something else.
    """
    states: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            prefix = f"{path}._extra_state" if path else "_extra_state"
            try:
                states[path] = _encoded(module.get_extra_state(), prefix, tensors)
            except ValueError as error:
                raise CheckpointError(
                    f"{path!r} ({type(module).__name__}) keeps extra state that is not saved here: {error}; numbers, "
                    "strings, lists, dicts with names for keys and tensors are"
                ) from error
    return states, tensors


def restore(model: nn.Module, states: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hand every module its extra state."""
    owners = {name: module for name, module in model.named_modules() if _keeps(module)}
    if owners.keys() != states.keys():
        raise CheckpointError(
            f"{path} does not fit the model: it holds extra state of {sorted(states)[:5]}, and the modules that keep "
            f"some are {sorted(owners)[:5]}"
        )
    for name, module in owners.items():
        try:
            module.set_extra_state(_decoded(states[name], tensors))
        except Exception as error:  # the module's own code, which may expect anything
            raise CheckpointError(
                f"{path}: {name!r} ({type(module).__name__}) does not take the extra state that was saved: "
                f"{type(error).__name__}: {error}"
            ) from error


def _keeps(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _encoded(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if value.dtype in (torch.uint8, torch.int8):
            raise ValueError("it holds a tensor of bytes")
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = value
        return {_KEY: name}
    if type(value) is list:
        return [_encoded(each, prefix, tensors) for each in value]
    if type(value) is dict and all(type(key) is str for key in value) and list(value) != [_KEY]:
        return {key: _encoded(each, prefix, tensors) for key, each in value.items()}
    raise ValueError(f"it holds a {type(value).__name__}")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if list(value) == [_KEY]:
        return tensors[value[_KEY]]
    return {key: _decoded(each, tensors) for key, each in value.items()}
