"""Gradients averaged over the steps before a scoring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.criteria import sums_of
from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import HALF, Region, blocks, precise
from only_train_once.sharding import like, local, part_of, shares_of


def params_of(groups: Iterable[PruningGroup], roles: Collection[Role], among: Collection[str]) -> list[str]:
    """Names of the tensors the groups cut in slices with these roles, in order, each once."""
    return list(dict.fromkeys(s.param for g in groups for s in g.with_role(*roles) if s.param in among))


class GradientAverage:
    """The mean of the true gradients over a window of steps, as the optimizer sees them.

    Gradients count after accumulation, unscaling and clipping, and negated under ``maximize=True``: they are gradients
    of what the step makes smaller. A parameter without a gradient in a step counts as zero in that step. Sums are in
    float32 for half precision, else in the parameter's own dtype; they exist between `add` and `reset` only. Of a
    parameter that is spread over processes each sums the part that is there.

    Args:
        names: the parameters.
        squares: also keep the mean of the squared gradients.
    """

    def __init__(self, names: Sequence[str], squares: bool = False) -> None:
        self.names = tuple(names)
        self.squared = squares
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.count = 0

    def add(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Add the gradients of this step."""
        gradients = self._gradients(optimizer, tensors)
        _accumulate(self.sums, gradients)
        if self.squared:
            _accumulate(self.squares, {n: _square(g) for n, g in gradients.items()})
        self.count += 1

    def _gradients(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        maximized = {id(p) for g in optimizer.param_groups if g.get("maximize") for p in g["params"]}
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when the kernel itself unscales
        out = {}
        for name in self.names:
            parameter = tensors[name]
            if parameter.grad is None:
                continue
            gradient = part_of(parameter.grad.detach(), parameter)
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            out[name] = -gradient if id(parameter) in maximized else gradient
        return out

    def mean(self, optimizer: Optimizer, tensors: Mapping[str, Tensor], gone: Sequence[Region] = ()) -> Means:
        """Name -> mean gradient over the steps added and this one, placed like the tensor; 0 in what is ``gone``.

        This step is not added: its gradients may turn out to be bad.
        """
        return Means(self.names, self.sums, self._gradients(optimizer, tensors), self.count + 1, tensors, gone)

    def mean_square(
        self, optimizer: Optimizer, tensors: Mapping[str, Tensor], gone: Sequence[Region] = ()
    ) -> Means | None:
        """Name -> mean of the squared gradient over the same steps, if it is kept."""
        if not self.squared:
            return None
        now = self._gradients(optimizer, tensors)
        return Means(self.names, self.squares, now, self.count + 1, tensors, gone, _square)

    def reset_unless_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget everything if an earlier step of the window brought a NaN or an infinity, in whichever process."""
        strange = [(~torch.isfinite(t)).any().to(torch.int32) for t in self.sums.values()]
        if any(bool(count) for count in shares_of(tensors).sum(strange)):
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.squares, self.count = {}, {}, 0


class ProductSquares:
    """Sums over the steps of a window of ``<x, g>^2``, one number per unit, which no mean of gradients tells.

    A step's products are those of the units as they are at that step; nothing of a gradient is kept.

    Attributes:
        sums: by the numbers that units always had.  (units,)
    """

    def __init__(self, groups: Sequence[PruningGroup], roles: Collection[Role], device: torch.device) -> None:
        self.roles, self.device = roles, device
        self.leave(groups, np.ones(sum(g.size for g in groups), dtype=np.bool_))
        self.reset()

    def leave(self, groups: Sequence[PruningGroup], present: NDArray[np.bool_]) -> None:
        """Units have left, or none has: the groups without them, and flags by the numbers that units always had."""
        self._groups, self._present = tuple(groups), torch.from_numpy(present.copy()).to(self.device)

    def add(self, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Add what a step with these gradients has; all processes do so together."""
        self.sums = self._with(tensors, gradients)

    def means(self, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], count: int) -> list[Tensor]:
        """Per group the means over ``count`` steps, of which the last has these gradients and was not added."""
        mean = self._with(tensors, gradients)[self._present] / count
        return list(mean.split([g.size for g in self._groups]))

    def _with(self, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        found = sums_of(self._groups, ("products",), tensors, gradients, gradients, self.roles)
        products = torch.cat([sums["products"].to(self.device, torch.float64) for sums in found])
        sums = self.sums.clone()
        sums[self._present] += products.square()
        return sums

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(len(self._present), dtype=torch.float64, device=self.device)

    def fits(self, saved: object) -> bool:
        """Whether this can be taken over as the sums."""
        return isinstance(saved, Tensor) and saved.shape == self.sums.shape and saved.is_floating_point()

    def restore(self, saved: Tensor) -> None:
        """Take over saved sums."""
        self.sums = saved.to(self.device, torch.float64, copy=True)


class Means(Mapping[str, Tensor]):
    """Means that are made when they are asked for: all at once would take as much as the gradients."""

    def __init__(
        self,
        names: Sequence[str],
        sums: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
        count: int,
        tensors: Mapping[str, Tensor],
        gone: Sequence[Region],
        of: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._sums, self._now, self._count, self._tensors, self._of = sums, now, count, tensors, of
        self._gone = {region.name: region for region in gone}
        self._last: tuple[str, Tensor] | None = None  # several sums over the entries of a tensor follow each other
        self.shares = shares_of(tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one takes memory
            self._last = name, self._made(name)
        return self._last[1]

    def _made(self, name: str) -> Tensor:
        made = self.rows(name, slice(None))
        return like(self._tensors[name], made.clone() if self._as_it_is(name) else made)

    def _as_it_is(self, name: str) -> bool:
        """Whether the mean is this step's value."""
        return self._count == 1 and name in self._now and name not in self._sums and name not in self._gone

    def rows(self, name: str, block: slice) -> Tensor:
        """Some rows of the part of a mean that is here; to be read only."""
        if self._as_it_is(name):
            return precise(self._of(self._now[name][block]))
        sums, now = self._sums.get(name), self._now.get(name)
        if sums is None and now is None:
            return torch.zeros_like(local(self._tensors[name])[block])
        if now is None:
            total = sums[block].clone()  # type: ignore[index]
        elif sums is None:
            total = _widened(self._of(now[block]))
        else:
            total = sums[block] + self._of(now[block])
        if name in self._gone:
            self._gone[name].zero_rows_(total, block.start or 0)
        return total.div_(self._count)

    def finite(self, name: str) -> Tensor:
        """Whether all of a mean that is here is finite, as a flag on the device."""
        flags = [torch.isfinite(self.rows(name, block)).all() for block in blocks(local(self._tensors[name]).shape)]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _accumulate(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to the sums, which begin as copies in a precision that holds them."""
    known = [n for n in values if n in sums]
    if known:
        torch._foreach_add_([sums[n] for n in known], [values[n] for n in known])
    for name in [n for n in values if n not in sums]:
        sums[name] = _widened(values[name])


def _widened(value: Tensor) -> Tensor:
    """A copy in a precision that holds sums."""
    return value.to(torch.float32 if value.dtype in HALF else value.dtype, copy=True)


def _square(gradient: Tensor) -> Tensor:
    """Squared size of every entry, in a precision that holds it."""
    return precise(gradient).abs().square()
