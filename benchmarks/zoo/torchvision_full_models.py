"""Networks of torchvision for timings: large classifiers and segmenters get pictures of their own size, too.

Detectors, optical flow and the video networks of `torchvision_models` have the same inputs as there.
"""

from __future__ import annotations

from . import torchvision_models
from .network import Network
from .torchvision_models import names

__all__ = ["build", "names"]


def build(name: str) -> Network:
    return torchvision_models.build(name, own_size=True)
