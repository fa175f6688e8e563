"""Scaled dot-product attention, fused or by hand through softmax."""

from __future__ import annotations

import numpy as np

from ..graph import Node
from ..labels import Dim, Label, Mark
from .registry import Context, rule, without_zeros


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math", "aten._scaled_dot_product_fused_attention_overrideable",
    "aten.scaled_dot_product_attention", "aten._scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(c: Context, node: Node) -> None:
    """``q (batch, heads, n, d)``, ``k (batch, heads, s, d)``, ``v (batch, heads, s, dv)``.

    A head contributes nothing once its values are 0, whatever its queries and keys. d is contracted and keeps the
    softmax scale of the full d; when the scale is not given it is computed from d, which freezes d.
    """
    q, k, v = c.tensors(node)[:3]
    rank = c.rank(q)
    c.contract(node, (q, rank - 1), (k, rank - 1))
    c.mark(c.dim(q, -1), Mark.HEAD_DIM)
    c.mark(c.dim(v, -1), Mark.HEAD_DIM)
    if node.argument("scale") is None:
        c.freeze(c.dim(q, -1), f"the softmax scale is computed from its size at {c.graph.where(node)}")
        c.freeze(c.dim(k, -1), f"the softmax scale is computed from its size at {c.graph.where(node)}")
    heads: list[Dim] = []
    for d in range(rank - 2):
        of_q, of_k, of_v = (c.dim(x, d) for x in (q, k, v))
        of_k = c.tie(of_k, of_v, node) if c.shape(k)[d] == c.shape(v)[d] else of_k
        times = c.shape(q)[d] // max(c.shape(k)[d], 1)
        if times > 1 and isinstance(of_k, Label):  # each key-value head serves `times` query heads
            of_k = Label(np.repeat(of_k.ids, times), np.repeat(of_k.zero, times))
        if times > 1 and isinstance(of_v, Label):
            of_v = Label(np.repeat(of_v.ids, times), np.repeat(of_v.zero, times))
        joined = c.tie(of_q, of_k, node)
        mask = c.tensor(node, "attn_mask") if c.tensor(node, "attn_mask") is not None else c.tensor(node, "attn_bias")
        if mask is not None:
            own = d - (rank - c.rank(mask))
            if own >= 0 and c.shape(mask)[own] > 1:
                joined = c.tie(joined, c.dim(mask, own), node)
        if isinstance(joined, Label):
            joined = joined.with_zero(of_v.zero if isinstance(of_v, Label) else False)
            c.mark(joined, Mark.HEAD)
        heads.append(joined)
    for x in {q, k} - {v}:  # keys may be the values
        c.ignore(node, x)
    for x, d in ((q, -2), (k, -2), (v, -2)):
        c.freeze(c.dim(x, d), f"is a sequence at {c.graph.where(node)}")
    c.set(node, [*heads, None, c.dim(v, -1)])
    for output in range(1, len(node.outputs)):
        made = node.outputs[output]
        if made is not None and c.shape(made)[: rank - 1] == c.shape(q)[: rank - 1] and c.rank(made) == rank - 1:
            c.set(node, [*without_zeros(heads), None], output)
        elif made is not None:
            c.set(node, [None] * c.rank(made), output)


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.softmax", "aten.log_softmax")
def softmax(c: Context, node: Node) -> None:
    """Every index counts in the sum of exponentials, a zero too: the axis itself is frozen."""
    x = c.tensors(node)[0]
    d = int(node.argument("dim")) % max(c.rank(x), 1)
    dims = list(c.dims(x))
    c.freeze(dims[d], f"a zero still counts in a softmax over this dim at {c.graph.where(node)}")
    dims[d] = None
    c.set(node, without_zeros(dims))
