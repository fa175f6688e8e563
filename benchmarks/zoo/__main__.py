"""Run the analysis over every network of torchvision, timm and transformers, one process each.

    python -m benchmarks.zoo                      every builder, one network per timm module, every model type
    python -m benchmarks.zoo timm --all           every registered name of timm
    python -m benchmarks.zoo transformers bert    some networks
    python -m benchmarks.zoo --table              only write the table

Each result is one line of ``benchmarks/results/zoo.jsonl``, written when it is there; a network that has a line is
not run again (``--again`` runs it, ``--failed`` those that failed). A process that needs more time or memory than
allowed is stopped and gets a line that says so. ``benchmarks/results/zoo.md`` is made from all lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .process import run, source

LIBRARIES = ("torchvision", "timm", "transformers")
RESULTS = Path("benchmarks/results")


def selected(library: str, everything: bool) -> list[str]:
    models = source(library)
    return models.families() if hasattr(models, "families") and not everything else models.names()


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest line of every network."""
    found = {}
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["library"], record["name"]] = record
    return found


def main() -> None:
    from benchmarks.zoo.table import failed, summary, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", choices=LIBRARIES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="every name timm registers, not one per module")
    parser.add_argument("--again", action="store_true", help="run what has a result already")
    parser.add_argument("--failed", action="store_true", help="run again what failed or was not exact")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds per network")
    parser.add_argument("--memory", type=float, default=10, help="GiB per network")
    parser.add_argument("--table", action="store_true", help="only write the table from the lines that exist")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.jsonl")
    options = parser.parse_args()
    done = read(options.out)
    if not options.table:
        libraries = [options.library] if options.library else LIBRARIES
        wanted = [(lib, name) for lib in libraries for name in options.names or selected(lib, options.all)]
        todo = [
            key
            for key in wanted
            if options.again or key not in done or (options.failed and failed(done[key])) or options.names
        ]
        multiprocessing.set_forkserver_preload(["benchmarks.zoo.check", "tests.conftest", *_imports(libraries)])
        with ThreadPoolExecutor(options.jobs) as pool, options.out.open("a") as lines:
            for record in pool.map(lambda key: run(*key, options.timeout, options.memory), todo):
                done[record["library"], record["name"]] = record
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                print(summary(record), flush=True)
    (options.out.with_suffix(".md")).write_text(table(list(done.values())))


def _imports(libraries: list[str] | tuple[str, ...]) -> list[str]:
    return [f"benchmarks.zoo.{library}_models" for library in libraries]


if __name__ == "__main__":
    main()
