"""Make a torch optimizer from the reference library's argument names and attach a method to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup
from only_train_once.optim.arguments import finite
from only_train_once.optim.base import attach
from only_train_once.optim.method import accepted_arguments

_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
    "adam": {"betas": (0.9, 0.999), "weight_decay": 0.0},
    "adamw": {"betas": (0.9, 0.999), "weight_decay": 1e-2},
}


def _optimizer_class(variant: str | type[Optimizer]) -> type[Optimizer]:
    if isinstance(variant, type) and issubclass(variant, Optimizer):
        return variant
    known = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if not isinstance(variant, str) or variant.lower() not in known:
        raise ConfigurationError(
            f"variant is {variant!r}; give a torch.optim.Optimizer class or one of {sorted(known)}, or make the "
            f"optimizer yourself and attach to it"
        )
    return known[variant.lower()]


def _optimizer_arguments(
    cls: type[Optimizer],
    defaults: Mapping[str, Any],
    weight_decay: float | None,
    first_momentum: float | None,
    second_momentum: float | None,
    dampening: float | None,
) -> dict[str, Any]:
    """The reference library's argument names as those of the torch optimizer."""
    accepted = inspect.signature(cls).parameters
    out = dict(defaults)
    if weight_decay is not None:
        out["weight_decay"] = weight_decay
    if dampening is not None:
        out["dampening"] = dampening
    if "betas" in accepted and (first_momentum is not None or second_momentum is not None):
        first, second = out.get("betas", accepted["betas"].default)
        out["betas"] = (
            first if first_momentum is None else first_momentum,
            second if second_momentum is None else second_momentum,
        )
    elif first_momentum is not None:
        out["momentum"] = first_momentum
    if second_momentum is not None and "betas" not in accepted:
        raise ConfigurationError(f"second_momentum={second_momentum!r} is given, but {cls.__name__} has only one")
    unknown = sorted(set(out) - set(accepted))
    if unknown:
        raise ConfigurationError(f"{cls.__name__} has no argument {', '.join(unknown)}; leave it at None")
    return out


def build(
    method: str,
    named_tensors: Mapping[str, Tensor],
    groups: Iterable[PruningGroup],
    *,
    variant: str | type[Optimizer] = "sgd",
    lr: float = 0.1,
    weight_decay: float | None = None,
    first_momentum: float | None = None,
    second_momentum: float | None = None,
    dampening: float | None = None,
    device: Any = None,
    process_group: Any = None,
    model: nn.Module | None = None,
    **options: Any,
) -> Optimizer:
    """Build a torch optimizer over all trainable parameters and attach a pruning method to it.

    Args:
        method: a name in `METHODS`.
        named_tensors: name -> parameter or buffer of the model.
        groups: what can be removed.
        variant: "sgd", "adam", "adamw", any other name in ``torch.optim``, or an optimizer class.
        lr: learning rate.
        weight_decay: None for 0, and 1e-2 for "adamw".
        first_momentum: momentum of SGD (None: 0), first beta of Adam (None: 0.9).
        second_momentum: second beta of Adam (None: 0.999).
        dampening: of SGD.
        process_group, model: see `attach`.
        device: accepted for the reference library's scripts; the tensors' own device is used.
        **options: the method's arguments, see its class; the others go to the optimizer class (``nesterov``,
            ``fused``, ``eps``, ...).
    """
    rate: Any = lr  # a tensor where the step is captured in a CUDA graph
    finite("lr", rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate, 0)
    for name, value in (
        ("weight_decay", weight_decay),
        ("first_momentum", first_momentum),
        ("second_momentum", second_momentum),
    ):
        if value is not None:
            finite(name, value, 0)
    if dampening is not None:
        finite("dampening", dampening)
    cls = _optimizer_class(variant)
    defaults = _DEFAULTS.get(cls.__name__.lower(), {})
    arguments = _optimizer_arguments(cls, defaults, weight_decay, first_momentum, second_momentum, dampening)
    trained = [t for t in named_tensors.values() if t.requires_grad]
    if not trained:
        raise ConfigurationError("no tensor has requires_grad=True, so there is nothing to train")
    config = {name: options.pop(name) for name in accepted_arguments(method) if name in options}
    arguments = {"lr": lr, **arguments, **options}
    try:
        optimizer = cls(trained, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{cls.__name__} refuses its arguments {arguments}: {error}; change them, or make the optimizer yourself "
            f"and attach to it"
        ) from error
    return attach(optimizer, groups, named_tensors, method=method, process_group=process_group, model=model, **config)
