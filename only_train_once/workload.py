"""What a forward pass takes, as a function of the units that stay: sizes of dims, FLOPs of operators, memory.

FLOPs of an operator and bytes of a tensor are products of the sizes of dims, or sums of such products. The labels say
which unit stands at which index of a dim; so an `Extent` knows what is left of a dim, and a `Term` what is left of a
product. Nothing is estimated: a dim that carries no label cannot shrink.

Which dims an operator multiplies is in ``products.py``, where ``flops.py`` has it from as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activations import Sight, find_sights
from .axes import Axes
from .graph import Graph, Node, Ref, ValueKind
from .labels import Ids, Label
from .products import FORMULAS, Place, flops_each


@dataclass(frozen=True, eq=False)
class Extent:
    """A dim that units can shorten.

    Attributes:
        length: of the full dim.
        units: group name -> (unit, index) pairs, as two arrays: the index leaves with the unit.
    """

    length: int
    units: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Term:
    """``factor`` times what is left of each of these extents (positions in `Workload.extents`)."""

    factor: int
    extents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads: where it stands among the arguments, and how long its dims are.

    Attributes:
        dims: per dim the full length, and the extent that shortens it or None.
        dtype: ``"float32"``.
    """

    dims: tuple[tuple[int, int | None], ...]
    dtype: str


@dataclass(frozen=True)
class Operator:
    """A call whose FLOPs are counted.

    Attributes:
        name: ``"layer1.0.conv1:convolution"``; module and operator, numbered where that is not unique.
        op: the ATen overload, ``"aten.convolution.default"``.
        args, kwargs: as passed, with an `Operand` in place of every tensor.
        terms: its FLOPs, two per multiply-accumulate (of complex numbers eight).
        results: its results, like operands.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    terms: tuple[Term, ...]
    results: tuple[Operand, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """The extents that its operands' sizes depend on, in order of appearance, each once."""
        dims = (dim for operand in operands_in((self.args, self.kwargs)) for dim in operand.dims)
        return tuple(dict.fromkeys(extent for _, extent in dims if extent is not None))


@dataclass(frozen=True)
class Storage:
    """Memory of an activation: its bytes, and the first and last call during which it is needed."""

    bytes: Term
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Workload:
    """A forward pass on the example inputs in evaluation mode.

    Attributes:
        extents: what can become shorter.
        operators: the calls whose FLOPs are counted.
        storages: activations, those of inputs and constants included; views share the memory of what they view.
        calls: number of calls in all.
        sights: tensors of modules that carry units; of training passes, too.
    """

    extents: tuple[Extent, ...]
    operators: tuple[Operator, ...]
    storages: tuple[Storage, ...]
    calls: int
    sights: tuple[Sight, ...] = ()

    def axes(self, operator: Operator) -> list[tuple[int, ...]]:
        """The extents of an operator's operands, those together that some group shortens both of.

        The rows of a recurrent layer's matrix, four for each hidden unit, are no dim of their own beside the hidden
        units; nor are the two sides of a convolution in groups. The first of each tuple stands for the others.
        """
        together: list[tuple[set[str], list[int]]] = []
        for extent in operator.extents:
            names, joined = set(self.extents[extent].units), [extent]
            for other in [t for t in together if t[0] & names]:
                together.remove(other)
                names, joined = names | other[0], sorted([*other[1], *joined], key=operator.extents.index)
            together.append((names, joined))
        return [tuple(joined) for _, joined in together]

    def without_last(self, extents: Sequence[int], share: float, multiple: int | None = None) -> dict[int, int]:
        """Sizes of extents when of every group that shortens one the last units, this share of them, are gone.

        What stays is a multiple of ``multiple``, as near as can be; for None no multiple of 8.
        """
        last: dict[str, int] = {}
        for extent in extents:
            for name, (units, _) in self.extents[extent].units.items():
                last[name] = max(last.get(name, 0), int(units.max()))
        kept = {name: _kept(number + 1, share, multiple) for name, number in last.items()}
        left = {}
        for extent in extents:
            gone = np.zeros(self.extents[extent].length, dtype=bool)
            for name, (units, index) in self.extents[extent].units.items():
                gone[index[units >= kept[name]]] = True
            left[extent] = int((~gone).sum())
        return left


