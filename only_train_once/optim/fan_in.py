"""Weights that read what is left, made larger as units leave, so that what they put out keeps its size.

A layer that adds up n inputs puts out values whose variance grows with n, so fresh weights are drawn with a variance
of c / n (He et al. 2015, arXiv 1502.01852, section 2.2). When m of the n inputs are left, the weights that read these
were drawn for n: times ``√(n / m)`` they are as fresh weights of a layer of m inputs would be. Without it the
activations of a network that has no normalizations shrink with every layer, the more the fewer units are left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role
from only_train_once.optim.zeros import slow_weights
from only_train_once.sharding import local

Units = Mapping[str, NDArray[np.int64]]  # group name -> units
Positions = dict[tuple[str, int], list[NDArray[np.int64]]]  # tensor and dim -> positions in it


def growth(
    groups: Iterable[PruningGroup], before: Units, after: Units, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """By what each tensor that reads units is to be multiplied.

    Args:
        groups: whose slices fit the tensors.
        before: units that were at zero already.
        after: those that are now.
        shapes: of the tensors.

    Returns:
        Name -> ``√(n / m)``, n and m the inputs that were and are left; over several dims that read, the product. A
        tensor that also *makes* units in such a dim (a tied embedding) has none: it would make them larger, too.
    """
    none = np.zeros(0, dtype=np.int64)
    zeros: tuple[Positions, Positions] = (defaultdict(list), defaultdict(list))  # read before, and now
    made = set()
    for group in groups:
        made |= {(s.param, s.dim % len(shapes[s.param])) for s in group.with_role(Role.ZERO)}
        for s in group.with_role(Role.CONSUMER):
            for units, positions in zip((before, after), zeros, strict=True):
                chosen = units.get(group.name, none)
                positions[s.param, s.dim % len(shapes[s.param])].append(s.index[chosen].ravel())
    found: dict[str, float] = {}
    for name, dim in zeros[0].keys() - made:
        n, m = (shapes[name][dim] - len(np.unique(np.concatenate(positions[name, dim]))) for positions in zeros)
        if 0 < m < n:
            found[name] = found.get(name, 1.0) * math.sqrt(n / m)
    return found


def enlarge_(factors: Mapping[str, float], tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Multiply the tensors by their factors, and the other values of these weights that the optimizer keeps."""
    for name, factor in factors.items():
        for values in (tensors[name], *slow_weights(optimizer, tensors[name])):
            local(values).mul_(factor)
