"""`run`: one network in a process of its own, with limits on time and memory."""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any


def source(library: str) -> Any:
    """The module that knows the networks of a library: ``names()`` and ``build(name)``."""
    import tests.conftest  # noqa: F401  (one thread; lets torchvision import beside a CPU build of torch)

    return importlib.import_module(f"benchmarks.zoo.{library}_models")


def _child(pipe: Connection, library: str, name: str, memory: float, job: str) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        models = source(library)
        module, _, function = job.rpartition(".")
        pipe.send(getattr(importlib.import_module(module), function)(lambda: models.build(name)))
    except BaseException as error:
        lines = traceback.format_exc().strip().splitlines()
        where = [line.strip() for line in lines if line.strip().startswith("File")][-3:]
        pipe.send({"error": f"{type(error).__name__}: {error}"[:600], "where": where})


def run(
    library: str, name: str, timeout: float, memory: float, job: str = "benchmarks.zoo.check.check"
) -> dict[str, Any]:
    """One network in a process of its own; ``job`` names a function of what builds it."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, library, name, memory, job))
    start = time.perf_counter()
    process.start()
    there.close()
    try:
        record = here.recv() if here.poll(timeout) else {"error": f"stopped after {timeout:.0f} s"}
    except EOFError:
        process.join(5)
        record = {"error": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return {"library": library, "name": name, "seconds": round(time.perf_counter() - start, 1), **record}
