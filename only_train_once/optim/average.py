"""Gradients averaged over the steps before a scoring."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup, Role


def params_of(groups: Iterable[PruningGroup], roles: Collection[Role], among: Collection[str]) -> list[str]:
    """Names of the tensors the groups cut in slices with these roles, in order, each once."""
    return list(dict.fromkeys(s.param for g in groups for s in g.with_role(*roles) if s.param in among))


class GradientAverage:
    """The mean of the true gradients over a window of steps, as the optimizer sees them.

    Gradients count after accumulation, unscaling and clipping, and negated under ``maximize=True``: they are gradients
    of what the step makes smaller. A parameter without a gradient in a step counts as zero in that step. Sums are in
    float32 for half precision, else in the parameter's own dtype; they exist between `add` and `reset` only.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Add the gradients of this step."""
        maximized = {id(p) for g in optimizer.param_groups if g.get("maximize") for p in g["params"]}
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when the kernel itself unscales
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for name in self.names:
            parameter = tensors[name]
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach()
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            if id(parameter) in maximized:
                gradient = -gradient
            if name in self.sums:
                sums.append(self.sums[name])
                gradients.append(gradient)
            else:
                half = gradient.dtype in (torch.float16, torch.bfloat16)
                self.sums[name] = gradient.to(torch.float32 if half else gradient.dtype, copy=True)
        if sums:
            torch._foreach_add_(sums, gradients)
        self.count += 1

    def mean_with(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average over the steps added and this one, which is not added: its gradients may turn out to be bad."""
        total = GradientAverage(self.names)
        total.sums, total.count = {n: t.clone() for n, t in self.sums.items()}, self.count
        total.add(optimizer, tensors)
        return {
            n: total.sums[n].div_(total.count) if n in total.sums else torch.zeros_like(tensors[n].detach())
            for n in self.names
        }

    def reset_unless_finite(self) -> None:
        """Forget everything if an earlier step of the window brought a NaN or an infinity."""
        if not all(bool(torch.isfinite(t).all()) for t in self.sums.values()):
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.count = {}, 0
