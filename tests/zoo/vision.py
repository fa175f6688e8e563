"""Detectors, segmentation decoders, diffusion networks, and convolutions of every kind."""

from __future__ import annotations

from .case import Case

VISION: dict[str, Case] = {}
