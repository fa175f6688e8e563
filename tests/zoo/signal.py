"""Speech, graphs, Fourier mixers and weights that are computed from other weights."""

from __future__ import annotations

from .case import Case

SIGNAL: dict[str, Case] = {}
