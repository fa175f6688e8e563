"""Pictures of scikit-image at twice their resolution, by a small CARN (cascading residual network)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task
from benchmarks.quality.tasks.digits import scaled

PICTURES = {  # with details: of retina.jpg or color.png bicubic interpolation misses next to nothing
    "train": ("astronaut.png", "coffee.png", "ihc.png"),
    "validation": (
        "rocket.jpg", "hubble_deep_field.jpg", "camera.png", "coins.png", "page.png", "text.png",
        "brick.png", "grass.png", "gravel.png",
    ),
    "test": ("chelsea.png", "motorcycle_left.png"),
}  # fmt: skip
PATCH, BATCH, PER_EPOCH = 48, 8, 64
SCORED = 240  # pixels of a side, from the middle of a picture


@functools.cache
def data() -> dict[str, list[Tensor]]:
    """Split -> pictures (3, height, width) in [0, 1], of even sizes."""
    from skimage import data as pictures
    from skimage import io

    folder = pictures.__path__[0]
    out = {}
    for split, names in PICTURES.items():
        read = [coloured(torch.tensor(io.imread(f"{folder}/{name}"))) for name in names]
        even = [p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2] for p in read]
        out[split] = [p.permute(2, 0, 1).float() / 255 for p in even]
    return out


def coloured(picture: Tensor) -> Tensor:
    """Grey is as much of each colour; what is transparent is not.  (height, width[, colours]) -> (height, width, 3)"""
    return picture[..., :3] if picture.dim() == 3 else picture[..., None].expand(-1, -1, 3)


def smaller(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def batches(generator: torch.Generator) -> Iterator[Batch]:
    pictures = data()["train"]
    for _ in range(PER_EPOCH):
        crops = []
        for _ in range(BATCH):
            picture = pictures[int(torch.randint(len(pictures), (), generator=generator))]
            top = int(torch.randint((picture.shape[1] - PATCH) // 2, (), generator=generator)) * 2
            left = int(torch.randint((picture.shape[2] - PATCH) // 2, (), generator=generator)) * 2
            crop = picture[:, top : top + PATCH, left : left + PATCH]
            flipped, turned = torch.randint(2, (2,), generator=generator).tolist()
            crop = crop.flip(2) if flipped else crop
            crops.append(crop.transpose(1, 2) if turned else crop)
        large = torch.stack(crops)
        yield smaller(large), large


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error, in units that keep Adam's gradients away from its epsilon.

    With absolute errors the network learns to add nothing in so few steps.
    """
    return 100 * (model(batch[0]) - batch[1]).square().mean()


@torch.no_grad()
def psnr(model: nn.Module, split: str) -> float:
    """Decibels, the mean over the middles of the pictures."""
    found = []
    for picture in data()[split]:
        top, left = ((n - min(SCORED, n)) // 4 * 2 for n in picture.shape[1:])
        large = picture[None, :, top : top + SCORED, left : left + SCORED]
        error = (model.eval()(smaller(large)).clamp(0, 1) - large).square().mean()
        found.append(-10 * float(torch.log10(error)))
    return sum(found) / len(found)


class ResidualUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class Cascade(nn.Module):
    """Units one after the other, each followed by a 1x1 convolution over the outputs of all before it."""

    def __init__(self, width: int, units: list[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.joints = nn.ModuleList(nn.Conv2d((n + 2) * width, width, 1) for n in range(len(units)))

    def forward(self, x: Tensor) -> Tensor:
        seen, out = x, x
        for unit, joint in zip(self.units, self.joints, strict=True):
            seen = torch.cat([seen, unit(out)], dim=1)
            out = F.relu(joint(seen))
        return out


class Carn(nn.Module):
    """CARN for a factor of 2: three cascades of three units; it learns what bicubic interpolation misses.

    At first it adds nothing to that.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, width, 3, 1, 1)
        self.body = Cascade(width, [Cascade(width, [ResidualUnit(width) for _ in range(3)]) for _ in range(3)])
        self.up = nn.Conv2d(width, 4 * width, 3, 1, 1)
        self.exit = nn.Conv2d(width, 3, 3, 1, 1)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, height, width) -> (batch, 3, 2 height, 2 width)
        up = F.relu(F.pixel_shuffle(self.up(self.body(self.entry(x))), 2))
        return self.exit(up) + F.interpolate(x, scale_factor=2, mode="bicubic")


def carn() -> Task:
    return Task(
        name="carn",
        build=lambda width: Carn(scaled(width, 20)),
        batches=batches,
        loss=loss,
        score=psnr,
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, fused=True),
        example=torch.rand(1, 3, 24, 24),
        steps=100,
        metric="PSNR, dB",
        kept=lambda model: [model.exit, model.up],
        recipe="undertrained",
    )


TASKS = {"carn": carn}