def _kept(units: int, share: float, multiple: int | None) -> int:
    number = max(round(units * (1 - share)), 1)
    if multiple is None:
        return min(number + (number % 8 == 0), units)
    return min(max(round(number / multiple), 1) * multiple, units)


def operands_in(value: Any) -> Iterator[Operand]:
    """The operands among arguments, in order."""
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from operands_in(item)
    elif isinstance(value, Mapping):
        yield from operands_in(list(value.values()))


class Later:
    """A workload that is found when somebody asks for it: most who analyse never do.

    Args:
        axes, units: see `find_workload`.
    """

    def __init__(self, axes: Axes, units: Mapping[str, Ids]) -> None:
        self._made: Workload | tuple[Axes, Mapping[str, Ids]] = (axes, units)

    def get(self) -> Workload:
        if not isinstance(self._made, Workload):
            self._made = find_workload(*self._made)
        return self._made

    def __deepcopy__(self, memo: Any) -> Later:
        return self  # it never changes

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": self.get()}


def find_workload(axes: Axes, units: Mapping[str, Ids]) -> Workload:
    """The workload of a graph.

    Args:
        axes: its analysis.
        units: group name -> (units,) classes of its units, in the order of the group.
    """
    sizes = _Sizes(axes, units)
    nodes = axes.graph.nodes[: axes.graph.example]
    operators: list[Operator] = []
    seen: dict[str, int] = {}
    for node in nodes:
        formula = FORMULAS.get(node.name)
        if formula is None:
            continue
        call = _Called(sizes.graph, node)
        name = f"{node.module}:{node.name.partition('.')[2]}"
        seen[name] = seen.get(name, 0) + 1
        operators.append(
            Operator(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                str(node.op),
                sizes.operands(node.args),
                sizes.operands(node.kwargs),
                tuple(sizes.term(flops_each(call, product), *product) for product in formula(call)),
                tuple(sizes.operand(o) for o in node.outputs if o is not None),
            )
        )
    storages = _storages(axes.graph, nodes, sizes)
    sights = find_sights(axes.graph, sizes.extent)
    return Workload(tuple(sizes.extents), tuple(operators), storages, len(nodes), sights)


@dataclass(frozen=True)
class _Called:
    """A node as the table of products takes it: operands are values."""

    graph: Graph
    node: Node

    @property
    def args(self) -> Sequence[Any]:
        return self.node.args

    @property
    def made(self) -> Ref | None:
        made = self.node.outputs[0]
        return None if made is None else Ref(made)

    def argument(self, name: str) -> Any:
        return self.node.argument(name)

    def is_operand(self, value: Any) -> bool:
        return isinstance(value, Ref)

    def shape(self, operand: Ref) -> Sequence[int]:
        return self.graph.values[operand.index].shape

    def is_complex(self, operand: Ref) -> bool:
        return self.graph.values[operand.index].dtype.is_complex


