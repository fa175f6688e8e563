"""Tables and a picture of what was measured.

    python -m benchmarks.quality.report      reads benchmarks/results/quality*.jsonl, writes .md and .svg beside them

A cell is the mean and the standard deviation over the seeds. Of two means one is better *beyond one standard error* if
they are farther apart than the standard error of their difference.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
OURS = "ours"
WORDS = ("won", "level", "behind", "**lost**", "too few seeds")
SAME = 0.005  # networks whose FLOPs differ by no more than this share have the same size
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Cell:
    """The scores of one competitor on one task at one level."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.scores = rows, [row["score"] for row in rows]
        self.n, self.mean = len(rows), statistics.mean(self.scores)
        self.deviation = statistics.stdev(self.scores) if self.n > 1 else 0.0
        self.error = self.deviation / math.sqrt(self.n)

    def average(self, name: str) -> float:
        return statistics.mean(row[name] for row in self.rows)

    def text(self, spread: float) -> str:
        digits = 1 if self.rows[0]["metric"].endswith("%") else 3
        return f"{self.mean:.{digits}f} ± {spread:.{digits}f}"

    def ahead_of(self, other: Cell, sign: int) -> float:
        """By how many standard errors of the difference."""
        gap = sign * (self.mean - other.mean)
        error = math.hypot(self.error, other.error)
        return gap / error if error else math.copysign(math.inf, gap) if gap else 0.0


def sign_of(metric: str) -> int:
    return -1 if metric == "bits per byte" else 1


def grouped(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[n] for n in names)].append(row)
    return dict(found)


def best_other(cells: dict[str, Cell], sign: int) -> str | None:
    """The name of the best of those that are neither ours nor the full network."""
    rivals = [name for name in cells if name not in (OURS, "dense")]
    return max(rivals, key=lambda name: sign * cells[name].mean, default=None)


def verdict(cells: dict[str, Cell], sign: int) -> str:
    """How ours stands against the best of the others."""
    best = best_other(cells, sign)
    if OURS not in cells or best is None:
        return ""
    ahead = cells[OURS].ahead_of(cells[best], sign)
    if min(cells[OURS].n, cells[best].n) < 3:  # no spread to speak of
        return f"too few seeds ({'ahead of' if ahead > 0 else 'not ahead of'} {best})"
    word = "won" if ahead > 1 else "level" if ahead >= 0 else "behind" if ahead >= -1 else "**lost**"
    return f"{word} ({ahead:+.1f} against {best})"


@dataclass(frozen=True)
class Match:
    """Ours against the best other, where ours has as many FLOPs; or fewer, if it won with fewer.

    Attributes:
        asked: of everyone, as a share of the full network's FLOPs.
        other: who was best at that.
        level: what that network has, which is what ours is asked for; ``asked`` where that will do.
        seeds: of ours where it was asked for the same as everyone.
        cells: ours at ``level``, if that was run, and the other.
    """

    task: str
    sign: int
    asked: float
    other: str
    level: float
    seeds: int
    cells: dict[str, Cell]


def matches(rows: list[Row], budget: str) -> list[Match]:
    """A match for every task and level that ours and others were asked for."""
    found = []
    ours = grouped((r for r in rows if r["budget"] == budget and r["competitor"] == OURS), "task", "level")
    for (task, asked), mine in grouped((r for r in rows if r["budget"] == budget), "task", "level").items():
        cells = {name: Cell(r) for (name,), r in grouped(mine, "competitor").items()}
        sign = sign_of(mine[0]["metric"])
        other = best_other(cells, sign)
        if OURS not in cells or other is None:
            continue
        theirs = cells[other].average("flops")
        more = cells[OURS].average("flops") / theirs - 1
        enough = abs(more) <= SAME or (more < 0 and verdict(cells, sign).startswith("won"))
        level = asked if enough else round(theirs, 4)
        there = {OURS: Cell(ours[task, level])} if (task, level) in ours else {}
        found.append(Match(task, sign, asked, other, level, cells[OURS].n, {**there, other: cells[other]}))
    return found


