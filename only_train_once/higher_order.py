"""Operators that take functions (`torch.cond`, scans, loops, `flex_attention`), so that a dispatch mode sees inside.

A mode that meets one gets the functions and not what they do. Run here, they are ordinary calls of ordinary operators,
which the mode then sees one by one: the branch that was taken, every step of a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode


def run_inside(mode: TorchDispatchMode, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
    """Run ``func`` with ``mode`` still on."""
    plain = _PLAIN.get(func.name()) or func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
    with mode:
        return plain(*args, **kwargs)


# The parameters are named as torch names them: some are passed by name.


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return (true_fn if pred else false_fn)(*operands)


def _scan(
    combine_fn: Callable[..., Any], init: Sequence[Any], xs: Sequence[Any], additional_inputs: Sequence[Any] = ()
) -> list[Any]:
    """``combine_fn(*carry, *step, *additional) -> (*carry, *made)`` over the first dim of ``xs``."""
    carry, made = list(init), []
    for step in range(xs[0].shape[0]):
        result = combine_fn(*carry, *(x[step] for x in xs), *additional_inputs)
        carry = list(result[: len(carry)])
        made.append(result[len(carry) :])
    return [*carry, *(torch.stack(each) for each in zip(*made, strict=True))]


def _while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    carried_inputs: Sequence[Any],
    additional_inputs: Sequence[Any] = (),
) -> tuple[Any, ...]:
    carried = tuple(carried_inputs)
    while cond_fn(*carried, *additional_inputs):
        result = body_fn(*carried, *additional_inputs)
        carried = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    return carried


# torch's own kernels of these refuse to run under a mode
_PLAIN: dict[str, Callable[..., Any]] = {"cond": _cond, "scan": _scan, "while_loop": _while_loop}
