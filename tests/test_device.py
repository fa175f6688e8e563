"""What depends on where tensors lie, on every kind of device at hand: the CPU, and CUDA where there is a GPU.

Rows that only CUDA has (capturable without a compiler) exist where there is a GPU, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import only_train_once
from only_train_once import OTO
from tests.methods import BOUNDARIES, CONFIGS, config
from tests.reference.nets import batch, loss_of, make
from tests.test_optim import Asked, adamw, attached, sgd, train
from tests.test_optim_resume import assert_same, through_file

CPU = "cpu"
DEVICES = [CPU, *(["cuda"] if torch.cuda.is_available() else [])]
NETS = ("conv", "layer_norm")
END = 24
Base = partial[Optimizer]  # of a function that without more arguments goes from tensor to tensor
BASES: dict[str, Base] = {
    "sgd, foreach": partial(sgd, foreach=True),
    "sgd, fused": partial(sgd, fused=True),
    "adamw, foreach": partial(adamw, foreach=True),
    "adamw, fused": partial(adamw, fused=True),
}
ON_CUDA: dict[str, Base] = {
    "adamw, capturable": partial(adamw, foreach=True, capturable=True),
    "adamw, fused and capturable": partial(adamw, fused=True, capturable=True),
}
AT = [
    pytest.param(device, base, id=f"{device}-{name}")
    for device in DEVICES
    for name, base in {**BASES, **({} if device == CPU else ON_CUDA)}.items()
]


@pytest.fixture(autouse=True)
def _bit_for_bit() -> Iterator[None]:
    # not by assignment, which torch's own test utilities forbid for the whole process once they are imported
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("device", "base"), AT)
def test_the_same_units_as_one_at_a_time_on_the_cpu(device: str, base: Base, method: str, net: str) -> None:
    model, other = make(net).to(device), make(net)
    optimizer, slow = attached(model, base, **config(method)), attached(other, base.func, **config(method))
    train(model, optimizer, net, range(END))
    train(other, slow, net, range(END))
    assert optimizer.removed == slow.removed
    assert sum(map(len, optimizer.removed.values())) == (7 if net == "conv" else 9)
    for (name, found), wanted in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert found.device.type == device
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-7, atol=1e-9, msg=name)
        assert torch.equal(found.cpu() == 0, wanted == 0), name


@contextlib.contextmanager
def nobody_waits(device: str, allowed: int) -> Iterator[None]:
    """An error where the host asks the device for a number, on the CPU more than so many times."""
    if device == CPU:
        with Asked() as asked:
            yield
        assert asked.count == allowed
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def asks(base: Base) -> int:
    """How many times the base optimizer alone asks for a number, as AdamW does for its count of steps."""
    model = make("layer_norm")
    optimizer = base(model.parameters())
    train(model, optimizer, "layer_norm", range(1))
    with Asked() as asked:
        optimizer.step()
    return asked.count


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("device", "base"), AT)
def test_no_step_waits_for_the_device_but_where_a_period_begins(device: str, base: Base, method: str) -> None:
    allowed = asks(base) if device == CPU else 0
    model = make("layer_norm").to(device)
    optimizer = attached(model, base, **config(method))
    train(model, optimizer, "layer_norm", range(1))  # an optimizer without state is asked whether this step is real
    for step in range(1, END):
        optimizer.zero_grad()
        loss_of(model, batch("layer_norm", step)).backward()
        with contextlib.nullcontext() if step in BOUNDARIES[method] else nobody_waits(device, allowed):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_with_overflows(device: str, method: str, dtype: torch.dtype) -> None:
    model = make("conv", dtype=torch.float32).to(device)
    optimizer = attached(model, BASES["adamw, fused"], **config(method))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    for step in range(END):
        for overflows in (True, False) if step in (2, 10, 13) else (False,):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = loss_of(model, batch("conv", step, torch.float32))
            scaler.scale(loss * (float("inf") if overflows else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    metrics = optimizer.compute_metrics()
    assert (metrics.step, metrics.num_zero_groups) == (END, 7)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("device", "base"), AT)
def test_cut_stopped_saved_and_loaded_by_way_of_the_cpu(device: str, base: Base, method: str, tmp_path: Path) -> None:
    """With units that leave: the run that was stopped ends as the other, bit for bit, and so does what it saves."""

    def run() -> tuple[nn.Module, OTO, Any]:
        model = make("conv", dtype=torch.float32).to(device)
        oto = OTO(model, batch("conv", 0, torch.float32).to(device), wide=True)
        optimizer = base(model.parameters())
        oto.attach(optimizer, physical_cuts=True, **config(method))
        return model, oto, optimizer

    model, _, optimizer = run()
    train(model, optimizer, "conv", range(10), torch.float32)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again_model, again_oto, again = run()
    again_oto.resume(again, saved["optimizer"], saved["model"])
    for one, its in ((model, optimizer), (again_model, again)):
        train(one, its, "conv", range(10, END), torch.float32)
        assert {t.device.type for t in one.state_dict().values()} == {device}
        moments = [v for s in its.state.values() for k, v in s.items() if k != "step"]
        assert {t.device.type for t in moments} == {device}
    assert_same(dict(again_model.state_dict()), dict(model.state_dict()))
    assert_same(again.state_dict(), optimizer.state_dict())
    subnet = again_oto.construct_subnet()
    assert subnet.report.verified_difference is not None
    assert subnet.report.verified_difference <= 1e-9
    subnet.save(tmp_path / "slim")
    slim = only_train_once.load(tmp_path / "slim", build=lambda: make("conv", dtype=torch.float32), device=device)
    x = batch("conv", 99, torch.float32).to(device)
    with torch.no_grad():
        assert torch.equal(slim.eval()(x), subnet.model.eval()(x))
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in make("conv").parameters())
