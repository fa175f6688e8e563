"""Selection: scores -> units. Pure functions of numpy arrays.

Exactly the number asked for is chosen, the lowest scores first, ties by the order of groups and units; units that
are gone are never chosen again; every group keeps at least ``min_units``.

[Note: divisibility]
With ``divisible = d`` a group ends either untouched or with a multiple of d units. The requirement is met by moving
units between groups, never by missing the total: `plan_counts` decides how many units every group will have lost *at
the end*, and each period takes its units, lowest scores first, from those that the plan removes. The plan of the last
period is one way to go on in the next, so a total that can be reached at all is reached whatever the scores do.

Some groups lose units only in multiples of a number of their own (``multiples``, `PruningGroup.multiple`); that is
one more condition on what a group may have lost in the end, met the same way.

Whether a total can be reached is a subset sum. Sums are kept as the bits of one integer, so that adding a group costs
a few shifts: exact, and fast for any size of network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[NDArray[np.float64]]
Masks = Sequence[NDArray[np.bool_]]


def units_for(total_units: int, sparsity: float) -> int:
    """``floor(N * sparsity)`` with the sparsity read as the decimal it is written as: 0.29 of 100 is 29."""
    return int(Fraction(repr(float(sparsity))) * total_units)


@dataclass(frozen=True)
class _Allowed:
    """How many units one group may have lost at the end: ``first, first + step, ..., last``, perhaps also 0."""

    first: int
    last: int
    step: int
    zero: bool

    @property
    def counts(self) -> list[int]:
        progression = list(range(self.first, self.last + 1, self.step))
        return [0, *progression] if self.zero else progression

    def __contains__(self, count: int) -> bool:
        inside = self.first <= count <= self.last and (count - self.first) % self.step == 0
        return inside or (self.zero and count == 0)

    def add_to(self, sums: int) -> int:
        """The sums reachable with one more group, as bits."""
        n = (self.last - self.first) // self.step + 1
        out = sums << self.first if n > 0 else 0
        done = 1
        while done < n:  # doubling: the terms done so far, shifted past themselves
            take = min(done, n - done)
            out |= out << (self.step * take)
            done += take
        return out | sums if self.zero else out


def _allowed(size: int, gone: int, divisible: int, min_units: int, multiple: int = 1) -> _Allowed:
    """Numbers of units a group of ``size``, of which ``gone`` are gone, may have lost at the end.

    What it has lost is a multiple of ``multiple``, and what is left one of ``divisible``, which need not be possible.
    """
    step = lcm(divisible, multiple)
    first = max(gone, 1)
    first += -first % multiple
    while (size - first) % divisible and first <= size:
        first += multiple
    last = size - min_units
    last -= (last - first) % step
    if first <= last:
        return _Allowed(first, last, step, zero=gone == 0)
    return _Allowed(gone, gone, 1, zero=False)  # cannot lose more: untouched, or as it is


def nearest_total(
    sizes: Sequence[int],
    gone: Sequence[int],
    total: int,
    divisible: int = 1,
    min_units: int = 1,
    multiples: Sequence[int] | None = None,
) -> int:
    """The number of removed units nearest to ``total`` that can be reached (of two, the smaller)."""
    sums = 1
    for size, lost, multiple in zip(sizes, gone, multiples or [1] * len(sizes), strict=True):
        sums = _allowed(size, lost, divisible, min_units, multiple).add_to(sums)
    top = sums.bit_length() - 1
    if total >= top:
        return top
    for distance in range(max(total, top - total) + 1):
        for candidate in (total - distance, total + distance):
            if candidate >= 0 and sums >> candidate & 1:
                return candidate
    raise AssertionError("leaving every group as it is can always be reached")


def plan_counts(
    scores: Scores,
    gone: Masks,
    total: int,
    divisible: int = 1,
    min_units: int = 1,
    multiples: Sequence[int] | None = None,
) -> list[int]:
    """How many units every group will have lost in the end: a reachable ``total`` in sum, at a low sum of scores.

    Where units leave one by one this is the exact minimum. Otherwise: round that minimum group by group to what is
    allowed, carrying the rounding error along and never leaving the reachable sums; then exchange as many units as
    some group has to lose at a time between two groups, as long as the sum of scores falls.
    """
    lost = [int(g.sum()) for g in gone]
    wanted = _lowest(scores, gone, total, min_units)
    multiples = multiples or [1] * len(gone)
    if divisible == 1 and max(multiples, default=1) == 1:
        return wanted
    allowed = [_allowed(len(g), n, divisible, min_units, m) for g, n, m in zip(gone, lost, multiples, strict=True)]
    mask = (1 << (total + 1)) - 1
    suffix = [1]  # suffix[i]: sums that groups i.. can reach
    for a in reversed(allowed):
        suffix.append(a.add_to(suffix[-1]) & mask)
    suffix.reverse()
    counts, rest, carried = [], total, 0
    for i, a in enumerate(allowed):
        target = wanted[i] + carried
        fits = [c for c in a.counts if c <= rest and suffix[i + 1] >> (rest - c) & 1]
        count = min(fits, key=lambda c: (abs(c - target), c))
        carried = target - count
        rest -= count
        counts.append(count)
    steps, before = sorted({a.step for a in allowed}), None
    while counts != before:  # an exchange of few units can make one of many worth while
        before = list(counts)
        for step in steps:
            counts = _exchange(counts, allowed, scores, gone, lost, step)
    return counts


def _lowest(scores: Scores, gone: Masks, total: int, min_units: int) -> list[int]:
    """Units lost per group when the lowest scores go, each group keeping ``min_units``."""
    lost = [int(g.sum()) for g in gone]
    pool = [_ranked(s, g)[: max(len(g) - n - min_units, 0)] for s, g, n in zip(scores, gone, lost, strict=True)]
    groups, _ = _merge(scores, pool, max(total - sum(lost), 0))
    return [n + int((groups == i).sum()) for i, n in enumerate(lost)]


def _ranked(score: NDArray[np.float64], gone: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Live units of a group, lowest score first, ties by index."""
    live = np.flatnonzero(~gone)
    return live[np.argsort(score[live], kind="stable")].astype(np.int64)


