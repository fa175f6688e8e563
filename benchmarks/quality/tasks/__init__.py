"""Name of a task -> the function that makes it; data is read when it is made."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.task import Task
from benchmarks.quality.tasks import cifar, digits, language, sentences, superresolution

TASKS: dict[str, Callable[[], Task]] = {
    **digits.TASKS,
    **language.TASKS,
    **superresolution.TASKS,
    **sentences.TASKS,
    **cifar.TASKS,
}
AT_HAND = [name for name in TASKS if name not in cifar.TASKS]  # their data comes with packages
