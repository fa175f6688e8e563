"""Python's collector of cyclic garbage, told to look less often where an analysis makes many objects that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Containers made before the young ones are looked at, and how many such looks before the next look at older ones.
_RARELY = (50_000, 50, 1_000)


@contextmanager
def few_collections() -> Iterator[None]:
    """Inside, the collector runs so rarely that it costs nothing, and still frees what a large model drops.

    A record of 5,000 operators makes so many objects that Python looks through everything there is, all of the
    libraries included, several times. That is the part of an analysis that would not be linear.
    """
    before = gc.get_threshold()
    if before[0] == 0:  # the user has it off
        yield
        return
    gc.set_threshold(*(max(a, b) for a, b in zip(before, _RARELY, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)
