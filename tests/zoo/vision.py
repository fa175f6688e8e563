"""Detectors, segmentation decoders, diffusion networks, and convolutions of every kind."""

from __future__ import annotations

from .case import Case
from .convolutions import CONVOLUTIONS

VISION: dict[str, Case] = {**CONVOLUTIONS}
