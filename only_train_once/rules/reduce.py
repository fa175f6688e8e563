"""Operators that reduce a dim, or whose result depends on the order or the count of a dim's indices."""

from __future__ import annotations

from ..graph import Node, Ref
from ..labels import Dim, Label, Mark
from .norm import norm_dim
from .registry import Context, NormSite, rule, without_zeros


def _reduced(c: Context, node: Node, x: int) -> list[int]:
    wanted = node.argument("dim")
    rank = c.rank(x)
    if wanted is None or wanted == []:
        return list(range(rank))
    return [int(d) % max(rank, 1) for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]


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
    reduced = _reduced(c, node, x)
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
    reduced = _reduced(c, node, x)
    dims = list(c.dims(x))
    for d in reduced:
        label = dims[d]
        if not isinstance(label, Label) or node.index in c.idle:  # nobody reads the mean
            continue
        alone = len(reduced) == 1
        if alone and _is_variance(c, node):
            continue  # everything is said at the mean that it goes with
        layer = alone and _is_centre(c, node)
        site = norm_dim(c, node, label) if layer or (alone and _is_mean_square(c, node)) else None
        if site is None:
            c.freeze(label, f"a mean divides by the count of this dim at {c.graph.where(node)}")
            continue
        c.mark(label, Mark.NORMALIZED)
        c.need_zero(node, x, d)
        c.norms.append(NormSite(node.module, site, label.ids))
        if layer:
            c.leak(label.ids)
    _set_reduced(c, node, dims, reduced)


def _is_mean_square(c: Context, node: Node) -> bool:
    """Whether the module computes ``x * rsqrt(mean(x * x) + eps)`` and nothing else."""
    squared = c.producers.get(node.inputs[0])
    return squared is not None and _is_square(squared) and _meets_root(c, node)


def _is_centre(c: Context, node: Node) -> bool:
    """Whether this is the m of ``(x - m) * rsqrt(mean((x - m) ** 2) + eps)``, a layer norm written out."""
    readers = _readers(c, node)
    squares = [n for reader in readers for n in _readers(c, reader) if _is_square(n)]
    variances = [n for square in squares for n in _readers(c, square) if n.name == "aten.mean"]
    return bool(variances) and all(_centres(n, node) for n in readers) and all(_is_variance(c, n) for n in variances)


def _is_variance(c: Context, node: Node) -> bool:
    """Whether this is the mean of ``(x - m) ** 2``, m the mean of x over the same dims, and a root follows."""
    squared = c.producers.get(node.inputs[0])
    if squared is None or not _is_square(squared):
        return False
    difference = c.producers.get(squared.inputs[0])
    if difference is None or difference.name != "aten.sub" or len(difference.inputs) != 2:
        return False
    centre = c.producers.get(difference.inputs[1])
    if centre is None or centre.name != "aten.mean" or not _centres(difference, centre):
        return False
    return _reduced(c, node, node.inputs[0]) == _reduced(c, centre, centre.inputs[0]) and _meets_root(c, node)


def _centres(node: Node, centre: Node) -> bool:
    """Whether ``node`` is ``x - m``, m what ``centre`` makes of the same x."""
    return (
        node.name == "aten.sub"
        and node.module == centre.module
        and node.inputs == (centre.inputs[0], centre.outputs[0])
        and node.argument("alpha", 1) == 1
    )


def _readers(c: Context, node: Node) -> list[Node]:
    return c.consumers.get(node.outputs[0], []) if node.outputs[0] is not None else []


def _meets_root(c: Context, node: Node) -> bool:
    """Whether a module without parts adds an eps and takes the root: mean -> (+ eps) -> rsqrt, casts in between."""
    path = node.module
    if path in c.parents or not path:
        return False
    for _ in range(4):
        readers = _readers(c, node)
        if any(_is_root(n) for n in readers) and all(n.module == path for n in readers):
            return True
        if len(readers) != 1 or readers[0].name not in ("aten.add", "aten._to_copy"):
            return False  # not a clamp either: its bound would have to scale as well
        node = readers[0]
    return False


def _is_root(node: Node) -> bool:
    return node.name in ("aten.rsqrt", "aten.sqrt") or (node.name == "aten.pow" and node.args[1] in (-0.5, 0.5))


def _is_square(node: Node) -> bool:
    if node.name == "aten.pow":
        return node.args[1] == 2 and isinstance(node.args[0], Ref)
    if node.name == "aten.square":
        return True
    return node.name == "aten.mul" and node.args[0] == node.args[1]


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
    reduced = _reduced(c, node, x)
    dims = list(c.dims(x))
    for d in reduced:
        c.freeze(dims[d], f"a zero still counts when this dim is reduced at {c.graph.where(node)}")
    plain = without_zeros(dims)
    for output in range(len(node.outputs)):
        _set_reduced(c, node, dims if output < _ZERO_OUTPUTS.get(node.name, 0) else plain, reduced, output)


@rule("aten.cumsum", "aten.cumprod", "aten.cummax", "aten.cummin", "aten.logcumsumexp", "aten.sort", "aten.argsort")
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
