"""Where units can be seen at work: tensors that modules are given or return, and which of their dims carries units.

Only modules can be watched in a training run; what happens between two modules (a ``relu`` written as a function)
shows in what the next one is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .graph import Graph, ValueKind
from .recorder import tensors_in


@dataclass(frozen=True)
class Sight:
    """A tensor that a module is given, or returns, with units in one of its dims.

    Attributes:
        module: path of the module.
        given: whether the module is given it by position; else it is returned.
        position: among the tensors given, or returned.
        dim: the dim.
        rank: number of dims.
        extent: which units stand where in the dim, a position in `Workload.extents`.
    """

    module: str
    given: bool
    position: int
    dim: int
    rank: int
    extent: int

    def of(self, value: Any) -> Tensor | None:
        """The tensor among what a module is given or returns."""
        return next((t for n, t in enumerate(tensors_in(value)) if n == self.position), None)


def find_sights(graph: Graph, extent: Callable[[int, int], int | None]) -> tuple[Sight, ...]:
    """Every sight, in the order in which the modules ran first.

    Args:
        graph: what was analysed.
        extent: (value, dim) -> the extent of a dim, None where nothing can shorten it.
    """
    weights = _made_of_weights(graph)
    seen: dict[tuple[str, bool, int], set[Sight]] = {}
    unlike: set[tuple[str, bool, int]] = set()
    for place, index in _tensors_of_calls(graph):
        if index in weights:
            continue
        rank = len(graph.values[index].shape)
        found = ((d, e) for d in range(rank) if (e := extent(index, d)) is not None)
        sights = {Sight(*place, d, rank, e) for d, e in found}
        if seen.setdefault(place, sights) != sights:
            unlike.add(place)  # a module that is called twice, with other units
    return tuple(s for place, found in seen.items() if place not in unlike for s in sorted(found, key=lambda s: s.dim))


def _made_of_weights(graph: Graph) -> set[int]:
    """Values that do not depend on the inputs: weights, and what is computed from them alone."""
    known = {v.index for v in graph.values if v.kind not in (ValueKind.INPUT, ValueKind.RESULT)}
    for node in graph.nodes:
        if all(index in known for index in node.inputs):
            known.update(output for output in node.outputs if output is not None)
    return known


def _tensors_of_calls(graph: Graph) -> Iterator[tuple[tuple[str, bool, int], int]]:
    for call in graph.calls:
        for given, values in ((True, call.inputs), (False, call.outputs)):
            for position, index in enumerate(values):
                yield (call.module, given, position), index
