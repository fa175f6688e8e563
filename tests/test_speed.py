"""Latency and memory of a subnet next to its model, and why a layer did not get faster."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO, SubnetReport
from only_train_once import speed as module
from only_train_once.errors import ConfigurationError
from only_train_once.speed import _Layer, _why, measure_speed, peak_memory, slow_layers

from .test_export import cut
from .zoo import ZOO


def sleeping(name: str, seconds: float) -> nn.Module:
    class Sleeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(seconds)
            return super().forward(x)

    return Sleeps(32, 32 if name == "full" else 8)


def test_measured_next_to_each_other() -> None:
    full, small = sleeping("full", 3e-2), sleeping("small", 1e-3)
    threads = torch.get_num_threads()
    speed = measure_speed(
        full, small, torch.randn(2, 32), backends=["eager"], batch_sizes=[2, 6], threads=[1, 2], rounds=4
    )
    assert [row.label for row in speed.latency] == [
        f"eager, batch {batch}, {count} threads" for batch in (2, 6) for count in (1, 2)
    ]
    for row in speed.latency:
        assert row.before > 3e-2
        assert row.after > 1e-3
        assert row.ratio > 1
        assert row.rounds == 4
    # weights and bias, input, result
    assert speed.latency[2].memory_before == 4 * (32 * 32 + 32 + 6 * 32 + 6 * 32)
    assert speed.latency[2].memory_after == 4 * (32 * 8 + 8 + 6 * 32 + 6 * 8)
    assert torch.get_num_threads() == threads
    assert speed.notes == ()


def test_kept_in_the_report() -> None:
    subnet = cut("convnet")
    full = ZOO["convnet"].build()
    report = subnet.measure_speed(full, backends=["eager", "onnxruntime"], rounds=3)
    assert subnet.report is report
    assert [row.label.partition(",")[0] for row in report.latency] == ["eager", "onnxruntime"]
    assert all(row.memory_before and row.memory_after for row in report.latency)
    assert SubnetReport.from_dict(report.to_dict()) == report
    assert "MiB" in str(report)
    assert full.training


@pytest.mark.slow
def test_compiled() -> None:
    full, small = (nn.Sequential(nn.Linear(16, n), nn.ReLU(), nn.Linear(n, 4)) for n in (32, 8))
    speed = measure_speed(full, small, torch.randn(2, 16), backends=["compiled"], rounds=3, explain=False)
    (row,) = speed.latency
    assert row.before > 0
    assert row.memory_before is None
    torch.compiler.reset()


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = nn.Linear(3, 4)
    speed = measure_speed(model, model, torch.randn(2, 3), backends=["eager", "onnxruntime"], rounds=2)
    assert len(speed.latency) == 1
    assert "onnxruntime was not measured: ExportError: the package onnxruntime is missing" in speed.notes[0]


def test_memory_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    # weights 70 + 44, the input, and at most two results of three at a time
    assert peak_memory(model.eval(), torch.zeros(3, 6)) == 4 * (114 + 3 * (6 + 10 + 10))


def test_layers_without_the_modules_inside() -> None:
    class Outer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = sleeping("full" if width == 32 else "small", 2e-2)

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(1e-3)
            return self.inner(x)

    found = {
        layer.name: layer for layer in slow_layers(Outer(32).eval(), Outer(8).eval(), torch.randn(2, 32), rounds=3)
    }
    assert found["inner"].seconds_after > found[""].seconds_after > 1e-3
    assert (found["inner"].flops_before, found["inner"].flops_after) == (2 * 2 * 32 * 32, 2 * 2 * 32 * 8)
    assert "inner (Sleeps) kept 25% of its FLOPs and" in str(found["inner"])


WHY: dict[str, tuple[tuple[Any, ...], str]] = {
    "launch": ((_Layer("Linear", bytes=100), [8], 10_000, 8e-6, 4e-6), "launch-bound: it takes 8 µs"),
    "memory": ((_Layer("Conv2d", bytes=10_000), [12], 10_000, 1e-3, 4e-6), "memory-bound: it does 1.0 FLOPs per byte"),
    "vector": (
        (_Layer("Conv2d", bytes=100), [5, 12], 10_000, 1e-3, 4e-6),
        "5 channels are below the width of a vector",
    ),
    "odd": ((_Layer("Conv2d", bytes=100), [16, 12], 10_000, 1e-3, 4e-6), "12 channels are no multiple of 8"),
    "pointwise": ((_Layer("ReLU", bytes=2_000_000), [], 0, 1e-3, 4e-6), "it multiplies nothing: it moves 2.0 MB"),
    "even": ((_Layer("Conv2d", bytes=100), [16], 10_000, 1e-3, 4e-6), "its kernel is less efficient"),
}


@pytest.mark.parametrize(("arguments", "words"), WHY.values(), ids=WHY)
def test_why(arguments: tuple[Any, ...], words: str) -> None:
    assert words in _why(*arguments)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "backend": (
        {"backends": ["tensorrt"]},
        r"backends is \['tensorrt'\]: a list of 'eager', 'compiled', 'onnxruntime'",
    ),
    "no list": ({"backends": "eager"}, "backends is 'eager': a list"),
    "batch": ({"batch_sizes": [0]}, r"batch_sizes is \[0\]: a list of whole numbers, at least 1"),
    "threads": ({"threads": 2}, "threads is 2: a list of whole numbers"),
    "rounds": ({"rounds": 1, "backends": ["eager"]}, "rounds=1: at least 2"),
    "size": ({"batch_sizes": [3]}, "the model does not run on 3 examples, made of .*: two"),
}


class Two(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 2:
            raise ValueError("two")
        return x


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        measure_speed(Two(), Two(), torch.ones(2, 3), **options)


def test_the_facade_measures_a_cut_network(tmp_path: Path) -> None:
    model, x = ZOO["mlp"].build(), ZOO["mlp"].inputs()
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5, seed=0)
    report = oto.construct_subnet().measure_speed(model, backends=["eager"], rounds=2)
    assert report.latency[0].label == f"eager, batch {len(x)}, {torch.get_num_threads()} threads"
    assert module.BACKENDS == ("eager", "compiled", "onnxruntime")
