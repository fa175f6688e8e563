"""Stop, save, load in a new process, continue: bit for bit the uninterrupted run.

The module is also the program that the new process runs: ``python -m tests.test_optim_resume CHECKPOINT``.
"""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.groups import PruningGroup
from only_train_once.optim import MethodState, attach, expect
from only_train_once.optim.stages import Staged
from tests.methods import CONFIGS, PLAN, config
from tests.reference.nets import batch, group, loss_of, make, tensors_of

ROOT = Path(__file__).resolve().parent.parent
NET = "conv"
# windows: steps 1-4, 5-8, 9-12; periods: 4-7, 8-11, 12-15
END = 24
CRITERIA = {"taylor_first_order": 1.0, "fisher_diagonal": 1.0, "group_fisher": 1.0}  # three kinds of means


def build(kind: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[nn.Module, Any]:
    model = make(NET, dtype=dtype)
    base: Optimizer
    if kind == "adamw":
        base = AdamW(model.parameters(), lr=3e-3)
    else:
        base = SGD(model.parameters(), lr=0.02, momentum=0.9 if kind == "momentum" else 0.0)
    return model, attach(
        base, model.groups(), tensors_of(model), **(arguments if "method" in arguments else {**PLAN, **arguments})
    )  # type: ignore[operator]


def train(model: nn.Module, optimizer: Optimizer, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(NET, step, dtype)).backward()
        optimizer.step()


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def main(path: str) -> None:
    """Continue the run saved in ``path`` to its end and save the result beside it."""
    saved = torch.load(path, weights_only=True)
    model, optimizer = build(saved["kind"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(saved["step"], END))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + ".end")


@pytest.mark.parametrize(
    ("kind", "step"),
    [("adamw", 3), ("adamw", 7), ("momentum", 10), ("plain", 6)],
    ids=["inside the first window", "inside a window and a period", "late in a window", "no base state"],
)
def test_a_new_process_continues_bit_for_bit(kind: str, step: int, tmp_path: Path) -> None:
    model, optimizer = build(kind)
    train(model, optimizer, range(step))
    state = {"kind": kind, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "mid.pt")
    train(model, optimizer, range(step, END))
    code = "import sys, torch; torch.set_num_threads(1); from tests.test_optim_resume import main; main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mid.pt")], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    end = torch.load(tmp_path / "mid.pt.end", weights_only=True)
    assert_same(end["model"], model.state_dict())
    assert_same(end["optimizer"], optimizer.state_dict())
    assert optimizer.compute_metrics().num_zero_groups == 7


@pytest.mark.parametrize(
    ("kind", "method"), [("plain", "hesso"), *(("adamw", m) for m in CONFIGS), ("momentum", "hspg"), ("plain", "dhspg")]
)
@pytest.mark.parametrize("step", range(18))
def test_every_step_is_a_good_place_to_stop(kind: str, method: str, step: int) -> None:
    arguments = config(method, **({"importance_score_criteria": CRITERIA} if method == "hesso" else {}))
    if "lmbda" in arguments:
        arguments |= {"lmbda": 30.0 if kind == "adamw" else 5.0, "epsilon": 0.9}
    model, optimizer = build(kind, **arguments)
    train(model, optimizer, range(step))
    if step == 12 and isinstance(optimizer._method, Staged):
        assert any(optimizer._method.space.fetch())  # in the middle of something
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(step, END))
    again, fresh = build(kind, **arguments)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert_same(fresh.state_dict(), saved["optimizer"])
    train(again, fresh, range(step, END))
    assert_same(again.state_dict(), model.state_dict())
    assert_same(fresh.state_dict(), optimizer.state_dict())
    assert fresh.removed == optimizer.removed
    left = {name for entries in optimizer.state_dict()["state"].values() for name in entries}
    assert not [name for name in left if str(name).startswith("only_train_once")]  # nothing is kept for good


def test_half_precision_sums_survive_in_full() -> None:
    model, optimizer = build("momentum", torch.bfloat16)
    train(model, optimizer, range(7), torch.bfloat16)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    sums = [s["only_train_once_gradient_sum"] for s in saved["optimizer"]["state"].values() if len(s) > 1]
    assert {s.dtype for s in sums} == {torch.float32}
    train(model, optimizer, range(7, END), torch.bfloat16)
    again, fresh = build("momentum", torch.bfloat16)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(again, fresh, range(7, END), torch.bfloat16)
    assert_same(again.state_dict(), model.state_dict())


