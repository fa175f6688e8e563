"""Operators that work index by index, and operators that make tensors.

Where zero stays zero is not looked up: the operator itself is run on a few numbers, with zeros in place of the
operands that are zero, and asked whether all results are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..graph import Node, Ref
from ..labels import Dim, Label, Mark
from .registry import Context, is_float, rule

# pointwise in fact, though PyTorch does not tag them so
UNTAGGED = (
    "aten.copy", "aten._to_copy", "aten.detach", "aten.detach_copy", "aten.alias", "aten.lift_fresh", "aten.lift",
    "aten.lift_fresh_copy",
    "aten.fill", "aten.zero", "aten.masked_fill", "aten.contiguous", "aten.to", "aten.dropout", "aten.feature_dropout",
    "aten._conj", "aten.conj", "aten.polar", "aten.complex", "aten.nan_to_num", "aten.rsub", "aten.alias_copy",
    "aten._prelu_kernel", "aten.native_dropout", "aten.relu6", "aten.celu", "aten.selu", "aten.hardswish",
    "aten.resolve_conj", "aten.resolve_neg", "aten._neg_view", "aten.log_sigmoid_forward", "aten.floor_divide",
    "aten.rrelu_with_noise",
)  # fmt: skip


def is_pointwise(op: Any) -> bool:
    """Whether PyTorch tags the operator as working index by index."""
    return torch.Tag.pointwise in op.tags


@rule(*UNTAGGED)
def pointwise(c: Context, node: Node) -> None:
    """Operands broadcast; equal dims are tied; the result is zero where the operator says so."""
    out = node.outputs[0]
    if out is None:
        return
    operands = list(dict.fromkeys(c.tensors(node)))
    shape = c.shape(out)
    question: _Question | None = None  # asked only where a dim carries something
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        carried: list[Dim] = []
        for index in operands:
            own = d - (len(shape) - c.rank(index))
            carried.append(c.dim(index, own) if own >= 0 and c.shape(index)[own] == size and size > 1 else _ABSENT)
        present = [x for x in carried if x is not _ABSENT]
        joined = present[0] if present else None
        for other in present[1:]:
            joined = c.tie(joined, other, node)
        if isinstance(joined, Label):
            if node.name == "aten.add" and len(operands) > 1 and not c.from_params & set(operands):
                c.mark(joined, Mark.STREAM)
            flags = _flags(carried, size)
            question = question or _question(c, node, operands)
            joined = joined.with_zero(_per_column(flags, partial(_gives_zero, node, question)))
            for row, index in enumerate(operands):
                if flags[row].any() and _breaks_at(c, node, question, operands, row):
                    c.broken_by_zero(node, index, d - len(shape) + c.rank(index), joined.ids[flags[row]])
        dims.append(joined)
    for output in range(len(node.outputs)):
        if node.outputs[output] is not None and c.shape(node.outputs[output]) == shape:  # type: ignore[arg-type]
            c.set(node, dims, output)


_ABSENT: Any = object()  # an operand that has no such dim, or repeats one value along it


def _flags(carried: list[Dim], size: int) -> np.ndarray[Any, Any]:
    """(operands, size) where each is 0 at removed indices."""
    flags = np.zeros((len(carried), size), dtype=bool)
    for row, found in enumerate(carried):
        if isinstance(found, Label):
            flags[row] = found.zero
    return flags


def _per_column(flags: np.ndarray[Any, Any], ask: Callable[[tuple[bool, ...]], bool]) -> np.ndarray[Any, Any]:
    """What ``ask`` says of each column."""
    if (flags == flags[:, :1]).all():  # nearly always, and much faster than looking for the different columns
        return np.full(flags.shape[1], ask(tuple(map(bool, flags[:, 0]))))
    patterns, inverse = np.unique(flags, axis=1, return_inverse=True)
    answers = np.array([ask(tuple(map(bool, p))) for p in patterns.T])
    return answers[inverse.reshape(-1)]


def _gives_zero(node: Node, question: _Question, zeros: tuple[bool, ...]) -> bool:
    if not any(zeros) and node.name not in ("aten.zero", "aten.fill", "aten.masked_fill"):
        return False
    return _probe(node.op, *question, zeros)


def _breaks_at(c: Context, node: Node, question: _Question, operands: list[int], row: int) -> bool:
    zeros = tuple(r == row for r in range(len(operands)))
    return is_float(c.value(operands[row]).dtype) and _breaks(node.op, *question, zeros)


_Question = tuple[tuple[int, ...], tuple[str, ...], str, "_Arguments"]  # order, kinds and text of the arguments


def _question(c: Context, node: Node, operands: list[int]) -> _Question:
    order = tuple(operands.index(i) for i in c.tensors(node))
    kinds = tuple(_kind(c.value(i).dtype) for i in operands)
    return order, kinds, f"{_text(node.args)}{_text(node.kwargs)}", _Arguments(node.args, node.kwargs)


def _text(value: Any) -> str:
    """What arguments are apart from which tensors they name."""
    if isinstance(value, Ref):
        return "%"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"[{','.join(f'{name}={_text(item)}' for name, item in value.items())}]"
    return repr(value)


def _kind(dtype: torch.dtype) -> str:
    return "c" if dtype.is_complex else "f" if is_float(dtype) else "b" if dtype == torch.bool else "i"


class _Arguments:
    """Arguments that do not take part in the cache's key; their text does."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arguments)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4096)
