"""`Case`: one small network of the test zoo, and inputs that many of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One structure."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    prunable: int = 1
    reason: str = ""
    wide: int = 0  # least number of prunable units with wide=True, where more than by default


def images(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def tokens(width: int = 16, length: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, length, width)