def test_the_state_is_in_files_only() -> None:
    model, optimizer = build("momentum")
    train(model, optimizer, range(7))
    state = optimizer.state_dict()
    assert "only_train_once" in state["param_groups"][0]
    assert any("only_train_once_gradient_sum" in s for s in state["state"].values())
    fresh_model, fresh = build("momentum")
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    for o in (optimizer, fresh):
        assert all("only_train_once" not in g for g in o.param_groups)
        assert all(set(s) == {"momentum_buffer"} for s in o.state.values())
    plain = SGD(make(NET, dtype=torch.float32).parameters(), lr=0.02, momentum=0.9)
    plain.load_state_dict(state)  # the base optimizer reads it, too
    train(model, optimizer, range(7, END))
    assert all("only_train_once_gradient_sum" not in s for s in optimizer.state_dict()["state"].values())


def test_round_trip_before_the_first_step() -> None:
    for kind in ("plain", "adamw"):
        model, optimizer = build(kind)
        optimizer.load_state_dict(through_file(optimizer.state_dict()))
        train(model, optimizer, range(END))
        other, plain = build(kind)
        train(other, plain, range(END))
        assert_same(model.state_dict(), other.state_dict())


def test_a_state_of_the_base_optimizer_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build("momentum")
    plain = SGD(model.parameters(), lr=0.5, momentum=0.9)
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(plain.state_dict())
    assert "has no state of method 'hesso'" in caplog.text
    assert optimizer.get_learning_rate() == 0.5
    assert optimizer.compute_metrics().step == 0


def changed(model: nn.Module, how: str) -> list[PruningGroup]:
    first, second = model.groups()  # type: ignore[operator]
    cuts = [(s.param, s.dim, s.role) for s in first.slices]
    return {
        "missing": [second],
        "renamed": [group("conv9", 6, model, cuts), second],
        "size": [group("conv1", 3, model, cuts), second],
        "slices": [group("conv1", 6, model, cuts[:-1]), second],
        "order": [second, first],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "'conv1' is only in the saved state"),
        ("renamed", "'conv1' is only in the saved state; 'conv9' is only in this optimizer"),
        ("size", "'conv1' has 6 units in the saved state and 3 here"),
        ("slices", "'conv1' cuts other tensors or positions in the saved state"),
        ("order", "the groups come in another order"),
    ],
)
def test_a_state_of_another_partition_is_refused(how: str, message: str) -> None:
    model, optimizer = build("momentum")
    train(model, optimizer, range(7))
    other = make(NET, dtype=torch.float32)
    fresh: Any = attach(SGD(other.parameters(), lr=0.3, momentum=0.9), changed(other, how), tensors_of(other), **PLAN)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match=message):
        fresh.load_state_dict(optimizer.state_dict())
    assert_same(fresh.state_dict(), before)


def test_a_state_of_another_schedule_is_refused_once_it_matters() -> None:
    model, optimizer = build("momentum")
    _, other = build("momentum", pruning_steps=15)
    train(model, optimizer, range(3))
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    with pytest.raises(CheckpointError, match="pruning_steps was 12 and is 15"):
        other.load_state_dict(optimizer.state_dict())
    _, later = build("momentum", start_pruning_step=100)
    with pytest.raises(CheckpointError, match="start_pruning_step was 4 and is 100"):
        later.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 99, "format version 99, this library reads 1"),
        ("method", "magic", "saved by method 'magic', not by 'hesso'"),
        ("chosen", torch.zeros(3, dtype=torch.int32), r"14 units.*\(3,\)"),
    ],
)
def test_a_strange_entry_is_named(key: str, value: Any, message: str) -> None:
    _, optimizer = build("momentum")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["only_train_once"][key] = value
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)


def test_numpy_arguments_are_saved_as_plain_numbers() -> None:
    model, optimizer = build("momentum", target_group_sparsity=np.float64(0.5), pruning_steps=np.int64(12))
    train(model, optimizer, range(7))
    assert_same(through_file(optimizer.state_dict()), optimizer.state_dict())


