"""The registry of rules, and what a rule may ask and say (`Context`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch

from ..errors import RuleError
from ..graph import EqualParts, Expr, Graph, ModuleCall, Node, Ref, SizeUse, Value, ValueKind
from ..labels import Dim, Ids, Label, LabelStore, Mark, Spread

Rule = Callable[["Context", Node], None]
Attribute = tuple[str, str, int | None]  # module path, name, place in a sequence: the arguments of an ``attr`` leaf
_RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators named ``namespace.name``, without overload or in-place mark.

    Raises:
        RuleError: a name has no dot, or has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in operators:
            if name.count(".") != 1:
                raise RuleError(f"{name!r} names no operator; write namespace.name, for example 'aten.mm'")
            if name in _RULES:
                raise RuleError(f"{name} has a rule already: {_RULES[name].__module__}.{_RULES[name].__name__}")
            _RULES[name] = function
        return function

    return register


def registered(name: str) -> Rule | None:
    """The rule of an operator, if there is one."""
    return _RULES.get(name)


@dataclass
class NormSite:
    """A normalization module whose statistics run over labelled ids; ``dim`` counts in the module's input."""

    module: str
    dim: int
    ids: Ids


@dataclass
class Context:
    """What a rule may ask and say.

    Reading: `tensors`, `shape`, `dim`, `dims`, `stated`. Stating: `tie`, `freeze`, `contract`, `need_zero`, `leak`,
    `mark`, `multiple`, `attribute`, `norm`. Writing: `set`.
    """

    graph: Graph
    store: LabelStore = field(default_factory=LabelStore)
    labels: dict[int, list[Dim]] = field(default_factory=dict)
    from_params: set[int] = field(default_factory=set)  # values that depend on parameters and constants alone
    demands: list[tuple[int, int]] = field(default_factory=list)  # (value, dim) that must be zero at removed units
    consumed: list[tuple[int, int]] = field(default_factory=list)  # (value, dim) of weights that read removed units
    ignored: set[tuple[int, int, int]] = field(default_factory=set)  # (node, value, dim): a walk back stops here
    never_zero: frozenset[tuple[str, int]] = frozenset()  # (parameter, dim) that something divides by
    breaks: list[tuple[int, int, Ids, str]] = field(default_factory=list)  # see `broken_by_zero`
    leaks: list[Ids] = field(default_factory=list)  # ids whose units get gradients at zero
    attributes: list[tuple[Attribute, Ids]] = field(default_factory=list)  # an attribute counts these ids
    norms: list[NormSite] = field(default_factory=list)
    counted: list[tuple[SizeUse, Ids]] = field(default_factory=list)  # what code gave as a count, and of what
    met: list[tuple[tuple[int, int], Ids]] = field(default_factory=list)  # spread dims and what they met
    sizes: dict[tuple[int, int], Expr] = field(default_factory=dict)  # (value, dim) -> where its whole size came from
    unknown: dict[str, list[str]] = field(default_factory=dict)  # operator without a rule -> modules

    # -- reading

    def tensors(self, node: Node) -> list[int]:
        """Value indices of the positional tensor arguments, in order; lists are flattened."""
        found: list[int] = []
        for arg in node.args:
            if isinstance(arg, Ref):
                found.append(arg.index)
            elif isinstance(arg, (list, tuple)):
                found += [a.index for a in arg if isinstance(a, Ref)]
        return found

    def tensor(self, node: Node, name: str) -> int | None:
        """Value index of the tensor argument of that name, or None."""
        arg = node.argument(name)
        return arg.index if isinstance(arg, Ref) else None

    def value(self, index: int) -> Value:
        return self.graph.values[index]

    def shape(self, index: int) -> tuple[int, ...]:
        return self.graph.values[index].shape

    def rank(self, index: int) -> int:
        return len(self.graph.values[index].shape)

    def dims(self, index: int) -> list[Dim]:
        """What the dims of a value carry. Asking for a parameter the first time gives it ids."""
        dims = self.labels.get(index)
        if dims is None:
            value = self.graph.values[index]
            if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
                zero = value.kind is ValueKind.PARAMETER and is_float(value.dtype)
                dims = [
                    self.store.fresh(n, zero and (value.name, d) not in self.never_zero) if n > 1 else None
                    for d, n in enumerate(value.shape)
                ]
                self.from_params.add(index)
            else:
                if value.kind is ValueKind.CONSTANT:
                    self.from_params.add(index)
                dims = [None] * len(value.shape)
            self.labels[index] = dims
        return dims

    def dim(self, index: int, dim: int) -> Dim:
        return self.dims(index)[dim]

    def label(self, index: int, dim: int) -> Label | None:
        """The label of a dim; None where it is fixed or a mere repetition."""
        found = self.dims(index)[dim]
        return found if isinstance(found, Label) else None

    def stated(self, index: int, dim: int, position: int) -> bool:
        """Whether the model's code said where ``position`` in a dim comes from (or it is an end of the dim).

        The code speaks of the tensor it was given; one call may cut several dims, one operator each, so the values
        before this one that carry the same label are asked as well.
        """
        label = self.dims(index)[dim]
        if position in (0, self.shape(index)[dim]):
            return True
        value: int | None = index
        while value is not None:
            here = [d for d, found in enumerate(self.labels.get(value, [])) if found is label]
            if not here:
                return False
            for said in self._said.get(value, ()):
                if said.dim in here and (
                    said.position == position if isinstance(said, SizeUse) else position % said.size == 0
                ):
                    return True
            made = self.producers.get(value)
            value = made.inputs[0] if made is not None and made.inputs else None
        return False

    @cached_property
    def _said(self) -> dict[int, list[SizeUse | EqualParts]]:
        said: dict[int, list[SizeUse | EqualParts]] = {}
        statements: list[SizeUse | EqualParts] = [*self.graph.uses, *self.graph.equal_parts]
        for statement in statements:
            said.setdefault(statement.value, []).append(statement)
        return said

    @cached_property
    def producers(self) -> dict[int, Node]:
        """The node that made each value."""
        return self.graph.producers()

    @cached_property
    def consumers(self) -> dict[int, list[Node]]:
        """The nodes that read each value."""
        return self.graph.consumers()

    @cached_property
    def idle(self) -> set[int]:
        """Nodes whose results reach no output and decide nothing: what they compute is never seen."""
        needed, idle = set(self.graph.outputs), set[int]()
        deciding = {branch.node for branch in self.graph.branches}
        for node in reversed(self.graph.nodes):
            made = {*node.outputs, *(new for new, _ in node.updates)}
            if node.index in deciding or made & needed:
                needed |= {*node.inputs, *(old for _, old in node.updates)}
            else:
                idle.add(node.index)
        return idle

    @cached_property
    def calls(self) -> dict[str, list[ModuleCall]]:
        """The calls of each module."""
        calls: dict[str, list[ModuleCall]] = {}
        for call in self.graph.calls:
            calls.setdefault(call.module, []).append(call)
        return calls

    @cached_property
    def parents(self) -> set[str]:
        """Paths of the modules that have modules inside."""
        return {path.rpartition(".")[0] for path in self.graph.classes if path}

    # -- stating

    def tie(self, a: Dim, b: Dim, node: Node) -> Dim:
        """Two dims index the same channels; returns what the common dim carries (zero where both are)."""
        if isinstance(a, Spread) or isinstance(b, Spread):
            spread, other = (a, b) if isinstance(a, Spread) else (b, a)
            assert isinstance(spread, Spread)
            if isinstance(other, Label):
                self.met.append((spread.origin, other.ids))
            return other
        if a is None or b is None:
            label = a or b
            if label is not None:
                self.freeze(label, f"meets a dim of fixed size at {self.graph.where(node)}")
            return None
        if len(a) != len(b):
            self.freeze(a, f"meets a dim of another size at {self.graph.where(node)}")
            self.freeze(b, f"meets a dim of another size at {self.graph.where(node)}")
            return None
        self.store.equal(a.ids, b.ids)
        return Label(a.ids, a.zero & b.zero) if a is not b else a

    def freeze(self, dim: Dim, reason: str) -> None:
        """Nothing may be removed from this dim."""
        if isinstance(dim, Label):
            self.store.freeze(dim.ids, reason)

    def freeze_node(self, node: Node, why: str) -> None:
        """Freeze every labelled dim of the node's inputs."""
        for index in node.inputs:
            for dim in self.dims(index):
                self.freeze(dim, f"{why} at {self.graph.where(node)}")

    def need_zero(self, node: Node, index: int, dim: int) -> bool:
        """The value has to be 0 at removed indices of this dim; freezes and says no where it is not."""
        label = self.label(index, dim)
        if label is None:
            return True
        if not label.zero.all():
            self.store.freeze(
                label.ids[~label.zero], f"a removed unit does not become 0 before {self.graph.where(node)}"
            )
        self.demands.append((index, dim))
        return bool(label.zero.any())

    def contract(self, node: Node, a: tuple[int, int], b: tuple[int, int]) -> None:
        """The operator sums products of ``a`` and ``b`` over these dims.

        Exact when one side is 0 at removed indices. The side that does not come from parameters alone is asked
        first; where it cannot be 0 (a constant behind a sigmoid), the weights' columns have to be.
        """
        if a[0] in self.from_params and b[0] not in self.from_params:
            a, b = b, a
        left, right = self.dim(*a), self.dim(*b)
        self.tie(left, right, node)
        for spread, other in ((left, right), (right, left)):
            if isinstance(spread, Spread) and isinstance(other, Label) and spread.origin not in self.sizes:
                self.freeze(other, f"sums over a repetition of unknown count at {self.graph.where(node)}")
        if isinstance(left, Spread) and isinstance(right, Label):
            left = right.with_zero(False)  # one value everywhere, at removed indices too
        elif isinstance(right, Spread) and isinstance(left, Label):
            right = left.with_zero(False)
        if not isinstance(left, Label) or not isinstance(right, Label):
            return
        if b[0] in self.from_params:
            self.demands.append(a)
            if right.zero.any():
                self.consumed.append(b)
            if not right.zero.all():  # behind an exponential, say: the zeros on the other side go on getting gradients
                self.leak(left.ids[~right.zero])
            if not left.zero.all():
                lacking = ~left.zero
                blocked = lacking & ~right.zero
                if blocked.any():
                    self.store.freeze(
                        left.ids[blocked], f"a removed unit does not become 0 before {self.graph.where(node)}"
                    )
                self.demands.append(b)
                self.leak(left.ids[lacking])
            return
        # two activations: both are driven to zero where both can be, so that neither gets a gradient
        both = left.zero & right.zero
        if not (left.zero | right.zero).all():
            self.store.freeze(
                left.ids[~(left.zero | right.zero)],
                f"a removed unit does not become 0 before {self.graph.where(node)}",
            )
        self.demands += [a, b]
        if not both.all():
            self.leak(left.ids[~both])

    def ignore(self, node: Node, index: int, *dims: int) -> None:
        """What the node makes needs nothing of this value at removed indices (of these dims; none means all)."""
        self.ignored |= {(node.index, index, d % self.rank(index)) for d in dims or range(self.rank(index))}

    def broken_by_zero(self, node: Node, index: int, dim: int, ids: Ids) -> None:
        """A 0 at these ids of the value gives a result, or a slope, that is not finite: parameters that would make
        it 0 have to keep their values, and where that is not enough the ids freeze."""
        self.breaks.append((index, dim, ids, f"a removed unit gives no finite number at {self.graph.where(node)}"))

    def leak(self, ids: Ids) -> None:
        """These units receive a gradient although they are at zero."""
        self.leaks.append(ids)

    def mark(self, dim: Dim, mark: Mark) -> None:
        """Note something about the ids of a dim."""
        if isinstance(dim, Label):
            self.store.mark(dim.ids, mark)

    def multiple(self, dim: Dim, of: int) -> None:
        """What leaves of this dim is a multiple of ``of`` indices: the operator wants rows of such a length."""
        if isinstance(dim, Label) and of > 1:
            self.store.multiple(dim.ids, of)

    def attribute(self, node: Node, name: str, value: int, label: Label) -> None:
        """What the code gave as ``name``, or the module's int attribute of that name, counts these ids; without
        either they freeze."""
        said = self.graph.counts.get(node.outputs[0]) if node.outputs[0] is not None else None
        if said is not None and said.expr.kind != "const":
            self.counted.append((said, label.ids))
            return
        if self.graph.attributes.get(node.module, {}).get(name) == value:
            self.attributes.append(((node.module, name, None), label.ids))
        else:
            self.freeze(label, f"no attribute {name}={value} to change at {self.graph.where(node)}")

    # -- writing

    def set(self, node: Node, dims: Sequence[Dim], output: int = 0) -> None:
        """Set what the dims of an output carry."""
        index = node.outputs[output]
        if index is None:
            return
        shape = self.shape(index)
        assert len(dims) == len(shape), (str(node), shape, len(dims))
        checked: list[Dim] = []
        given = self._out_argument(node, output)
        if given is not None:
            dims = [self.into(d, self.dim(given, k), node) for k, d in enumerate(dims)]
        for d, n in zip(dims, shape, strict=True):
            if n == 1:
                d = None
            if isinstance(d, Label):
                assert len(d) == n, (str(node), shape, [len(x) if isinstance(x, Label) else None for x in dims])
            checked.append(d)
        self.labels[index] = checked

    def into(self, dim: Dim, memory: Dim, node: Node) -> Dim:
        """What a dim carries when it is written into given memory, which then has to shrink with it."""
        joined = self.tie(dim, memory, node)
        return joined.with_zero(dim.zero) if isinstance(joined, Label) and isinstance(dim, Label) else joined

    def _out_argument(self, node: Node, output: int) -> int | None:
        """The tensor handed in with ``out=`` for this output."""
        names = _out_names(node.op)
        given = node.kwargs.get(names[output]) if output < len(names) else None
        return given.index if isinstance(given, Ref) else None

    def keep(self, node: Node, index: int, *, output: int = 0, fixed: Sequence[int] = (), why: str = "") -> None:
        """The output has the dims of ``index``; those named ``fixed`` freeze."""
        dims = list(self.dims(index))
        for d in fixed:
            self.freeze(dims[d], f"{why or 'the order or count of this dim matters'} at {self.graph.where(node)}")
            dims[d] = None
        self.set(node, dims, output)


@cache
def _out_names(op: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments if argument.is_out)


def without_zeros(dims: Sequence[Dim]) -> list[Dim]:
    """The same dims, zero nowhere."""
    return [dim.with_zero(False) if isinstance(dim, Label) else dim for dim in dims]


def is_float(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can carry a removable unit."""
    return dtype.is_floating_point or dtype.is_complex


def reduced_dims(c: Context, node: Node, x: int) -> list[int]:
    """The dims of ``x`` that an operator with an argument ``dim`` reduces: one, several, or all where none is given."""
    wanted = node.argument("dim")
    rank = c.rank(x)
    if wanted is None or wanted == []:
        return list(range(rank))
    return [int(d) % max(rank, 1) for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
