"""Floating-point operations of one forward pass, counted as it runs.

One multiply-accumulate is two FLOPs; additions of biases, normalizations, activations and pooling are not counted
(they are a few percent of a network, and counting conventions for them differ). What is counted is a table from
ATen operator to formula; an operator that is a composition of others is counted through its parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from .copying import borrowed
from .higher_order import run_inside
from .inputs import call_model, no_fast_paths

Formula = Callable[..., int]
_FORMULAS: dict[Any, Formula] = {}
_aten = torch.ops.aten


@dataclass(frozen=True)
class FlopCount:
    """FLOPs (two per multiply-accumulate) of one forward pass.

    Attributes:
        total: of the whole model.
        by_module: path of the innermost module an operator ran in ("" is the model itself) -> FLOPs. They sum to
            ``total``; a module that is called twice has both calls under its first name.
        by_operator: ATen operator -> FLOPs.
    """

    total: int
    by_module: Mapping[str, int] = field(default_factory=dict)
    by_operator: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.total:,} FLOPs (2 per multiply-accumulate)"


def _counts(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula for ATen operators, all overloads; an operator this torch lacks is left out."""

    def register(formula: Formula) -> Formula:
        for name in names:
            packet = getattr(_aten, name, None)
            if packet is None:
                continue
            if packet in _FORMULAS:
                raise ValueError(f"two FLOP formulas for aten.{name}")
            _FORMULAS[packet] = formula
        return formula

    return register


@_counts("mm", "_int_mm", "_scaled_mm")
def _mm(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


@_counts("addmm", "_addmm_activation")
def _addmm(out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


@_counts("bmm")
def _bmm(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


@_counts("baddbmm", "addbmm")
def _baddbmm(out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


@_counts("_grouped_mm", "_scaled_grouped_mm")
def _grouped_mm(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Every row meets the matrix of its group alone; where both have three dims, it is a batch of products."""
    batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


@_counts("mv", "dot", "vdot")
def _mv(out: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


@_counts("addmv", "addr")
def _addmv(out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * (a.numel() if a.dim() == 2 else a.numel() * b.numel())


@_counts("linear")
def _linear(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(x.shape[:-1]) * weight.numel()


@_counts("convolution", "_convolution", "convolution_overrideable")
def _convolution(out: Tensor, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> int:
    """Every weight meets every position of the smaller-channel side once: ``batch * space * weight.numel()``.

    ``weight`` is (out, in / groups, *kernel), so convolution groups are in its size already. For a transposed
    convolution it is (in, out / groups, *kernel) and the positions are the input's.
    """
    transposed = options.get("transposed", rest[4] if len(rest) > 4 else False)
    positions = x if transposed else out
    return 2 * positions.shape[0] * prod(positions.shape[2:]) * weight.numel()


@_counts(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values; query (batch, heads, L, E), value (batch, heads', S, Ev)."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


@_counts("_trilinear")
def _trilinear(out: Tensor, a: Tensor, b: Tensor, c: Tensor, *dims: Any, **__: Any) -> int:
    """``nn.Bilinear``: contract over everything that the three operands span together."""
    expand_a, expand_b, expand_c = dims[:3]
    shapes = [list(t.shape) for t in (a, b, c)]
    for shape, expand in zip(shapes, (expand_a, expand_b, expand_c), strict=True):
        for dim in sorted(expand):
            shape.insert(dim, 1)
    return 2 * prod(max(sizes) for sizes in zip(*shapes, strict=True))


@_counts("mkldnn_rnn_layer")
def _mkldnn_rnn(out: Any, x: Tensor, *weights: Any, **__: Any) -> int:
    """One layer and direction; x (time, batch, width), the input-hidden and the hidden-hidden weight."""
    return 2 * x.shape[0] * x.shape[1] * sum(w.numel() for w in weights[:2])


@_counts("_cudnn_rnn", "miopen_rnn")
def _cudnn_rnn(out: Any, x: Tensor, weights: Any, *_: Any, **__: Any) -> int:
    """All layers and directions at once; only the matrices multiply."""
    return 2 * x.shape[0] * x.shape[1] * sum(w.numel() for w in weights if w.dim() == 2)


class _Counter(TorchDispatchMode):
    """Adds up the formulas of what runs, under the module path that is on top of ``stack``."""

    supports_higher_order_operators = True

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.by_module: dict[str, int] = {}
        self.by_operator: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_inside(self, func, args, kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None:
            # A composite operator reaches a mode whole under inference mode; its parts are what has formulas.
            with self:
                parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        flops = formula(out, *args, **kwargs)
        path = self.stack[-1]
        self.by_module[path] = self.by_module.get(path, 0) + flops
        name = str(func.overloadpacket)
        self.by_operator[name] = self.by_operator.get(name, 0) + flops
        return out


@contextmanager
def _module_paths(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the running module on top of ``stack``; hooks are global, so the model is not touched."""
    names = {id(m): name for name, m in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        with warnings.catch_warnings():  # a compiled module says that hooks of all modules see it twice, which is fine
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; mode, buffers, random state and fast-path switch are put back after.

    Modes are set on the attribute and not through ``train()``, which some models override with side effects.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
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


def count_flops(model: nn.Module, inputs: Any) -> FlopCount:
    """Run a copy of ``model`` once on ``inputs`` in evaluation mode and count.

    Example::

        >>> print(count_flops(nn.Linear(3, 4), torch.zeros(2, 3)))
        48 FLOPs (2 per multiply-accumulate)

    Args:
        model: any module that runs on ``inputs``.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments).
    """
    stack = [""]
    counter = _Counter(stack)
    # a copy: a forward may write to the module's own attributes
    with borrowed(model) as copied, observing(copied), _module_paths(copied, stack), counter:
        call_model(copied, inputs)
    return FlopCount(sum(counter.by_module.values()), counter.by_module, counter.by_operator)