def same_size(rows: list[Row], budget: str) -> tuple[list[str], list[str]]:
    """A table of ours and the best other at the same FLOPs, or with fewer of ours if that won; and the verdicts."""
    lines = [
        "| task | FLOPs asked | best other | its FLOPs | ours | FLOPs | |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for match in sorted(matches(rows, budget), key=lambda m: (m.task, -m.asked)):
        other, ours = match.cells[match.other], match.cells.get(OURS)
        verdicts.append(verdict(match.cells, match.sign))
        texts = [f"{c.text(c.deviation)}, n {c.n} | {c.average('flops'):.4f}" if c else "– | –" for c in (other, ours)]
        lines.append(f"| {match.task} | {match.asked} | {match.other} {texts[0]} | {texts[1]} | {verdicts[-1]} |")
    return lines, verdicts


def comparison(rows: list[Row], budget: str) -> tuple[list[str], list[str]]:
    """A table of all tasks and levels, and the verdicts."""
    rows = [row for row in rows if row["budget"] == budget]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    names = [n for n in ("dense", OURS) if n in names] + [n for n in names if n not in ("dense", OURS)]
    lines = [
        f"| task | FLOPs | {' | '.join(names)} | ours against the best other |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    verdicts = []
    for task in tasks:
        mine = [row for row in rows if row["task"] == task]
        metric = mine[0]["metric"]
        pairs = matches(mine, budget)
        elsewhere = {m.level for m in pairs} - {m.asked for m in pairs}  # has a table of its own
        levels = sorted({row["level"] for row in mine} - {1.0} - elsewhere, reverse=True)
        full = [row for row in mine if row["level"] == 1.0]
        for level in levels:
            cells = {n: Cell(r) for (n,), r in grouped((r for r in mine if r["level"] == level), "competitor").items()}
            if full:
                cells["dense"] = Cell(full)
            best = max((sign_of(metric) * c.mean for n, c in cells.items() if n != "dense"), default=0.0)
            texts = []
            for name in names:
                cell = cells.get(name)
                if cell is None:
                    texts.append("–")
                    continue
                mark = "**" if name != "dense" and sign_of(metric) * cell.mean == best else ""
                n = "" if cell.n == 5 else f", n {cell.n}"
                texts.append(f"{mark}{cell.text(cell.deviation)}{mark}{n}")
            verdicts.append(verdict(cells, sign_of(metric)))
            lines.append(f"| {task} ({metric}) | {level} | {' | '.join(texts)} | {verdicts[-1]} |")
    return lines, verdicts


def tally(verdicts: list[str]) -> str:
    return f"Cells: {', '.join(f'{sum(v.startswith(w) for v in verdicts)} {w}' for w in WORDS)}."


def sizes(rows: list[Row], budget: str) -> list[str]:
    """What the networks of the table cost."""
    lines = [
        "| task | FLOPs asked | competitor | FLOPs | parameters | latency, ms | training FLOPs | steps | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    chosen = [row for row in rows if row["budget"] == budget]
    for (task, level, competitor), mine in grouped(chosen, "task", "level", "competitor").items():
        cell = Cell(mine)
        lines.append(
            f"| {task} | {level} | {competitor} | {cell.average('flops'):.3f} | {cell.average('parameters'):,.0f} | "
            f"{cell.average('latency_ms'):.2f} | {cell.average('training_flops'):.2f} | {cell.average('steps'):,.0f} | "
            f"{cell.average('seconds'):.0f} |"
        )
    return lines


def ablation(rows: list[Row]) -> list[str]:
    """A column for each task and level, a row for each variant."""
    columns = sorted({(row["task"], row["level"]) for row in rows if row["level"] != 1.0})
    lines = [f"| variant | {' | '.join(f'{t} {level}' for t, level in columns)} |", f"|---|{'---|' * len(columns)}"]
    for (name,), mine in grouped(rows, "competitor").items():
        cells = {key: Cell(r) for key, r in grouped(mine, "task", "level").items()}
        texts = [f"{cells[c].text(cells[c].error)} (n {cells[c].n})" if c in cells else "–" for c in columns]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Score against FLOPs, parameters and latency of the networks, a row for each task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"
    from matplotlib import pyplot

    rows = [row for row in rows if row["budget"] == "flops"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    axes_of = {"flops": "FLOPs, share", "parameters": "parameters", "latency_ms": "latency, ms"}
    figure, axes = pyplot.subplots(len(tasks), 3, figsize=(12, 3 * len(tasks)), squeeze=False, layout="constrained")
    for line, task in zip(axes, tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for axis, (name, label) in zip(line, axes_of.items(), strict=True):
            for (competitor,), found in grouped(mine, "competitor").items():
                cells = sorted((Cell(r) for r in grouped(found, "level").values()), key=lambda c: c.average(name))
                axis.errorbar(
                    [c.average(name) for c in cells], [c.mean for c in cells], [c.error for c in cells],
                    marker="o" if competitor == OURS else ".", lw=2 if competitor == OURS else 0.8, label=competitor,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel(label)
        line[0].set_ylabel(f"{task}: {mine[0]['metric']}")
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    rows = [row for row in read(RESULTS / "quality.jsonl") if row["split"] == "test"]
    text = ["# Accuracy per FLOP of one training", "", (Path(__file__).parent / "about.md").read_text()]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        lines, verdicts = comparison(rows, budget)
        text += [f"## Equal training {'FLOPs' if budget == 'flops' else 'steps'}", "", *lines, ""]
        text += [tally(verdicts), ""]
        if budget == "flops":
            lines, verdicts = same_size(rows, budget)
            text += ["## Equal training FLOPs, and no more and hardly fewer FLOPs than the best other", "", *lines, ""]
            text += [tally(verdicts), ""]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        text += [f"## What the networks cost, equal {budget}", "", *sizes(rows, budget), ""]
    (RESULTS / "quality.md").write_text("\n".join(text))
    picture(rows, RESULTS / "quality.svg")
    tried = read(RESULTS / "quality_ablation.jsonl")
    about = (Path(__file__).parent / "about_ablation.md").read_text()
    (RESULTS / "quality_ablation.md").write_text(
        "\n".join(["# What pays, and what does not", "", about, *ablation(tried), ""])
    )


if __name__ == "__main__":
    main()
