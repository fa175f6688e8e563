"""Weights that read what is left, made larger as units leave, so that what they put out keeps its size.

A layer that adds up n inputs puts out values whose variance grows with n, so fresh weights are drawn with a variance
of c / n (He et al. 2015, arXiv 1502.01852, section 2.2). When m of the n inputs are left, the weights that read these
were drawn for n: times ``√(n / m)`` they are as fresh weights of a layer of m inputs would be. Without it the
activations of a network that has no normalizations shrink with every layer, the more the fewer units are left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import positions_of
from only_train_once.optim.zeros import slow_weights
from only_train_once.sharding import local

Units = Mapping[str, NDArray[np.int64]]  # group name -> units


def growth(
    groups: Collection[PruningGroup], before: Units, after: Units, tensors: Mapping[str, Tensor]
) -> dict[str, float]:
    """By what each tensor that reads units is to be multiplied.

    Args:
        groups: whose slices fit the tensors.
        before: units that were at zero already.
        after: those that are now.
        tensors: that the groups cut, by name.

    Returns:
        Name -> ``√(n / m)``, n and m the inputs that were and are left; over several dims that read, the product. Dims
        whose role is ``zero`` have none, also where they are read: those of a tied table make the units, too, and
        those of a square layer inside of a residual stream have that role.
    """
    were, are = (positions_of(groups, units, tensors, (Role.CONSUMER,)) for units in (before, after))
    found: dict[str, float] = {}
    for name, dims in are.items():
        for dim, gone in dims.items():
            length = tensors[name].shape[dim]
            n, m = length - len(were.get(name, {}).get(dim, ())), length - len(gone)
            if 0 < m < n:
                found[name] = found.get(name, 1.0) * math.sqrt(n / m)
    return found


def enlarge_(factors: Mapping[str, float], tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Multiply the tensors by their factors, and the other values of these weights that the optimizer keeps."""
    for name, factor in factors.items():
        for values in (tensors[name], *slow_weights(optimizer, tensors[name])):
            local(values).mul_(factor)
