"""scikit-learn's digits, 1797 pictures of 8x8: 1047 to train, 300 to choose settings on, 450 for the final numbers.

The networks are small enough that 5 % of them is little: a residual network and a VGG-like one with batch norm, and a
vision transformer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task
from benchmarks.quality.transformer import Block, attention_layers

BATCH = 64


@functools.cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> pictures (count, 1, 8, 8) in [-1, 1] and labels (count,)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(images)), test_size=450, random_state=0, stratify=digits.target)
    train, validation = train_test_split(rest, test_size=300, random_state=0, stratify=digits.target[rest])
    return {
        name: (images[part], labels[part])
        for name, part in (("train", train), ("validation", validation), ("test", test))
    }


def batches(generator: torch.Generator, shifted: bool) -> Iterator[Batch]:
    images, labels = data()["train"]
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        picked = images[chosen]
        if shifted:
            picked = torch.roll(picked, torch.randint(-1, 2, (2,), generator=generator).tolist(), dims=(2, 3))
        yield picked, labels[chosen]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, split: str) -> float:
    images, labels = data()[split]
    return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def scaled(width: float, full: int) -> int:
    return max(1, round(width * full))


class ResidualBlock(nn.Module):
    def __init__(self, wide_in: int, inner: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide_in, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, wide_out, 3, 1, 1, bias=False), nn.BatchNorm2d(wide_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def residual(width: float) -> nn.Module:
    """24 k parameters at width 1: a stem of 12 channels, blocks of 12, 12, 24 and 24."""
    a, b = scaled(width, 12), scaled(width, 24)
    stem = (nn.Conv2d(1, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
    blocks = (
        ResidualBlock(a, a, a, 1),
        ResidualBlock(a, a, a, 1),
        ResidualBlock(a, b, b, 2),
        ResidualBlock(b, b, b, 1),
    )
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 10))


def vgg(width: float) -> nn.Module:
    """23 k parameters at width 1: convolutions of 12, 12, 24, 24 and 48 channels, a hidden layer of 48."""
    layers: list[nn.Module] = []
    wide_in = 1
    for wide in (12, 12, 0, 24, 24, 0, 48):
        if not wide:
            layers.append(nn.MaxPool2d(2))
            continue
        out = scaled(width, wide)
        layers += [nn.Conv2d(wide_in, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        wide_in = out
    hidden = scaled(width, 48)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide_in, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return nn.Sequential(*layers, *head)


class VisionTransformer(nn.Module):
    """Patches of 2x2, learned positions, the mean of all tokens at the end."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, head_dim, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def vit(width: float) -> nn.Module:
    """27 k parameters at width 1: 3 blocks of 32, with 4 heads of 8 and 64 hidden neurons."""
    return VisionTransformer(scaled(width, 32), scaled(width, 4), 8, scaled(width, 64), 3)


def _digits(
    name: str, build: Callable[[float], nn.Module], optimizer: Callable[[Any], torch.optim.Optimizer], **more: Any
) -> Callable[[], Task]:
    shifted = more.pop("shifted", True)

    def make() -> Task:
        return Task(
            name=name,
            build=build,
            batches=functools.partial(batches, shifted=shifted),
            loss=loss,
            score=accuracy,
            optimizer=optimizer,
            example=data()["train"][0][:4],
            steps=more.get("steps", 240),
            **{k: v for k, v in more.items() if k != "steps"},
        )

    return make


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4, fused=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=4e-3, weight_decay=1e-2, fused=True)


def last_layer(model: nn.Module) -> list[Any]:
    return [[m for m in model.modules() if isinstance(m, nn.Linear)][-1]]


def _head(model: nn.Module) -> list[Any]:
    return [model.head]


# Learned positions take long to learn pictures that are shifted: 480 steps give the full network 77 % with and 95 %
# without (validation).
_VIT: Mapping[str, Any] = {
    "wide": True, "heads": attention_layers, "kept": _head, "shifted": False, "steps": 480,
}  # fmt: skip
TASKS = {
    "digits_res": _digits("digits_res", residual, sgd, kept=last_layer),
    "digits_vgg": _digits("digits_vgg", vgg, sgd, kept=last_layer),
    "digits_vit": _digits("digits_vit", vit, adamw, **_VIT),
}
