"""`example`: inputs for a model by what its forward calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .transformers_shrink import IMAGE, MEL, parts

BATCH, LENGTH = 2, 13


class Draw:
    """Random inputs for one model from one seed."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.config = model, model.config
        self.text = model.config.get_text_config()
        self.generator = torch.Generator().manual_seed(seed)
        self.signature = inspect.signature(model.forward).parameters

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def find(self, *keys: str, default: Any = None) -> Any:
        """The first of these fields that some part of the configuration has."""
        for key in keys:
            for part in parts(self.config):
                value = getattr(part, key, None)
                if value is not None:
                    return value
        return default

    def image(self) -> tuple[int, ...]:
        size = self.find("image_size", "img_size", default=IMAGE)
        size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return (self.find("num_channels", default=3), *size)


def _ids(d: Draw) -> Tensor:
    return d.integers(5, 50, BATCH, LENGTH)


def _grid(d: Draw) -> Tensor:
    return torch.tensor([[1, 4, 6]] * BATCH)


def _patches(d: Draw) -> Tensor:
    size, frames = d.find("patch_size"), d.find("temporal_patch_size", "patch_temporal", default=1)
    return d.normal(BATCH * 24, d.find("in_channels", "num_channels", default=3) * frames * size * size)


def _pixels(d: Draw) -> Tensor:
    if {"image_grid_thw", "grid_thw"} & set(d.signature):
        return _patches(d)
    if "spatial_shapes" in d.signature:
        return d.normal(BATCH, 16, 3 * d.find("patch_size") ** 2)
    if "pixel_attention_mask" in d.signature:
        return d.normal(BATCH, 1, *d.image())
    return d.normal(BATCH, *d.image())


_MAKERS: dict[str, Callable[[Draw], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": lambda d: d.normal(BATCH, d.find("num_frames", default=4), *d.image()),
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "hidden_states": _patches,
    "input_features": lambda d: d.normal(BATCH, d.find("num_mel_bins", default=MEL), 60),
    "input_values": lambda d: d.normal(BATCH, 3200),
    "spatial_shapes": lambda d: torch.tensor([[4, 4]] * BATCH),
    "image_sizes": lambda d: torch.tensor([list(d.image()[1:])] * BATCH),
    "bbox": lambda d: torch.stack([torch.arange(4).repeat(LENGTH, 1) * 5] * BATCH),
}
_ALWAYS = (
    "input_ids",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "image_grid_thw",
    "image_sizes",
    "spatial_shapes",
    "bbox",
)


Makers = dict[str, Callable[[Draw], Any] | None]


def example(model: PreTrainedModel, seed: int, special: Makers | None = None) -> dict[str, Any]:
    """Inputs for a model by what its forward calls its arguments; ``special`` says otherwise for some of them."""
    d, special = Draw(model, seed), special or {}
    needed = [
        n for n, p in d.signature.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    makers = {name: _MAKERS[name] for name in d.signature if name in _MAKERS and (name in needed or name in _ALWAYS)}
    made = {name: maker(d) for name, maker in {**makers, **special}.items() if maker is not None}
    if missing := set(needed) - set(made):
        raise NotImplementedError(f"no maker for {sorted(missing)}")
    if "input_ids" in made and "input_ids" not in special:
        for kind, source in (("image", "pixel_values"), ("audio", "input_features")):
            _place(d, made, kind, source)
    if "mm_token_type_ids" in d.signature and "pixel_values" in made:
        made["mm_token_type_ids"] = (made["input_ids"] == _token(d, "image")).long()
    return made


def _token(d: Draw, kind: str) -> int | None:
    return d.find(f"{kind}_token_id", f"{kind}_token_index")


def _place(d: Draw, made: dict[str, Any], kind: str, source: str) -> None:
    """Give ``input_ids`` a token for every vector that the model makes of the images (or sounds)."""
    token, features = _token(d, kind), getattr(d.model, f"get_{kind}_features", None)
    if token is None or features is None or source not in made:
        return
    accepted = inspect.signature(features).parameters
    with torch.no_grad():
        out = features(**{k: v for k, v in made.items() if k in accepted and k != "input_ids"})
    out = getattr(out, "pooler_output", out)
    while isinstance(out, (list, tuple)) and not isinstance(out[0], Tensor):
        out = out[0]
    width = d.model.get_input_embeddings().embedding_dim
    total = sum(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out])) // width
    tokens = torch.full((BATCH, total // BATCH), token)
    made["input_ids"] = torch.cat([made["input_ids"][:, :3], tokens, made["input_ids"][:, 3:]], 1)
