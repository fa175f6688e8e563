"""How the analysis grows with depth and size.

    python -m benchmarks.scaling       writes benchmarks/results/scaling.md

Transformers of 8 to 64 layers, a convolutional network of 1,000 layers, and a Llama configuration of 70 billion
parameters on the meta device, each in a process of its own: processor seconds (the best of three, one for the
large ones), peak memory of the process, and the growth exponent (1 is linear).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tests.conftest  # noqa: F401  (lets transformers import torchvision beside a CPU build of torch)
from only_train_once.groups import find_groups
from only_train_once.trace import trace
from tests.scale import DeepCNN, llama, llama_inputs


def measure(build: Callable[[], tuple[nn.Module, Any]], repeats: int) -> dict[str, float]:
    """Seconds of the capture, of default and of wide groups; operators, groups, units; peak memory in GiB."""
    model, inputs = build()
    best = dict.fromkeys(("capture", "default", "wide"), math.inf)
    for _ in range(repeats):
        marks = [time.process_time()]
        graph = trace(model, inputs)
        marks.append(time.process_time())
        find_groups(graph)
        marks.append(time.process_time())
        groups = find_groups(graph, wide=True)
        marks.append(time.process_time())
        best = {k: min(v, b - a) for (k, v), a, b in zip(best.items(), marks, marks[1:], strict=False)}
    return best | {
        "operators": len(graph.nodes),
        "groups": len(groups.prunable),
        "units": sum(g.size for g in groups.prunable),
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def toy_llama(layers: int) -> tuple[nn.Module, Any]:
    return llama(layers, large=False), llama_inputs()


def large_llama() -> tuple[nn.Module, Any]:
    return llama(80, large=True), llama_inputs()


def deep_cnn(layers: int) -> tuple[nn.Module, Any]:
    return DeepCNN(layers), torch.randn(2, 3, 8, 8)


CASES: dict[str, tuple[Callable[..., tuple[nn.Module, Any]], tuple[int, ...], int]] = {
    **{f"Llama, {n} layers of width 64, on meta": (toy_llama, (n,), 3) for n in (8, 16, 32, 64)},
    **{f"residual CNN, {n} convolutions": (deep_cnn, (n,), 2) for n in (250, 1000)},
    "Llama, 80 layers of width 8192 (70B), on meta": (large_llama, (), 1),
}


def _run(name: str) -> dict[str, float]:
    build, args, repeats = CASES[name]
    return measure(lambda: build(*args), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.md"))
    options = parser.parse_args()
    results = {}
    for name in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that peak memory is that of one case
            results[name] = pool.apply(_run, (name,))
        print(name, results[name], flush=True)
    rows = [
        f"| {name} | {r['parameters'] / 1e6:,.1f} M | {r['operators']} | {r['groups']} | {r['units']:,} | "
        f"{r['capture']:.2f} | {r['default']:.2f} | {r['wide']:.2f} | {r['memory']:.1f} |"
        for name, r in results.items()
    ]

    def whole(name: str) -> float:
        return results[name]["capture"] + results[name]["default"]

    names = list(CASES)
    exponents = [
        (f"Llama from 8 to 64 layers: {math.log(whole(names[3]) / whole(names[0]), 8):.2f}"),
        (f"CNN from 250 to 1,000 convolutions: {math.log(whole(names[5]) / whole(names[4]), 4):.2f}"),
    ]
    text = [
        "# How the analysis grows",
        "",
        f"`python -m benchmarks.scaling` with torch {torch.__version__}, one thread, processor time.",
        "",
        "| network | parameters | operators | groups, wide | units, wide | capture s | groups s | wide s | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "Growth exponent of capture and groups together (1 is linear):",
        "",
        *(f"- {line}" for line in exponents),
        "",
    ]
    options.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
