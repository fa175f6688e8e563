"""Operators that reduce a dim, or whose result depends on the order or the count of a dim's indices."""

from __future__ import annotations

from ..graph import Node
from ..labels import Dim, Label, Mark
from . import written_norms
from .norm import norm_dim
from .registry import Context, NormSite, reduced_dims, rule, without_zeros
from .written_norms import Norm


def _set_reduced(c: Context, node: Node, dims: list[Dim], reduced: list[int], output: int = 0) -> None:
    made = node.outputs[output]
    if made is None:
        return
    kept_rank = c.rank(made) == len(dims)
    result = [None if d in reduced else dim for d, dim in enumerate(dims)]
    if not kept_rank:
        result = [dim for d, dim in enumerate(result) if d not in reduced]
    c.set(node, result, output)


@rule("aten.sum", "aten.linalg_vector_norm", "aten.norm", "aten.nansum")
def summing(c: Context, node: Node) -> None:
    """A zero adds nothing. A sum gives every entry a gradient, a norm gives a zero entry none."""
    x = c.tensors(node)[0]
    reduced = reduced_dims(c, node, x)
    dims = list(c.dims(x))
    order = node.argument("ord", node.argument("p", 2))
    for d in reduced:
        label = dims[d]
        if not isinstance(label, Label):
            continue
        if node.name in ("aten.linalg_vector_norm", "aten.norm") and (order is None or float(order) <= 0):
            c.freeze(label, f"a norm of order {order} counts zeros at {c.graph.where(node)}")
            continue
        c.need_zero(node, x, d)
        if node.name in ("aten.sum", "aten.nansum"):
            c.leak(label.ids)
    _set_reduced(c, node, dims, reduced)


@rule("aten.mean")
def mean(c: Context, node: Node) -> None:
    """A mean divides by the count: exact only where the running module is a norm that can be told the full one."""
    x = c.tensors(node)[0]
    reduced = reduced_dims(c, node, x)
    dims = list(c.dims(x))
    for d in reduced:
        label = dims[d]
        if not isinstance(label, Label) or node.index in c.idle:  # nobody reads the mean
            continue
        alone = len(reduced) == 1
        if alone and written_norms.is_variance(c, node):
            continue  # everything is said at the mean that it goes with
        norm = written_norms.norm_of(c, node) if alone else None
        site = norm_dim(c, node, label) if norm is not None else None
        if site is None:
            c.freeze(label, f"a mean divides by the count of this dim at {c.graph.where(node)}")
            continue
        if norm is not Norm.RESPONSE:  # the width of a response norm is that of its layer, and not of a stream
            c.mark(label, Mark.NORMALIZED)
        c.need_zero(node, x, d)
        c.norms.append(NormSite(node.module, site, label.ids))
        if norm is Norm.LAYER:
            c.leak(label.ids)
    _set_reduced(c, node, dims, reduced)


# how many of the outputs are 0 where everything reduced is 0: values are, positions need not be
_ZERO_OUTPUTS = {
    "aten.amax": 1, "aten.amin": 1, "aten.max": 1, "aten.min": 1, "aten.prod": 1, "aten.var": 1, "aten.std": 1,
    "aten.var_mean": 2, "aten.std_mean": 2, "aten.any": 1, "aten.all": 1, "aten.median": 1, "aten.nanmedian": 1,
    "aten.mode": 1, "aten.count_nonzero": 1, "aten.aminmax": 2, "aten.kthvalue": 1,
}  # fmt: skip


@rule(
    "aten.amax", "aten.amin", "aten.max", "aten.min", "aten.prod", "aten.var", "aten.std", "aten.var_mean",
    "aten.std_mean", "aten.argmax", "aten.argmin", "aten.any", "aten.all", "aten.logsumexp", "aten.median",
    "aten.nanmedian", "aten.mode", "aten.count_nonzero", "aten.aminmax", "aten.kthvalue",
)  # fmt: skip
def counting(c: Context, node: Node) -> None:
    """A zero is a value like any other here: the reduced axis is frozen, the others pass."""
    x = c.tensors(node)[0]
    tensors = c.tensors(node)
    if len(tensors) > 1:  # max(a, b)
        c.freeze_node(node, "two tensors are reduced together")
        return
    reduced = reduced_dims(c, node, x)
    dims = list(c.dims(x))
    for d in reduced:
        c.freeze(dims[d], f"a zero still counts when this dim is reduced at {c.graph.where(node)}")
    plain = without_zeros(dims)
    for output in range(len(node.outputs)):
        _set_reduced(c, node, dims if output < _ZERO_OUTPUTS.get(node.name, 0) else plain, reduced, output)


@rule("aten.cumsum")
def running_sum(c: Context, node: Node) -> None:
    """A zero adds nothing to what follows, but what was summed before it stands in its place."""
    x = c.tensors(node)[0]
    d = int(node.argument("dim")) % max(c.rank(x), 1)
    dims = list(c.dims(x))
    label = dims[d] if dims else None
    if isinstance(label, Label):
        c.need_zero(node, x, d)
        c.leak(label.ids)
        dims[d] = label.with_zero(False)
    c.set(node, dims)


@rule("aten.cumprod", "aten.cummax", "aten.cummin", "aten.logcumsumexp", "aten.sort", "aten.argsort")
def ordered(c: Context, node: Node) -> None:
    """The order of the indices matters: the axis is frozen, the others pass. Zeros give zeros, but not positions."""
    x = c.tensors(node)[0]
    d = int(node.argument("dim", -1)) % max(c.rank(x), 1)
    dims = list(c.dims(x))
    c.freeze(dims[d], f"the order of this dim matters at {c.graph.where(node)}")
    dims[d] = None
    plain = without_zeros(dims)
    for output in range(len(node.outputs)):
        values = output == 0 and node.name not in ("aten.logcumsumexp", "aten.argsort")
        c.set(node, dims if values else plain, output)


@rule("aten.topk")
def topk(c: Context, node: Node) -> None:
    """Which indices are picked depends on all of them: one at zero is picked where the others are smaller."""
    x = c.tensors(node)[0]
    d = int(node.argument("dim", -1)) % max(c.rank(x), 1)
    dims = list(c.dims(x))
    c.freeze(dims[d], f"the largest of this dim are picked, a zero may be one, at {c.graph.where(node)}")
    dims[d] = None
    plain = without_zeros(dims)
    c.set(node, dims)
    c.set(node, plain, output=1)
