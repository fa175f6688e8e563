"""Every network of the test zoo, dense and cut, exported, read back, and compared at other sizes.

    python -m benchmarks.export_zoo                     torch.export and ONNX, into benchmarks/results/export_zoo.md
    python -m benchmarks.export_zoo onnx vit lstm       some networks, printed

A cut network has to be exported where the dense one is, with the same sizes free to change. What the dense one cannot
do is in tests/exports.py, in the exporter's words; this says so when that is no longer true, too. Lines are kept in
export_zoo.jsonl while it runs, and a second call goes on where the first one stopped; remove them to start anew.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (one thread)
from only_train_once.export import FORMATS, Exported
from tests.exports import REFUSED, dense, outcome, says, slim
from tests.zoo import ZOO

LINES, TABLE = Path("benchmarks/results/export_zoo.jsonl"), Path("benchmarks/results/export_zoo.md")


def line(kind: str, name: str) -> dict[str, Any]:
    """Both networks in one format."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for build in (dense, slim):
            torch.manual_seed(0)
            results.append(outcome(*build(name), kind, Path(folder)))
    whole, cut = results
    return {
        "kind": kind,
        "name": name,
        "verdict": verdict(kind, name, whole, cut),
        "dynamic": {n: list(d) for n, d in cut.dynamic.items()} if isinstance(cut, Exported) else None,
        "difference": cut.difference if isinstance(cut, Exported) else None,
        "notes": [n for n in cut.notes if "code or weights" not in n] if isinstance(cut, Exported) else [cut],
        "seconds": round(time.process_time() - start, 1),
    }


def verdict(kind: str, name: str, whole: Exported | str, cut: Exported | str) -> str:
    pattern = REFUSED[kind].get(name)
    if pattern is not None:
        if says(whole, pattern) and says(cut, pattern):
            return "neither"
        return "listed as refused, and is not"
    if isinstance(cut, str):
        return "cut fails" if isinstance(whole, Exported) else "neither, and not listed"
    if isinstance(whole, str):
        return "only cut"
    return "equal" if whole.dynamic == cut.dynamic else f"other sizes are free: dense {dict(whole.dynamic)}"


def main() -> None:
    warnings.simplefilter("ignore")  # of the networks' own code
    logging.disable(logging.WARNING)
    kinds = [a for a in sys.argv[1:] if a in FORMATS] or ["torch_export", "onnx"]
    names = [a for a in sys.argv[1:] if a not in FORMATS]
    known = [json.loads(text) for text in LINES.read_text().splitlines()] if LINES.exists() and not names else []
    done = {(row["kind"], row["name"]) for row in known}
    for kind in kinds:
        for name in names or ZOO:
            if (kind, name) in done:
                continue
            known.append(line(kind, name))
            print(json.dumps(known[-1]), flush=True)
            if not names:
                with LINES.open("a") as file:
                    file.write(json.dumps(known[-1]) + "\n")
    if not names:
        TABLE.write_text(table(known))


def table(rows: list[dict[str, Any]]) -> str:
    text = [
        "# The test zoo, exported",
        "",
        f"`python -m benchmarks.export_zoo` with torch {torch.__version__}: every network of the zoo, dense and "
        "without 40 % of its units, exported with all sizes that may change, read back and compared with the module at "
        "the example's sizes and at others. *difference*: largest relative difference of the cut network's outputs, in "
        "float32.",
        "",
        "| format | networks | exported alike | neither dense nor cut | anything else | largest difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        equal = [row for row in mine if row["verdict"] == "equal"]
        neither = sum(row["verdict"] == "neither" for row in mine)
        worst = max((row["difference"] for row in equal), default=0.0)
        other = len(mine) - len(equal) - neither
        text.append(f"| {kind} | {len(mine)} | {len(equal)} | {neither} | {other} | {worst:.1e} |")
    for title, chosen in (
        ("Neither dense nor cut", [r for r in rows if r["verdict"] == "neither"]),
        ("Anything else", [r for r in rows if r["verdict"] not in ("neither", "equal")]),
        ("With sizes fixed", [r for r in rows if r["verdict"] == "equal" and r["notes"]]),
    ):
        text += ["", f"## {title}", "", "| format | network | |", "|---|---|---|"] if chosen else []
        for row in chosen:
            words = "; ".join([*([row["verdict"]] if title == "Anything else" else []), *row["notes"]])
            text.append(f"| {row['kind']} | {row['name']} | {words[:300].replace('|', '/')} |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    main()
