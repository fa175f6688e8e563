"""ImageNet from folders of pictures, ``data/imagenet/train/<class>/`` and ``data/imagenet/val/<class>/``.

    python -m benchmarks.quality --task imagenet_resnet50 --competitor ours dense --levels 0.35 --seeds 1 \
        --device cuda --workers 12

The settings are the papers': ResNet-50 as for HSPG (120 epochs of batches of 256, SGD from 0.1 to a tenth after every
30) and, from torchvision's weights, as for DHSPG (no weight decay, mixed pictures, smoothed labels); DeiT-S as in its
own (300 epochs of batches of 1024, AdamW, RandAugment, mixup, CutMix, erasing, each picture three times), from timm's
weights too. Augmentations are timm's. ``val`` is the test split, as in the papers; every hundredth training picture is
for the choice of settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task, learning_rate, quarters
from benchmarks.quality.tasks.digits import last_layer, loss, scaled
from benchmarks.quality.tasks.folders import Source, present, steps
from benchmarks.quality.tasks.pictures import SEEDS, Drawn, Mix, loader, mixer, transforms

FOLDER, HELD_OUT, CLASSES = "imagenet", 100, 1000
WAY = (
    "It takes the pictures of ILSVRC 2012 from image-net.org in one folder for each class, "
    "{0}/train/n01440764/*.JPEG and {0}/val/n01440764/*.JPEG: torchvision.datasets.ImageNet('{0}', split) makes these "
    "of the archives"
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What is in the folders.

    Attributes:
        files: split -> torchvision's ``ImageFolder``.
        numbers: split -> which of its pictures.
    """

    files: Mapping[str, Any]
    numbers: Mapping[str, Tensor]
    classes: int


@functools.cache
def data(folder: Path) -> Pictures:
    from torchvision.datasets import ImageFolder

    present([folder / "train", folder / "val"], "ImageNet", WAY.format(folder))
    try:
        train, test = (ImageFolder(str(folder / part)) for part in ("train", "val"))
    except FileNotFoundError as error:  # no folders of classes, or one without pictures
        raise FileNotFoundError(f"{error} {WAY.format(folder)}") from error
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{folder}: train and val have not the same classes: {', '.join(other[:5])} is in one of them")
    every = torch.arange(len(train))
    held = every % HELD_OUT == 0
    return Pictures(
        {"train": train, "validation": train, "test": test},
        {"train": every[~held], "validation": every[held], "test": torch.arange(len(test))},
        len(train.classes),
    )


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        build: (width, classes, side of the pictures) -> network.
        optimizer: (parameters) -> optimizer at the peak learning rate.
        augment: arguments of timm's ``create_transform`` that differ from a crop and a flip.
        mix: arguments of timm's ``Mixup``; None for unmixed pictures.
        repeats: so often a picture is in an epoch, each time changed otherwise, with as many fewer others.
        task: more of the `Task`.
    """

    build: Callable[[float, int, int], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    batch: int
    augment: Mapping[str, Any] = field(default_factory=dict)
    mix: Mapping[str, Any] | None = None
    repeats: int = 1
    side: int = 224
    task: Mapping[str, Any] = field(default_factory=dict)


def batches(
    generator: torch.Generator, pictures: Pictures, settings: Settings, mix: Mix | None, workers: int
) -> Iterator[Batch]:
    numbers = pictures.numbers["train"]
    order = numbers[torch.randperm(len(numbers), generator=generator)].repeat_interleave(settings.repeats)
    order = order[: len(numbers) // settings.batch * settings.batch]
    seeds = torch.randint(SEEDS, order.shape, generator=generator)
    drawn = Drawn(pictures.files["train"], transforms(settings.side, True, settings.augment))
    yield from loader(drawn, order, seeds, settings.batch, mix, workers)


@torch.no_grad()
def accuracy(model: nn.Module, split: str, pictures: Pictures, settings: Settings, workers: int) -> float:
    """Of the middles of the pictures."""
    numbers = pictures.numbers[split]
    drawn = Drawn(pictures.files[split], transforms(settings.side, False, settings.augment))
    right = 0
    model.eval()
    for shown, labels in loader(drawn, numbers, torch.zeros_like(numbers), settings.batch, workers=workers):
        right += int((model(shown).argmax(1) == labels).sum())
    return 100 * right / len(numbers)


def resnet50(width: float, classes: int, side: int, weights: str | None = None) -> nn.Module:
    """torchvision's, with so much of its channels; weights are for the full width."""
    from torchvision.models import resnet50

    if weights is not None and width == 1:
        return resnet50(weights=weights)
    if width == 1:
        return resnet50(num_classes=classes)
    with torch.device("meta"):  # all of its tensors are made anew
        model = resnet50(num_classes=classes)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            entry = layer.in_channels if layer is model.conv1 else scaled(width, layer.in_channels)
            shape = layer.kernel_size, layer.stride, layer.padding
            made: nn.Module = nn.Conv2d(entry, scaled(width, layer.out_channels), *shape, bias=False)
            nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            made = nn.BatchNorm2d(scaled(width, layer.num_features))
        elif isinstance(layer, nn.Linear):
            made = nn.Linear(scaled(width, layer.in_features), classes)
        else:
            continue
        model.set_submodule(name, made)
    return model


