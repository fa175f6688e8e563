"""What the analysis costs at the sizes that networks have in use: default configurations, inputs of usual size.

    python -m benchmarks.analysis_cost

Forward passes and analyses take turns in one process. The zoo times the same on transformers of toy size, where
Python is compared with Python; here the layers are as wide as users have them.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import tests.conftest  # noqa: F401  (one thread; lets torchvision import beside a CPU build of torch)
from only_train_once.groups import find_groups
from only_train_once.inputs import call_model
from only_train_once.trace import trace

TOKENS = 128


def _text(cls: str, config: str, **fields: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        settings = getattr(transformers, config)(**fields)
        ids = torch.randint(0, settings.vocab_size, (2, TOKENS))
        inputs = {"input_ids": ids}
        if settings.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :32]
        settings.use_cache = False
        return getattr(transformers, cls)(settings), inputs

    return build


def _image(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        import torchvision  # after tests.conftest, which lets it be imported

        return torchvision.models.get_model(name, weights=None), torch.randn(2, 3, 224, 224)

    return build


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bert-base": _text("BertForSequenceClassification", "BertConfig"),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", bos_token_id=0, eos_token_id=0),
    "t5-small": _text("T5ForConditionalGeneration", "T5Config"),
    "llama, 16 layers of 1024": _text(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=4,
    ),
    "mixtral, 4 layers of 512": _text(
        "MixtralForCausalLM", "MixtralConfig", hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2,
    ),
    "resnet50": _image("resnet50"),
    "mobilenet_v3_large": _image("mobilenet_v3_large"),
    "efficientnet_b0": _image("efficientnet_b0"),
    "convnext_tiny": _image("convnext_tiny"),
    "swin_t": _image("swin_t"),
    "vit_b_16": _image("vit_b_16"),
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    rows, ratios, beyond = [], [], []
    for name, build in NETWORKS.items():
        model, inputs = build()
        model.eval()
        forward, analysis, count = [], [], 0
        with torch.no_grad():
            call_model(model, inputs)
            for _ in range(5):
                forward.append(_seconds(lambda m=model, x=inputs: call_model(m, x))[0])  # type: ignore[misc]
                seconds, count = _seconds(lambda m=model, x=inputs: _analyse(m, x))  # type: ignore[misc]
                analysis.append(seconds)
        ratios.append(statistics.median(a / f for a, f in zip(analysis, forward, strict=True)))
        beyond.append(statistics.median((a - 3 * f) / count * 1e6 for a, f in zip(analysis, forward, strict=True)))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append(
            f"| {name} | {parameters:.0f} M | {count} | {statistics.median(forward):.3f} | "
            f"{statistics.median(analysis):.3f} | {ratios[-1]:.2f} | {beyond[-1]:.0f} |"
        )
        print(rows[-1], flush=True)
    Path("benchmarks/results/analysis_cost.md").write_text(
        "\n".join(
            [
                "# Cost of the analysis",
                "",
                f"`python -m benchmarks.analysis_cost` with torch {torch.__version__}, one thread, shared machine: "
                "median of 5 turns. *beyond 3*: milliseconds per 1,000 operators beyond three forward passes.",
                "",
                "| network | parameters | operators | forward s | analysis s | ratio | beyond 3 |",
                "|---|---:|---:|---:|---:|---:|---:|",
                *rows,
                "",
                f"Medians: {statistics.median(ratios):.2f} times one forward pass, "
                f"{statistics.median(beyond):.0f} ms per 1,000 operators beyond three.",
                "",
            ]
        )
    )


def _analyse(model: nn.Module, inputs: Any) -> int:
    graph = trace(model, inputs)
    find_groups(graph)
    return len(graph.nodes)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
