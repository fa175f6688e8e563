"""What of the zoo cannot be exported, dense or cut: the exporter's words, by format. And what one comparison is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from only_train_once import OTO
from only_train_once.errors import ExportError
from only_train_once.export import Exported, export_model

from .pruning import choose, randomize, zero
from .zoo import ZOO

SUFFIX = {"torch_export": ".pt2", "onnx": ".onnx", "aot": ".pt2"}

_DATA = "data-dependent expression"
_CAPTURE = {
    **dict.fromkeys(("data_branch", "data_branches", "data_failure", "written_branch", "exit_early"), _DATA),
    **dict.fromkeys(("data_count", "constant_count", "random_count", "written_count"), _DATA),
    **dict.fromkeys(("mixtral", "rarely_chosen", "never_chosen", "shared_expert"), _DATA),
    **dict.fromkeys(("packed_lstm", "packed_gru"), "FakeTensor"),
    **dict.fromkeys(("grouped_experts", "grouped_transposed"), "Expected inputs of BF16 type"),
    "mapped": "fake tensor in the exported program constant's list",
}
# format -> network -> what its exporter says of it
REFUSED: dict[str, dict[str, str]] = {
    "torch_export": _CAPTURE,
    "onnx": {
        **_CAPTURE,
        "windowed_attention": "only 4D query, key, and value are supported",
        "unknown_operator": "No ONNX function found for .*linalg_svd",
        "noise": "differs on inputs",  # ONNX Runtime draws numbers of its own
        "spatial": "No ONNX function found for .*_adaptive_avg_pool3d",
        "lstm_projected": "All inputs to Concat must have same rank",
        "s4d": "complex-valued input",
        "lru": "complex-valued input",
        "fourier_operator": "complex-valued input",
        "orthogonal": "No ONNX function found for .*linalg_matrix_exp",
        "message_passing": "differs on inputs",
        "qrnn": "No ONNX function found for .*prod",
    },
}


def dense(name: str) -> tuple[nn.Module, Any]:
    """A network of the zoo and its inputs."""
    model = ZOO[name].build().eval()
    randomize(model)
    return model, ZOO[name].inputs()


def slim(name: str) -> tuple[nn.Module, Any]:
    """The same without 40 % of its units."""
    model, inputs = dense(name)
    oto = OTO(model, inputs)
    zero(model, oto.groups, choose(oto.groups))
    return oto.construct_subnet(verify=False).model, inputs


def outcome(model: nn.Module, inputs: Any, kind: str, folder: Path, dynamic: bool | str = True) -> Exported | str:
    """The export, compared with the module at other sizes; or why there is none."""
    try:
        return export_model(model, kind, folder / f"net{SUFFIX[kind]}", inputs=inputs, dynamic=dynamic)
    except ExportError as error:
        return str(error)


def says(result: Exported | str, pattern: str) -> bool:
    """Whether there is no export, for this reason."""
    return isinstance(result, str) and re.search(pattern, result) is not None
