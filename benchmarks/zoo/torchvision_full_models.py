"""Networks of torchvision with pictures of the size they are made for, the largest too. For timings."""

from __future__ import annotations

from . import torchvision_models
from .network import Network
from .torchvision_models import names

__all__ = ["build", "names"]


def build(name: str) -> Network:
    torchvision_models.LARGE = float("inf")
    return torchvision_models.build(name)
