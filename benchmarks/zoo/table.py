"""The results of the zoo as Markdown: how many are exact, every network that is below the bar with its cause, all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .check import EXACT
from .process import source

Record = dict[str, Any]


def failed(record: Record) -> str:
    """Why a network is below the bar; empty when it is not."""
    if "error" in record:
        return str(record["error"]).splitlines()[0][:200]
    reasons = []
    for mode in ("default", "wide"):
        found = record[mode]
        if "difference" not in found:
            continue
        checks = {
            f"difference {found['difference']:.0e}": found["difference"] <= EXACT,
            f"compared in {found['dtype']}": found["dtype"] == "float64",
            "no finite output": found["finite"],
            "what was removed changed nothing": found["changed"],
            "another class": found["same_class"],
            "does not train": found["trains"],
            "does not load": found["loads"],
        }
        reasons += [f"{mode}: {text}" for text, holds in checks.items() if not holds]
    return "; ".join(reasons)


def nothing(record: Record) -> bool:
    """Whether nothing at all can be removed."""
    return "error" not in record and not record["wide"]["groups"]


def summary(record: Record) -> str:
    """One line for the terminal."""
    text = failed(record) or ("nothing prunable" if nothing(record) else "exact")
    if "error" in record:
        return f"{record['library']:12} {record['name']:40} {record['seconds']:6.1f} s  {text}"
    covered = f"{record['default']['coverage']:.2f}/{record['wide']['coverage']:.2f}"
    return (
        f"{record['library']:12} {record['name']:40} {record['seconds']:6.1f} s  {covered}  x{record['ratio']:<6}  "
        f"{text} {' '.join(record['without_rule'])}"
    )


def _median(records: Iterable[Record], value: Callable[[Record], float]) -> str:
    values = [value(r) for r in records]
    return f"{statistics.median(values):.2f}" if values else "-"


def not_runnable(library: str) -> dict[str, str]:
    """What is registered and cannot run here, and why."""
    return dict(getattr(source(library), "NOT_RUNNABLE", {}))


def beyond(r: Record) -> float:
    return float((r["analysis_s"] - 3 * r["forward_s"]) / r["operators"] * 1e6)


def table(records: list[Record]) -> str:
    """The whole file."""
    lines = [
        "# The zoo",
        "",
        "`make zoo`: every network is analysed, 40 % of the units of every group are set to zero and cut, by default",
        "and with wide=True, and full and cut network are compared in float64 on fresh inputs (exact: a relative",
        "difference of at most 1e-9). Every subnet is of the same class, trains a step, and loads bit-equal.",
        "Weights, norms and biases are random. Times are from a shared machine: only their ratio, from one process,",
        "means something; transformers are shrunk to toy sizes, where Python is compared with Python",
        "(`make analysis_cost` has them at their own size).",
        "",
        "*ratio* is the time of the analysis over that of one forward pass; *beyond 3* is what it takes beyond three",
        "forward passes, in milliseconds per 1,000 operators. Both are medians.",
        "",
        "| library | networks | analysed | exact | nothing prunable | covered (median) | wide | ratio | beyond 3 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_library: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["library"], r["name"])):
        by_library.setdefault(record["library"], []).append(record)
    for library, found in by_library.items():
        ran = [r for r in found if "error" not in r]
        exact = [r for r in ran if not failed(r)]
        lines.append(
            f"| {library} | {len(found)} | {len(ran)} | {len(exact)} | {sum(map(nothing, ran))} | "
            f"{_median(ran, lambda r: r['default']['coverage'])} | {_median(ran, lambda r: r['wide']['coverage'])} | "
            f"{_median(ran, lambda r: r['ratio'])} | {_median(ran, beyond)} |"
        )
    lines += ["", "## Below the bar", ""]
    below = [(r, failed(r)) for found in by_library.values() for r in found if failed(r)]
    lines += [f"- {r['library']} {r['name']}: {why}" for r, why in below] or ["None."]
    lines += ["", "## Not run", ""]
    left_out = {f"{library} {name}": why for library in by_library for name, why in not_runnable(library).items()}
    lines += [f"- {name}: {why}" for name, why in sorted(left_out.items())] or ["None."]
    lines += ["", "## Little covered with wide=True (less than 0.9), and what is in the way", ""]
    for found in by_library.values():
        for r in found:
            if "error" not in r and r["wide"]["coverage"] < 0.9:
                why = "; ".join(f"{share:.2f} {reason}" for reason, share in r["wide"].get("stays", {}).items())
                lines.append(f"- {r['library']} {r['name']} {r['wide']['coverage']:.2f}: {why or 'small remainders'}")
    header = (
        "| network | parameters | operators | forward s | analysis s | ratio | groups | units | covered | kept | "
        "difference | groups, wide | units, wide | covered, wide | kept, wide | difference, wide | without a rule |"
    )
    for library, found in by_library.items():
        lines += ["", f"## {library}", "", header, "|---" + "|---:" * (header.count("|") - 3) + "|---|"]
        lines += [_row(r) for r in found if "error" not in r]
    return "\n".join([*lines, ""])


def _row(r: Record) -> str:
    cells = [r["name"], r["parameters"], r["operators"], f"{r['forward_s']:.3f}", f"{r['analysis_s']:.3f}", r["ratio"]]
    for mode in ("default", "wide"):
        m = r[mode]
        cells += [m["groups"], m["units"], f"{m['coverage']:.2f}", m.get("kept", 1.0)]
        cells.append(f"{m['difference']:.0e}" if "difference" in m else "-")
    return "| " + " | ".join(map(str, [*cells, ", ".join(r["without_rule"])])) + " |"
