"""Operators over space: pooling, resampling, patches. Channels pass."""

from __future__ import annotations

import numpy as np

from ..graph import Node
from ..labels import Dim, Label
from .registry import Context, rule, without_zeros


@rule(
    "aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d", "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d", "aten.adaptive_avg_pool3d",
    "aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d", "aten.upsample_nearest1d",
    "aten.upsample_nearest2d", "aten.upsample_nearest3d", "aten._upsample_nearest_exact1d",
    "aten._upsample_nearest_exact2d", "aten._upsample_nearest_exact3d", "aten.upsample_linear1d",
    "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten.upsample_bicubic2d", "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa", "aten.mkldnn_max_pool2d",
)  # fmt: skip
def over_space(c: Context, node: Node) -> None:
    """The last one, two or three dims are space (the name says how many); zero stays zero.

    A second output holds positions, which are not 0 where the values are.
    """
    x = c.tensors(node)[0]
    dims = _space(c, node, x)
    plain = without_zeros(dims)
    for output in range(len(node.outputs)):
        if node.outputs[output] is not None:
            c.set(node, plain if output else dims, output)


def _space(c: Context, node: Node, x: int) -> list[Dim]:
    """The dims of ``x`` with those of space frozen."""
    space = next((int(n) for n in "123" if f"{n}d" in node.name), 2)
    dims = list(c.dims(x))
    for d in range(c.rank(x) - space, c.rank(x)):
        c.freeze(dims[d], f"is a dim of space at {c.graph.where(node)}")
        dims[d] = None
    return dims


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def max_unpool(c: Context, node: Node) -> None:
    """Values are put where the indices of another pooling say: the other dims of both go together."""
    x, places = c.tensors(node)[:2]
    dims: list[Dim] = []
    for value, place in zip(_space(c, node, x), _space(c, node, places), strict=True):
        joined = c.tie(value, place, node) if value is not None or place is not None else None
        dims.append(joined.with_zero(value.zero) if isinstance(joined, Label) and isinstance(value, Label) else joined)
    c.set(node, dims)


@rule("aten.im2col")
def im2col(c: Context, node: Node) -> None:
    """``(batch, C, H, W) -> (batch, C * kernel, positions)``."""
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    label = c.dim(x, -3)
    if isinstance(label, Label):
        times = c.shape(out)[-2] // len(label)
        label = Label(np.repeat(label.ids, times), np.repeat(label.zero, times))
    for d in (-1, -2):
        c.freeze(c.dim(x, d), f"is a dim of space at {c.graph.where(node)}")
    c.set(node, [*c.dims(x)[:-3], label, None])


@rule("aten.col2im")
def col2im(c: Context, node: Node) -> None:
    """``(batch, C * kernel, positions) -> (batch, C, H, W)``."""
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    label = c.dim(x, -2)
    channels = None
    if isinstance(label, Label):
        size = c.shape(out)[-3]
        channels, block = c.store.split(label, [size, len(label) // size])
        c.freeze(block, f"fills a block of pixels at {c.graph.where(node)}")
    c.set(node, [*c.dims(x)[:-2], channels, None, None])


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.grid_sampler")
def grid_sampler(c: Context, node: Node) -> None:
    """``input (batch, C, *space)`` read at ``grid (batch, *space, 2 or 3)``."""
    x, grid = c.tensors(node)[:2]
    batch = c.tie(c.dim(x, 0), c.dim(grid, 0), node)
    for d in range(2, c.rank(x)):
        c.freeze(c.dim(x, d), f"is a dim of space at {c.graph.where(node)}")
    for d in range(1, c.rank(grid)):
        c.freeze(c.dim(grid, d), f"is a position at {c.graph.where(node)}")
    of_x = c.dim(x, 0)
    if isinstance(batch, Label) and isinstance(of_x, Label):
        batch = batch.with_zero(of_x.zero)
    c.set(node, [batch, c.dim(x, 1), *[None] * (c.rank(x) - 2)])
