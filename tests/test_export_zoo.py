"""Every network of the zoo, cut, is exported as the dense one is; ``make export_zoo`` does so in every format."""

from __future__ import annotations

from pathlib import Path

import pytest

from only_train_once.export import Exported

from .exports import REFUSED, dense, outcome, says, slim
from .zoo import ZOO

# A network for every kind of operator that ONNX writes in its own way; exporting takes seconds.
ONNX = [
    *("mlp", "grouped", "shuffle", "grouped_query", "layer_norm", "hand_rms_norm", "group_norm", "weight_norm"),
    *("mha_cross", "decoder_norm_last", "lstm", "mamba", "sigmoid_gates", "pixel_shuffles", "dense_block", "fnet"),
]
# The first dim of an input is time or layers, or experts hold so many tokens as the example has.
FIRST_DIM_FIXED = {"given_start", "lstm_time_first", "gru_all_states", "rnn_relu", "batched_experts", "group_limited"}


@pytest.mark.filterwarnings("ignore")  # of the networks' own code; the export is silent
@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED["torch_export"]])
def test_slim_as_torch_export(name: str, tmp_path: Path) -> None:
    exported = outcome(*slim(name), "torch_export", tmp_path, "batch")
    assert isinstance(exported, Exported), exported
    assert exported.difference <= 1e-6  # the same operators: no more than another order of sums
    changes = 0 in next(iter(exported.dynamic.values()))
    assert changes is (name not in FIRST_DIM_FIXED), exported
    if not changes:
        whole = outcome(*dense(name), "torch_export", tmp_path, "batch")
        assert isinstance(whole, Exported)
        assert whole.dynamic == exported.dynamic


@pytest.mark.parametrize("name", ONNX)
def test_slim_as_onnx(name: str, tmp_path: Path) -> None:
    exported = outcome(*slim(name), "onnx", tmp_path)
    assert isinstance(exported, Exported), exported
    assert any(exported.dynamic.values())


@pytest.mark.parametrize("name", REFUSED["torch_export"])
def test_what_is_refused_is_refused_dense_as_well(name: str, tmp_path: Path) -> None:
    pattern = REFUSED["torch_export"][name]
    for build in (dense, slim):
        found = outcome(*build(name), "torch_export", tmp_path, False)
        assert says(found, pattern), found
