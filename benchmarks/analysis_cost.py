"""What the analysis costs at the sizes that networks have in use, against one eager forward pass.

    python -m benchmarks.analysis_cost                    every network (an hour)
    python -m benchmarks.analysis_cost timm convnext      some

Every builder of torchvision, one network per module of timm, and types of transformers that are not shrunk
(``zoo/*_full_models.py``), with two inputs of their own size (detectors, optical flow and most video networks of
torchvision: the zoo's smaller ones), in float32 on one thread. Forward passes and analyses take turns in one process
per network. The zoo times the same on transformers of toy size, where Python is compared with Python.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch

from .zoo.__main__ import read
from .zoo.process import run, source
from .zoo.table import beyond

LIBRARIES = {"timm": "families", "transformers_full": "names", "torchvision_full": "names"}
LINES = Path("benchmarks/results/analysis_cost.jsonl")
JOB = "benchmarks.zoo.check.cost"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", choices=LIBRARIES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--again", action="store_true", help="time what has a line already")
    options = parser.parse_args()
    done = read(LINES)
    multiprocessing.set_forkserver_preload(["benchmarks.zoo.check", "tests.conftest"])
    for library in [options.library] if options.library else LIBRARIES:
        for name in options.names or getattr(source(library), LIBRARIES[library])():
            if (library, name) in done and not options.again and not options.names:
                continue
            record = run(library, name, 600, 20, JOB)
            done[library, name] = record
            with LINES.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            print(_row(record), flush=True)
    LINES.write_text("".join(json.dumps(done[key]) + "\n" for key in sorted(done)))
    LINES.with_suffix(".md").write_text(_table([done[key] for key in sorted(done)]))


def _row(r: dict[str, Any]) -> str:
    if "error" in r:
        return f"| {r['library']} | {r['name']} | not timed: {r['error'][:150]} |"
    return (
        f"| {r['library'].removesuffix('_full')} | {r['name']} | {r['parameters'] / 1e6:.1f} M | {r['operators']} | "
        f"{r['forward_s']:.3f} | {r['analysis_s']:.3f} | {r['ratio']:.2f} | {beyond(r):.0f} |"
    )


def _table(records: list[dict[str, Any]]) -> str:
    timed = [r for r in records if "error" not in r]
    lines = [
        "# Cost of the analysis",
        "",
        f"`python -m benchmarks.analysis_cost` with torch {torch.__version__}, float32, one thread, processor time; "
        "medians of 5 turns. *beyond 3*: milliseconds per 1,000 operators beyond three forward passes; at most 50 is "
        "the bar. Detectors, optical flow and most video networks of torchvision have smaller inputs than in use, all "
        "others have their own size.",
        "",
        "| library | networks | ratio (median) | beyond 3 (median) | within the bar |",
        "|---|---:|---:|---:|---:|",
    ]
    for library in (*LIBRARIES, "all"):
        own = [r for r in timed if library in (r["library"], "all")]
        if own:
            within = sum(beyond(r) <= 50 for r in own)
            lines.append(
                f"| {library.removesuffix('_full')} | {len(own)} | {statistics.median(r['ratio'] for r in own):.2f} | "
                f"{statistics.median(map(beyond, own)):.0f} | {within} |"
            )
    lines += ["", "| library | network | parameters | operators | forward s | analysis s | ratio | beyond 3 |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|", *map(_row, timed), ""]
    lines += [_row(r).strip("| ").replace(" | ", ": ") for r in records if "error" in r]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
