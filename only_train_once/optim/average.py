"""Gradients averaged over the steps before a scoring."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role
from only_train_once.masking import precise
from only_train_once.sharding import like, part_of, shared_as, shares_of


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

    def with_this_step(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> GradientAverage:
        """The steps added and this one, which is not added here: its gradients may turn out to be bad."""
        total = GradientAverage(self.names, self.squared)
        total.sums = {n: t.clone() for n, t in self.sums.items()}
        total.squares = {n: t.clone() for n, t in self.squares.items()}
        total.count = self.count
        total.add(optimizer, tensors)
        return total

    def mean(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Name -> mean gradient, placed like the tensor; takes the sums with it."""
        sums, self.sums = self.sums, {}
        return self._mean(sums, tensors)

    def mean_square(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Name -> mean of the squared gradient, if they are kept; takes the sums with it."""
        sums, self.squares = self.squares, {}
        return self._mean(sums, tensors) if self.squared else None

    def _mean(self, sums: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        means = {
            n: like(tensors[n], sums[n].div_(self.count)) if n in sums else torch.zeros_like(tensors[n].detach())
            for n in self.names
        }
        return shared_as(tensors, means)

    def mean_with(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Mean gradient over the steps added and this one."""
        return self.with_this_step(optimizer, tensors).mean(tensors)

    def reset_unless_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget everything if an earlier step of the window brought a NaN or an infinity, in whichever process."""
        strange = [(~torch.isfinite(t)).any().to(torch.int32) for t in self.sums.values()]
        if any(bool(count) for count in shares_of(tensors).sum(strange)):
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.squares, self.count = {}, {}, 0


def _accumulate(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to the sums, which begin as copies in a precision that holds them."""
    known = [n for n in values if n in sums]
    if known:
        torch._foreach_add_([sums[n] for n in known], [values[n] for n in known])
    for name in [n for n in values if n not in sums]:
        half = values[name].dtype in (torch.float16, torch.bfloat16)
        sums[name] = values[name].to(torch.float32 if half else values[name].dtype, copy=True)


def _square(gradient: Tensor) -> Tensor:
    """Squared size of every entry, in a precision that holds it."""
    return precise(gradient).abs().square()
