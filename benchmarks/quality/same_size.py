"""Ours once more where the best other network has other FLOPs: with just as many.

    python -m benchmarks.quality.same_size

Uniform widths come in coarse steps, and competitors that have only those get the next larger network: at 5 % of
digits_vgg one of 5.8 %. Wherever the network of the best other is more than 0.5 % smaller than ours, or larger and ours
has not won with the smaller one, this trains ours with the other's FLOPs as its target, with as many seeds as it had,
and appends the runs to ``quality.jsonl``; ``python -m benchmarks.quality.report`` makes a second table of them. Runs
that are in the file already are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.quality import __main__ as quality
from benchmarks.quality.report import OURS, Match, matches, read
from benchmarks.quality.tasks import TASKS


def wanted(tasks: Sequence[str] | None) -> list[Match]:
    rows = [row for row in read(quality.RESULTS) if row["split"] == "test"]
    return [m for m in matches(rows, "flops") if m.level != m.asked and (tasks is None or m.task in tasks)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, help="default: all that have results")
    for match in wanted(parser.parse_args(arguments).task):
        print(f"{match.task} at {match.asked}: {match.other} has {match.level} of the FLOPs", flush=True)
        seeds = f"{match.seeds}"
        quality.main(["--task", match.task, "--levels", f"{match.level}", "--seeds", seeds, "--competitor", OURS])


if __name__ == "__main__":
    main()
