"""Pictures from files, changed at random in a way that depends on the seed alone, not on who reads them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.quality.task import Batch

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SEEDS = 2**31


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What augmentations draw from (Python, NumPy, torch on the CPU) starts from the seed, and is put back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def mixer(classes: int, **settings: Any) -> Mix:
    """(pictures, labels) -> mixed pictures and the shares of the classes in them; of an even number."""
    from timm.data import Mixup

    return Mixup(num_classes=classes, **settings)


class Drawn(Dataset):
    """Pictures by (number, seed of what is done to it)."""

    def __init__(self, files: Any, transform: Callable[[Any], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int, int]:
        number, seed = at
        picture, label = self.files[number]
        with seeded(seed):
            return self.transform(picture), label, seed


class Collate:
    """Pictures of a batch together, and mixed if that is wanted, in whatever process reads them."""

    def __init__(self, mix: Mix | None) -> None:
        self.mix = mix

    def __call__(self, items: list[tuple[Tensor, int, int]]) -> Batch:
        pictures, labels, seeds = default_collate(items)
        if self.mix is not None:
            with seeded(int(seeds[0])):
                pictures, labels = self.mix(pictures, labels)
        return pictures, labels


def loader(
    drawn: Drawn, order: Tensor, seeds: Tensor, size: int, mix: Mix | None = None, workers: int = 0
) -> DataLoader[Any]:
    """Batches of the pictures in this order."""
    pairs = list(zip(order.tolist(), seeds.tolist(), strict=True))
    batches = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return DataLoader(
        drawn,
        batch_sampler=batches,
        collate_fn=Collate(mix),
        num_workers=workers,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator(),  # or it draws from the networks' random numbers
    )


def transforms(size: int, train: bool, settings: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """What timm makes of ImageNet's pictures: without ``settings`` a crop of any size and a flip, or the middle."""
    from timm.data import create_transform

    plain = {"interpolation": "bilinear", "color_jitter": None}
    chosen = {**plain, **settings} if train else {"interpolation": settings.get("interpolation", "bilinear")}
    return create_transform(size, is_training=train, crop_pct=0.875, **chosen)
