"""What a saved state has to look like, and what to say when it does not."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from only_train_once.errors import CheckpointError
from only_train_once.optim.candidates import fingerprint
from only_train_once.optim.method import Method

STATE_VERSION = 1


def damaged(name: str, value: Any, expected: str) -> CheckpointError:
    """What to raise for an entry of a saved state that no run can have written."""
    return CheckpointError(
        f"the optimizer state is damaged: {name!r} is {str(value)[:80]!r}, expected {expected}; load another copy"
    )


def saved_count(state: Mapping[str, Any], name: str) -> int:
    """A whole number, at least 0, from a saved state."""
    value = state.get(name)
    try:
        number = -1 if value is None or isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise damaged(name, value, "a whole number, at least 0")
    return number


def saved_per_unit(state: Mapping[str, Any], name: str, units: int) -> NDArray[np.int64]:
    """A whole number per unit, none negative, from a saved state.  (units,)"""
    value = state.get(name)
    try:
        found = torch.as_tensor(value).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged(name, value, "a tensor of whole numbers") from error
    if found.shape != (units,):
        raise CheckpointError(
            f"the optimizer state is damaged: {name!r} has to hold numbers for {units} units and is a tensor of shape "
            f"{tuple(found.shape)}"
        )
    if found.dtype.kind not in "iu" or found.min() < 0:
        raise damaged(name, value, "a tensor of whole numbers, none of them negative")
    return found.astype(np.int64)


def check_shapes(what: str, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless every saved tensor has the shape of the parameter it was saved with."""
    for name, value in saved.items():
        if name not in tensors or not isinstance(value, Tensor) or value.shape != tensors[name].shape:
            expected = tuple(tensors[name].shape) if name in tensors else "none"
            raise damaged(f"{what} of {name}", getattr(value, "shape", value), f"a tensor of shape {expected}")


def check_state_dict(state_dict: Any) -> None:
    """Raise CheckpointError unless this is what an optimizer's ``state_dict`` returns."""
    found = state_dict if isinstance(state_dict, Mapping) else {}
    groups, state = found.get("param_groups"), found.get("state")
    sound = isinstance(groups, (list, tuple)) and all(
        isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in groups
    )
    if not sound or not isinstance(state, Mapping):
        what = f"a dictionary with {list(found)[:5]}" if found else f"{type(state_dict).__name__} {state_dict!r:.80}"
        raise CheckpointError(
            f"the state_dict is foreign or damaged: an optimizer's has the entries 'state' and 'param_groups', this is "
            f"{what}; give what optimizer.state_dict() returned"
        )


def check_entry(where: str, entry: Mapping[str, Any], method: Method) -> None:
    """Raise CheckpointError unless ``entry``, found under ``where``, fits this method's groups."""
    if not isinstance(entry, Mapping):
        raise damaged(where, entry, "a dictionary")
    if entry.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"the optimizer state has format version {entry.get('version')!r}, this library reads {STATE_VERSION}"
        )
    if entry.get("method") != method.name:
        raise CheckpointError(
            f"the optimizer state was saved by method {entry.get('method')!r}, not by {method.name!r}; attach that one"
        )
    saved_count(entry, "step")
    lists: list[Any] = [entry.get(key) for key in ("group_names", "group_sizes", "group_fingerprints")]
    if not all(isinstance(each, (list, tuple)) for each in lists) or len({len(each) for each in lists}) != 1:
        raise CheckpointError(
            "the optimizer state is damaged: group_names, group_sizes and group_fingerprints have to be lists of one "
            f"length, they are {str(lists)[:200]}"
        )
    facts = zip(entry["group_sizes"], entry["group_fingerprints"], strict=True)
    saved = dict(zip(entry["group_names"], facts, strict=True))
    own = {g.name: (g.size, fingerprint(g)) for g in method.groups}
    differences = [f"{name!r} is only in the saved state" for name in saved.keys() - own.keys()]
    differences += [f"{name!r} is only in this optimizer" for name in own.keys() - saved.keys()]
    for name in saved.keys() & own.keys():
        if saved[name][0] != own[name][0]:
            differences.append(f"{name!r} has {saved[name][0]} units in the saved state and {own[name][0]} here")
        elif saved[name][1] != own[name][1]:
            differences.append(f"{name!r} cuts other tensors or positions in the saved state")
    if not differences and list(saved) != list(own):
        differences.append(f"the groups come in another order: {list(saved)[:3]}... and {list(own)[:3]}...")
    if differences:
        raise CheckpointError(
            "the optimizer state belongs to another partition into groups: "
            + "; ".join(sorted(differences)[:8])
            + ("; ..." if len(differences) > 8 else "")
            + ". Build the optimizer from the same model with the same groups marked unprunable."
        )
