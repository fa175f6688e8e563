"""Name of a task -> the function that makes it; data is read when it is made."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.task import Task
from benchmarks.quality.tasks import digits, language, sentences, superresolution

TASKS: dict[str, Callable[[], Task]] = {**digits.TASKS, **language.TASKS, **superresolution.TASKS, **sentences.TASKS}
