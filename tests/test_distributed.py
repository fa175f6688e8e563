"""Many processes against one: the same units, and the same weights up to the order of sums."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import spread

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Number of processes -> what each of them found; started once for each number."""

    @functools.cache
    def launch(size: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"processes{size}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        done = subprocess.run(
            [*command, "-m", "tests.spread", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-8000:]
        return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]

    return launch


@pytest.mark.parametrize("run", spread.RUNS, ids=str)
def test_as_one_process_does(run: spread.Run, launched: Callable[[int], list[dict[str, Any]]]) -> None:
    expected = spread.result(run, alone=True)
    found = [results[str(run)] for results in launched(run.processes)]
    assert sum(map(len, expected["removed"].values())) == expected["metrics"]["num_zero_groups"] > 0
    for each in found:
        assert each["removed"] == expected["removed"]
        assert each["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
        assert each["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(each["weights"][name], weight, rtol=1e-7, atol=1e-9, msg=name)
            assert torch.equal(each["weights"][name] == 0, weight == 0), name
