"""Operators that sum products over an axis: matrix products and convolutions."""

from __future__ import annotations

from ..graph import Node
from ..labels import Dim, Label, Mark
from .registry import Context, rule, without_zeros


def _with_bias(c: Context, node: Node, bias: int | None, out: Dim) -> Dim:
    """Add a bias along the last dim: zero where both are."""
    if bias is None:
        return out
    if c.rank(bias) == 0 or c.shape(bias)[-1] == 1:
        return out.with_zero(False) if isinstance(out, Label) else out
    return c.tie(out, c.dim(bias, -1), node)


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.dot", "aten.vdot", "aten.mv")
def matmul(c: Context, node: Node) -> None:
    a, b = c.tensors(node)[:2]
    _matmul(c, node, a, b, None)


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv")
def addmm(c: Context, node: Node) -> None:
    bias, a, b = c.tensors(node)[:3]
    if node.name == "aten.addbmm":
        c.freeze_node(node, "sums over the batch")
        return
    _matmul(c, node, a, b, bias)


@rule("aten.addr")
def outer(c: Context, node: Node) -> None:
    """``base + column x row``: zero where the base is, and the column or the row."""
    base, *vectors = c.tensors(node)[:3]
    dims: list[Dim] = []
    for d, vector in enumerate(vectors):
        own = d - (2 - c.rank(base))
        here = c.dim(vector, 0)
        if own >= 0 and c.shape(base)[own] > 1:
            here = c.tie(here, c.dim(base, own), node)
        elif isinstance(here, Label):
            here = here.with_zero(False)
        dims.append(here)
    c.set(node, dims)


@rule("aten.linear")
def linear(c: Context, node: Node) -> None:
    x, weight, *bias = c.tensors(node)
    c.contract(node, (x, c.rank(x) - 1), (weight, 1))
    out = _with_bias(c, node, bias[0] if bias else None, c.dim(weight, 0))
    rows = [d.with_zero(d.zero & (not bias)) if isinstance(d, Label) else d for d in c.dims(x)[:-1]]
    c.set(node, [*rows, out])


def _matmul(c: Context, node: Node, a: int, b: int, bias: int | None) -> None:
    """``(..., n, k) @ (..., k, m) + bias``."""
    column = 0 if c.rank(b) == 1 else c.rank(b) - 2
    c.contract(node, (a, c.rank(a) - 1), (b, column))
    activations = a not in c.from_params and b not in c.from_params
    batch: list[Dim] = []
    for d in range(max(c.rank(a), c.rank(b)) - 2 if c.rank(a) > 1 and c.rank(b) > 1 else 0):
        left, right = c.dim(a, d), c.dim(b, d)
        joined = c.tie(left, right, node)
        if isinstance(joined, Label) and isinstance(left, Label) and isinstance(right, Label):
            joined = joined.with_zero(left.zero | right.zero)
        if activations:
            c.mark(joined, Mark.HEAD)
        elif {a, b} - c.from_params:
            c.mark(joined, Mark.EXPERT)
        batch.append(joined)
    dims = list(batch)
    if c.rank(a) > 1:
        dims.append(c.dim(a, -2))
    if c.rank(b) > 1:
        dims.append(c.dim(b, -1))
    if activations:
        c.mark(c.dim(a, -1), Mark.HEAD_DIM)
        c.mark(dims[-1] if dims else None, Mark.HEAD_DIM)
    if bias is not None:
        rank = len(dims)
        for d in range(rank):
            own = d - (rank - c.rank(bias))
            here = dims[d]
            if own >= 0 and c.shape(bias)[own] > 1:
                dims[d] = c.tie(here, c.dim(bias, own), node)
            elif isinstance(here, Label):
                dims[d] = here.with_zero(False)
    c.set(node, dims)


@rule("aten.convolution", "aten._convolution", "aten.mkldnn_convolution", "aten.cudnn_convolution", "aten.conv1d",
      "aten.conv2d", "aten.conv3d", "aten.convolution_overrideable")  # fmt: skip
def convolution(c: Context, node: Node) -> None:
    """``x (batch, in, *space)``, ``weight (out, in / groups, *kernel)``; transposed: ``(in, out / groups, *kernel)``.

    With several groups an input channel is (group, i) and an output channel (group, o), and the group is shared: a
    whole group can leave, or the same i (or o) of every group.
    """
    x, weight = c.tensors(node)[:2]
    bias = c.tensor(node, "bias")
    transposed, groups = bool(node.argument("transposed", False)), int(node.argument("groups", 1))
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if c.rank(x) != c.rank(weight):
        c.freeze_node(node, "takes one example, not a batch")
        return
    for d in range(2, c.rank(x)):
        c.freeze(c.dim(x, d), f"is a dim of space at {c.graph.where(node)}")
    for d in range(2, c.rank(weight)):
        c.freeze(c.dim(weight, d), f"is a dim of the kernel at {c.graph.where(node)}")
    if groups == 1:
        c.contract(node, (x, 1), (weight, in_dim))
        out: Dim = c.dim(weight, out_dim)
    else:
        out = _grouped(c, node, x, weight, groups, transposed)
    if bias is not None:
        out = c.tie(out, c.dim(bias, 0), node)
    batch = c.dim(x, 0)
    if isinstance(batch, Label) and bias is not None:
        batch = batch.with_zero(False)
    c.set(node, [batch, out, *[None] * (c.rank(x) - 2)])