def _probe(
    op: Any, order: tuple[int, ...], kinds: tuple[str, ...], text: str, arguments: _Arguments, zeros: tuple[bool, ...]
) -> bool:
    """Whether the operator gives exactly 0 when the operands marked in ``zeros`` are 0 and the others anything.

    A weight below 0 times 0 is -0, which some operators tell from 0 (the angle of a complex number).
    """
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for kind, zero in zip(kinds, zeros, strict=True):
        x = torch.randn(16, generator=generator, dtype=torch.float64) * 3
        if kind == "c":
            x = torch.complex(x, x.roll(1))
        elif kind == "b":
            x = x > 0  # a mask holds both, so that a selection is zero only where both sides are
        elif kind == "i":
            x = x.to(torch.int64)
        tensors.append(_zeros(x) if zero else x)
    with torch.no_grad():
        result = _run(op, [tensors[i] for i in order], arguments)
    return result is not None and bool((result == 0).all())


@lru_cache(maxsize=4096)
def _breaks(
    op: Any, order: tuple[int, ...], kinds: tuple[str, ...], text: str, arguments: _Arguments, zeros: tuple[bool, ...]
) -> bool:
    """Whether a result, or its slope, is finite for numbers between 0 and 1, and is not when an operand is 0."""

    def finite(at: tuple[bool, ...]) -> bool:
        generator = torch.Generator().manual_seed(0)
        tensors: list[Tensor] = []
        for kind, zero in zip(kinds, at, strict=True):
            x = torch.rand(16, generator=generator, dtype=torch.float64) * 0.8 + 0.1
            x = x > 0.5 if kind == "b" else x.ceil().to(torch.int64) if kind == "i" else x
            x = torch.complex(x, x) if kind == "c" else x
            tensors.append((torch.zeros_like(x) if zero else x).requires_grad_(kind in "fc"))
        with torch.enable_grad():
            result = _run(op, [tensors[i].clone() for i in order], arguments)
            if result is None or not result.is_floating_point() or not result.isfinite().all():
                return result is None or not result.is_floating_point()
            if not result.requires_grad:
                return True
            given = [t for t in tensors if t.requires_grad]
            try:
                slopes = torch.autograd.grad(result.sum(), given, allow_unused=True)
            except (RuntimeError, NotImplementedError):
                return True  # it has no derivative, and so no slope to be infinite
        return all(bool(s.isfinite().all()) for s in slopes if s is not None)

    return finite((False,) * len(zeros)) and not finite(zeros)


def _run(op: Any, tensors: list[Tensor], arguments: _Arguments) -> Tensor | None:
    """The first result of the operator, None where it does not run on plain numbers: then nothing is known."""
    operands = iter(tensors)
    args = pytree.tree_map_only(Ref, lambda _: next(operands), arguments.args)
    ignored = ("dtype", "device", "layout", "memory_format", "pin_memory", "out")
    kwargs = {k: v for k, v in arguments.kwargs.items() if k not in ignored}
    if any(isinstance(v, Ref) for v in kwargs.values()):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            result = op(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    result = result[0] if isinstance(result, (list, tuple)) else result
    return result if isinstance(result, Tensor) else None


def _zeros(x: Tensor) -> Tensor:
    """Zeros of both signs, in all combinations where there are two parts."""
    if not is_float(x.dtype):
        return torch.zeros_like(x)
    signs = torch.arange(len(x)) % 4
    real, imag = (torch.where(signs < 2, 0.0, -0.0).double(), torch.where(signs % 2 == 0, 0.0, -0.0).double())
    return torch.complex(real, imag) if x.is_complex() else real


_MAKE_ZERO = {"aten.zeros": True, "aten.new_zeros": True, "aten.zeros_like": True}
# Fewer numbers are other numbers: all that are drawn after the first one left out change.
_DRAW = frozenset({"aten.rand", "aten.randn", "aten.randint", "aten.rand_like", "aten.randn_like", "aten.bernoulli"})


def _freeze_drawn(c: Context, node: Node, dims: list[Dim]) -> None:
    """In training mode numbers are drawn anew in every step, whatever their count (dropout)."""
    if node.name in _DRAW and (c.graph.training is None or node.index < c.graph.training):
        for dim in dims:
            c.freeze(dim, f"random numbers are drawn along this dim at {c.graph.where(node)}")


@rule(
    "aten.zeros", "aten.ones", "aten.empty", "aten.full", "aten.rand", "aten.randn", "aten.arange",
    "aten.scalar_tensor", "aten.linspace", "aten.eye", "aten.new_zeros", "aten.new_ones", "aten.new_empty",
    "aten.new_full", "aten.empty_strided", "aten.new_empty_strided", "aten.randint", "aten.randperm",
    "aten.tril_indices", "aten.triu_indices", "aten.hann_window", "aten.logspace",
)  # fmt: skip
def create(c: Context, node: Node) -> None:
    """A dim whose size came from another dim or from an attribute follows it; any other is fixed."""
    out = node.outputs[0]
    assert out is not None
    zero = _MAKE_ZERO.get(node.name, False)
    dims: list[Dim] = []
    for d, size in enumerate(c.shape(out)):
        expr = c.sizes.get((out, d))
        dims.append(None)
        if expr is None or size == 1 or node.name == "aten.arange":
            continue
        if expr.kind == "dim":
            source = c.label(*expr.args)
            dims[-1] = source.with_zero(zero) if source is not None and len(source) == size else None
        elif any(leaf.kind == "attr" for leaf in expr.leaves()):
            dims[-1] = c.store.fresh(size, zero)
    _freeze_drawn(c, node, dims)
    c.from_params.add(out)
    c.set(node, dims)


@rule(
    "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like", "aten.rand_like", "aten.randn_like",
    "aten.bernoulli",
)  # fmt: skip
def create_like(c: Context, node: Node) -> None:
    zero = _MAKE_ZERO.get(node.name, False)
    dims = [d.with_zero(zero) if isinstance(d, Label) else d for d in c.dims(c.tensors(node)[0])]
    _freeze_drawn(c, node, dims)
    c.set(node, dims)
