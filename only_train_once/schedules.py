"""Schedules: step -> how many units should be gone. Pure functions of integers.

The steps of a run are counted from 0. Pruning occupies the steps ``start .. start + steps - 1``; they are cut into
``periods`` of equal length, and what does not divide goes to the last one::

    >>> period_lengths(10, 3)
    (3, 3, 4)
    >>> position(4, start=0, steps=10, periods=3)
    Position(period=1, t=1, length=3)
    >>> [units_due(p, 3, total=8) for p in range(3)]
    [2, 5, 8]
"""

from __future__ import annotations

import math
from typing import NamedTuple

RAMPS = ("linear", "geometric")


class Position(NamedTuple):
    """Where in the schedule a step falls: step ``t`` of the ``length`` steps of period ``period``."""

    period: int
    t: int
    length: int


def period_lengths(steps: int, periods: int) -> tuple[int, ...]:
    """Number of steps of every period; they add up to ``steps``."""
    length = steps // periods
    return (length,) * (periods - 1) + (steps - length * (periods - 1),)


def period_start(period: int, *, start: int, steps: int, periods: int) -> int:
    """First step of a period; for ``period == periods`` the first step after pruning."""
    return start + steps if period == periods else start + period * (steps // periods)


def position(step: int, *, start: int, steps: int, periods: int) -> Position | None:
    """Where ``step`` falls, or ``None`` before and after pruning."""
    if not start <= step < start + steps:
        return None
    period = min((step - start) // (steps // periods), periods - 1)
    return Position(period, step - start - period * (steps // periods), period_lengths(steps, periods)[period])


def units_due(period: int, periods: int, total: int, units: int = 0, ramp: str = "linear") -> int:
    """Units chosen once ``period`` has begun, exactly ``total`` in the last.

    Linear over the periods: two of them differ by at most one unit in what they add. Geometric: after a share f of the
    periods the share of all ``units`` that is left is what is left in the end to the power f.
    """
    if ramp == "linear" or period + 1 == periods:
        return total * (period + 1) // periods
    return units - math.ceil(left_due(period, periods, units, units - total, ramp))


def left_due(period: int, periods: int, full: float, target: float, ramp: str = "linear") -> float:
    """What is left of ``full`` once ``period`` has begun on the way to ``target``: linear or geometric."""
    share = (period + 1) / periods
    if share == 1:
        return target
    return full + (target - full) * share if ramp == "linear" else full * (target / full) ** share


def linear(step: int, *, start: int, steps: int, periods: int, total: int) -> int:
    """Units that are gone (or on their way) at ``step``: 0 before pruning, ``total`` after it."""
    if step < start:
        return 0
    where = position(step, start=start, steps=steps, periods=periods)
    return total if where is None else units_due(where.period, periods, total)


def decay_factor(t: int, length: int) -> float:
    """Factor of step ``t`` of a period: ``(T - t - 1) / (T - t)``.

    The product over ``t = 0 .. s`` telescopes to ``(T - s - 1) / T``: a linear ramp of the value the period began
    with (HESSO, arXiv 2409.09085), 0 at ``t = T - 1``.
    """
    return (length - t - 1) / (length - t)
