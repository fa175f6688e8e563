"""What the analysis finds in networks people use, how long it takes, and whether the cut is exact.

    python -m benchmarks.architectures            writes benchmarks/results/architectures.md

Per network: seconds of one eager forward pass and of the whole analysis (capture, replay, groups) and their ratio, both
medians of interleaved runs; prunable groups and units, and the share of parameters that some group reaches, by
default and with wide=True; parameters kept when 40 % of the units of every group are removed; relative difference
between full and cut network in float64 on fresh inputs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from only_train_once.groups import GroupList, find_groups
from only_train_once.inputs import call_model
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet
from tests.architectures import ARCHITECTURES
from tests.pruning import choose, coverage, randomize, zero

HEADER = (
    "| network | operators | forward s | analysis s | ratio | groups | units | covered | groups, wide | units, wide | "
    "covered, wide | kept, wide | difference | difference, wide |"
)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(name: str, repeats: int) -> str:
    architecture = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = architecture.build().eval(), architecture.inputs()
    randomize(model)
    forward, analysis = [], []
    with torch.no_grad():
        call_model(model, inputs)
        for _ in range(repeats):
            forward.append(seconds(lambda: call_model(model, inputs)))
            analysis.append(seconds(lambda: find_groups(trace(model, inputs))))
    graph = trace(model, inputs)
    state = copy.deepcopy(model.state_dict())
    cells: list[str] = []
    differences, kept = [], 1.0
    for wide in (False, True):
        groups: GroupList = find_groups(graph, wide=wide)
        model.load_state_dict(state)
        zero(model, groups, choose(groups))
        subnet, _ = construct_subnet(model, groups)
        differences.append(verify_subnet(model, subnet, inputs, tolerance=float("inf")).max_relative_difference)
        kept = sum(p.numel() for p in subnet.parameters()) / sum(p.numel() for p in model.parameters())
        units = sum(g.size for g in groups.prunable)
        cells += [str(len(groups.prunable)), str(units), f"{coverage(model, groups):.2f}"]
    one, whole = statistics.median(forward), statistics.median(analysis)
    ratio = statistics.median(a / f for a, f in zip(analysis, forward, strict=True))
    fields = [name, str(len(graph.nodes)), f"{one:.3f}", f"{whole:.3f}", f"{ratio:.1f}", *cells, f"{kept:.2f}"]
    return "| " + " | ".join([*fields, *(f"{d:.0e}" for d in differences)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks to run; all of them if none is named")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/architectures.md"))
    options = parser.parse_args()
    rows = []
    for name in options.names or ARCHITECTURES:
        rows.append(row(name, options.repeats))
        print(rows[-1], flush=True)
    notes = [f"- {name}: {a.because}." for name, a in ARCHITECTURES.items() if a.because]
    rule = "|---" + "|---:" * (HEADER.count("|") - 2) + "|"
    text = "\n".join(
        [
            "# Networks people use",
            "",
            f"`python -m benchmarks.architectures` with torch {torch.__version__}, "
            f"{torch.get_num_threads()} thread; times are from a shared machine, only their ratio means something.",
            "",
            HEADER,
            rule,
            *rows,
            "",
            "Less than 0.60 by default or 0.95 with wide=True:",
            "",
            *notes,
            "",
        ]
    )
    if not options.names:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
