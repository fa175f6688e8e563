"""How a model is called and read: example inputs and fresh ones like them, outputs, a run in float64.

Inputs are a tensor, a tuple (positional arguments) or a dictionary (keyword arguments).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ConfigurationError
from .higher_order import run_inside

Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"

_WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


def validate_inputs(inputs: object) -> None:
    """Raise ``ConfigurationError`` unless ``inputs`` has one of the three forms and is not empty."""
    way_out = "give a tensor, a tuple of positional arguments or a dict of keyword arguments"
    if inputs is None:
        raise ConfigurationError(f"example inputs are None; {way_out}")
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise ConfigurationError(f"example inputs are a {type(inputs).__name__}; {way_out}")
    if not isinstance(inputs, Tensor) and len(inputs) == 0:
        raise ConfigurationError(f"example inputs are an empty {type(inputs).__name__}; {way_out}")
    if isinstance(inputs, Mapping):
        strange = [key for key in inputs if not isinstance(key, str)]
        if strange:
            raise ConfigurationError(f"keyword arguments need names, {strange[0]!r} is none; {way_out}")


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of ``inputs`` in order, at any depth; raises ``ConfigurationError`` when there is none."""
    validate_inputs(inputs)
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    tensors = [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ConfigurationError(
            f"example inputs (a {type(inputs).__name__} of {len(inputs)}) hold no tensor; give what the forward "
            "takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
        )
    return tensors


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call ``model`` with ``inputs``.

    A tuple is only positional, whatever its last entry is: a trailing dictionary is one more argument.
    """
    validate_inputs(inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs)


def named_outputs(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output and where they are: in tensors, sequences, mappings and dataclasses.

    Other objects are opaque: what a key-value cache holds is no output that a caller computes with.
    """
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, entry in output.items():
            yield from named_outputs(entry, f"{name}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        for place, entry in enumerate(output):
            yield from named_outputs(entry, f"{name}[{place}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for each in dataclasses.fields(output):
            yield from named_outputs(getattr(output, each.name), f"{name}.{each.name}")


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, see `named_outputs`."""
    return (tensor for _, tensor in named_outputs(output))


@contextmanager
def no_fast_paths() -> Iterator[None]:
    """Inside, transformer layers and compiled functions run operator by operator.

    Fused kernels hide them and know no float64 mode, and what takes functions compiles them first.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def cuda_devices(model: nn.Module) -> list[int]:
    """CUDA devices of the parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def seed_generators(devices: Sequence[int], seed: int = 0) -> None:
    """``torch.manual_seed`` for the CPU and these devices.

    For all devices it takes as long as a small model: where none is in use yet, it writes down the whole stack of
    calls for each kind, and keeps it.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; mode, buffers, random state and fast-path switch are put back after.

    Modes are set on the attribute and not through ``train()``, which some models override with side effects.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices(model)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_fast_paths())
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def inputs_for(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Inputs for a model that had ``dtype``, cast along when it has another by now (``model.half()``)."""
    now = dtype_of(model)
    return inputs if now is None or now is dtype else cast_inputs(inputs, now)


def map_inputs(function: Callable[[Any], Any], inputs: Inputs) -> Inputs:
    """``function`` on every leaf of ``inputs``, at any depth of tuples, lists and dictionaries."""
    validate_inputs(inputs)
    # A mapping that is no dict (a tokenizer's result) would be one opaque leaf.
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    mapped: Inputs = tree_map(function, plain)
    return mapped


def clone_inputs(inputs: Inputs) -> Inputs:
    """A copy of ``inputs`` that a model may write to."""
    return map_inputs(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), inputs)


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """``inputs`` with every floating tensor in ``dtype``."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return map_inputs(cast, inputs)


def fresh_inputs(inputs: Inputs, seed: int = 0) -> Inputs:
    """Other values in the shapes of ``inputs``, the same ones for the same seed.

    Floats are normal with the example's mean and standard deviation (1 when the example is constant), integers
    are uniform between the example's smallest and largest; booleans, floats that are not all finite (masks) and
    whatever is no tensor stay. The global random state is not used.
    """
    generator = torch.Generator().manual_seed(seed)

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        value = leaf.detach()
        if value.numel() == 0 or value.dtype is torch.bool or value.device.type == "meta":
            return value.clone()
        if value.is_complex():
            value = torch.view_as_real(value)
            return torch.view_as_complex(_normal_like(value, generator).contiguous())
        if value.is_floating_point():
            return _normal_like(value, generator)
        low, high = int(value.min()), int(value.max())
        drawn = torch.randint(low, high + 1, tuple(value.shape), generator=generator, dtype=torch.int64)
        return drawn.to(value.device, value.dtype)

    return map_inputs(fresh, inputs)


def _normal_like(value: Tensor, generator: torch.Generator) -> Tensor:
    wide = value.double()
    if not bool(torch.isfinite(wide).all()):
        return value.clone()
    std = float(wide.std(correction=0)) or 1.0
    drawn = torch.randn(tuple(value.shape), generator=generator, dtype=torch.float64) * std + float(wide.mean())
    return drawn.to(value.device, value.dtype)


class _Float64Mode(TorchDispatchMode):
    """Turns every cast to, and every result in, a lower precision into float64.

    A model in float64 still computes part of itself in float32 when its forward says ``.to(torch.float32)``,
    ``softmax(..., dtype=torch.float32)`` or ``torch.arange(..., dtype=torch.float32)``.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_inside(self, func, args, kwargs)
        if func is torch.ops.aten.view.dtype:  # reinterprets bits: float32 means float32
            return func(*args, **kwargs)
        names, kept = _arguments(func)
        # What is viewed or written has to stay the same tensor; everything else may be a wider copy of itself.
        args = tuple(_widen(value, name not in kept) for name, value in zip(names, args, strict=False))
        kwargs = {name: _widen(value, name not in kept) for name, value in kwargs.items()}
        result = _IN_FLOAT64.get(func, func)(*args, **kwargs)
        return result if kept else _widen(result, True)


@functools.cache
def _arguments(func: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of an operator's arguments, and which of them its result is a view of or are written to."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments), frozenset(a.name for a in arguments if a.alias_info is not None)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``aten._grouped_mm``, whose kernels know no float64, one group after the other."""
    if offs is None:
        made = torch.bmm(a, b)
    else:
        ends = [int(end) for end in offs]
        groups = list(enumerate(zip([0, *ends], ends, strict=False)))
        if a.dim() == 2 and b.dim() == 2:
            made = torch.stack([a[:, start:end] @ b[start:end] for _, (start, end) in groups])
        elif a.dim() == 2:
            made = a.new_zeros(a.shape[0], b.shape[2])
            for group, (start, end) in groups:
                made[start:end] = a[start:end] @ b[group]
        else:
            made = a.new_zeros(a.shape[1], b.shape[1])
            for group, (start, end) in groups:
                made[:, start:end] = a[group] @ b[:, start:end]
    return made if bias is None else made + bias


def _full(size: Any, fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """``aten.full``, whose default dtype would not hold the least number of float64 (which masks are filled with)."""
    widened = torch.float64 if dtype is None and isinstance(fill_value, float) else dtype
    return torch.ops.aten.full.default(size, fill_value, dtype=widened, **options)


# operators that do not work in float64, and what computes the same
_IN_FLOAT64: dict[Any, Callable[..., Any]] = {
    op.default: _grouped_mm for op in (getattr(torch.ops.aten, "_grouped_mm", None),) if op is not None
} | {torch.ops.aten.full.default: _full}


def _widen(value: Any, tensors: bool) -> Any:
    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return _WIDE.get(leaf, leaf)
        if tensors and isinstance(leaf, Tensor) and leaf.dtype in _WIDE:
            return leaf.to(_WIDE[leaf.dtype])
        return leaf

    return tree_map(widen, value) if isinstance(value, (tuple, list, dict)) else widen(value)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what runs on float64 tensors stays in float64, whatever dtypes its code names."""
    with _Float64Mode():
        yield
