"""A fixed selection of mutated folders of saved subnets; ``make fuzz`` runs 10,000."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from .damaged import PLAIN, SIGNED, Sound, sound_folders, tried, watch, written

EACH = 12
WAYS = ("load", "report", "inflate")
ORDER = ("load", "load", "load", "load", "report", "inflate")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    torch.manual_seed(0)
    return sound_folders(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("way", WAYS)
def test_sound_folders_pass(way: str, sounds: dict[str, Sound], tmp_path: Path) -> None:
    for name, sound in sounds.items():
        written(tmp_path / name, sound.files)
        tried(tmp_path / name, sound, False, way)  # what is imported when it is first needed
        outcome = tried(tmp_path / name, sound, False, way)
        assert (outcome.result, outcome.wrong) == ("loaded", ""), name


@pytest.mark.parametrize("mutation", [*PLAIN, *SIGNED])
def test_mutated_folders(mutation: str, sounds: dict[str, Sound], tmp_path: Path) -> None:
    r = random.Random(mutation)
    table, results = SIGNED if mutation in SIGNED else PLAIN, []
    for number in range(EACH):
        sound = sounds[r.choice(sorted(sounds))]
        files = dict(sound.files)
        table[mutation](files, r)
        written(tmp_path / str(number), files)
        outcome = tried(tmp_path / str(number), sound, table is SIGNED, ORDER[number % len(ORDER)])
        assert not outcome.wrong, (number, outcome)
        results.append(outcome.result)
    assert table is SIGNED or any(result != "loaded" for result in results)


class Evaluates(nn.Linear):
    """What nothing in a file may bring about; the watch has to see it."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        exec(compile("1 + 1", "<string>", "exec"))


class Writes(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        with open("/dev/null", "w"):
            pass


class Runs(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize(("make", "event"), [(Evaluates, "compile"), (Writes, "open"), (Runs, "subprocess")])
def test_the_watch_sees(make: Callable[[], nn.Module], event: str, sounds: dict[str, Sound], tmp_path: Path) -> None:
    sound = sounds["one file"]
    written(tmp_path / "slim", sound.files)
    outcome = tried(tmp_path / "slim", Sound(sound.files, make, sound.bits), True)
    assert f"did: ['{event}" in outcome.wrong.replace('"', "'")
    assert watch().folder is None


def test_another_model_after_plain_damage_is_noticed(sounds: dict[str, Sound], tmp_path: Path) -> None:
    sound = sounds["one file"]
    written(tmp_path / "slim", sound.files)
    assert "another model" in tried(tmp_path / "slim", Sound(sound.files, sound.make, "other bits"), False).wrong
