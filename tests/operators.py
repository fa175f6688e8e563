"""Operators of torch between layers that can be cut: sample inputs from torch's own table of operators.

`sampled` makes a small network around one call. Its operands are made by parameters, so that every dim of every
operand could be cut, and every result is weighted by a parameter and summed, so that nothing else holds a dim. What
the analysis offers is removed and compared (`wrong`); what a brute-force cut of the operator alone shows to be
removable has to be offered (`missed`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from only_train_once.errors import TraceError
from only_train_once.graph import Graph
from only_train_once.groups import GroupList, find_groups
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace

from .pruning import zero

TOLERANCE = 1e-9
# torch's kernels read past the end of operands whose sizes do not fit together, as a trial cut may make them
_UNCHECKED = frozenset({"lu_unpack", "lu_solve", "linalg.lu_solve", "linalg.ldl_solve", "ormqr", "_segment_reduce"})
# They hand out memory that nobody wrote: what is in it is no function of anything, so there is nothing to compare.
_UNWRITTEN = frozenset({"empty_like", "new_empty", "new_empty_strided", "resize_", "resize_as_"})
_LARGEST = 400  # entries of an operand; torch's samples are mostly smaller

# How an operand comes about: an activation that is zero where its unit is removed, one that is not, a weight.
ACTIVATION, SHIFTED, WEIGHT = "activation", "shifted", "weight"


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: as in torch's table.
        name: the same with the variant and the number of the sample.
        function: takes the flattened arguments.
        leaves: flattened arguments; floating tensors with a dim are operands.
        structure: how the arguments nest.
    """

    operator: str
    name: str
    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @property
    def operands(self) -> tuple[int, ...]:
        return tuple(i for i, leaf in enumerate(self.leaves) if is_operand(leaf))

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The floating results."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.operands, operands, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        result = self.function(*args, **kwargs)
        return [
            torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
            for t in pytree.tree_leaves(result)
            if isinstance(t, Tensor) and t.layout == torch.strided and (t.is_floating_point() or t.is_complex())
        ]


