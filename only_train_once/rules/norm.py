"""Normalizations: which statistics run over which dims, and what the full count means."""

from __future__ import annotations

import re

import numpy as np

from ..graph import Graph, Node
from ..labels import Dim, Label, Mark
from .registry import Context, NormSite, rule

_NORMALIZING = re.compile(r"norm(?!al)|sqrt|\bstd|\bvar")  # of operators' names; not aten.normal, which draws


def normalizes(graph: Graph) -> bool:
    """Whether something is divided by its own size: by a norm of torch's, or by a root or a deviation of it."""
    return any(_NORMALIZING.search(name) for name in graph.operators())


def _affine_zero(c: Context, label: Label, weight: int | None, bias: int | None, input_zero: bool) -> Label:
    """The result is ``x * weight + bias``: zero where the bias is, and the weight or what it multiplies."""
    product = np.full(len(label), input_zero) & label.zero
    if weight is not None:
        scale = c.label(weight, -1)
        product = product | (scale.zero if scale is not None else False)
    if bias is not None:
        shift = c.label(bias, -1)
        product = product & (shift.zero if shift is not None else False)
    return label.with_zero(product)


@rule(
    "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training",
    "aten.cudnn_batch_norm", "aten.miopen_batch_norm", "aten.batch_norm", "aten._batch_norm_with_update",
    "aten._batch_norm_no_update", "aten._batch_norm_impl_index",
)  # fmt: skip
def batch_norm(c: Context, node: Node) -> None:
    """Per channel, so removing a channel is exact; zero when weight and bias are.

    With statistics of the batch (instance norm, weight standardization) the other dims are averaged over.
    """
    x = c.tensors(node)[0]
    weight, bias = c.tensor(node, "weight"), c.tensor(node, "bias")
    of_batch = bool(node.argument("training", node.name == "aten._batch_norm_with_update"))
    training = of_batch or c.tensor(node, "running_mean") is None
    dims = list(c.dims(x))
    for d in range(len(dims)):
        if d != 1 and training:
            c.freeze(dims[d], f"statistics run over this dim at {c.graph.where(node)}")
        if d != 1 and isinstance(dims[d], Label):
            dims[d] = dims[d].with_zero(False)  # type: ignore[union-attr]
    channels = dims[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = c.tensor(node, name)
        if tensor is not None:
            joined = c.tie(channels, c.dim(tensor, 0), node)
            if not isinstance(joined, Label):
                channels = joined
    if isinstance(channels, Label):
        channels = _affine_zero(c, channels, weight, bias, input_zero=training)
    dims[1] = channels
    c.set(node, dims)
    for output in range(1, len(node.outputs)):
        made = node.outputs[output]
        if made is not None and c.rank(made) == 1 and c.shape(made)[0] == c.shape(x)[1]:
            c.set(node, [channels.with_zero(False) if isinstance(channels, Label) else None], output)
        elif made is not None:
            c.set(node, [None] * c.rank(made), output)


@rule("aten.native_layer_norm", "aten.layer_norm")
def layer_norm(c: Context, node: Node) -> None:
    """Mean and variance over the last dims: exact with the divisor of the full width, when the input is zero.

    The statistics also leak gradient into removed channels, so their slices are pinned.
    """
    _norm_over_last_dims(c, node, "LayerNorm", leaks=True)


@rule("aten._fused_rms_norm", "aten.rms_norm")
def rms_norm(c: Context, node: Node) -> None:
    """Mean of squares over the last dim: exact with the divisor of the full width, when the input is zero."""
    _norm_over_last_dims(c, node, "RMSNorm", leaks=False)


def _norm_over_last_dims(c: Context, node: Node, base: str, *, leaks: bool) -> None:
    x, count = c.tensors(node)[0], len(node.argument("normalized_shape"))
    weight, bias = c.tensor(node, "weight"), c.tensor(node, "bias")
    dims = _other_dims(c, node, x, count, bias)
    if count > 1:
        for d in range(-count, 0):
            _freeze_normalized(c, node, [c.dim(x, d)], weight, bias, "statistics run over several dims")
            dims[d] = None
    else:
        dims[-1] = _full_width(c, node, x, c.rank(x) - 1, weight, bias, base, leaks=leaks)
    c.set(node, dims)  # nothing is said about the statistics: who reads them freezes what they are made of


def _other_dims(c: Context, node: Node, x: int, normalized: int, bias: int | None) -> list[Dim]:
    """The dims that are not normalized pass; without a bias a zero row stays zero."""
    dims = list(c.dims(x))
    for d in range(len(dims) - normalized):
        found = dims[d]
        if isinstance(found, Label) and bias is not None:
            dims[d] = found.with_zero(False)
    return dims


def _freeze_normalized(c: Context, node: Node, dims: list[Dim], weight: int | None, bias: int | None, why: str) -> None:
    found = [*dims, *(c.dim(w, d) for w in (weight, bias) if w is not None for d in range(c.rank(w)))]
    for dim in found:
        c.freeze(dim, f"{why} at {c.graph.where(node)}")


def _full_width(
    c: Context, node: Node, x: int, dim: int, weight: int | None, bias: int | None, base: str, *, leaks: bool
) -> Dim:
    """The dim a norm runs over, when the module that runs it can be told to remember the full width."""
    label = c.dim(x, dim)
    for tensor in (weight, bias):
        if tensor is not None:
            label = c.tie(label, c.dim(tensor, 0), node)
    if not isinstance(label, Label):
        return None
    if base not in c.graph.bases.get(node.module, ()):
        _freeze_normalized(c, node, [label], None, None, f"statistics run over this dim outside of a {base} module")
        return label
    site = norm_dim(c, node, label)
    if site is None:
        _freeze_normalized(c, node, [label], None, None, "the normalized dim is not found in the module's input")
        return label
    c.mark(label, Mark.NORMALIZED)
    c.need_zero(node, x, dim)
    c.norms.append(NormSite(node.module, site, label.ids))
    if leaks:
        c.leak(label.ids)
    return _affine_zero(c, label, weight, bias, input_zero=not leaks)


def norm_dim(c: Context, node: Node, label: Label) -> int | None:
    """Which dim of the first input of the running module carries these ids; None where none does.

    A gate of the same shape may have given its ids to the product with it.
    """
    alike = [
        index
        for call in c.calls.get(node.module, [])
        for index in call.inputs
        if c.shape(index) == c.shape(call.inputs[0])
    ]
    for index in alike:
        for d, found in enumerate(c.labels.get(index, [])):
            if isinstance(found, Label) and np.array_equal(found.ids, label.ids):
                # counted from the end, so that an added batch dim does not matter; 1 means channels first
                return -1 if d == c.rank(index) - 1 else d
    return None


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(c: Context, node: Node) -> None:
    """Whole norm groups leave exactly; inside a group the full count has to be remembered."""
    x = c.tensors(node)[0]
    weight, bias = c.tensor(node, "weight"), c.tensor(node, "bias")
    count = int(node.argument("group") or node.argument("num_groups"))
    dims = list(c.dims(x))
    for d in range(len(dims)):
        if d != 1:
            c.freeze(dims[d], f"statistics run over this dim at {c.graph.where(node)}")
            dims[d] = None
    label = dims[1]
    for tensor in (weight, bias):
        if tensor is not None:
            label = c.tie(label, c.dim(tensor, 0), node)
    dims[1] = label
    if isinstance(label, Label):
        group, inner = c.store.split(label, [count, len(label) // count])
        if group is not None:
            c.attribute(node, "num_groups", count, group)
        if inner is not None:
            if "GroupNorm" in c.graph.bases.get(node.module, ()):
                c.mark(inner, Mark.NORMALIZED)
                c.need_zero(node, x, 1)
                c.norms.append(NormSite(node.module, 1, label.ids))
                c.leak(inner.ids)
            else:
                c.freeze(inner, f"statistics run over this dim outside of a GroupNorm module at {c.graph.where(node)}")
        dims[1] = _affine_zero(c, label, weight, bias, input_zero=False)
    c.set(node, dims)  # nothing is said about the statistics: who reads them freezes what they are made of


@rule("aten._weight_norm_interface", "aten._weight_norm")
def weight_norm(c: Context, node: Node) -> None:
    """``v * g / |v|`` with a norm per index of ``dim``: there only g may be zero, for v at zero is 0 / 0.

    Along the other dims a zero adds nothing to the norm.
    """
    v, g = c.tensors(node)[:2]
    kept = int(node.argument("dim")) % c.rank(v)
    dims = list(c.dims(v))
    for d in range(len(dims)):
        if d != kept:
            c.need_zero(node, v, d)
    joined, scale = c.tie(dims[kept], c.dim(g, kept), node), c.label(g, kept)
    dims[kept] = joined.with_zero(scale.zero if scale is not None else False) if isinstance(joined, Label) else None
    c.ignore(node, v, kept)
    c.from_params.add(node.outputs[0] if node.outputs[0] is not None else -1)
    c.set(node, dims)
