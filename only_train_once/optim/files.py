"""States of a method in ``torch.distributed.checkpoint``: what its files hold, and what they cannot.

That library loads into what is there: a fresh optimizer whose ``state_dict`` lacks an entry does not get it. Between
averaging windows, and outside the cycles of HESSO-CRIC, nothing is lacking. Inside one, `expect` looks into the files
and makes room, so that the run goes on as if it had not stopped::

    expect(optimizer, "checkpoints/900")
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id="checkpoints/900")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])

With ``StateDictOptions(flatten_optimizer_state_dict=True)`` only what live param groups and states hold is read back,
so the method's part does not come through. `MethodState` is that part alone, to be saved and loaded beside it::

    expect(optimizer, "checkpoints/900")  # where something is loaded
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    state = {"optimizer": MethodState.without(flat), "method": MethodState(optimizer)}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer

from only_train_once.errors import ConfigurationError
from only_train_once.optim.base import COMPANION, ENTRY, AttachedOptimizer
from only_train_once.optim.state import check_entry, damaged


def _attached(optimizer: Optimizer) -> AttachedOptimizer:
    if not isinstance(optimizer, AttachedOptimizer):
        raise ConfigurationError(f"no method is attached to this {type(optimizer).__name__}; attach it first")
    return optimizer


def expect(optimizer: Optimizer, checkpoint: str | Path | Iterable[str]) -> None:
    """Make an optimizer's ``state_dict`` have the entries that a checkpoint holds of its method; call before loading.

    Args:
        optimizer: with a method attached.
        checkpoint: folder of a ``torch.distributed.checkpoint``, or the names of the entries in another kind of storage
            (``reader.read_metadata().state_dict_metadata``).
    """
    attached = _attached(optimizer)
    method = attached._method
    if isinstance(checkpoint, (str, Path)):
        from torch.distributed.checkpoint import FileSystemReader

        checkpoint = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found: dict[str, set[str]] = {}  # what -> parameters it was saved for
    for key in checkpoint:
        before, mark, what = key.partition(f".{COMPANION}")
        if mark:
            names = (n for n in method.named_tensors if before == n or before.endswith(f".{n}"))
            found.setdefault(what.partition(".")[0], set()).add(max(names, key=len, default=before))
    if found and not attached.state:
        _initialise(attached)  # a copy of the run holds the optimizer's state, too
    method.expect(attached, {what: names & method.named_tensors.keys() for what, names in found.items()})


def _initialise(optimizer: AttachedOptimizer) -> None:
    """Make an optimizer create its state as ``torch.distributed.checkpoint`` does, by a step that changes nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group, rate in rates:
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in rates:
        group["lr"] = rate
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


class MethodState:
    """A method's part of an optimizer's state, for ``torch.distributed.checkpoint`` (it has its two functions)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = _attached(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What the method saves, tensors under the names of the parameters they belong to."""
        state: dict[str, dict[str, Any]] = {}
        for what, named in self.optimizer._method.companions.items():
            for name, value in named.items():
                state.setdefault(name, {})[COMPANION + what] = value
        return {ENTRY: self.optimizer.state_dict()["param_groups"][0][ENTRY], "state": state}

    @staticmethod
    def without(flat: Mapping[str, Any]) -> dict[str, Any]:
        """A flattened state of the optimizer without the method's part, which would be written once per parameter."""
        return {key: value for key, value in flat.items() if ENTRY not in key}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: it is damaged or foreign, or belongs to another partition into groups or to another
                schedule. Nothing was changed then.
        """
        method, entry = self.optimizer._method, state_dict.get(ENTRY)
        if entry is None:
            raise damaged(ENTRY, list(state_dict)[:5], "what MethodState.state_dict() returned")
        companions: dict[str, dict[str, Any]] = {}
        for name, values in state_dict.get("state", {}).items():
            for what, value in values.items():
                companions.setdefault(what.removeprefix(COMPANION), {})[name] = value
        check_entry(ENTRY, cast("dict[str, Any]", entry), method)
        method.check_state(entry, companions)
        method.step = int(entry["step"])
        method.load_state(entry, companions)
