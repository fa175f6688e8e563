"""The harness of ``benchmarks/quality``: budgets, sizes and verdicts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.competitors import COMPETITORS, Asked, dense, once, scratch
from benchmarks.quality.report import Cell, comparison, verdict
from benchmarks.quality.task import Task, learning_rate, nearest
from benchmarks.quality.tasks import cifar

PICTURES = torch.randn(16, 1, 6, 6)


def network(width: float) -> nn.Module:
    n = max(1, round(48 * width))
    return nn.Sequential(
        nn.Conv2d(1, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4),
    )  # fmt: skip


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    yield PICTURES, torch.randint(4, (16,), generator=generator)


TASK = Task(
    name="noise",
    build=network,
    batches=batches,
    loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    score=lambda model, split: float(model.eval()(PICTURES).mean()),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    example=PICTURES[:2],
    steps=40,
)


@pytest.mark.parametrize("competitor", [dense, scratch, COMPETITORS["hesso"], COMPETITORS["ours"]])
def test_everyone_spends_the_budget(competitor) -> None:  # type: ignore[no-untyped-def]
    level = 1.0 if competitor is dense else 0.3
    model, run = competitor(Asked(TASK, level, 0, "flops"))
    assert run.spent == pytest.approx(40, rel=0.05)
    assert TASK.share(model) == pytest.approx(level, rel=0.1)
    assert run.done > 40 or level == 1.0


def test_the_budget_in_steps() -> None:
    _, run = scratch(Asked(TASK, 0.3, 0, "steps"))
    assert run.done == 40
    assert run.spent < 20


def test_the_same_seed_gives_the_same_network() -> None:
    first, second = (once(Asked(TASK, 0.3, 3, "flops"), recipe={})[0] for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_competitors_are_never_smaller() -> None:
    assert nearest({0.5: 0.24, 0.6: 0.27, 0.7: 0.4}, 0.25) == (0.6, 0.27)
    assert nearest({0.5: 0.2478, 0.6: 0.27}, 0.25) == (0.5, 0.2478)  # within 1 %


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    assert learning_rate(0.0, 0.1) == 0
    assert learning_rate(0.1, 0.1) == 1
    assert learning_rate(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate(1.0, 0.1) == pytest.approx(0, abs=1e-12)


def rows(name: str, scores: list[float], level: float = 0.1) -> list[dict[str, object]]:
    row = {"task": "t", "level": level, "competitor": name, "budget": "flops", "metric": "accuracy, %"}
    return [{**row, "score": s, "seed": n} for n, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("ours", "sign", "word"),
    [
        ([92, 93, 94], 1, "won"),
        ([90, 91, 92], 1, "level"),
        ([89.8, 90.4, 91], 1, "behind"),
        ([80, 81, 82], 1, "**lost**"),
        ([80, 81, 82], -1, "won"),
    ],
)
def test_verdicts(ours: list[float], sign: int, word: str) -> None:
    cells = {
        "ours": Cell(rows("ours", ours)),
        "a": Cell(rows("a", [90, 91, 92])),
        "dense": Cell(rows("dense", [99, 99])),
    }
    assert verdict(cells, sign).startswith(word)


def test_two_seeds_are_no_verdict() -> None:
    cells = {"ours": Cell(rows("ours", [99, 99])), "a": Cell(rows("a", [90, 91, 92]))}
    assert verdict(cells, 1) == "too few seeds (ahead of a)"


def test_distance_is_in_standard_errors_of_the_difference() -> None:
    one, other = Cell(rows("a", [10, 12])), Cell(rows("b", [4, 6]))
    assert one.ahead_of(other, 1) == pytest.approx(6 / math.sqrt(2))


def test_the_table_keeps_lost_cells() -> None:
    lines, verdicts = comparison(
        [*rows("ours", [80, 81, 82]), *rows("a", [90, 91, 92]), *rows("dense", [99, 99], 1.0)], "flops"
    )
    assert "**lost**" in verdicts[0]
    assert "81.0 ± 1.0" in lines[-1]
    assert "**91.0 ± 1.0**, n 3" in lines[-1]


def records(count: int, seed: int) -> bytes:
    """Pictures in CIFAR-10's binary format: the label, then three planes."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 256, (count, cifar.RECORD), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows.tobytes()


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    for seed, name in enumerate([*cifar.FILES["train"], *cifar.FILES["test"]]):
        (tmp_path / name).write_bytes(records(40, seed))
    return tmp_path


def test_cifar_is_read_from_its_binary_files(cifar_folder: Path) -> None:
    images, labels = cifar.read(cifar_folder, cifar.FILES["test"])
    raw = np.frombuffer(records(40, 5), dtype=np.uint8).reshape(40, -1)
    assert labels.tolist() == raw[:, 0].tolist()
    green = (raw[7, 1 + 1024 + 33] / 255 - cifar.MEAN[1]) / cifar.DEVIATION[1]  # second row, second column
    assert float(images[7, 1, 1, 1]) == pytest.approx(green, rel=1e-5)


@pytest.mark.parametrize("name", cifar.NETWORKS)
def test_a_training_on_cifar(name: str, cifar_folder: Path) -> None:
    build, decay = cifar.NETWORKS[name]
    task = cifar.cifar(name, functools.partial(lambda width: build(width / 8)), decay, cifar_folder)
    assert task.steps == 300 * 2  # 180 of 200 pictures, in whole batches
    model, run = scratch(Asked(dataclasses.replace(task, steps=3), 0.25, 0, "steps"))
    assert run.done == 3
    assert 0 <= task.score(model, "test") <= 100


def test_shifted_pictures_are_parts_of_the_padded_ones(cifar_folder: Path) -> None:
    images, labels = cifar.data(cifar_folder)["train"]
    shown, told = next(cifar.batches(torch.Generator().manual_seed(0), cifar_folder))
    padded = F.pad(images[labels == told[0]], (4, 4, 4, 4))
    found = [p[:, t : t + 32, x : x + 32] for p in padded for t in range(9) for x in range(9)]
    assert any(torch.equal(shown[0], f) or torch.equal(shown[0], f.flip(2)) for f in found)


@pytest.mark.parametrize(("change", "message"), [("absent", "lacks test_batch.bin"), ("short", "no whole number")])
def test_other_files_are_refused(change: str, message: str, cifar_folder: Path) -> None:
    file = cifar_folder / "test_batch.bin"
    if change == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        cifar.read(cifar_folder, cifar.FILES["test"])
