"""What can be removed, what stays and why, and what would free it: for people, from groups alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .groups import PruningGroup

# Part of a reason -> what a user can do. The first that fits counts.
_WAYS_OUT: tuple[tuple[str, str], ...] = (
    ("wide=True offers it", "wide=True"),
    ("no rule for this operator", "a rule for the operator (docs/rules.md)"),
    ("the rule for this operator failed", "a rule that fits this use of the operator (docs/rules.md)"),
    ("skip_patterns", "leave it out of skip_patterns"),
    ("on request", "leave the operator out of skip_patterns"),
    ("marked unprunable", "do not mark it"),
    ("is a dim of the model's output", "nothing, if callers rely on the output's shape; else return less"),
    ("its size is written as the number", "write the size as x.shape[i], -1 or an attribute of the module"),
    ("the code relies on", "compute both sizes from the same attribute or shape"),
    ("which counts something else too", "an attribute of its own for each size"),
    ("which would not hold", "compute the size from the shape of the tensor"),
    ("what the code says about sizes cannot be kept true", "compute sizes from the shapes of tensors"),
    ("no attribute", "keep the count as an int attribute of the module that runs the operator"),
    ("the softmax scale is computed from its size", "give the scale as a number that __init__ computes"),
    ("it is not known", "cut it with sizes from shapes or attributes (x.shape[i], self.width), not from numbers"),
    ("is cut into parts of unequal size", "split with sizes that shrink together"),
    ("are drawn along this dim", "draw one number for all channels, or none in evaluation mode"),
    ("at positions that data decides", "a mask that is the same along the channels"),
    ("is solved for", "nothing: a system of equations is solved as a whole"),
    ("which their ranks decide", "matrices and right-hand sides of the same rank"),
    ("nothing is known about this result", "a rule of your own for this use of the operator (docs/rules.md)"),
    ("data decides", "give an example on which every module runs"),
    ("gives another result when it runs again", "make the operator deterministic in evaluation mode"),
    ("the output is not made by the operators that were seen", "return what tensor operators compute"),
    (
        "a removed unit does not become 0",
        "a function with f(0) = 0 in between, or no constant added behind the weights",
    ),
    ("cannot be made to compute what it computes in full", "nn.LayerNorm or nn.RMSNorm, or eps in an attribute"),
    ("is a single unit", "nothing: the last unit has to stay"),
    ("units leave in multiples of", "a wider layer: an operator wants rows of such a length"),
    ("its units lie unevenly in rows", "parts of equal length"),
    ("more than one index has to be left", "nothing: an average over one index would be that index"),
    ("a mean divides by the count", "a sum, or a mean over another dim"),
    ("one index is picked", "an operator over the whole dim instead of one index after the other"),
    ("its entries are chosen by data", "nothing: which experts are read differs from input to input"),
    ("groups are chosen by data", "nothing: which rows go to which expert differs from input to input"),
    ("the largest of this dim are picked", "nothing: an index whose score is zero can be picked"),
    ("a zero still counts", "nothing for this function: 0 is an entry like any other to it"),
    ("a norm of order", "a norm that zeros do not change (order 1 or 2)"),
    ("statistics run over this dim outside of", "nn.GroupNorm as a module"),
    ("statistics run over several dims", "a norm over the channels alone"),
    ("statistics run over this dim", "nothing for this function: a zero counts in its statistics"),
    ("is a dim of the kernel", "nothing: a kernel keeps its extent"),
    ("is a dim of a sparse matrix", "nothing: rows and columns of it have a meaning (a node of a graph)"),
    ("is a dim of space", "nothing: neighbours along this dim have a meaning"),
    ("no finite number", "divide by something that a removed unit leaves above 0 (x + eps)"),
    ("rows are looked up by data", "nothing: every row has a meaning (a token, a position)"),
    ("is grouped by a fixed weight", "a weight that is a parameter of its own"),
    ("a part of fixed size joins", "nothing, if it comes from an input; a weight there makes it removable"),
    ("meets a dim of fixed size", "make the other dim depend on weights or on this one"),
    ("every factor of this dim is fixed", "what fixes its factors, see the reasons beside this one"),
    ("one dim is read as", "reshape to heads the same way everywhere"),
    ("is part of two dims that are merged in different ways", "merge the dims in one way"),
    ("a merged dim is tied to one of its own factors", "project to a width of its own first"),
    ("is a sequence", "nothing: its length is that of the data"),
    ("has to stay larger than the projection", "a layer without proj_size, and a linear layer behind it"),
    ("every index is used apart", "nothing: every index has a use of its own"),
    ("are chosen by data", "nothing: every entry has a meaning"),
    ("is written at given positions", "index along another dim"),
    ("is transformed as a whole", "a transform over another dim (space, time)"),
    ("is indexed by position", "index along another dim"),
    ("indices are picked", "index along another dim"),
)
_PLACE = re.compile(r"\b(?:at|in|by|before) \S+ (?:in|\()\s?.*$")


def way_out(reason: str | None) -> str:
    """What would free a group that is frozen for this reason; empty where nothing general can be said."""
    return next((text for part, text in _WAYS_OUT if part in (reason or "")), "")


@dataclass(frozen=True)
class Stays:
    """What stays for one reason.

    Attributes:
        reason: in the words of the first group, with the place.
        way_out: what would free it.
        share: of the model's parameters that only groups with this reason reach.
        tensors: names of parameters and the dims concerned, ``fc.weight[0]``.
    """

    reason: str
    way_out: str
    share: float
    tensors: tuple[str, ...]


def coverage(groups: Sequence[PruningGroup], shapes: Mapping[str, Sequence[int]]) -> float:
    """Share of the parameters that some prunable group can cut; ``shapes`` are those of all parameters."""
    reached = _reached([g for g in groups if g.prunable], shapes)
    total = sum(mask.size for mask in reached.values())
    return sum(int(mask.sum()) for mask in reached.values()) / total if total else 0.0


def what_stays(groups: Sequence[PruningGroup], shapes: Mapping[str, Sequence[int]]) -> list[Stays]:
    """Frozen groups by reason (places apart), those that keep most parameters first."""
    by_reason: dict[str, list[PruningGroup]] = {}
    for group in groups:
        if not group.prunable:
            by_reason.setdefault(_PLACE.sub("", re.sub(r"\d+", "N", group.reason or "")), []).append(group)
    free = _reached([g for g in groups if g.prunable], shapes)
    total = sum(mask.size for mask in free.values())
    found = []
    for members in by_reason.values():
        kept = _reached(members, {name: shapes[name] for g in members for name in g.params if name in shapes})
        stuck = sum(int((mask & ~free[name]).sum()) for name, mask in kept.items())
        tensors = dict.fromkeys(f"{s.param}[{s.dim}]" for g in members for s in g.slices if s.role.is_tensor)
        found.append(Stays(str(members[0].reason), way_out(members[0].reason), stuck / (total or 1), tuple(tensors)))
    return sorted(found, key=lambda stays: -stays.share)


def _reached(groups: Sequence[PruningGroup], shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.bool_]]:
    """For every tensor the entries that some group cuts."""
    reached = {name: np.zeros(tuple(shape), dtype=bool) for name, shape in shapes.items()}
    for group in groups:
        for s in group.slices:
            if s.role.is_tensor and s.param in reached:
                np.moveaxis(reached[s.param], s.dim, 0)[s.index.reshape(-1)] = True
    return reached
