"""Speech, graphs, Fourier mixers and weights that are computed from other weights."""

from __future__ import annotations

from .case import Case
from .weights import WEIGHTS

SIGNAL: dict[str, Case] = {**WEIGHTS}
