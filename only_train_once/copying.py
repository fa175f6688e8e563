"""Copies of modules: what ``copy.deepcopy`` makes, in less time, and weights that are only read stay uncopied.

[Note: copying modules]
A network is hundreds of modules with two dozen attributes each, nearly all of them numbers and empty tables of hooks.
Modules whose class copies itself as any object does are made here, attribute by attribute; everything else, a class
with a ``__deepcopy__`` of its own for one, is left to ``copy.deepcopy``, with which the two share what was copied.

[Note: borrowed weights]
`borrowed` is a copy whose parameters share memory with the originals until somebody writes to one of the two, which
PyTorch notices by itself (copy-on-write storages). Whoever writes gets memory of its own: the copy may be trained,
and the originals stay as they are. When the copy is given back, the originals own their memory as before, at the same
address.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OTOError, SurgeryError

_ATOMIC = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size})
_TABLES = frozenset({dict, OrderedDict, set, list})
_COMPILED = "_compiled_call_impl"  # what ``module.compile()`` leaves behind is made for one module; torch drops it too
_MEMBERS = ("_parameters", "_buffers", "_modules")


def copy_module(
    module: nn.Module, error: type[OTOError] = SurgeryError, instead: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """What ``copy.deepcopy`` makes, keeping marks on parameters, also where a weight is kept with its graph.

    ``instead`` names tensors, by their id, that the copy holds in the place of a copy of others.

    Raises:
        error: the module holds what cannot be copied.
    """
    return _copy(module, error, dict(instead or {}))


@contextmanager
def borrowed(module: nn.Module, error: type[OTOError] = SurgeryError) -> Iterator[nn.Module]:
    """A copy for as long as the block runs, see [Note: borrowed weights]; errors as in `copy_module`."""
    lent: dict[int, Any] = {}
    pairs = []
    for parameter in module.parameters():
        shared = _lend(parameter)
        if shared is not None:
            lent[id(parameter)] = shared
            pairs.append((parameter, shared))
    try:
        yield _copy(module, error, lent)
    finally:
        for original, shared in pairs:
            shared.data = shared.data.new_empty(0)  # whoever still holds the copy holds no memory of the original
            original.data_ptr()  # alone again, it takes its memory back


def _lend(parameter: nn.Parameter) -> nn.Parameter | None:
    """A parameter with the same memory until it is written to, or None where that cannot be."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    if not plain or parameter.device.type != "cpu" or parameter.layout is not torch.strided:
        return None
    value = parameter.detach()
    if parameter.is_inference() or not torch.ops.aten.is_non_overlapping_and_dense(value):
        return None
    try:
        return nn.Parameter(torch._lazy_clone(value), parameter.requires_grad)
    except (AttributeError, RuntimeError):  # memory that is not PyTorch's own: numpy's, shared between processes
        return None


def _copy(module: nn.Module, error: type[OTOError], memo: dict[int, Any]) -> nn.Module:
    parts = list(module.modules())
    shells = [(part, _shell(part)) for part in parts if _is_plain(type(part)) and "__deepcopy__" not in vars(part)]
    memo |= {id(part): shell for part, shell in shells}
    for part in parts:
        if id(part) not in memo:
            for value in (*vars(part).values(), *part._buffers.values()):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    try:
        for part, shell in reversed(shells):  # what a module holds is there when the module looks at it
            state = {name: _copied(name, value, memo) for name, value in vars(part).items() if name != _COMPILED}
            _restore(shell, state)
        copied: nn.Module = copy.deepcopy(module, memo)
    except Exception as cause:
        raise error(
            f"{type(module).__name__} cannot be copied ({type(cause).__name__}: {cause}), and the model given has to "
            "stay as it is; remove from its attributes what copy.deepcopy cannot copy"
        ) from cause
    parameters = [p for part in parts for p in part._parameters.values()]
    if any(p is not None and p.__dict__ for p in parameters):
        for old, new in zip(module.parameters(), copied.parameters(), strict=True):
            new.__dict__.update(old.__dict__)  # marks that users put on parameters; torch's own copy drops them
    return copied


_plain: dict[type, bool] = {}


def _is_plain(cls: type) -> bool:
    """Whether instances are copied by copying their attributes."""
    if cls not in _plain:
        _plain[cls] = _copies_by_attributes(cls)
    return _plain[cls]


def _copies_by_attributes(cls: type) -> bool:
    own_ways = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__new__")
    return not (
        any(name in vars(base) for base in cls.__mro__ if base not in (nn.Module, object) for name in own_ways)
        or cls in copyreg.dispatch_table
        or copyreg._slotnames(cls)  # type: ignore[attr-defined]
    )


def _shell(module: nn.Module) -> nn.Module:
    cls = type(module)
    return cls.__new__(cls)


def _restore(shell: nn.Module, state: dict[str, Any]) -> None:
    if type(shell).__setstate__ is nn.Module.__setstate__:
        shell.__dict__.update(state)  # what torch's own does, but for attributes that older versions lacked
    else:
        shell.__setstate__(state)


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    cls = type(value)
    if cls in _ATOMIC:
        return value
    if cls in _TABLES:
        if not value:
            return memo.setdefault(id(value), cls())
        if name in _MEMBERS and id(value) not in memo:
            made = memo[id(value)] = cls()
            for key, member in value.items():
                made[key] = memo[id(member)] if id(member) in memo else _copied("", member, memo)
            return made
    elif isinstance(value, Tensor) and not value.is_leaf:  # a weight that is computed and kept with its graph
        return memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(value, memo)