def _grouped(c: Context, node: Node, x: int, weight: int, groups: int, transposed: bool) -> Dim:
    channels = c.dim(x, 1)
    per_in = c.shape(x)[1] // groups
    # the dim of the weight that runs over all channels, and the one that runs inside a group
    whole, inside = c.dim(weight, 0), c.dim(weight, 1)
    if not isinstance(channels, Label):
        c.freeze(whole, f"its groups read a fixed input at {c.graph.where(node)}")
        c.freeze(inside, f"its groups read a fixed input at {c.graph.where(node)}")
        return None
    if not isinstance(whole, Label):
        c.freeze(channels, f"is grouped by a fixed weight at {c.graph.where(node)}")
        return None
    per_whole = len(whole) // groups
    x_group, x_in = c.store.split(channels, [groups, per_in])
    w_group, w_in = c.store.split(whole, [groups, per_whole])
    group = c.tie(x_group, w_group, node)
    if isinstance(group, Label):
        c.attribute(node, "groups", groups, group)
    if transposed:  # whole = (group, in), inside = out of a group
        c.tie(x_in, w_in, node)
        per_out = c.shape(weight)[1]
        sides = [group if isinstance(group, Label) else None, inside if isinstance(inside, Label) else None]
        out = c.store.merge(sides, [groups, per_out])
    else:
        c.tie(x_in, inside, node)
        out = whole
    if per_in > 1:
        # sums over the channels of a group; the channels themselves have to be zero
        c.need_zero(node, x, 1)
        c.consumed.append((weight, 0 if transposed else 1))
    return out


@rule("aten._sparse_addmm", "aten._sparse_mm")
def sparse_mm(c: Context, node: Node) -> None:
    """A sparse matrix (who is whose neighbour) times a dense one: its columns pass."""
    *added, sparse, dense = c.tensors(node)[:3]
    for index, d in ((sparse, 0), (sparse, 1), (dense, 0)):
        c.freeze(c.dim(index, d), f"is a dim of a sparse matrix at {c.graph.where(node)}")
    columns = c.dim(dense, 1)
    if added and float(node.argument("beta", 1)):
        c.freeze(c.dim(added[0], 0), f"is a dim of a sparse matrix at {c.graph.where(node)}")
        columns = c.tie(columns, c.dim(added[0], 1), node)
    c.set(node, [None, columns])


@rule("aten._euclidean_dist", "aten._cdist_forward", "aten.cdist")
def distance(c: Context, node: Node) -> None:
    """Sums squared differences over the last dim: exact when both are zero there."""
    a, b = c.tensors(node)[:2]
    c.tie(c.dim(a, -1), c.dim(b, -1), node)
    c.need_zero(node, a, c.rank(a) - 1)
    c.need_zero(node, b, c.rank(b) - 1)
    batch = [c.tie(c.dim(a, d), c.dim(b, d), node) for d in range(c.rank(a) - 2)]
    batch = without_zeros(batch)
    c.set(node, [*batch, c.dim(a, -2), c.dim(b, -2)])


# which arguments are the matrices and the right-hand sides
_SYSTEMS = {
    "aten.linalg_solve_triangular": (0, 1), "aten._linalg_solve_ex": (0, 1), "aten.cholesky_solve": (1, 0),
    "aten.triangular_solve": (1, 0),
}  # fmt: skip


@rule(*_SYSTEMS)
def solve(c: Context, node: Node) -> None:
    """``matrix @ x = right`` (or ``x @ matrix = right``): the systems of a batch and the columns are independent.

    A column of zeros has a solution of zeros.
    """
    tensors = c.tensors(node)
    matrix, right = (tensors[i] for i in _SYSTEMS[node.name])
    if c.rank(matrix) != c.rank(right):
        c.freeze_node(node, "is one system or many, which their ranks decide")
        return
    inner = -2 if bool(node.argument("left", True)) else -1
    for index, d in ((matrix, -1), (matrix, -2), (right, inner)):
        c.freeze(c.dim(index, d), f"is solved for at {c.graph.where(node)}")
    dims: list[Dim] = []
    for d in range(c.rank(right) - 2):
        of_right = c.dim(right, d)
        joined = c.tie(c.dim(matrix, d), of_right, node)
        if isinstance(joined, Label):
            # a system at zero has no solution, so its matrix has to keep its numbers
            joined = joined.with_zero(of_right.zero if isinstance(of_right, Label) else False)
        dims.append(joined)
    c.ignore(node, matrix, *range(c.rank(matrix) - 2))
    columns = c.dim(right, -1 if inner == -2 else -2)
    c.set(node, [*dims, *([None, columns] if inner == -2 else [columns, None])])
    for output in range(1, len(node.outputs)):  # factors, pivots and messages
        made = node.outputs[output]
        if made is not None:
            c.set(node, [*without_zeros(dims), *[None] * (c.rank(made) - len(dims))], output)
