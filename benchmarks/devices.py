"""What benchmarks need to run on the CPU and elsewhere: inputs that go along, and a clock that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and mappings, on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: of the processor on the CPU; elsewhere of the wall, once the device is done."""

    def waited() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return time.process_time if device.type == "cpu" else waited