def _merge(
    scores: Scores, pool: Sequence[NDArray[np.int64]], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ``count`` lowest of the pooled units as (group numbers, units); ties by group, then index."""
    groups = np.concatenate([np.full(len(p), i, dtype=np.int64) for i, p in enumerate(pool)])
    units = np.concatenate(list(pool))
    values = np.concatenate([s[p] for s, p in zip(scores, pool, strict=True)])
    order = np.lexsort((units, groups, values))[:count]
    return groups[order], units[order]


def _exchange(
    counts: list[int], allowed: Sequence[_Allowed], scores: Scores, gone: Masks, lost: Sequence[int], d: int
) -> list[int]:
    """Move ``d`` units of loss from one group to another while that lowers the sum of scores."""
    cost = [np.concatenate([[0.0], np.cumsum(s[_ranked(s, g)])]) for s, g in zip(scores, gone, strict=True)]

    def change(i: int, by: int) -> float:
        now, then = counts[i], counts[i] + by
        if then not in allowed[i]:
            return np.inf
        return float(cost[i][then - lost[i]] - cost[i][now - lost[i]])

    more = np.array([change(i, d) for i in range(len(counts))])
    less = np.array([change(i, -d) for i in range(len(counts))])
    slack = 1e-12 * max((float(np.abs(c).max()) for c in cost), default=0.0)  # rounding is no reason to move
    for _ in range(sum(len(s) for s in scores)):
        up, down = int(more.argmin()), int(less.argmin())
        if up == down or not more[up] + less[down] < -slack:
            break
        counts[up] += d
        counts[down] -= d
        for i in (up, down):
            more[i], less[i] = change(i, d), change(i, -d)
    return counts


def select(
    scores: Scores,
    gone: Masks,
    count: int,
    total: int,
    divisible: int = 1,
    min_units: int = 1,
    multiples: Sequence[int] | None = None,
) -> list[NDArray[np.int64]]:
    """The next ``count`` units to go, on the way to ``total`` removed units.

    Args:
        scores: per group (units,), low goes first.
        gone: per group (units,), True where the unit was removed before.
        count: how many to choose now.
        total: removed units in the end, these included; a number `nearest_total` returns.
        divisible: see [Note: divisibility].
        min_units: units every group keeps.
        multiples: per group, what it loses in the end is a multiple of this.

    Returns:
        Per group the chosen units in ascending order, ``count`` in all.
    """
    counts = plan_counts(scores, gone, total, divisible, min_units, multiples)
    pool = [_ranked(s, g)[: n - int(g.sum())] for s, g, n in zip(scores, gone, counts, strict=True)]
    groups, units = _merge(scores, pool, count)
    assert len(units) == count, f"{count} units asked for, {len(units)} live ones are left in the plan"
    return [np.sort(units[groups == i]) for i in range(len(scores))]


def ceilings(
    scores: Scores,
    gone: Masks,
    total: int,
    divisible: int = 1,
    min_units: int = 1,
    multiples: Sequence[int] | None = None,
) -> list[int]:
    """How many units each group may have lost while ``total`` stays in reach whatever the others do.

    All but ``min_units`` where any number will do; with ``divisible`` or ``multiples`` the numbers of the plan.
    """
    if divisible == 1 and max(multiples or [1]) == 1:
        return [max(len(s) - min_units, 0) for s in scores]
    return plan_counts(scores, gone, total, divisible, min_units, multiples)
