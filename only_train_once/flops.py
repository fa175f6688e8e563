"""Floating-point operations of one forward pass, counted as it runs.

What is counted is the table of ``products.py``; an operator that is a composition of others is counted through its
parts. From the graph, for any choice of units, the same table is read by ``workload.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from .copying import borrowed
from .higher_order import run_inside
from .inputs import call_model, observing
from .products import FORMULAS, Formula, flops_each


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


@dataclass(frozen=True)
class _Called:
    """A call that has just run, as the table of products takes it: operands are tensors."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def made(self) -> Tensor:
        out: Tensor = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return out

    def argument(self, name: str) -> Any:
        for position, each in enumerate(self.op._schema.arguments):
            if each.name == name:
                return self.args[position] if position < len(self.args) else self.kwargs.get(name, each.default_value)
        return None

    def is_operand(self, value: Any) -> bool:
        return isinstance(value, Tensor)

    def shape(self, operand: Tensor) -> Sequence[int]:
        return operand.shape

    def is_complex(self, operand: Tensor) -> bool:
        return operand.is_complex()

    def flops(self, formula: Formula) -> int:
        return sum(
            flops_each(self, product) * prod(tensor.shape[dim] for (tensor, dim), *_ in product)
            for product in formula(self)
        )


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
        name = str(func.overloadpacket)
        formula = FORMULAS.get(name)
        if formula is None:
            # A composite operator reaches a mode whole under inference mode; its parts are what has formulas.
            with self:
                parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        flops = _Called(func, args, kwargs, out).flops(formula)
        path = self.stack[-1]
        self.by_module[path] = self.by_module.get(path, 0) + flops
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


def count_flops(model: nn.Module, inputs: Any) -> FlopCount:
    """Run a copy of ``model`` once on ``inputs`` in evaluation mode and count.

    Example::

        >>> import torch
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
