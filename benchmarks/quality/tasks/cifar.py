"""CIFAR-10 with the networks and settings of the papers, from ``data/cifar-10-batches-bin`` or ``-py``.

    python -m benchmarks.quality --task cifar_vgg16 --competitor ours dense scratch tp_magnitude

300 epochs of batches of 64, SGD with a momentum of 0.9 and a learning rate of 0.1 that falls to a tenth after each
quarter (every 75 epochs), as for HSPG and DHSPG; pictures are shifted by up to four pixels and flipped, and mixed for
VGG-16. The last 5,000 training pictures are for the choice of settings. A file of the binary version holds records of
3,073 bytes: the label, then the red, green and blue planes of 32x32; the Python version is read by torchvision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task, quarters
from benchmarks.quality.tasks.digits import ResidualBlock, last_layer, loss, scaled
from benchmarks.quality.tasks.folders import Source, present, steps
from benchmarks.quality.tasks.pictures import SEEDS, Mix, mixer, seeded

BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
WAY = (
    f"Unpack CIFAR-10's binary version (https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz) to {{0}}/{BINARY}, or "
    f"its Python version to {{0}}/{PYTHON}: torchvision.datasets.CIFAR10('{{0}}', download=True) does it"
)
RECORD, BATCH, EPOCHS, HELD_OUT = 1 + 3 * 32 * 32, 64, 300, 5000
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FILES = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
Raw = tuple[Tensor, Tensor]  # bytes (count, 3, 32, 32) and labels (count,)


def read_binary(folder: Path, split: str) -> Raw:
    paths = [folder / BINARY / name for name in FILES[split]]
    present(paths, "CIFAR-10", WAY.format(folder))
    records = np.concatenate([np.fromfile(path, dtype=np.uint8) for path in paths])
    if len(records) % RECORD:
        raise ValueError(f"{paths[0].parent}: {len(records)} bytes are no whole number of records of {RECORD} bytes")
    rows = torch.from_numpy(records.reshape(-1, RECORD))
    if int(rows[:, 0].max()) > 9:
        raise ValueError(f"{paths[0].parent}: a label is {int(rows[:, 0].max())}, and CIFAR-10 has 0 to 9")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_python(folder: Path, split: str) -> Raw:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:  # its checksums differ
        raise ValueError(
            f"{folder / PYTHON} is not what torchvision knows as CIFAR-10. {WAY.format(folder)}"
        ) from error
    return torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalized pictures (count, 3, 32, 32) and labels (count,) of "train" or "test"."""
    python = (folder / PYTHON).exists() and not (folder / BINARY).exists()
    images, labels = (read_python if python else read_binary)(folder, split)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation, labels


@functools.cache
def data(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> pictures and labels."""
    images, labels = read(folder, "train")
    held = min(HELD_OUT, len(images) // 10)
    return {
        "train": (images[:-held], labels[:-held]),
        "validation": (images[-held:], labels[-held:]),
        "test": read(folder, "test"),
    }


def batches(generator: torch.Generator, folder: Path, mix: Mix | None = None) -> Iterator[Batch]:
    images, labels = data(folder)["train"]
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        padded = F.pad(images[chosen], (4, 4, 4, 4))
        top, left = torch.randint(9, (2, len(chosen)), generator=generator)
        rows, columns = (at[:, None] + torch.arange(32) for at in (top, left))
        crops = padded[torch.arange(len(chosen))[:, None, None], :, rows[:, :, None], columns[:, None]]
        flipped = torch.rand(len(chosen), generator=generator) < 0.5
        # In this layout, not channels last: there oneDNN 3.12 writes past its memory on AVX2 for the gradient of a
        # strided 1x1 convolution with fewer than eight input channels (a heap that is damaged, and later an abort).
        crops = crops.permute(0, 3, 1, 2).contiguous()
        shown, told = torch.where(flipped[:, None, None, None], crops.flip(3), crops), labels[chosen]
        if mix is not None:
            with seeded(int(torch.randint(SEEDS, (), generator=generator))):
                shown, told = mix(shown, told)
        yield shown, told


@torch.no_grad()
def accuracy(model: nn.Module, split: str, folder: Path) -> float:
    images, labels = data(folder)[split]
    found = torch.cat([model.eval()(part).argmax(1) for part in images.split(250)])
    return 100 * float((found == labels).double().mean())


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride) and 1x1, the last four times as wide."""

    def __init__(self, wide_in: int, inner: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, wide_out, 1, bias=False), nn.BatchNorm2d(wide_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(x))


def resnet(
    width: float,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    block: type[nn.Module] = ResidualBlock,
    times: int = 1,
) -> nn.Module:
    """Stages of blocks that are ``times`` as wide outside as inside; all but the first halve the picture."""
    inner = [scaled(width, w) for w in widths]
    layers: list[nn.Module] = [nn.Conv2d(3, inner[0], 3, 1, 1, bias=False), nn.BatchNorm2d(inner[0]), nn.ReLU()]
    before = inner[0]
    for stage, (wide, count) in enumerate(zip(inner, blocks, strict=True)):
        for number in range(count):
            layers.append(block(before, wide, times * wide, 2 if stage and not number else 1))
            before = times * wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def vgg16(width: float) -> nn.Module:
    """With batch norm, and two hidden layers of 512 between dropouts."""
    layers: list[nn.Module] = []
    before = 3
    for wide in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if wide:
            out = scaled(width, wide)
            layers += [nn.Conv2d(before, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU()]
            before = out
        else:
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(before, before), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(before, 10))


@dataclass(frozen=True)
class Network:
    """A network and what differs between them.

    Attributes:
        build: (width) -> network.
        decay: of the weights.
        mix: settings of timm's ``Mixup``; None for unmixed pictures.
    """

    build: Callable[[float], nn.Module]
    decay: float
    mix: dict[str, float] | None = None


NETWORKS = {
    "cifar_resnet18": Network(functools.partial(resnet, widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2)), 1e-4),
    "cifar_resnet50": Network(
        functools.partial(resnet, widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), block=Bottleneck, times=4), 1e-3
    ),
    "cifar_resnet56": Network(functools.partial(resnet, widths=(16, 32, 64), blocks=(9, 9, 9)), 1e-4),
    "cifar_vgg16": Network(vgg16, 5e-4, {"mixup_alpha": 1.0, "label_smoothing": 0.0}),
}


def cifar(name: str, source: Source = Source()) -> Task:  # noqa: B008  (it is frozen)
    network, folder = NETWORKS[name], source.folder
    images, _ = data(folder)["train"]
    mix = None if network.mix is None else mixer(10, **network.mix)
    return Task(
        name=name,
        build=network.build,
        batches=functools.partial(batches, folder=folder, mix=mix),
        loss=loss,
        score=functools.partial(accuracy, folder=folder),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=network.decay),
        example=images[:2],
        steps=steps(len(images), BATCH, EPOCHS, folder),
        kept=last_layer,
        schedule=quarters,
    )


TASKS: dict[str, Any] = {name: functools.partial(cifar, name) for name in NETWORKS}
