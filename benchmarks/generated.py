"""Networks that nobody thought of: as many as asked for, every one cut at random and compared.

    python -m benchmarks.generated --count 2000 --seed 1     writes benchmarks/results/generated.md

The networks and the check are those of tests/test_generated.py, which runs 300 of them with fixed seeds. A network
that is cut wrong ends the run with its layers, groups and units printed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.test_generated import check, images, programs


def run(count: int, start: int, strategy: st.SearchStrategy[torch.nn.Module], shape: tuple[int, ...]) -> list[int]:
    """Units offered by each of ``count`` networks; raises at the first wrong one."""
    offered: list[int] = []

    @seed(start)
    @settings(
        database=None,
        deadline=None,
        max_examples=count,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, st.booleans(), st.integers(0, 10_000))
    def cut(model: torch.nn.Module, wide: bool, number: int) -> None:
        offered.append(check(model, shape, wide, number))

    cut()
    return offered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generated.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    share = options.count // 3
    rows = []
    for name, count, strategy, shape in (
        ("token programs", options.count - share, programs(), (2, 3, 5)),
        ("image networks", share, images(), (2, 3, 4, 4)),
    ):
        start = time.perf_counter()
        offered = run(count, options.seed, strategy, shape)
        some = sum(n > 0 for n in offered)
        rows.append(f"| {name} | {len(offered)} | 0 | {some} | {sum(offered)} |")
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    options.out.write_text(
        "\n".join(
            [
                "# Generated networks",
                "",
                f"`python -m benchmarks.generated --count {options.count} --seed {options.seed}`: random graphs of",
                "layers (tests/test_generated.py), two random cuts of each, in float64 on fresh inputs (1e-9).",
                "",
                "| kind | networks | wrong | with prunable units | units |",
                "|---|---:|---:|---:|---:|",
                *rows,
                "",
            ]
        )
    )


if __name__ == "__main__":
    main()
