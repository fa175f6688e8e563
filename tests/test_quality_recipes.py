"""The recipes for CIFAR-10, ImageNet and SQuAD on generated files in the same formats, by the benchmark's one command."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.__main__ import main
from benchmarks.quality.tasks import cifar, imagenet, squad
from tests import recipe_data


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The command turns warnings of logs off."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets, generated."""
    at = tmp_path_factory.mktemp("data")
    for write in (recipe_data.cifar_binary, recipe_data.imagenet, recipe_data.squad, recipe_data.bert):
        write(at)
    return at


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and batches of a test's size; everything else is as it is."""
    for name, network in cifar.NETWORKS.items():
        narrow = functools.partial(lambda width, build: build(width / 8), build=network.build)
        monkeypatch.setitem(cifar.NETWORKS, name, dataclasses.replace(network, build=narrow))
    for name, settings in imagenet.SETTINGS.items():
        if not name.endswith("pretrained"):
            smaller = functools.partial(SMALLER[name], settings.build)
            monkeypatch.setitem(imagenet.SETTINGS, name, dataclasses.replace(settings, build=smaller, batch=4, side=32))
    monkeypatch.setattr(cifar, "BATCH", 8)
    for name, value in (("BATCH", 4), ("TOKENS", 32), ("SHARED", 8), ("QUESTION", 8)):
        monkeypatch.setattr(squad, name, value)
    squad.data.cache_clear()


SMALLER: dict[str, Callable[..., Any]] = {
    "imagenet_resnet50": lambda build, width, classes, side: build(width / 8, classes, side),
    "imagenet_deit": lambda build, width, classes, side: build(width / 4, classes, side, depth=2),
}
RIVALS = {
    "cifar_resnet18": "scratch",
    "cifar_resnet50": "scratch",
    "cifar_resnet56": "scratch",
    "cifar_vgg16": "tp_magnitude",
    "imagenet_resnet50": "scratch",
    "imagenet_deit": "tp_magnitude",
    "squad_bert": "tp_magnitude",
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("task", "rival"), RIVALS.items())
def test_one_command(task: str, rival: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    asked = ["--levels", "0.5", "--seeds", "1", "--steps", "10", "--data", str(folder), "--out", str(out)]
    main(["--task", task, "--competitor", "ours", rival, *asked])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task"], row["competitor"]) for row in lines] == [(task, "ours"), (task, rival)]
    for row in lines:
        print(row)
        assert row["flops"] == pytest.approx(0.5, abs=0.1)
        assert row["training_flops"] == pytest.approx(1, abs=0.15)
        assert 0 <= row["score"] <= 100