def is_operand(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0 and leaf.numel() > 0


def operators() -> list[str]:
    """Names of the operators of torch's table that take float64 and compute something."""
    left_out = _UNCHECKED | _UNWRITTEN
    infos = [info for info in op_db if torch.float64 in info.dtypes and info.name not in left_out]
    return sorted({info.name for info in infos})


def calls(operator: str, count: int) -> Iterator[Call]:
    """Up to ``count`` samples of every variant of an operator, those with the most dims to cut first."""
    for info in op_db:
        if info.name != operator:
            continue
        found: list[tuple[tuple[int, ...], Call]] = []
        # With each sample torch would look through all frames below for a test of its own kind: most of the time.
        with warnings.catch_warnings(), mock.patch.object(common_utils, "extract_test_fn", return_value=None):
            warnings.simplefilter("ignore")  # what torch says about its own samples
            samples = list(enumerate(info.sample_inputs("cpu", torch.float64)))
        for number, sample in samples:
            leaves, structure = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
            name = f"{info.name}{'.' + info.variant_test_name if info.variant_test_name else ''}#{number}"
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = Call(info.name, name, info.op, tuple(leaves), structure)
            shapes = [leaves[i].shape for i in call.operands]
            if not shapes or any(s.numel() > _LARGEST for s in shapes):
                continue
            interesting = sum(n >= 3 for s in shapes for n in s)
            found.append(((-interesting, sum(s.numel() for s in shapes), number), call))
        for _, call in sorted(found, key=lambda pair: pair[0])[:count]:
            yield call


class Sampled(nn.Module):
    """A call between what makes its operands and what reads its results."""

    def __init__(self, call: Call, kinds: Sequence[str], inference: bool = False) -> None:
        super().__init__()
        self.call, self.kinds, self.inference = call, tuple(kinds), inference
        generator = torch.Generator().manual_seed(0)
        for number, (place, kind) in enumerate(zip(call.operands, kinds, strict=True)):
            value = call.leaves[place].double()
            noise = 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            made = {ACTIVATION: value, SHIFTED: value - 0.5, WEIGHT: value}[kind]
            weight = made.clone() if kind == WEIGHT else torch.stack([made, noise])
            self.register_parameter(f"made{number}", nn.Parameter(weight))
        with torch.no_grad():
            for number, result in enumerate(call.run([call.leaves[i].double() for i in call.operands])):
                read = torch.randn(result.shape, generator=generator, dtype=torch.float64)
                self.register_parameter(f"read{number}", nn.Parameter(read))

    def operands(self, x: Tensor) -> list[Tensor]:
        found = []
        for number, kind in enumerate(self.kinds):
            weight = getattr(self, f"made{number}")
            if kind != WEIGHT:
                weight = (x.view(-1, *[1] * (weight.dim() - 1)) * weight).sum(0)
            found.append(weight + 0.5 if kind == SHIFTED else weight)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.inference_mode() if self.inference else nullcontext():
            results = self.call.run(self.operands(x))
            return [(r * getattr(self, f"read{number}")).sum() for number, r in enumerate(results)]


def inputs(seed: int) -> Tensor:
    """Near (1, 0), so that the operands stay in the range of torch's sample."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([1.0, 0.0], dtype=torch.float64) + 0.1 * torch.rand(2, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Analysed:
    """A network around a call and what the analysis says of it."""

    model: Sampled
    graph: Graph
    groups: GroupList

    @property
    def units(self) -> int:
        return sum(g.size for g in self.groups.prunable)


def patterns(call: Call) -> Iterator[tuple[str, ...]]:
    """Ways to make the operands: all alike, and one unlike the others."""
    n = len(call.operands)
    seen: dict[tuple[str, ...], None] = {}
    for kind in (ACTIVATION, SHIFTED):
        seen[(kind,) * n] = None
    for one, others in ((WEIGHT, ACTIVATION), (ACTIVATION, WEIGHT), (SHIFTED, WEIGHT), (ACTIVATION, SHIFTED)):
        seen[(one, *[others] * (n - 1))] = None
    yield from seen


def sampled(call: Call, kinds: Sequence[str], inference: bool = False) -> Analysed | None:
    """Build and analyse; None where the call gives nothing to compare or is not repeatable."""
    try:
        model = Sampled(call, kinds, inference).eval()
        with torch.no_grad():
            one, two = model(inputs(0)), model(inputs(0))
    except Exception:  # the sample is there to show an error, or takes a parameter's place
        return None
    if not one or not all(torch.equal(a, b) for a, b in zip(one, two, strict=True)):
        return None
    try:
        graph = trace(model, inputs(0))
    except TraceError:
        return None
    return Analysed(model, graph, find_groups(graph, wide=True))


# ---------------------------------------------------------------- what is offered is exact


def wrong(case: Analysed, sets: int = 3) -> list[str]:
    """What was offered and is not exact: every unit alone (a few of each group), and random sets."""
    found = []
    random = np.random.default_rng(0)
    trials: list[dict[str, NDArray[np.int64]]] = []
    for group in case.groups.prunable:
        trials += [{group.name: np.array([u])} for u in random.permutation(group.size)[:2]]
    for _ in range(sets if case.units else 0):
        trials.append(
            {
                g.name: np.sort(random.permutation(g.size)[: int(random.integers(0, g.size))])
                for g in case.groups.prunable
            }
        )
    for units in trials:
        off = _difference(case, units)
        if off > TOLERANCE:
            found.append(f"off by {off:.1e} without { ({k: v.tolist() for k, v in units.items()}) }")
    return found


def _difference(case: Analysed, units: dict[str, NDArray[np.int64]]) -> float:
    model = Sampled(case.model.call, case.model.kinds, case.model.inference).eval()
    zero(model, case.groups, units)
    x = inputs(1)
    with torch.no_grad():
        try:
            expected = model(x)
        except RuntimeError:
            return 0.0  # the operator refuses zeros (a singular matrix): there is nothing to be equal to
        subnet, _ = construct_subnet(model, case.groups, units)
        try:
            found = subnet(x)
        except (RuntimeError, ValueError, IndexError) as error:
            raise AssertionError(f"{case.model.call.name} does not run without {units}: {error}") from error
    return max(_gap(a, b) for a, b in zip(expected, found, strict=True))


def _gap(a: Tensor, b: Tensor) -> float:
    if not bool(torch.isfinite(a).all()):
        return 0.0  # zeros are outside of the operator's domain
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0)) if bool(torch.isfinite(b).all()) else float("inf")


# ---------------------------------------------------------------- what can be removed is offered


def missed(case: Analysed) -> list[str]:
    """Dims that a cut of the operator alone shows to be removable, all indices one by one, but that are frozen."""
    offered: set[tuple[int, int]] = set()
    for group in case.groups.prunable:
        for s in group.slices:
            if s.param.startswith("made"):
                offered.add((int(s.param.removeprefix("made")), s.dim - 1))
    found = []
    for plan in _plans(case):
        lacking = [f"operand {i} dim {d}" for i, d in enumerate(plan[0]) if d is not None and (i, d) not in offered]
        if lacking and _removable(case.model.call, *plan):
            reasons = sorted({r for i, d in enumerate(plan[0]) if d is not None for r in _reasons(case, i, d)})
            found.append(f"{', '.join(lacking)} of {plan}: {'; '.join(reasons)[:200]}")
    return found


def _reasons(case: Analysed, operand: int, dim: int) -> set[str]:
    where = (f"made{operand}", dim + (case.model.kinds[operand] != WEIGHT))
    return {g.reason or "" for g in case.groups if not g.prunable and where in [(s.param, s.dim) for s in g.slices]}


_Plan = tuple[tuple[int | None, ...], tuple[int | None, ...]]


def _plans(case: Analysed) -> Iterator[_Plan]:
    """Which dim of each operand and of each result might be the same axis: those of equal size, from 3 on."""
    call = case.model.call
    shapes = [tuple(call.leaves[i].shape) for i in call.operands]
    results = [tuple(p.shape) for name, p in case.model.named_parameters() if name.startswith("read")]
    if len(shapes) + len(results) > 5:
        return
    for size in sorted({n for shape in shapes for n in shape if n >= 3}):
        choices = [[None, *(d for d, n in enumerate(shape) if n == size)] for shape in (*shapes, *results)]
        for plan in itertools.product(*choices):
            if any(d is not None for d in plan[: len(shapes)]):
                yield plan[: len(shapes)], plan[len(shapes) :]


def _removable(call: Call, dims: tuple[int | None, ...], out_dims: tuple[int | None, ...]) -> bool:
    generator = torch.Generator().manual_seed(2)
    values = [call.leaves[i].double() for i in call.operands]
    values = [v * (1 + 0.1 * torch.rand(v.shape, generator=generator, dtype=torch.float64)) for v in values]
    size = next(v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None)
    with torch.no_grad():
        for index in range(size):
            keep = torch.tensor([i for i in range(size) if i != index])
            zeroed = [
                v if d is None else v.index_fill(d, torch.tensor([index]), 0) for v, d in zip(values, dims, strict=True)
            ]
            cut = [v if d is None else v.index_select(d, keep) for v, d in zip(values, dims, strict=True)]
            try:
                full, small = call.run(zeroed), call.run(cut)
                full = [f if d is None else f.index_select(d, keep) for f, d in zip(full, out_dims, strict=True)]
            except Exception:  # sizes no longer fit: not removable this way
                return False
            for f, s in zip(full, small, strict=True):
                if f.shape != s.shape or not torch.isfinite(f).all() or not torch.allclose(f, s, rtol=1e-9, atol=1e-11):
                    return False
    return True
