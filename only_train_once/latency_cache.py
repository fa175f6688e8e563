"""Seconds of operators that were timed on this machine before, in a file of its own for each machine.

A file is found by what changes the seconds: the processor or GPU, the number of threads, the version of torch. In it
each call is found by its operator and the shapes and dtypes of its arguments, so that networks share what they have in
common.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import ConfigurationError

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``only_train_once/latency`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "only_train_once" / "latency"


def machine(device: torch.device) -> dict[str, str]:
    """What the seconds of an operator on this device depend on."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        hardware = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    else:
        hardware = platform.node()
    return {"device": device.type, "hardware": hardware, "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@contextmanager
def remembered(device: torch.device, folder: str | Path | None = None) -> Iterator[dict[str, float]]:
    """The calls that were timed on this machine; what is added inside is written to the file at the end.

    A file that is damaged is replaced, with a warning.

    Args:
        device: where operators run.
        folder: of the files; None for `default_folder`.
    """
    facts = machine(device)
    directory = default_folder() if folder is None else Path(folder).expanduser()
    path = directory / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.json"
    known = _read(path, facts)
    before = len(known)
    yield known
    if len(known) == before:
        return
    text = json.dumps({"machine": facts, "seconds": {**_read(path, facts), **known}}, indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as beside:
            written = Path(beside) / path.name
            written.write_text(text, encoding="utf-8")
            os.replace(written, path)  # whole or not at all: other processes may read it
    except OSError as error:
        raise ConfigurationError(
            f"the latency cache {path} cannot be written ({error}): give cache= a folder that can be, or cache=False"
        ) from error


def _read(path: Path, facts: dict[str, str]) -> dict[str, float]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("the latency cache %s cannot be read (%s): its operators are timed again", path, error)
        return {}
    seconds = data.get("seconds") if isinstance(data, dict) else None
    if not isinstance(seconds, dict) or data.get("machine") != facts or not all(map(_sound, seconds.values())):
        logger.warning("the latency cache %s is damaged: its operators are timed again", path)
        return {}
    return dict(seconds)


def _sound(seconds: object) -> bool:
    return isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0
