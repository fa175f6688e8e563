"""Fourier transforms: every entry of a transformed dim reads every other; channels pass."""

from __future__ import annotations

from ..graph import Node
from .registry import Context, rule


@rule("aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r")
def transform(c: Context, node: Node) -> None:
    """Linear along ``dim``: all zeros there give all zeros, so a channel that is 0 stays 0."""
    x = c.tensors(node)[0]
    moved = [int(d) % c.rank(x) for d in node.argument("dim")]
    c.keep(node, x, fixed=moved, why="is transformed as a whole")
