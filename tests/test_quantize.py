"""Quantization after training takes subnets as it takes any other module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .test_export import cut

# 8 bits: 1/254 of the largest weight of a row at most, and errors of a few layers add up.
TOLERANCE = 0.05


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def whole_numbers(model: nn.Module) -> int:
    """How many weights are kept in 8 bits."""
    return sum(getattr(p, "qdata", p).dtype is torch.int8 for p in model.parameters())


def weight_only() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(version=2)


@pytest.mark.filterwarnings("ignore")  # torchao says which of its own parts it will rename
@pytest.mark.parametrize("config", [weight_only, dynamic])
@pytest.mark.parametrize(("name", "wide"), [("mlp", False), ("layer_norm", True), ("grouped_query", False)])
def test_torchao(name: str, wide: bool, config: Callable[[], Any]) -> None:
    from torchao.quantization import quantize_

    subnet = cut(name, wide)
    model = copy.deepcopy(subnet.model).eval()
    quantize_(model, config())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert whole_numbers(model) == len(linear) > 0
    with torch.no_grad():
        for x in (subnet.inputs, torch.randn(5, *subnet.inputs.shape[1:])):
            assert 0 < difference(model(x), subnet.model.eval()(x)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp", "grouped_query", "layer_norm"])
def test_onnx_runtime(name: str, tmp_path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from only_train_once.export import open_exported

    subnet = cut(name)
    exported = subnet.export("onnx", tmp_path / "net.onnx", dynamic="batch")
    small = tmp_path / "small.onnx"
    # 7 bits: without VNNI, sums of products of 8 bits overflow in ONNX Runtime's kernels
    quantize_dynamic(exported.path, small, weight_type=QuantType.QInt8, reduce_range=True)
    kinds = [t.data_type for t in onnx.load(small).graph.initializer if len(t.dims) == 2]
    assert onnx.TensorProto.INT8 in kinds
    with torch.no_grad():
        for x in (subnet.inputs, torch.randn(5, *subnet.inputs.shape[1:])):
            (found,) = open_exported("onnx", small)(x)
            assert 0 < difference(found, subnet.model.eval()(x)) <= TOLERANCE
