"""Every operator of torch's own table of samples, cut between layers, as a report.

    python -m benchmarks.operators               three samples of every operator (some minutes)
    python -m benchmarks.operators --samples 10 nn.functional.linear matmul

What is wrong and what is frozen without need are reported apart (tests/operators.py says how each is found).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  (one thread)
from only_train_once.rules.registry import _RULES
from only_train_once.trace import trace
from tests.operators import Analysed, calls, missed, operators, patterns, sampled, wrong
from tests.test_operators import CONSERVATIVE, ONLY_CHECKED
from tests.test_rules import ROWS, prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/operators.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's samples include what it warns about
    logging.disable(logging.WARNING)
    counts = {"samples": 0, "networks": 0, "units": 0}
    reached: set[str] = set()
    for row in ROWS:
        model, inputs, _ = prepared(row.values[0])  # type: ignore[arg-type]
        reached |= {node.name for node in trace(model, inputs).nodes}
    errors: list[str] = []
    frozen: dict[str, str] = {}
    names = options.operators or operators()
    for operator in names:
        for call in calls(operator, options.samples):
            counts["samples"] += 1
            for kinds in patterns(call):
                for inference in (False, True) if kinds == next(patterns(call)) else (False,):
                    case = sampled(call, kinds, inference)
                    if case is None:
                        continue
                    counts["networks"] += 1
                    reached |= {node.name for node in case.graph.nodes}
                    counts["units"] += case.units
                    errors += [f"{call.name} of {kinds}: {text}" for text in _wrong(case)]
                    if kinds == next(patterns(call)) and not inference and (found := missed(case)):
                        frozen.setdefault(operator, found[0])
        print(operator, "wrong" if errors else "", "frozen" if operator in frozen else "", flush=True)
    lines = [
        "# Operators",
        "",
        f"`python -m benchmarks.operators --samples {options.samples}` with torch {torch.__version__}: samples of",
        "torch's own table of operators, each between layers that make its operands and read its results; operands are",
        "activations, activations that are not zero where their unit is, and weights in turns, also in inference mode.",
        "What the analysis offers is removed and compared in float64 on other values (1e-9). A dim that a cut of the",
        "operator alone shows to be removable, and that is frozen, is listed.",
        "",
        ", ".join([f"{len(names)} operators", *(f"{n} {what}" for what, n in counts.items())]) + " offered.",
        "",
        f"## Wrong: {len(errors)}",
        "",
        *([f"- {text}" for text in errors] or ["None."]),
        "",
        f"## Frozen without need: {len(frozen)} operators",
        "",
        *(f"- {name}: {CONSERVATIVE.get(name, 'new: ' + text)}" for name, text in frozen.items()),
        "",
        "## Rules that neither these samples nor the rows of tests/test_rules.py reach on a CPU",
        "",
        ", ".join(sorted(set(_RULES) - reached)) + ".",
        "",
    ]
    options.out.write_text("\n".join(lines))


def _wrong(case: Analysed) -> list[str]:
    try:
        return wrong(case) if case.model.call.name not in ONLY_CHECKED else []
    except AssertionError as error:  # the subnet does not run
        return [str(error)]


if __name__ == "__main__":
    main()
