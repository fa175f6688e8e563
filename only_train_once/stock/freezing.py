"""`reasons_to_stay`: which groups a stock architecture has no field for, to be known before training."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..groups import PruningGroup, Role
from ..surgery import named_tensors, ties
from . import timm_models, transformers_models
from .convert import places

_LAYER_NORM = "a stock layer norm averages over the width it finds, so this width stays whole"
_ROTARY = "a stock model computes the rotary frequencies anew from the head-dim, so head-dims stay whole"


def reasons_to_stay(model: nn.Module, groups: Iterable[PruningGroup]) -> dict[str, str]:
    """Name of a prunable group -> why a stock model cannot be made if units of it leave.

    Raises:
        StockError: no table knows the model.
    """
    tensors = named_tensors(model)
    first = ties(tensors)[0]
    shown: dict[tuple[str, int | None], str] = {}  # place in the model -> field
    of_timm = timm_models.is_of_timm(model)
    kind = "timm.create_model has" if of_timm else f"{type(getattr(model, 'config', None)).__name__} has"
    for place in places(model, (timm_models if of_timm else transformers_models).family_of(model)):
        for number in place.kept:
            for width in place.stack.widths:
                name = f"{place.path}{number}.{width.at}"
                shown[first.get(name, name), width.dim] = width.field
    out = {}
    for group in groups:
        reason = _reason(model, group, shown, kind) if group.prunable else None
        if reason is not None:
            out[group.name] = reason
    return out


def _reason(model: nn.Module, group: PruningGroup, shown: dict[tuple[str, int | None], str], kind: str) -> str | None:
    if any(s.role is Role.NORM and isinstance(model.get_submodule(s.param), nn.LayerNorm) for s in group.slices):
        return _LAYER_NORM
    if any(s.param.endswith("inv_freq") for s in group.slices):
        return _ROTARY
    for s in group.slices:
        if (s.param, s.dim if s.role.is_tensor else None) in shown:
            return None
    return f"{kind} no field for its width alone"
