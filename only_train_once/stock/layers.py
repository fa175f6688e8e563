"""`zero_layers`: what the least useful layers of a network add becomes zero, and a stock model does without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..inputs import Inputs, call_model, clone_inputs, named_outputs, observing
from . import timm_models, transformers_models
from .convert import StackPlace, adds_nothing, places


def zero_layers(model: nn.Module, layers: Any, inputs: Inputs) -> list[str]:
    """Zero whole layers in ``model`` itself, and train them no further; returns their paths.

    All parameters of its attention and its feed-forward part become zero: the layer then passes on what it gets,
    exactly. Training leaves them there, because the gradient of a product is zero where both factors are; only the
    biases at the end would move, so their ``requires_grad`` is switched off.

    Args:
        layers: which ones; or how many, those without which the outputs on ``inputs`` change least, one after the
            other.
        inputs: example inputs.

    Raises:
        ConfigurationError: there are no such layers, or none would be left.
        StockError: no table knows the model.
    """
    place = _only_stack(model)
    count = len(place.layers)
    if isinstance(layers, bool) or not isinstance(layers, (int, Sequence)) or isinstance(layers, str):
        raise ConfigurationError(f"layers={layers!r}: how many, or a list of places from 0 to {count - 1}")
    zero = [i for i, layer in enumerate(place.layers) if adds_nothing(layer, place.stack)]
    if isinstance(layers, int):
        if not 0 <= layers < count - len(zero):
            raise ConfigurationError(f"layers={layers}: {count - len(zero)} layers add something, and one has to stay")
        chosen = _least_useful(model, place, layers, zero, inputs)
    else:
        chosen = list(dict.fromkeys(layers))
        strange = [i for i in chosen if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count]
        if strange:
            raise ConfigurationError(f"layers holds {strange[0]!r}: the places run from 0 to {count - 1}")
        if len({*chosen, *zero}) == count:
            raise ConfigurationError(f"layers={chosen}: one of the {count} layers has to stay")
    with torch.no_grad():
        for i in chosen:
            for path in place.stack.adds:
                for parameter in place.layers[i].get_submodule(path.partition(".")[0]).parameters():
                    parameter.zero_()
            for added in _added(place, i):
                for name, parameter in added.named_parameters():
                    # a bias has a gradient though all around it is zero; what has none stays, as a part of its groups
                    parameter.requires_grad_(parameter.requires_grad and not name.endswith("bias"))
    return [f"{place.path}{i}" for i in chosen]


def _only_stack(model: nn.Module) -> StackPlace:
    library = timm_models if timm_models.is_of_timm(model) else transformers_models
    found = places(model, library.family_of(model))
    if len(found) == 1 and found[0].stack.adds:
        return found[0]
    raise ConfigurationError(
        f"layers of a {type(model).__name__} cannot be left out: its norms come after the sums, its layers share a "
        "table, or its constructor has no argument for their number"
    )


def _added(place: StackPlace, number: int) -> list[nn.Module]:
    return [place.layers[number].get_submodule(path) for path in place.stack.adds]


@contextmanager
def _without(modules: Iterable[nn.Module]) -> Iterator[None]:
    hooks = [m.register_forward_hook(lambda module, given, made: torch.zeros_like(made)) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _least_useful(model: nn.Module, place: StackPlace, count: int, zero: Sequence[int], inputs: Inputs) -> list[int]:
    """Greedily: the layer without which the outputs change least, given those that were chosen before."""
    chosen: list[int] = []
    with observing(model):
        reference = _outputs(model, inputs)
        while len(chosen) < count:
            rest = [i for i in range(len(place.layers)) if i not in chosen and i not in zero]
            change = {}
            for i in rest:
                with _without(m for j in (*chosen, i) for m in _added(place, j)):
                    change[i] = _distance(reference, _outputs(model, inputs))
            chosen.append(min(rest, key=lambda i: change[i]))
    return chosen


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [t for _, t in named_outputs(call_model(model, clone_inputs(inputs))) if t.is_floating_point()]


def _distance(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Sum over the outputs of |a - b| / |a|."""
    total = 0.0
    for a, b in zip(reference, found, strict=True):
        total += float((a - b).double().norm() / a.double().norm().clamp_min(1e-300))
    return total
