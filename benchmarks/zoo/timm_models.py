"""Every name that timm registers; first one small network of each module, so that families come before variants."""

from __future__ import annotations

from typing import Any

import timm
import torch

from .network import Network

# From small to large, as timm's names say it.
_SMALL = (
    "test_", "zepto", "atto", "femto", "pico", "nano", "xxtiny", "xx_small", "xxs", "xtiny", "x_small", "xs", "tiny",
    "_ti", "mini", "_050", "_s0", "_t0", "_b0", "_m0", "small", "_s", "_18", "18", "_0", "_1", "_a", "_d1", "_l1", "26",
)  # fmt: skip


# Modules without a small network: fewer layers of the same kind, and pictures of another size where it is not None.
_LARGE: dict[str, tuple[dict[str, Any], int | None]] = {
    "deepseek_vit_412m_align": ({"depth": 4, "img_size": 224}, 224),
    "gemma4_vit_167m": ({"depth": 4, "img_size": 224}, 224),
    "mobilenetv5_300m": ({}, 256),
    "naflexvit_base_patch16_siglip": ({"depth": 4}, None),
    "qwen3_vit_88m": ({"depth": 4, "img_size": 224}, 224),
    "sam2_hiera_tiny": ({}, 224),
    "samvit_base_patch16": ({"depth": 4, "img_size": 256, "global_attn_indexes": (1, 3)}, 256),
}


def names() -> list[str]:
    """Module by module the smallest first, then everything else."""
    ranked = {module: sorted(timm.list_models(module=module), key=_rank) for module in timm.list_modules()}
    first = [ranked[module][0] for module in sorted(ranked) if ranked[module]]
    rest = sorted((name for found in ranked.values() for name in found[1:]), key=_rank)
    return [*first, *rest]


def families() -> list[str]:
    """One name per module."""
    return names()[: len([m for m in timm.list_modules() if timm.list_models(module=m)])]


def build(name: str) -> Network:
    options, size = _LARGE.get(name, ({}, None))
    model = timm.create_model(name, **options)
    shape = model.default_cfg["input_size"] if size is None else (3, size, size)
    note = ", ".join([*(f"{k}={v}" for k, v in options.items()), *([f"input {size}"] if size else [])])

    def inputs(seed: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))

    return Network(model, inputs, note)


def _rank(name: str) -> tuple[int, int, str]:
    large = any(part in name for part in ("large", "huge", "giant", "enormous"))
    place = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
    return (len(_SMALL) + 1 if large else place, len(name), name)