@pytest.mark.parametrize("method", ["hesso", "hspg", "ada_hspg", "dhspg", "hesso_cric"])
@pytest.mark.parametrize("kind", ["plain", "adamw"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("step", [0, 6, 8, 11])
def test_distributed_checkpoint(kind: str, step: int, method: str, tmp_path: Path) -> None:
    """Through its state_dict functions and its files; saved between windows, where no gradient sum is needed."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    arguments = config(method, **({} if method in ("hspg", "hesso_cric") else {"window": 1}))
    if method == "hesso_cric":
        step = {0: 0, 6: 2, 8: 3, 11: 10}[step]  # outside its cycles, in which the copy of the run is needed
    model, optimizer = build(kind, **arguments)
    train(model, optimizer, range(step))
    optimizer.zero_grad()
    saved_model, saved_optimizer = api.get_state_dict(model, optimizer)
    assert optimizer.compute_metrics().step == step
    dcp.save({"model": saved_model, "optimizer": saved_optimizer}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    train(model, optimizer, range(step, END))

    again, fresh = build(kind, **arguments)
    target_model, target_optimizer = api.get_state_dict(again, fresh)
    target = {"model": target_model, "optimizer": target_optimizer}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    api.set_state_dict(again, fresh, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    assert fresh.compute_metrics().step == step
    train(again, fresh, range(step, END))
    assert fresh.removed == optimizer.removed
    if kind == "plain" or step > 0:  # at step 0 the call itself takes a step with AdamW, in torch's own count
        assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(("method", "step"), [("hesso", 7), ("hesso", 10), ("ada_hspg", 6), ("hesso_cric", 5)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_inside_windows_and_cycles(method: str, step: int, flat: bool, tmp_path: Path) -> None:
    """Nothing is lost on the way, when the fresh optimizer is told what the files hold."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = api.StateDictOptions(flatten_optimizer_state_dict=flat)
    arguments = {**config(method), "importance_score_criteria": CRITERIA} if "hesso" in method else config(method)

    def states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        model_state, optimizer_state = api.get_state_dict(model, optimizer, options=options)
        if not flat:
            return {"model": model_state, "optimizer": optimizer_state}
        return {
            "model": model_state,
            "optimizer": MethodState.without(optimizer_state),
            "method": MethodState(optimizer),
        }

    model, optimizer = build("adamw", **arguments)
    train(model, optimizer, range(step))
    optimizer.zero_grad()
    dcp.save(states(model, optimizer), checkpoint_id=tmp_path / "dcp", no_dist=True)
    train(model, optimizer, range(step, END))

    again, fresh = build("adamw", **arguments)
    expect(fresh, tmp_path / "dcp")
    target = states(again, fresh)
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    api.set_state_dict(
        again, fresh, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options
    )
    assert fresh.compute_metrics().step == step
    train(again, fresh, range(step, END))
    assert fresh.removed == optimizer.removed
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(10, dtype=torch.int64), "x", [0.0]])
def test_damaged_squares_of_products(value: Any) -> None:
    model, optimizer = build("plain", importance_score_criteria="group_fisher")
    train(model, optimizer, range(6))
    saved = through_file(optimizer.state_dict())
    entry = saved["param_groups"][0]["only_train_once"]
    assert entry["product_squares"].any()  # in the middle of a window
    entry["product_squares"] = value
    before = optimizer._method.scoring.products.sums.clone()
    with pytest.raises(CheckpointError, match=r"'product_squares' is .*expected a number for every unit"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer._method.scoring.products.sums, before)


def test_an_unfinished_window_without_its_squares_starts_afresh(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build("plain", importance_score_criteria="group_fisher")
    train(model, optimizer, range(6))
    saved = through_file(optimizer.state_dict())
    assert saved["param_groups"][0]["only_train_once"]["window_count"] > 0
    del saved["param_groups"][0]["only_train_once"]["product_squares"]
    again, fresh = build("plain", importance_score_criteria="group_fisher")
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(saved)
    assert "the average starts afresh" in caplog.text
    train(again, fresh, range(6, END))
    assert fresh.compute_metrics().num_zero_groups == 7


def test_states_of_other_optimizers_are_refused() -> None:
    model, optimizer = build("plain")
    plain = SGD(model.parameters(), lr=0.1)
    for function in (MethodState, lambda o: expect(o, [])):
        with pytest.raises(ConfigurationError, match="no method is attached to this SGD"):
            function(plain)
    with pytest.raises(CheckpointError, match="damaged: 'only_train_once' is"):
        MethodState(optimizer).load_state_dict({"state": {}})
    state = MethodState(build("plain", **config("dhspg"))[1]).state_dict()
    with pytest.raises(CheckpointError, match="saved by method 'dhspg', not by 'hesso'"):
        MethodState(optimizer).load_state_dict(state)


def test_sums_lost_on_the_way_restart_the_window(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build("plain")
    train(model, optimizer, range(7))
    state = optimizer.state_dict()
    state["state"] = {}
    again, fresh = build("plain")
    again.load_state_dict(model.state_dict())
    with caplog.at_level(logging.WARNING):
        fresh.load_state_dict(state)
    assert "2 step(s) into an averaging window" in caplog.text
    train(again, fresh, range(7, END))
    assert fresh.compute_metrics().num_zero_groups == 7
