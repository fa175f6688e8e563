"""`Graph`: what one forward pass did, as a flat list of ATen calls.

A graph holds no tensor data. `Value` is a tensor that existed, `Node` is a call. In-place operators make a
new `Value` for the tensor they change and for every alias of it, so that a graph reads like single
assignment. `Expr` says where an integer that shaped a tensor came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import torch


class ValueKind(str, Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # a tensor the model made or kept outside of anything traced
    RESULT = "result"


@dataclass(frozen=True)
class Value:
    """A tensor of the traced forward pass."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: ValueKind
    name: str = ""  # of a parameter, buffer or input; the first name of a tied tensor
    strides: tuple[int, ...] = ()  # of its memory, in entries

    def __str__(self) -> str:
        return f"%{self.index}{':' + self.name if self.name else ''}{list(self.shape)}"


@dataclass(frozen=True)
class Ref:
    """Stands for a value inside a node's arguments."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Node:
    """One call of an ATen operator.

    Attributes:
        index: position in the graph.
        op: the overload that ran, in place or not.
        args, kwargs: as passed, with `Ref` in place of tensors.
        inputs: indices of the values read, in order of appearance.
        outputs: indices of the values made, one per tensor returned (None for what is no tensor).
        module: path of the innermost module that was running; "" is the model itself.
        updates: (new, old) indices of other names for memory that this call wrote to.
    """

    index: int
    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    module: str
    updates: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """Operator name without overload and in-place mark: ``aten.add``."""
        return operator_name(self.op)

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of that schema name, however it was passed."""
        found = _signature(self.op).get(name)
        if found is None:
            return default
        position, fallback = found
        if position is not None and position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default if fallback is _REQUIRED else fallback)

    def __str__(self) -> str:
        made = ", ".join("_" if o is None else f"%{o}" for o in self.outputs)
        return f"{made} = {self.name}({', '.join(map(str, self.args))})  # {self.module or '<model>'}"


_REQUIRED: Any = object()


@cache
def _signature(op: Any) -> dict[str, tuple[int | None, Any]]:
    """Argument name -> its position (None for keyword-only) and default value."""
    return {
        argument.name: (
            None if argument.kwarg_only else position,
            argument.default_value if argument.has_default_value() else _REQUIRED,
        )
        for position, argument in enumerate(op._schema.arguments)
    }


_names: dict[int, tuple[Any, str]] = {}  # by identity: asking an operator for its hash takes longer than all the rest


def operator_name(op: Any) -> str:
    """``aten.add`` for ``aten.add_.Tensor``: namespace and name, without overload and in-place mark."""
    known = _names.get(id(op))
    if known is not None:
        return known[1]
    namespace, _, name = op._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    _names[id(op)] = op, f"{namespace}.{name}"  # held, so that no other operator gets its id
    return _names[id(op)][1]


@dataclass(frozen=True)
class Expr:
    """Where an integer came from: a leaf, or arithmetic on such integers.

    Kinds of leaf: ``const`` (a literal), ``attr`` (module path, attribute, index or None), ``dim`` (value index,
    dim). Other kinds are operators (``+ - * // %``) on two expressions.
    """

    kind: str
    args: tuple[Any, ...]

    @property
    def is_leaf(self) -> bool:
        return self.kind in ("const", "attr", "dim")

    def leaves(self) -> Iterator[Expr]:
        """All leaves, left to right."""
        if self.is_leaf:
            yield self
        else:
            for arg in self.args:
                yield from arg.leaves()

    def evaluate(self, leaf: Callable[[Expr], Any]) -> Any:
        """The value of the expression where ``leaf(expr)`` gives that of each leaf: ints, or int arrays."""
        if self.kind == "const":
            return int(self.args[0])
        if self.is_leaf:
            return leaf(self)
        left, right = (arg.evaluate(leaf) for arg in self.args)
        return _OPERATORS[self.kind](left, right)

    def __str__(self) -> str:
        if self.kind == "const":
            return str(self.args[0])
        if self.kind == "attr":
            path, name, index = self.args
            return f"{path + '.' if path else ''}{name}" + ("" if index is None else f"[{index}]")
        if self.kind == "dim":
            return f"%{self.args[0]}.shape[{self.args[1]}]"
        return f"({self.args[0]} {self.kind} {self.args[1]})"


