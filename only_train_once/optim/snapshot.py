"""A run as it stood at one step: parameters, the optimizer's state of them, buffers. Taken, put back, saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from only_train_once.optim.state import check_shapes, damaged
from only_train_once.sharding import like, part_of


class Snapshot:
    """Copies of all tensors by name.

    Attributes:
        parameters: name -> {"value": tensor, "state": the optimizer's state of it}.
        buffers: name -> tensor, running statistics for one.
    """

    def __init__(self, parameters: dict[str, dict[str, Any]], buffers: dict[str, Tensor]) -> None:
        self.parameters, self.buffers = parameters, buffers

    @classmethod
    def take(cls, optimizer: Optimizer, named_tensors: Mapping[str, Tensor]) -> Snapshot:
        """Copy what the optimizer trains and the buffers that were given."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {
            name: {"value": t.detach().clone(), "state": copy.deepcopy(dict(optimizer.state.get(t, {})))}
            for name, t in named_tensors.items()
            if id(t) in owned
        }
        buffers = {n: t.detach().clone() for n, t in named_tensors.items() if not isinstance(t, nn.Parameter)}
        return cls(parameters, buffers)

    @torch.no_grad()
    def put_back(self, optimizer: Optimizer, named_tensors: Mapping[str, Tensor]) -> None:
        """Make everything as it was, in place: the tensors stay the same objects."""
        for name, entry in self.parameters.items():
            parameter = named_tensors[name]
            parameter.copy_(entry["value"])
            if not entry["state"]:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            for key in [k for k in state if k not in entry["state"]]:
                del state[key]
            for key, value in entry["state"].items():
                now = state.get(key)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                    now.copy_(value)
                else:
                    state[key] = copy.deepcopy(value)
        for name, value in self.buffers.items():
            named_tensors[name].copy_(value)


def check_snapshot(parameters: Mapping[str, Any], buffers: Any, named_tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless these can be put back."""
    for name, entry in parameters.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("state"), Mapping):
            raise damaged(f"snapshot of {name}", entry, "a dictionary of a value and a state")
    check_shapes("snapshot", {name: entry.get("value") for name, entry in parameters.items()}, named_tensors)
    if not isinstance(buffers, Mapping):
        raise damaged("buffers", buffers, "a dictionary of tensors")
    check_shapes("snapshot", buffers, named_tensors)


def load_snapshot(
    parameters: Mapping[str, Any], buffers: Mapping[str, Tensor], named_tensors: Mapping[str, Tensor]
) -> Snapshot:
    """The snapshot that was saved, on the devices of the tensors."""

    def here(value: Any, name: str) -> Any:
        tensor = named_tensors[name]
        # Step counters stay where the optimizer keeps them; what has a shape goes with the parameter.
        if not isinstance(value, Tensor) or not value.dim():
            return copy.deepcopy(value)
        if value.shape == tensor.shape:
            value = like(tensor, part_of(value, tensor))
        return value.to(tensor.device, copy=True)

    return Snapshot(
        {
            n: {"value": here(e["value"], n), "state": {k: here(v, n) for k, v in e["state"].items()}}
            for n, e in parameters.items()
        },
        {n: b.to(named_tensors[n].device, copy=True) for n, b in buffers.items()},
    )
