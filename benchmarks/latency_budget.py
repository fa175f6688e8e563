"""What a target in latency promises, next to what the subnet takes.

    python -m benchmarks.latency_budget             writes benchmarks/results/latency_budget.md
    python -m benchmarks.latency_budget ViT         only networks with this in their name, printed

A table is measured (`oto.measure_latency`), a network is pruned to a share of its latency by the table, and the subnet
runs in turns with the dense model on the same machine. Both numbers are shares of the dense model's seconds: the
table's, and the ratio of the medians of forward passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from benchmarks.step_cost import gpt
from only_train_once import OTO
from only_train_once.inputs import call_model

ROUNDS = 40


def resnet18() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet18(weights=None), torch.randn(1, 3, 128, 128)


def vit() -> tuple[nn.Module, Any]:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=128, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=100
    )
    return model, torch.randn(2, 3, 128, 128)


def gpt_prompt() -> tuple[nn.Module, Any]:
    model, _ = gpt()
    return model, {"input_ids": torch.randint(0, 16384, (1, 128)), "use_cache": False}


# name -> how it is made, in which multiples units stay, and targets (embeddings, the output and what is between the
# layers cannot get cheaper)
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int, tuple[float, ...]]] = {
    "ResNet-18": (resnet18, 1, (0.75, 0.5, 0.3)),
    "ResNet-18, multiples of 16": (resnet18, 16, (0.75, 0.5, 0.3)),
    "ViT-like, 6 layers": (vit, 1, (0.8, 0.65, 0.5)),
    "GPT-like, 30 M": (gpt_prompt, 1, (0.9, 0.8, 0.7)),
}


def seconds(model: nn.Module, inputs: Any) -> float:
    begin = time.process_time()
    call_model(model, inputs)
    return time.process_time() - begin


def measured(dense: nn.Module, subnet: nn.Module, inputs: Any) -> float:
    """Seconds of the subnet over those of the dense model, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(ROUNDS):
            for model, taken in zip((dense, subnet), times, strict=True):
                taken.append(seconds(model, inputs))
    warm = [statistics.median(taken[3:]) for taken in times]
    return warm[1] / warm[0]


def rows(name: str) -> list[str]:
    torch.manual_seed(0)
    build, divisible, targets = NETWORKS[name]
    out = []
    for target in targets:
        model, inputs = build()
        model.eval()
        oto = OTO(model, inputs)
        table = oto.measure_latency(multiple=divisible if divisible > 1 else None)
        full = oto.costs(latency_table=table).latency
        optimizer: Any = oto.hesso(
            lr=0.0, target_latency=target, latency_table=table, importance_score_criteria="magnitude",
            ranking="per_block", min_units=0.05, group_divisible=divisible, pruning_steps=2,
        )  # fmt: skip
        for _ in range(2):
            optimizer.step()
        promised = oto.costs(optimizer.removed, latency_table=table).latency / full
        subnet = oto.construct_subnet(verify=False).model.eval()
        dense, _ = build()
        kept = measured(dense.eval(), subnet, inputs)
        out.append(f"| {name} | {target:.2f} | {promised:.3f} | {kept:.3f} | {kept / promised - 1:+.0%} |")
        print(out[-1], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="")
    part = parser.parse_args().part
    torch.set_num_threads(1)
    found = [row for name in NETWORKS if part in name for row in rows(name)]
    text = [
        "# Latency, promised and measured",
        "",
        f"`python -m benchmarks.latency_budget` with torch {torch.__version__}, 1 thread, CPU: shares of the dense "
        "model's latency. *promised* is the table's, *measured* the ratio of the medians of interleaved forward passes "
        "of subnet and dense model, processor time.",
        "",
        "| network | target | promised | measured | off by |",
        "|---|---:|---:|---:|---:|",
        *found,
        "",
    ]
    if not part:
        Path("benchmarks/results/latency_budget.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