_OPERATORS: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: np.where(np.equal(b, 0), -1, np.floor_divide(a, np.maximum(b, 1))),
    "%": lambda a, b: np.where(np.equal(b, 0), -1, np.mod(a, np.maximum(b, 1))),
}


@dataclass(frozen=True)
class SizeUse:
    """The model's code said that the first ``position`` indices of a dim number ``expr``.

    After surgery the code says it again with the new value of ``expr``; it has to be true again.
    """

    value: int
    dim: int
    position: int
    expr: Expr
    where: str  # module and function, for messages


@dataclass(frozen=True)
class EqualParts:
    """The model's code cut a dim into parts of equal size (``chunk``, ``split(int)``); they have to stay equal."""

    value: int
    dim: int
    size: int
    where: str


@dataclass(frozen=True)
class Guard:
    """The model's code relied on ``left == right`` (a comparison, or a size that became a float)."""

    left: Expr
    right: Expr
    where: str


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: what tensors went in and out."""

    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """A tensor's data decided something in Python (``if x.sum() > 0``, ``int(n)``).

    Attributes:
        node: the call that read the data.
        module: path of the module that ran.
        lines: where in its code, for a decision between True and False; "" where a number was read.
    """

    node: int
    module: str
    lines: str = ""


@dataclass(frozen=True)
class Graph:
    """One forward pass, see the module's docstring.

    Attributes:
        nodes: calls in order.
        values: by index.
        inputs: values that are the model's inputs.
        outputs: values that are the model's outputs.
        tensors: value index of every parameter and buffer that was used, by its first name.
        aliases: all names of every tensor of the model, by its first name.
        classes: class name of each module, by path.
        attributes: int attributes (name -> value) of each module, by path.
        bases: class names in the method resolution order of each module, by path.
        uses, equal_parts, guards: what the model's code said about sizes.
        counts: what it gave as the count of groups of a convolution or norm, by the value that the call made.
        calls: module calls in order.
        branches: data-dependent decisions.
        untrusted: values that a replay of the graph did not reproduce, with the reason.
        unused: parameters that no call touched.
        example: how many of the nodes ran on the example; further passes follow what else can run. None for all.
        training: index of the first node that only training mode ran; None where that was not looked at.
        provenance: False when the model did not run with instrumented sizes; all literal sizes freeze then.
    """

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: Mapping[str, int]
    aliases: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int]]
    bases: Mapping[str, tuple[str, ...]]
    uses: tuple[SizeUse, ...] = ()
    equal_parts: tuple[EqualParts, ...] = ()
    guards: tuple[Guard, ...] = ()
    counts: Mapping[int, SizeUse] = field(default_factory=dict)
    calls: tuple[ModuleCall, ...] = ()
    branches: tuple[Branch, ...] = ()
    untrusted: Mapping[int, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    example: int | None = None
    training: int | None = None
    provenance: bool = True

    def consumers(self) -> dict[int, list[Node]]:
        """The nodes that read each value."""
        readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for index in dict.fromkeys(node.inputs):
                readers.setdefault(index, []).append(node)
        return readers

    def producers(self) -> dict[int, Node]:
        """The node that made each value; leaves have none."""
        return {output: node for node in self.nodes for output in node.outputs if output is not None}

    def chains(self, operators: Sequence[str]) -> set[int]:
        """Indices of the nodes of every path along which these operators (``"add"``) follow one another."""
        readers = self.consumers()
        found: set[int] = set()

        def named(node: Node, name: str) -> bool:
            return name in (node.name, node.name.partition(".")[2])

        for first in self.nodes:
            paths = [[first]] if named(first, operators[0]) else []
            for name in operators[1:]:
                paths = [
                    [*path, after]
                    for path in paths
                    for output in path[-1].outputs
                    for after in (readers.get(output, ()) if output is not None else ())
                    if named(after, name)
                ]
            found |= {node.index for path in paths for node in path}
        return found

    def operators(self) -> dict[str, int]:
        """How often each operator was called."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.name] = counts.get(node.name, 0) + 1
        return counts

    def where(self, node: Node) -> str:
        """``aten.add in layer1.0 (BasicBlock)``: operator and module, for messages."""
        cls = self.classes.get(node.module, "?")
        return f"{node.name} in {node.module or 'the model'} ({cls})"

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes))