def deit(width: float, classes: int, side: int, pretrained: bool = False, depth: int = 12) -> nn.Module:
    """timm's DeiT-S, with so much of the dims of its heads; weights are for the full width."""
    from timm import create_model

    return create_model(
        "deit_small_patch16_224",
        pretrained=pretrained and width == 1,
        embed_dim=6 * scaled(width, 64),
        depth=depth,
        img_size=side,
        num_classes=classes,
        drop_path_rate=0.1,
    )


def sgd(parameters: Any, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=decay)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """For batches of 1024: 5e-4 for each 512. Weights of layers decay; biases, norms, positions and tokens do not."""
    every = list(parameters)
    decayed = [p for p in every if p.ndim in (2, 4)]
    rest = [p for p in every if p.ndim not in (2, 4)]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)


def _attention(model: nn.Module) -> list[Any]:
    return [block.attn for block in model.blocks]


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {layer.qkv: layer.num_heads for layer in _attention(model)}


def _count_heads(model: nn.Module) -> None:
    for layer in _attention(model):
        layer.attn_dim = layer.qkv.out_features // 3
        layer.num_heads = layer.attn_dim // layer.head_dim


RESNET50 = Settings(
    build=resnet50,
    optimizer=functools.partial(sgd, decay=1e-4),
    epochs=120,
    batch=256,
    task={"schedule": quarters, "kept": last_layer},
)
DEIT = Settings(
    build=deit,
    optimizer=adamw,
    epochs=300,
    batch=1024,
    augment={
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "interpolation": "bicubic",
        "re_prob": 0.25,
        "re_mode": "pixel",
    },
    mix={"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
    repeats=3,
    task={
        "schedule": learning_rate,
        "wide": True,
        "heads": _heads,
        "kept": lambda model: [model.head],
        "mend": _count_heads,
    },
)
SETTINGS = {
    "imagenet_resnet50": RESNET50,
    "imagenet_resnet50_pretrained": replace(
        RESNET50,
        build=functools.partial(resnet50, weights="IMAGENET1K_V1"),
        optimizer=functools.partial(sgd, decay=0.0),
        mix={"mixup_alpha": 0.2, "label_smoothing": 0.1},
    ),
    "imagenet_deit": DEIT,
    "imagenet_deit_pretrained": replace(DEIT, build=functools.partial(deit, pretrained=True)),
}


def imagenet(name: str, source: Source = Source()) -> Task:  # noqa: B008  (it is frozen)
    settings, folder = SETTINGS[name], source.folder / FOLDER
    pictures = data(folder)
    if name.endswith("pretrained") and pictures.classes != CLASSES:
        raise ValueError(f"{folder} has {pictures.classes} classes, and the weights of {name} know {CLASSES}")
    mix = None if settings.mix is None else mixer(pictures.classes, **settings.mix)
    where = {"pictures": pictures, "settings": settings, "workers": source.workers}
    return Task(
        name=name,
        build=lambda width: settings.build(width, pictures.classes, settings.side),
        batches=functools.partial(batches, mix=mix, **where),
        loss=loss,
        score=functools.partial(accuracy, **where),
        optimizer=settings.optimizer,
        example=torch.randn(2, 3, settings.side, settings.side, generator=torch.Generator().manual_seed(0)),
        pretrained=name.endswith("pretrained"),
        steps=steps(len(pictures.numbers["train"]), settings.batch, settings.epochs, folder),
        **settings.task,
    )


TASKS: dict[str, Any] = {name: functools.partial(imagenet, name) for name in SETTINGS}
