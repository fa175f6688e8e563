"""`example`: inputs for a model by what its forward calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .transformers_shrink import IMAGE, MEL, numbers, parts

BATCH, LENGTH, FRAMES = 2, 13, 64


class Draw:
    """Random inputs for one model from one seed."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.config = model, model.config
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

    def words(self, *shape: int) -> Tensor:
        """No token that means something else than a word."""
        words = torch.tensor([i for i in range(5, 50) if i not in self._special_tokens()])
        return words[self.integers(0, len(words), *shape)]

    def _special_tokens(self) -> set[int]:
        fields = [(k, v) for part in parts(self.config) for k, v in vars(part).items() if "token" in k]
        return {value for _, each in fields for value in numbers(each)}

    def image(self) -> tuple[int, ...]:
        size = self.find("image_size", "img_size", default=IMAGE)
        size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return (self.find("num_channels", default=3), *size)


def _ids(d: Draw) -> Tensor:
    return d.words(BATCH, LENGTH)


def _mel(d: Draw) -> Tensor:
    """A spectrogram, in the order that the first operator takes: a convolution over time or anything else."""
    mel = d.find("num_mel_bins", "n_mel_bins", "num_mel_channels", "mel_dim", default=MEL)
    first = any(isinstance(m, torch.nn.Conv1d) and m.in_channels == mel for m in d.model.modules())
    return d.normal(BATCH, mel, FRAMES) if first else d.normal(BATCH, FRAMES, mel)


def _hidden(d: Draw) -> Tensor:
    if "grid_thw" in d.signature:
        return _patches(d)
    return d.normal(BATCH, LENGTH, d.find("hidden_size", "d_model", "dim"))


def _pixel_mask(d: Draw) -> Tensor:
    return (
        torch.ones(BATCH, 16).long() if "spatial_shapes" in d.signature else torch.ones(BATCH, 1, *d.image()[1:]).long()
    )


def _grid(d: Draw) -> Tensor:
    return torch.tensor([[1, 4, 6]] * BATCH)


def _patches(d: Draw) -> Tensor:
    size, frames = d.find("patch_size"), d.find("temporal_patch_size", "patch_temporal", default=1)
    return d.normal(BATCH * 24, d.find("in_channels", "num_channels", default=3) * frames * size * size)


def _pixels(d: Draw) -> Tensor:
    if "image_grid_thw" in d.signature or "grid_thw" in d.signature:
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
    "hidden_states": _hidden,
    "inputs_embeds": _hidden,
    "input_features": _mel,
    "input_features_mask": lambda d: torch.ones(BATCH, FRAMES).long(),
    "feature_attention_mask": lambda d: torch.ones(BATCH, FRAMES).long(),
    "pixel_attention_mask": _pixel_mask,
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


_SOURCES = (("image", "pixel_values"), ("audio", "input_features"))


def _required(signature: Mapping[str, inspect.Parameter]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, p in signature.items() if p.default is p.empty and p.kind not in kinds]


Makers = dict[str, Callable[[Draw], Any] | None]


def example(model: PreTrainedModel, seed: int, special: Makers | None = None) -> dict[str, Any]:
    """Inputs for a model by what its forward calls its arguments; ``special`` says otherwise for some of them."""
    d, special = Draw(model, seed), special or {}
    required = _required(d.signature)
    needed = list(required)
    for kind, source in _SOURCES:
        if source in d.signature and (features := _features(d, kind)):
            needed += [name for name in _required(inspect.signature(features).parameters) if name in d.signature]
    makers = {name: _MAKERS[name] for name in d.signature if name in _MAKERS and (name in needed or name in _ALWAYS)}
    made = {name: maker(d) for name, maker in {**makers, **special}.items() if maker is not None}
    if missing := set(required) - set(made):
        raise NotImplementedError(f"no maker for {sorted(missing)}")
    if "input_ids" in made and "input_ids" not in special:
        for kind, source in _SOURCES:
            _place(d, made, kind, source)
    if "mm_token_type_ids" in d.signature and "pixel_values" in made:
        made["mm_token_type_ids"] = (made["input_ids"] == _token(d, "image")).long()
    return made


def _token(d: Draw, kind: str) -> int | None:
    return d.find(f"{kind}_token_id", f"{kind}_token_index")


def _features(d: Draw, kind: str) -> Callable[..., Any] | None:
    """What makes the vectors of an image; a wrapper leaves it to the network inside."""
    found = [getattr(module, f"get_{kind}_features", None) for module in (d.model, *d.model.children())]
    named = [
        each for each in found if each and any(p in dict(_SOURCES).values() for p in inspect.signature(each).parameters)
    ]
    return next(iter(named), None)


def _place(d: Draw, made: dict[str, Any], kind: str, source: str) -> None:
    """Give ``input_ids`` a token for every vector that the model makes of the images (or sounds)."""
    token, features = _token(d, kind), _features(d, kind)
    if token is None or features is None or source not in made:
        return
    accepted = inspect.signature(features).parameters
    with torch.no_grad():
        out = features(**{k: v for k, v in made.items() if k in accepted and k != "input_ids"})
    width = d.model.get_input_embeddings().embedding_dim
    if not isinstance(out, (Tensor, list, tuple)):
        if out.pooler_output is None:
            width = out.last_hidden_state.shape[-1]
        out = out.last_hidden_state if out.pooler_output is None else out.pooler_output
    while isinstance(out, (list, tuple)) and not isinstance(out[0], Tensor):
        out = out[0]
    total = sum(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out])) // width
    tokens = torch.full((BATCH, total // BATCH), token)
    made["input_ids"] = torch.cat([made["input_ids"][:, :3], tokens, made["input_ids"][:, 3:]], 1)
