"""CIFAR-10 with the networks and settings of the papers; its binary version is read from ``data/cifar-10-batches-bin``.

    python -m benchmarks.quality --task cifar_vgg16 --competitor ours dense scratch tp_magnitude

300 epochs of batches of 64, SGD with a learning rate of 0.1, momentum and weight decay as for DHSPG and HESSO, pictures
that are shifted by up to four pixels and flipped. The last 5,000 training pictures are for the choice of settings. A
file holds records of 3,073 bytes: the label, then the red, green and blue planes of 32x32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task
from benchmarks.quality.tasks.digits import ResidualBlock, last_layer, loss, scaled

FOLDER = Path("data/cifar-10-batches-bin")
RECORD, BATCH, EPOCHS, HELD_OUT = 1 + 3 * 32 * 32, 64, 300, 5000
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FILES = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}


def read(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Normalized pictures (count, 3, 32, 32) and labels (count,)."""
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}: unpack CIFAR-10's binary version there")
    records = np.concatenate([np.fromfile(folder / name, dtype=np.uint8) for name in names])
    if len(records) % RECORD:
        raise ValueError(f"{folder}: {len(records)} bytes are no whole number of records of {RECORD} bytes")
    rows = torch.from_numpy(records.reshape(-1, RECORD))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255 - mean) / deviation, rows[:, 0].long()


@functools.cache
def data(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> pictures and labels."""
    images, labels = read(folder, FILES["train"])
    held = min(HELD_OUT, len(images) // 10)
    return {
        "train": (images[:-held], labels[:-held]),
        "validation": (images[-held:], labels[-held:]),
        "test": read(folder, FILES["test"]),
    }


def batches(generator: torch.Generator, folder: Path) -> Iterator[Batch]:
    images, labels = data(folder)["train"]
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        padded = nn.functional.pad(images[chosen], (4, 4, 4, 4))
        top, left = torch.randint(9, (2, len(chosen)), generator=generator)
        rows, columns = (at[:, None] + torch.arange(32) for at in (top, left))
        crops = padded[torch.arange(len(chosen))[:, None, None], :, rows[:, :, None], columns[:, None]]
        flipped = torch.rand(len(chosen), generator=generator) < 0.5
        crops = crops.permute(0, 3, 1, 2)
        yield torch.where(flipped[:, None, None, None], crops.flip(3), crops), labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, split: str, folder: Path) -> float:
    images, labels = data(folder)[split]
    found = torch.cat([model.eval()(part).argmax(1) for part in images.split(250)])
    return 100 * float((found == labels).double().mean())


def resnet(width: float, widths: tuple[int, ...], blocks: int) -> nn.Module:
    """Stages of basic blocks; all but the first halve the picture."""
    inner = [scaled(width, w) for w in widths]
    layers: list[nn.Module] = [nn.Conv2d(3, inner[0], 3, 1, 1, bias=False), nn.BatchNorm2d(inner[0]), nn.ReLU()]
    before = inner[0]
    for stage, out in enumerate(inner):
        for number in range(blocks):
            layers.append(ResidualBlock(before, out, out, 2 if stage and not number else 1))
            before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def vgg16(width: float) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for wide in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if wide:
            out = scaled(width, wide)
            layers += [nn.Conv2d(before, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU()]
            before = out
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


def cifar(name: str, build: Callable[[float], nn.Module], decay: float, folder: Path = FOLDER) -> Task:
    parts = data(folder)
    return Task(
        name=name,
        build=build,
        batches=functools.partial(batches, folder=folder),
        loss=loss,
        score=functools.partial(accuracy, folder=folder),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=decay),
        example=parts["train"][0][:2],
        steps=EPOCHS * (len(parts["train"][0]) // BATCH),
        kept=last_layer,
    )


NETWORKS: dict[str, tuple[Callable[[float], nn.Module], float]] = {
    "cifar_resnet18": (functools.partial(resnet, widths=(64, 128, 256, 512), blocks=2), 1e-4),
    "cifar_resnet56": (functools.partial(resnet, widths=(16, 32, 64), blocks=9), 1e-4),
    "cifar_vgg16": (vgg16, 5e-4),
}
TASKS: dict[str, Any] = {name: functools.partial(cifar, name, *how) for name, how in NETWORKS.items()}
