"""What many tests do to a network: random numbers in every norm, random units to zero."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from only_train_once.groups import GroupList, Role
from only_train_once.masking import regions


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random norm weights, biases, statistics and scales; what starts at zero, or next to it, gets small
    numbers.

    A fresh network hides mistakes: its norms are the identity and its zero-initialized branches contribute nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = parameter.numel() == max(parameter.shape, default=1)  # a vector, whatever its rank
            if small:
                parameter.copy_(normal(parameter) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
            elif parameter.numel() and parameter.abs().max() < 1e-4:
                parameter.copy_(normal(parameter) * 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer) * 0.3)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator).to(buffer.dtype) + 0.5)


def choose(groups: GroupList, share: float = 0.4, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """A random share of the units of every prunable group, never all; as few as may leave at a time, or more."""
    random = np.random.default_rng(seed)
    chosen = {}
    for group in groups.prunable:
        step = group.multiple
        count = min(max(round(group.size * share / step), 1) * step, group.most)
        chosen[group.name] = np.sort(random.permutation(group.size)[:count]).astype(np.int64)
    return chosen


def zero(model: nn.Module, groups: GroupList, units: dict[str, NDArray[np.int64]]) -> None:
    """Set what has to be zero, and nothing else."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for region in regions(groups, units, tensors, (Role.ZERO,)):
            region.zero_(tensors[region.name])


def coverage(model: nn.Module, groups: GroupList) -> float:
    """Share of the parameters' entries that some prunable group can cut."""
    parameters = dict(model.named_parameters())
    covered = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for group in groups.prunable:
        for s in group.slices:
            if s.role.is_tensor and s.param in covered:
                covered[s.param].index_fill_(s.dim, torch.from_numpy(s.index.reshape(-1)), True)
    return sum(int(c.sum()) for c in covered.values()) / sum(p.numel() for p in parameters.values())
