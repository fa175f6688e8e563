"""`SizeInt`: an int that remembers where it came from.

PyTorch drops subclasses of int before an operator runs, but a `TorchFunctionMode` still sees them. While a
model is traced its int attributes and the entries of ``x.shape`` are such ints, so that ``view(B, N, self.heads,
C // self.heads)`` tells which attribute and which dim each new size depends on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from .graph import Expr


class SizeLog:
    """Collects what the traced code relied on; one per trace."""

    def __init__(self) -> None:
        self.guards: list[tuple[Expr, Expr]] = []
        self.enabled = True

    def guard(self, left: Expr, right: Expr) -> None:
        """The code took ``left == right`` for granted."""
        if self.enabled:
            self.guards.append((left, right))


class SizeInt(int):
    """An int with an `Expr`; arithmetic keeps it, conversion to float leaves a guard behind."""

    expr: Expr
    log: SizeLog

    def __new__(cls, value: int, expr: Expr, log: SizeLog) -> SizeInt:
        self = super().__new__(cls, value)
        self.expr = expr
        self.log = log
        return self

    def __deepcopy__(self, memo: Any) -> SizeInt:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int.__int__(self),))

    def __repr__(self) -> str:
        return int.__repr__(self)

    __str__ = __repr__
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True:
            self.log.guard(self.expr, expr_of(other))
        return equal

    def __ne__(self, other: object) -> bool:
        differs = int.__ne__(self, other)
        if differs is False:
            self.log.guard(self.expr, expr_of(other))
        return differs

    def escapes(self) -> None:
        """The number itself is computed with, so it has to stay."""
        self.log.guard(self.expr, Expr("const", (int.__int__(self),)))

    def __float__(self) -> float:
        self.escapes()
        return int.__float__(self)

    def __truediv__(self, other: Any) -> Any:
        self.escapes()
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        self.escapes()
        return int.__rtruediv__(self, other)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.escapes()
        return int.__pow__(self, other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        self.escapes()
        return int.__rpow__(self, other, modulo)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = []
        for value in inputs:
            if isinstance(value, SizeInt):
                value.escapes()
                value = int.__int__(value)
            plain.append(value)
        return getattr(ufunc, method)(*plain, **kwargs)

    def __neg__(self) -> SizeInt:
        return SizeInt(int.__neg__(self), Expr("-", (Expr("const", (0,)), self.expr)), self.log)


def plain(value: Any) -> int:
    """The number without its origin, for those who note the origin themselves."""
    return int.__int__(value) if isinstance(value, SizeInt) else int(value)


def expr_of(value: Any) -> Expr:
    """The expression of an int, or a literal."""
    return value.expr if isinstance(value, SizeInt) else Expr("const", (int(value),))


def _binary(symbol: str, function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[SizeInt, Any], Any]:
    def method(self: SizeInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            if isinstance(other, float):
                self.escapes()
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        result = function(int.__int__(a), int.__int__(b))
        return SizeInt(result, Expr(symbol, (expr_of(a), expr_of(b))), self.log)

    return method


def _plain(name: str) -> Callable[..., Any]:
    """An operation whose result is an int without an origin (``int(size)``, ``round(size)``, ``size << 1``)."""
    function = getattr(int, name)

    def method(self: SizeInt, *others: Any) -> Any:
        self.escapes()
        return function(self, *others)

    return method


for _name in (
    "__int__", "__trunc__", "__floor__", "__ceil__", "__round__", "__abs__", "__invert__", "__divmod__", "__rdivmod__",
    "__lshift__", "__rlshift__", "__rshift__", "__rrshift__", "__and__", "__rand__", "__or__", "__ror__", "__xor__",
    "__rxor__",
):  # fmt: skip
    setattr(SizeInt, _name, _plain(_name))

for _symbol, _name, _function in (
    ("+", "add", operator.add),
    ("-", "sub", operator.sub),
    ("*", "mul", operator.mul),
    ("//", "floordiv", operator.floordiv),
    ("%", "mod", operator.mod),
):
    setattr(SizeInt, f"__{_name}__", _binary(_symbol, _function, False))
    setattr(SizeInt, f"__r{_name}__", _binary(_symbol, _function, True))
