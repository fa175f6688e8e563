"""Name of a task -> the function that makes it; data is read when it is made."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.task import Task
from benchmarks.quality.tasks import cifar, digits, imagenet, language, sentences, squad, superresolution
from benchmarks.quality.tasks.folders import Source

ON_DISK: dict[str, Callable[..., Task]] = {**cifar.TASKS, **imagenet.TASKS, **squad.TASKS}  # they take a `Source`
TASKS: dict[str, Callable[..., Task]] = {
    **digits.TASKS,
    **language.TASKS,
    **superresolution.TASKS,
    **sentences.TASKS,
    **ON_DISK,
}
LONG = ("minilm_long",)  # run by its own command, not by the one that runs all
AT_HAND = [name for name in TASKS if name not in ON_DISK and name not in LONG]  # their data comes with packages


def make(name: str, source: Source) -> Task:
    return TASKS[name](source) if name in ON_DISK else TASKS[name]()
