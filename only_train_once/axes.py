"""Run the rules over a graph: which dims index the same channels, where zero stays zero, why an axis is frozen.

`analyse` gives an `Axes`: labels for every value, the solved constraints, and for every parameter dim the role
its entries play. `groups.py` turns that into groups; nothing below reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .graph import Expr, Graph, Guard, Node, SizeUse, ValueKind
from .labels import Dim, Ids, Kind, Label, Solution, Spread, kinds_of
from .rules import Context, registered
from .rules.pointwise import is_pointwise, pointwise
from .rules.registry import Attribute, NormSite, is_float

logger = logging.getLogger(__name__)


@dataclass
class Axes:
    """What the analysis found.

    Attributes:
        graph: what was analysed.
        solution: classes of ids, see `labels.py`.
        tensors: (parameter or buffer name, dim) -> ids.
        zero: (name, dim) pairs whose entries have to be 0 when a unit is removed.
        consumers: (name, dim) pairs that read a removed unit.
        attributes: (path of an int attribute) -> ids it counts.
        norms: norms whose statistics run over labelled ids.
        leaks: ids whose units receive a gradient at zero.
        multiples: (ids, number): what leaves of these ids is a multiple of the number.
        labels: value -> what its dims carry.
        unknown: operators without a rule and the modules they ran in.
    """

    graph: Graph
    solution: Solution
    tensors: dict[tuple[str, int], Ids]
    zero: set[tuple[str, int]]
    consumers: set[tuple[str, int]]
    attributes: dict[str, Ids]
    norms: list[NormSite]
    leaks: Ids
    multiples: list[tuple[Ids, int]] = field(default_factory=list)
    labels: dict[int, list[Dim]] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)


def analyse(
    graph: Graph,
    *,
    wide: bool = False,
    strict_outputs: bool = False,
    skip_operators: Collection[str] = (),
    skip_nodes: Collection[int] = (),
) -> Axes:
    """Find the axes of a graph.

    Args:
        graph: from `trace`.
        wide: offer the width of normalized residual streams and the positions inside heads as well.
        strict_outputs: only outputs that nothing else reads count as outputs.
        skip_operators: operators (``aten.add`` or ``add``) whose dims are to be frozen.
        skip_nodes: indices of nodes whose dims are to be frozen.
    """
    skip = (skip_operators, skip_nodes)
    c = _read(graph, *skip, frozenset())
    while c.breaks:  # what is divided by has to keep its values; known, other parameters may still make a unit 0
        found = _walk(c, c.store.solve(), [(index, dim) for index, dim, _, _ in c.breaks], True)
        if found <= c.never_zero:
            break
        c = _read(graph, *skip, c.never_zero | found)
    for _, _, ids, text in c.breaks:
        c.store.freeze(ids, text)
    _freeze_outputs(c, strict_outputs)
    _freeze_branches(c)
    statements = _statements(c)
    bound = _apply_sizes(c, statements)
    if not wide:
        _freeze_wide(c)
    return _settle(c, bound, [(use, ids) for use, ids in statements if not use.expr.is_leaf])


# ---------------------------------------------------------------- rules


def _read(
    graph: Graph,
    skip_operators: Collection[str],
    skip_nodes: Collection[int],
    never_zero: frozenset[tuple[str, int]],
) -> Context:
    """Every rule says what it has to say."""
    c = Context(graph, never_zero=never_zero)
    for use in graph.uses:
        if use.position == graph.values[use.value].shape[use.dim]:
            value = use.value
            c.sizes.setdefault((value, use.dim), use.expr)
            while value in c.producers and c.producers[value].name in ("aten.detach", "aten.alias", "aten.lift_fresh"):
                value = c.producers[value].inputs[0]  # a factory function hands out a view of what it made
                c.sizes.setdefault((value, use.dim), use.expr)
    for node in graph.nodes:
        names = (node.name, node.name.partition(".")[2])
        _apply(c, node, skip=node.index in skip_nodes or any(name in skip_operators for name in names))
    return c


def _apply(c: Context, node: Node, *, skip: bool) -> None:
    function = registered(node.name) or (pointwise if is_pointwise(node.op) else None)
    if skip:
        c.freeze_node(node, "the operator is skipped on request")
        function = None
    elif function is None:
        c.unknown.setdefault(node.name, []).append(node.module)
        c.freeze_node(node, "no rule for this operator")
    untrusted = next((c.graph.untrusted[o] for o in node.outputs if o is not None and o in c.graph.untrusted), None)
    if untrusted is not None:
        c.freeze_node(node, untrusted)
        function = None
    if function is not None:
        try:
            function(c, node)
        except Exception as error:  # a rule that fails says nothing: what it has stated already only restricts
            logger.warning("the rule for %s failed: %s", c.graph.where(node), error, exc_info=True)
            c.freeze_node(node, f"the rule for this operator failed ({type(error).__name__})")
            for output in node.outputs:
                if output is not None:
                    c.labels[output] = [None] * len(c.shape(output))
    if node.inputs and all(i in c.from_params for i in node.inputs):
        c.from_params |= {o for o in node.outputs if o is not None}
    for output in node.outputs:
        if output is not None and output not in c.labels:
            if output in c.consumers or output in c.graph.outputs:
                c.freeze_node(node, "nothing is known about this result")
            c.labels[output] = [None] * len(c.shape(output))
    _update_aliases(c, node)


def _update_aliases(c: Context, node: Node) -> None:
    """Memory that a call wrote to has other names: they keep their ids, and lose zeros that were overwritten."""
    if not node.updates:
        return
    lost: set[int] = set()
    kept: set[int] = set()
    for output in node.outputs:
        for dim in c.labels.get(output, []) if output is not None else []:
            if isinstance(dim, Label):
                lost |= set(dim.ids[~dim.zero].tolist())
                kept |= set(dim.ids[dim.zero].tolist())
    written_fixed = [o for o in node.outputs if o is not None]
    for new, old in node.updates:
        dims = []
        for d in c.dims(old):
            if isinstance(d, Label) and lost:
                seen = np.isin(d.ids, np.fromiter(lost | kept, dtype=np.int64))
                stays = ~np.isin(d.ids, np.fromiter(lost, dtype=np.int64)) & seen.any()
                d = d.with_zero(d.zero & stays)  # written through another reading of the memory: nothing is known
            elif isinstance(d, Spread) and written_fixed:
                d = None
            dims.append(d)
        c.labels[new] = dims
        if not all(i in c.from_params for i in node.inputs):
            c.from_params.discard(new)


def _freeze_outputs(c: Context, strict: bool) -> None:
    for position, index in enumerate(c.graph.outputs):
        if strict and c.consumers.get(index):
            continue
        for dim in c.dims(index):
            c.freeze(dim, f"is a dim of the model's output {position}")


def _freeze_branches(c: Context) -> None:
    """A decision taken on data may run other code next time; where parameters lie unused, it probably does."""
    if not c.graph.branches or not c.graph.unused:
        return
    for branch in c.graph.branches:
        prefix = f"{branch.module}." if branch.module else ""
        hidden = [name for name in c.graph.unused if name.startswith(prefix)]
        if not hidden:
            continue
        where = c.graph.where(c.graph.nodes[branch.node])
        for node in c.graph.nodes:
            if node.module == branch.module or node.module.startswith(prefix):
                for index in (*node.inputs, *(o for o in node.outputs if o is not None)):
                    for dim in c.dims(index):
                        c.freeze(dim, f"data decides at {where} whether {hidden[0]} and others run")


_WIDE = {
    Kind.WIDTH: "is the width of a normalized residual stream; wide=True offers it",
    Kind.HEAD_DIM: "is a position inside attention heads; wide=True offers it",
}


def _freeze_wide(c: Context) -> None:
    solution = c.store.solve()
    kinds = kinds_of(solution)
    for kind, text in _WIDE.items():
        c.store.freeze(np.flatnonzero(kinds[kind][solution.of_id]), text)


# ---------------------------------------------------------------- what the model's code said about sizes


def _statements(c: Context) -> list[tuple[SizeUse, Ids]]:
    """What the code said about the sizes of labelled dims, and the ids it spoke of.

    A repeated dim has no ids of its own; what was said about its size holds for the ids it met.
    """
    by_place: dict[tuple[int, int], list[SizeUse]] = {}
    for use in c.graph.uses:
        by_place.setdefault((use.value, use.dim), []).append(use)
    own = [(use, label.ids) for use in c.graph.uses if (label := c.label(use.value, use.dim)) is not None]
    met = [(use, ids) for place, ids in c.met for use in by_place.get(place, [])]
    return [(use, ids[: use.position]) for use, ids in (*own, *met, *c.counted)]


def _apply_sizes(c: Context, statements: list[tuple[SizeUse, Ids]]) -> dict[Attribute, Ids]:
    """Turn statements about sizes into constraints; returns what each attribute counts."""
    bound: dict[Attribute, Ids] = {}
    for attribute, ids in c.attributes:
        known = bound.setdefault(attribute, ids)
        if len(known) == len(ids):
            c.store.equal(known, ids)
        else:
            c.store.freeze(ids, f"is counted by {attribute[1]}, which counts something else too")
    for parts in c.graph.equal_parts:
        label = c.label(parts.value, parts.dim)
        if label is None:
            continue
        first = label.ids[: parts.size]
        for start in range(parts.size, len(label), parts.size):
            part = label.ids[start : start + parts.size]
            if len(part) == len(first):
                c.store.equal(first, part)
            else:
                c.freeze(label, f"is cut into parts of unequal size by {parts.where}")
    for use, ids in statements:
        expr = use.expr
        if expr.kind == "const":
            c.store.freeze(ids, f"its size is written as the number {expr.args[0]} by {use.where}")
        elif expr.kind == "attr":
            known = bound.setdefault(expr.args, ids)
            if len(known) == len(ids):
                c.store.equal(known, ids)
            else:
                c.store.freeze(ids, f"its size is {expr}, which counts something else too, by {use.where}")
        elif expr.kind == "dim":
            source = c.label(*expr.args)
            if source is not None and len(source) == len(ids):
                # of the same ids in any order there are as many: nothing is said about which leave together
                if not np.array_equal(np.sort(source.ids), np.sort(ids)):
                    c.store.equal(source.ids, ids)
            else:
                c.store.freeze(ids, f"its size is that of a fixed dim by {use.where}")
        elif (repeated := _repeated(c, expr, ids)) is not None:
            known = bound.setdefault(*repeated)
            if len(known) == len(repeated[1]):
                c.store.equal(known, repeated[1])
        else:
            suffix = _suffix(expr, c)
            if suffix is not None:  # x[-3:] of a dim: the last three stay
                label = c.label(use.value, use.dim)
                if label is not None:
                    c.store.freeze(label.ids[use.position :], f"its last {suffix} indices are cut by {use.where}")
    for guard in c.graph.guards:
        _bind_guard(c, guard, bound)
    return bound


def _repeated(c: Context, expr: Expr, ids: Ids) -> tuple[Attribute, Ids] | None:
    """``batch * self.heads``: the attribute counts what stands there once for every image."""
    for leaf in expr.args if expr.kind == "*" else ():
        size = _attribute_value(c.graph, *leaf.args) if leaf.kind == "attr" else 0
        if 1 < size < len(ids) and len(ids) % size == 0 and np.array_equal(np.resize(ids[:size], len(ids)), ids):
            return leaf.args, ids[:size]
    return None


def _suffix(expr: Expr, c: Context) -> int | None:
    if expr.kind == "+" and expr.args[0].kind == "dim" and expr.args[1].kind == "const" and expr.args[1].args[0] < 0:
        return -int(expr.args[1].args[0])
    return None


def _bind_guard(c: Context, guard: Guard, bound: dict[Attribute, Ids]) -> None:
    """``x.shape[1] == self.channels`` held, so the attribute counts that dim."""
    for attr, other in ((guard.left, guard.right), (guard.right, guard.left)):
        if attr.kind != "attr":
            continue
        ids = None
        if other.kind == "dim":
            label = c.label(*other.args)
            ids = label.ids if label is not None else None
        elif other.kind == "attr":
            ids = bound.get(other.args)
        if ids is None:
            continue
        known = bound.setdefault(attr.args, ids)
        if known is not ids and len(known) == len(ids):
            c.store.equal(known, ids)


def _settle(c: Context, bound: dict[Attribute, Ids], statements: list[tuple[SizeUse, Ids]]) -> Axes:
    """Solve; test every statement about sizes on trial removals; freeze what would break one; again."""
    guards = [g for g in c.graph.guards if g.left != g.right] + _about_fixed_dims(c, bound)
    for _ in range(64):
        solution = c.store.solve()
        broken = _broken(c, solution, bound, statements, guards)
        if not broken:
            break
        for ids, text in broken:
            c.store.freeze(ids, text)
    else:  # every round breaks something else: what cannot be kept true is not touched
        for _, ids in statements:
            c.store.freeze(ids, "what the code says about sizes cannot be kept true")
        for ids in bound.values():
            c.store.freeze(ids, "what the code says about sizes cannot be kept true")
        solution = c.store.solve()
    return _collect(c, solution, bound)


def _about_fixed_dims(c: Context, bound: dict[Attribute, Ids]) -> list[Guard]:
    """What is said about a dim that cannot shrink has to stay true while what it is said with may shrink."""
    met = {place for place, _ in c.met}
    guards: dict[Guard, None] = {}
    for use in c.graph.uses:
        dim = c.dims(use.value)[use.dim]
        if isinstance(dim, Label) or (use.value, use.dim) in met:
            continue
        for leaf in use.expr.leaves():
            if (leaf.kind == "attr" and leaf.args in bound) or (leaf.kind == "dim" and c.label(*leaf.args) is not None):
                guards[Guard(Expr("const", (use.position,)), use.expr, use.where)] = None
    return list(guards)


def _broken(
    c: Context,
    solution: Solution,
    bound: dict[Attribute, Ids],
    statements: list[tuple[SizeUse, Ids]],
    guards: list[Guard],
) -> list[tuple[Ids, str]]:
    """Statements that the removal of some unit makes false, as the unit's ids and the reason to freeze them.

    What such a statement speaks of cannot be removed while the model keeps its code.
    """
    if not statements and not guards:
        return []
    involved: list[tuple[Ids, Expr | None, Expr, str]] = [
        (ids, None, use.expr, f"its size is {use.expr} by {use.where}, which would not hold") for use, ids in statements
    ]
    for guard in guards:
        involved.append(
            (np.empty(0, np.int64), guard.left, guard.right, f"the code relies on {guard.left} == {guard.right}")
        )
    found: list[tuple[Ids, str]] = []
    for ids, left, right, text in involved:
        bad = _broken_by(c, solution, bound, ids, left, right)
        if len(bad):
            found.append((np.flatnonzero(np.isin(solution.of_id, bad)), text))
    return found


def _broken_by(
    c: Context,
    solution: Solution,
    bound: dict[Attribute, Ids],
    ids: Ids,
    left: Expr | None,
    right: Expr,
) -> Ids:
    """The units whose removal, alone or a few alike, makes a statement false."""
    lost: dict[int, NDArray[np.int64]] = {}

    def count(label_ids: Ids) -> tuple[int, NDArray[np.int64]]:
        if id(label_ids) not in lost:
            lost[id(label_ids)] = np.bincount(solution.removed_by(label_ids)[0], minlength=len(solution.frozen))
        return len(label_ids), lost[id(label_ids)]

    leaves: dict[Expr, tuple[int, NDArray[np.int64] | int]] = {}
    for expr in (left, right):
        for leaf in expr.leaves() if expr is not None else ():
            if leaf.kind == "attr":
                of_attribute = bound.get(leaf.args)
                leaves[leaf] = (
                    (_attribute_value(c.graph, *leaf.args), 0) if of_attribute is None else count(of_attribute)
                )
            elif leaf.kind == "dim":
                label = c.label(*leaf.args)
                leaves[leaf] = (c.shape(leaf.args[0])[leaf.args[1]], 0) if label is None else count(label.ids)
    own = count(ids) if left is None else None
    deltas = [d for _, d in (*leaves.values(), *([own] if own else [])) if not isinstance(d, int)]
    if not deltas:
        return np.empty(0, dtype=np.int64)
    units = np.flatnonzero(np.any([d > 0 for d in deltas], axis=0) & ~solution.frozen)
    bad: list[Ids] = []
    for times in (1, 2, 3):  # floor division can hide a single removal
        sizes = {leaf: n - times * (d if isinstance(d, int) else d[units]) for leaf, (n, d) in leaves.items()}
        actual = own[0] - times * own[1][units] if own is not None else left.evaluate(sizes.get)  # type: ignore[union-attr]
        wrong = np.broadcast_to(actual != right.evaluate(sizes.get), units.shape)
        possible = np.ones(len(units), dtype=bool)
        for size in sizes.values():
            possible &= np.asarray(size) > 0
        bad.append(units[wrong & possible])
    return np.unique(np.concatenate(bad))


def _attribute_value(graph: Graph, path: str, name: str, index: int | None) -> int:
    return graph.attributes.get(path, {}).get(name if index is None else f"{name}[{index}]", 0)


# ---------------------------------------------------------------- what the parameters are to the units


def _collect(c: Context, solution: Solution, bound: dict[Attribute, Ids]) -> Axes:
    graph = c.graph
    zero, consumers = _roles(c, solution)
    tensors: dict[tuple[str, int], Ids] = {}
    for name, index in graph.tensors.items():
        for d, dim in enumerate(c.labels.get(index, [])):
            if isinstance(dim, Label):
                tensors[name, d] = dim.ids
    attributes: dict[str, Ids] = {}
    for (path, attribute, position), ids in bound.items():
        full = f"{path}.{attribute}" if path else attribute
        attributes[full if position is None else f"{full}[{position}]"] = ids
    leaks = (
        np.unique(np.concatenate([np.asarray(ids).reshape(-1) for ids in c.leaks]))
        if c.leaks
        else np.empty(0, dtype=np.int64)
    )
    return Axes(
        graph, solution, tensors, zero, consumers, attributes, c.norms, leaks, c.store.multiples, c.labels, c.unknown
    )


def _roles(c: Context, solution: Solution) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """The parameter dims that have to be zero for a removed unit to be zero where it must, and those that read it."""
    return _walk(c, solution, c.demands, True), _walk(c, solution, c.consumed, False) - c.never_zero


def _walk(c: Context, solution: Solution, starts: list[tuple[int, int]], needs_zero: bool) -> set[tuple[str, int]]:
    """Walk back from dims of values to those of parameters: the ones that make these zero, or the weights they are."""
    known: dict[int, Ids] = {}  # id of an array of ids -> components; most labels share their array
    component = solution.component[solution.of_id]
    stamp = np.full(int(solution.component.max(initial=-1)) + 1, -1)  # component -> the last visit that wanted it
    visit = 0

    def classes(index: int, dim: int) -> Ids | None:
        label = c.label(index, dim)
        if label is None:
            return None
        if id(label.ids) not in known:
            found = component[label.ids]
            known[id(label.ids)] = found[:1] if (found == found[0]).all() else found
        return known[id(label.ids)]

    reached: set[tuple[int, int]] = set()
    pending: dict[int, set[int]] = {}
    for index, dim in starts:
        pending.setdefault(index, set()).add(dim)
        reached.add((index, dim))
    for node in reversed(c.graph.nodes):
        made = [o for o in (*node.outputs, *(new for new, _ in node.updates)) if o in pending]
        wanted = [found for o in made for d in pending[o] if (found := classes(o, d)) is not None]
        if not wanted:
            continue
        visit += 1
        for target in wanted:
            stamp[target] = visit
        for index in dict.fromkeys((*node.inputs, *(old for _, old in node.updates))):
            if not needs_zero and index not in c.from_params:
                continue
            for dim, label in enumerate(c.dims(index)):
                if not isinstance(label, Label) or (needs_zero and not label.zero.any()):
                    continue
                if (node.index, index, dim) in c.ignored:
                    continue
                found = classes(index, dim)
                if found is not None and (stamp[found] == visit).any():
                    pending.setdefault(index, set()).add(dim)
                    reached.add((index, dim))
    values = c.graph.values
    return {
        (values[i].name, d) for i, d in reached if values[i].kind is ValueKind.PARAMETER and is_float(values[i].dtype)
    }
