"""Detectors, segmentation decoders, diffusion networks, and convolutions of every kind."""

from __future__ import annotations

from .case import Case
from .convolutions import CONVOLUTIONS
from .image_attention import IMAGE_ATTENTION

VISION: dict[str, Case] = {**CONVOLUTIONS, **IMAGE_ATTENTION}
