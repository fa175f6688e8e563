"""Many processes against one: the same units, and the same weights up to the order of sums."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import only_train_once
from only_train_once import OTO
from only_train_once.errors import ConfigurationError
from only_train_once.optim import attach
from tests import spread
from tests.methods import config
from tests.reference.nets import make, tensors_of

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 280

Launch = Callable[[int], list[dict[str, Any]]]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes write; several workers of one test run share it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="module")
def launched(folder: Path) -> Launch:
    """Number of processes -> what each of them found; whoever asks first starts them, two before four."""

    @cache
    def launch(size: int) -> list[dict[str, Any]]:
        if size > 2:
            launch(2)  # writes what the others continue
        outcome = folder / f"{size}.txt"
        try:
            os.close(os.open(folder / f"{size}.started", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            end = time.monotonic() + TIMEOUT
            while not outcome.exists() and time.monotonic() < end:
                time.sleep(0.2)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command += ["-m", "tests.spread", str(folder)]
            for _ in range(
                2
            ):  # once more where gloo lost a connection; what is computed fails twice, and is compared below
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
                if not done.returncode:
                    break
            beside = folder / f"{size}.ended"
            beside.write_text(done.stderr[-8000:] if done.returncode else "", encoding="utf-8")
            beside.rename(outcome)
        assert outcome.read_text(encoding="utf-8") == ""
        return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]

    return launch


@cache
def alone(run: spread.Run) -> dict[str, Any]:
    return spread.result(run, alone=True)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sum(map(len, expected["removed"].values())) == expected["metrics"]["num_zero_groups"] > 0
    assert found["removed"] == expected["removed"]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-7, atol=1e-9, msg=name)
        assert torch.equal(found["weights"][name] == 0, weight == 0), name


@pytest.mark.parametrize("run", spread.RUNS, ids=str)
def test_as_one_process_does(run: spread.Run, launched: Launch) -> None:
    for results in launched(run.processes):
        assert_equal(results[str(run)], alone(run))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("run", spread.STOPPED, ids=str)
def test_stopped_and_continued(run: spread.Run, processes: int, launched: Launch) -> None:
    """Through the files of ``torch.distributed.checkpoint``, also with another number of processes."""
    for results in launched(processes):
        assert_equal(results[f"{run} goes on"], alone(run))


@pytest.mark.parametrize("run", spread.STOPPED, ids=str)
def test_stopped_and_continued_by_one_process(run: spread.Run, launched: Launch, folder: Path) -> None:
    launched(2)
    assert_equal(spread.go_on(run, 1, folder), alone(run))


def test_stopped_and_continued_through_one_file(launched: Launch) -> None:
    for results in launched(2):
        assert_equal(results["through one file"], alone(next(iter(spread.STOPPED))))


@pytest.mark.parametrize("saved", ["slim-ddp-False", "slim-fsdp-False", "slim-tensor_parallel-False", "slim-fsdp-True"])
def test_gathered_and_cut(saved: str, launched: Launch, folder: Path) -> None:
    """The subnet of many processes is the one of one process; analysed with weights or without."""
    launched(2)
    model = make("block")
    oto = OTO(model, spread.example())
    optimizer = oto.attach(spread.base_of(spread.CUT, model), **config(spread.CUT.method))
    spread.train(spread.CUT, model, optimizer, range(spread.STEPS), alone=True)
    expected = oto.construct_subnet()
    found = only_train_once.load(folder / saved, build=lambda: make("block"))
    assert expected.report.parameters_after < expected.report.parameters_before
    for (name, a), b in zip(tensors_of(expected.model).items(), tensors_of(found).values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=name)


def test_cut_from_a_sharded_checkpoint(launched: Launch, folder: Path) -> None:
    """One process reads the files of two into the whole model."""
    launched(2)
    run, step = next((run, step) for run, step in spread.STOPPED.items() if run.net == "conv")
    expected = spread.build(replace(run, processes=1), alone=True)
    spread.train(run, *expected, range(step), alone=True)
    model = make(run.net)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / str(run), no_dist=True)
    model.load_state_dict(state["model"])
    subnet = OTO(model, torch.cat([spread.rows(run.net, 0, 0, 1)])).construct_subnet()
    removed = sum(len(units) for units in expected[1].removed.values())
    assert sum(b - a for runs in subnet.record.removed.values() for a, b in runs) == removed > 0


@pytest.mark.parametrize("name", spread.TOGETHER)
def test_together_with_targets_and_cuts(name: str, launched: Launch) -> None:
    expected = spread.together(name, alone=True)
    assert sum(map(len, expected["removed"].values())) > 0
    for results in launched(2):
        found = results["together"][name]
        assert found["removed"] == expected["removed"]
        for a, b in zip(found["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_two_runs_side_by_side(launched: Launch) -> None:
    runs = {str(run): run for run in (spread.Run("fsdp", "block", "hesso"), spread.Run("fsdp", "mlp", "dhspg"))}
    results = [each["pairs"] for each in launched(4)]
    assert [results[0]["run"], results[2]["run"]] == list(runs)
    for found in results:
        assert_equal(found, alone(runs[found["run"]]))


def test_copies_know_the_processes(launched: Launch) -> None:
    assert [each["copies"] for each in launched(2)] == [True, True]


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_are_where_they_should_be(processes: int, launched: Launch) -> None:
    for results in launched(processes):
        assert results["parts"] >= 4 * 3 * 7


def test_what_is_refused(launched: Launch) -> None:
    for results in launched(2):
        assert "has another partition into groups than process 0" in results["refusals"]["other_groups"]
        assert "analyse the model before fully_shard" in results["refusals"]["analysis_too_late"]
        assert "'fc1.weight' has 72 entries" in results["refusals"]["part_of_the_processes"]
        assert "have 36: parts are missing" in results["refusals"]["part_of_the_processes"]
        assert "'fc1.weight' is spread over processes" in results["refusals"]["nobody_counts"]
        assert "'activation' expects that 'o' is given a tensor" in results["refusals"]["activations_in_parts"]


def test_names_are_those_of_the_model_whatever_wraps_it() -> None:
    model = make("mlp")
    named = {f"module._orig_mod.{name}": tensor for name, tensor in tensors_of(model).items()}
    optimizer = attach(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.groups(),
        named,
        **config("hesso"),  # type: ignore[operator]
    )
    assert set(optimizer._method.tensors) == {"fc1.weight", "fc1.bias", "fc2.weight"}  # type: ignore[attr-defined]


def test_gathered_in_one_process() -> None:
    model = make("block")
    oto = OTO(model, spread.example())
    with pytest.raises(ConfigurationError, match=r"no copy of its modules was kept; call gather\(make_model\(\)\)"):
        oto.gather()
    with pytest.raises(ConfigurationError, match=r"nothing here is called; give a model made like"):
        oto.gather(make("mlp"))
    full = oto.gather(make("block", seed=1))
    assert full is not None
    assert full.groups == oto.groups
    for (name, a), b in zip(tensors_of(model).items(), tensors_of(full.model).values(), strict=True):
        assert torch.equal(a, b), name
        assert a is not b
