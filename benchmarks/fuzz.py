"""Mutated folders of saved subnets: what loading them does.

    python -m benchmarks.fuzz                  10,000 of them (some minutes)
    python -m benchmarks.fuzz --count 500 --seed 7
    python -m benchmarks.fuzz --only 1234      one, with its error

tests/damaged.py makes the mutations and watches over what is done. A folder passes if loading it gives a
`CheckpointError` that names the folder, or, where its checksums were made right again, a model of the size of its
files; after plain damage only the very model that was saved counts. Nothing may be run, written, fetched or read
outside of the folder, within 1 GiB of memory and 10 seconds.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  (one thread; lets timm import beside a CPU build of torch)
from tests.damaged import PLAIN, SIGNED, Files, Outcome, Sound, quiet, sound_folders, tried, written

RESULTS = Path("benchmarks/results/fuzz.md")
MEMORY, SECONDS = 2**30, 10.0
_SLOW = ("of transformers", "of timm")  # these folders are made from their description: fewer of them


def chosen(number: int, seed: int, sounds: dict[str, Sound]) -> tuple[str, str, str, Files]:
    """Folder, mutation, how it is read, and files of a number; the same each time."""
    r = random.Random(f"{seed} {number}")
    signed = r.random() < 0.7
    mutation = r.choice(sorted(SIGNED if signed else PLAIN))
    quick = [name for name in sounds if name not in _SLOW]
    folder = r.choice(_SLOW if mutation == "description_forged" or r.random() < 0.1 else quick)
    files = dict(sounds[folder].files)
    (SIGNED if signed else PLAIN)[mutation](files, r)
    return folder, mutation, r.choices(("load", "report", "inflate"), (8, 1, 1))[0], files


def ran(number: int, seed: int, sounds: dict[str, Sound], where: Path) -> tuple[str, str, str, Outcome]:
    folder, mutation, read, files = chosen(number, seed, sounds)
    path = where / f"{number}"
    written(path, files)
    try:
        outcome = tried(path, sounds[folder], mutation in SIGNED, read)
    finally:
        shutil.rmtree(path)
    if files == sounds[folder].files and outcome.result != "loaded":
        outcome.wrong += " a sound folder is not loaded"
    if outcome.seconds > SECONDS:
        outcome.wrong += f" took {outcome.seconds:.1f} s"
    return folder, mutation, read, outcome


def limit_memory(more: int) -> None:
    """Let this process have so many bytes beyond what it has."""
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kind_of(message: str) -> str:
    """An error without the names and numbers in it."""
    text = re.sub(r"FOLDER/?\S*", "F", message)
    text = re.sub(r"'[^']*'|\[[^\]]*\]|\{[^}]*\}|\b[0-9a-f]{64}\b|-?\d[\d.e+]*", "…", text)
    return text[:70]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        sounds = sound_folders(where)
        for name, sound in sounds.items():  # what is imported when it is first needed
            written(where / "sound", sound.files)
            for read in ("load", "report", "inflate"):
                assert tried(where / "sound", sound, False, read).result == "loaded", name
            shutil.rmtree(where / "sound")
        if options.only is not None:
            print(*ran(options.only, options.seed, sounds, where), sep="\n")
            return
        limit_memory(MEMORY)
        before, start = peak(), time.perf_counter()
        done = []
        for number in range(options.count):
            done.append((number, *ran(number, options.seed, sounds, where)))
            if done[-1][-1].wrong:
                print(number, *done[-1][1:4], done[-1][-1].wrong[:300], flush=True)
        seconds, grown = time.perf_counter() - start, peak() - before
    wrong = [entry for entry in done if entry[-1].wrong]
    options.out.write_text(report(options, done, seconds, grown))
    print(f"{len(done)} folders, {len(wrong)} wrong, {seconds:.0f} s, peak memory + {grown / 2**20:.0f} MiB")
    sys.exit(1 if wrong else 0)


def report(
    options: argparse.Namespace, done: list[tuple[int, str, str, str, Outcome]], seconds: float, grown: int
) -> str:
    times = sorted(outcome.seconds for *_, outcome in done)
    wrong = [entry for entry in done if entry[-1].wrong]
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _, _, mutation, _, outcome in done:
        rows[mutation]["loaded" if outcome.result == "loaded" else "error"] += 1
    kinds = collections.Counter(kind_of(outcome.result) for *_, outcome in done if outcome.result != "loaded")
    lines = [
        "# Mutated folders of saved subnets",
        "",
        f"`python -m benchmarks.fuzz --count {options.count} --seed {options.seed}` with torch {torch.__version__}.",
        "A folder passes if loading it ends in a `CheckpointError` that names it, or in the saved model; where all",
        "checksums were made right again after the mutation, in a model of the size of its files. Every tenth is",
        "inflated, every tenth only asked for its report. Audit hooks watch over what is run, written, fetched or",
        f"read outside of the folder; more than {MEMORY >> 20} MiB or {SECONDS:.0f} seconds fail, too.",
        "",
        f"{len(done)} folders, {len(wrong)} wrong. {seconds:.0f} seconds; the median folder took "
        f"{statistics.median(times) * 1e3:.1f} ms, the slowest {times[-1]:.2f} s. Peak memory grew by "
        f"{grown / 2**20:.0f} MiB over what loading the sound folders takes.",
        "",
        "## Wrong",
        "",
        *([f"- {n}: {f}, {m}, {r}: {o.wrong}" for n, f, m, r, o in wrong] or ["None."]),
        "",
        "## By mutation",
        "",
        "| mutation | checksums | folders | error | loaded |",
        "|---|---|---|---|---|",
        *(
            f"| {m.replace('_', ' ')} | {'right' if m in SIGNED else 'as they come'} | {sum(rows[m].values())} "
            f"| {rows[m]['error']} | {rows[m]['loaded']} |"
            for m in sorted(rows, key=lambda m: (m in SIGNED, m))
        ),
        "",
        f"## The {len(kinds)} kinds of errors, the most frequent",
        "",
        *(f"- {count} x `{kind.replace('`', '')}`" for kind, count in kinds.most_common(40)),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
