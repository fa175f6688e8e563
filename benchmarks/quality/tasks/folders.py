"""Data that somebody has put on the disk: where it is, and what is said when it is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where data is read from.

    Attributes:
        folder: holds one folder for each data set.
        workers: processes that read pictures; 0 for none beside the training's.
    """

    folder: Path = Path("data")
    workers: int = 0


def present(paths: Iterable[Path], what: str, way: str) -> None:
    """Refuse to go on without these files and folders."""
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise FileNotFoundError(f"{what} is not there: {', '.join(absent)} is missing. {way}")


def steps(examples: int, batch: int, epochs: int, where: Path) -> int:
    """Of so many epochs in whole batches, of which there is at least one."""
    if examples < batch:
        raise ValueError(f"{where} has {examples} examples to train on, fewer than the {batch} of a batch")
    return epochs * (examples // batch)
