"""Every builder that torchvision registers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.optical_flow import RAFT

from .network import Network

# Clips are given at the length and size the networks were written for, or the least that runs.
_VIDEO = {"mvit": (16, 224), "swin3d": (8, 64), "s3d": (16, 224), "r3d": (8, 64), "mc3": (8, 64), "r2plus1d": (8, 64)}
_SIZES = {
    "maxvit_t": 224,
    "vit_b_16": 224,
    "vit_b_32": 224,
    "inception_v3": 299,
    "quantized_inception_v3": 299,
}
# The largest networks get smaller pictures: their forward passes in float64 are what takes the zoo's time.
_LARGE, _SMALL = 30_000_000, 96
_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"init_weights": False}
    for name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")
}


def names() -> list[str]:
    return sorted(torchvision.models.list_models())


def build(name: str, own_size: bool = False) -> Network:
    """A network; with ``own_size`` classifiers and segmenters that are large get pictures of their own size too."""
    options = dict(_OPTIONS.get(name, {}))
    module = torchvision.models.get_model_builder(name).__module__
    if ".detection." in module or ".segmentation." in module:
        options["weights_backbone"] = None
    small = 98 if name.endswith("14") else _SMALL  # pictures of whole patches
    if name.startswith("vit_") and name not in _SIZES and not own_size:
        options["image_size"] = small
    model = torchvision.models.get_model(name, weights=None, **options)
    if ".detection." in module:
        return Network(
            DetectorParts(model),
            lambda seed: _images(seed, 300 if name == "ssd300_vgg16" else 128),
            "backbone and heads, without box decoding",
        )
    if isinstance(model, RAFT):
        return Network(_Flow(model), lambda seed: (_images(seed, 128), _images(seed + 100, 128)), "2 updates")
    if ".video." in module:
        frames, size = next(found for prefix, found in _VIDEO.items() if name.startswith(prefix))
        return Network(model, lambda seed: _images(seed, frames, size, size))
    large = sum(p.numel() for p in model.parameters()) > _LARGE
    size = small if large and name not in _SIZES and not own_size else _SIZES.get(name, 224)
    return Network(model, lambda seed: _images(seed, size), f"input {size}" if size == small else "")


def _images(seed: int, *size: int) -> Tensor:
    shape = size if len(size) > 1 else (size[0], size[0])
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))


class _Flow(nn.Module):
    """RAFT with fewer updates than its default of 12: the same layers run in each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, one: Tensor, two: Tensor) -> Any:
        return self.model(one, two, num_flow_updates=2)


class DetectorParts(nn.Module):
    """What a torchvision detector computes before and after its compiled operators.

    Decoding boxes, suppressing and pooling regions needs torchvision's compiled code, which a CPU build from another
    index lacks. Features and dense heads are run as they are; the heads that look at regions get features that were
    pooled to the size the regions would have.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Any]:
        d = self.detector
        features = d.backbone(images)
        maps = list(features.values()) if isinstance(features, OrderedDict) else [features]
        if not hasattr(d, "rpn"):
            return {"head": d.head(maps)}
        out: dict[str, Any] = {"rpn": d.rpn.head(maps)}
        heads = d.roi_heads
        for kind, size in (("box", 7), ("mask", 14), ("keypoint", 14)):
            head, predictor = getattr(heads, f"{kind}_head", None), getattr(heads, f"{kind}_predictor", None)
            if head is not None and predictor is not None:
                regions = torch.cat([nn.functional.adaptive_avg_pool2d(x, size) for x in maps])
                out[kind] = predictor(head(regions))
        return out