class _Sizes:
    """Sizes of dims as terms; extents that are the same are one."""

    def __init__(self, axes: Axes, units: Mapping[str, Ids]) -> None:
        self.axes, self.graph = axes, axes.graph
        self.names = list(units)
        classes = len(axes.solution.frozen)
        self.group_of = np.full(classes, -1, dtype=np.int64)
        self.unit_of = np.zeros(classes, dtype=np.int64)
        for number, of_group in enumerate(units.values()):
            self.group_of[of_group] = number
            self.unit_of[of_group] = np.arange(len(of_group))
        members = axes.solution.members
        alive = np.r_[0, np.cumsum(self.group_of[members.indices] >= 0)]
        self.shrinks = alive[members.indptr[1:]] > alive[members.indptr[:-1]]  # classes that some unit removes
        self.extents: list[Extent] = []
        self._by_array: dict[int, int | None] = {}  # most labels share their array of ids
        self._by_classes: dict[bytes, int | None] = {}

    def extent(self, index: int, dim: int) -> int | None:
        """The extent of a dim of a value, or None."""
        dims = self.axes.labels.get(index)
        label = dims[dim] if dims is not None else None
        if not isinstance(label, Label):
            return None
        key = id(label.ids)
        if key not in self._by_array:
            classes = self.axes.solution.of_id[label.ids]
            if not self.shrinks[classes].any():
                self._by_array[key] = None
            else:
                digest = classes.tobytes()
                if digest not in self._by_classes:
                    self._by_classes[digest] = self._made(label.ids)
                self._by_array[key] = self._by_classes[digest]
        return self._by_array[key]

    def _made(self, ids: Ids) -> int:
        removed, places = self.axes.solution.removed_by(ids)
        groups = self.group_of[removed]
        pairs = {}
        for number in np.unique(groups[groups >= 0]).tolist():
            mine = groups == number
            pairs[self.names[number]] = (self.unit_of[removed[mine]], places[mine])
        self.extents.append(Extent(len(ids), pairs))
        return len(self.extents) - 1

    def term(self, factor: int, *dims: Sequence[Place]) -> Term:
        """The product of dims; of each, the places where it can be seen: any that shrinks tells."""
        extents = []
        for places in dims:
            found = next((e for value, dim in places if (e := self.extent(value.index, dim)) is not None), None)
            if found is None:
                factor *= self.graph.values[places[0][0].index].shape[places[0][1]]
            else:
                extents.append(found)
        return Term(factor, tuple(extents))

    def whole(self, index: int, factor: int = 1) -> Term:
        """The entries of a value."""
        return self.term(factor, *([(Ref(index), d)] for d in range(len(self.graph.values[index].shape))))

    def operand(self, index: int) -> Operand:
        found = self.graph.values[index]
        dims = tuple((n, self.extent(index, d)) for d, n in enumerate(found.shape))
        return Operand(dims, str(found.dtype).removeprefix("torch."))

    def operands(self, value: Any) -> Any:
        """Arguments with an `Operand` in place of every tensor."""
        if isinstance(value, Ref):
            return self.operand(value.index)
        if isinstance(value, (list, tuple)):
            return type(value)([self.operands(item) for item in value])
        if isinstance(value, Mapping):
            return {key: self.operands(item) for key, item in value.items()}
        return value


# ---------------------------------------------------------------- memory


def _storages(graph: Graph, nodes: Sequence[Node], sizes: _Sizes) -> tuple[Storage, ...]:
    """When the memory of every activation is needed: from the call that makes it to the last that reads it."""
    end = len(nodes) - 1
    base: dict[int, int] = {}  # value -> the value whose memory it is

    def of(index: int) -> int:
        return base.setdefault(index, index)

    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for node in nodes:
        for index in node.inputs:
            last[of(index)] = node.index
        viewed = _viewed(node)
        for position, made in enumerate(node.outputs):
            if made is None or made in base:
                continue
            source = viewed.get(position, viewed.get(-1))
            base[made] = made if source is None else of(source)
            first.setdefault(base[made], node.index)
            last[base[made]] = node.index
        for new, old in node.updates:
            base[new] = of(old)
    weights = (ValueKind.PARAMETER, ValueKind.BUFFER)
    storages = []
    outputs = {of(index) for index in graph.outputs if index in base}
    for index in sorted(last):
        value = graph.values[index]
        if value.kind in weights:
            continue
        held = value.kind is not ValueKind.RESULT  # by the caller, or by the model
        term = sizes.whole(index, value.dtype.itemsize)
        until = end if held or index in outputs else last[index]
        storages.append(Storage(term, 0 if held else first[index], until))
    return tuple(storages)


def _viewed(node: Node) -> dict[int, int]:
    """Position of a result (-1 for all) -> the argument whose memory it is."""
    if node.name == "aten._unsafe_view":  # its schema does not say so
        return {0: node.inputs[0]}
    schema = node.op._schema
    by_mark: dict[str, int] = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, Ref):
                by_mark.update(dict.fromkeys(argument.alias_info.before_set, value.index))
    found: dict[int, int] = {}
    for position, result in enumerate(schema.returns):
        if result.alias_info is None:
            continue
        marks = [by_mark[m] for m in result.alias_info.before_set if m in by_mark]
        if marks:
            found[position] = marks[0]
        elif by_mark and "[]" in str(result.type).replace("List", "[]"):  # a list of views
            found[-1] = next(iter(by_mark.values()))
    return found
