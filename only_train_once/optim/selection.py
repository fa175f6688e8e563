"""Selection: scores -> units. Pure functions of numpy arrays.

Exactly the number asked for is chosen, the lowest scores first, ties by the order of groups and units; units that
are gone are never chosen again; every group keeps at least ``min_units`` and in the end at most ``max_units``.

[Note: divisibility]
With ``divisible = d`` a group ends either untouched or with a multiple of d units. The requirement is met by moving
units between groups, never by missing the total: `plan_counts` decides how many units every group will have lost *at
the end*, and each period takes its units, lowest scores first, from those that the plan removes. The plan of the last
period is one way to go on in the next, so a total that can be reached at all is reached whatever the scores do.

Some groups lose units only in multiples of a number of their own (``multiples``, `PruningGroup.multiple`); that is
one more condition on what a group may have lost in the end, met the same way.

[Note: costs]
Where the target is a cost (`plan_costs`), how many units that takes depends on which ones. Every group goes down a
ladder of numbers it may have lost; the rungs of all groups are taken in the order of their mean scores until the cost
is not above the target. A few rungs are then given back, or exchanged, so that it is not far below.

Whether a total can be reached is a subset sum. Sums are kept as the bits of one integer, so that adding a group costs
a few shifts: exact, and fast for any size of network.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

from only_train_once.groups import PruningGroup

Scores = Sequence[NDArray[np.float64]]
Masks = Sequence[NDArray[np.bool_]]


def units_for(total_units: int, sparsity: float) -> int:
    """``floor(N * sparsity)`` with the sparsity read as the decimal it is written as: 0.29 of 100 is 29."""
    return int(Fraction(repr(float(sparsity))) * total_units)


def removable(group: PruningGroup, share: float) -> int:
    """Units of one group that make the share at most, and may leave together."""
    return min(units_for(group.size, share) // group.multiple * group.multiple, group.most)


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


def _allowed(
    size: int, gone: int, divisible: int, min_units: int, multiple: int = 1, max_units: int | None = None
) -> _Allowed:
    """Numbers of units a group of ``size``, of which ``gone`` are gone, may have lost at the end.

    What it has lost is a multiple of ``multiple``, and what is left one of ``divisible``, which need not be possible.
    """
    step = lcm(divisible, multiple)
    surplus = 0 if max_units is None else size - max_units
    first = max(gone, 1, surplus)
    first += -first % multiple
    while (size - first) % divisible and first <= size:
        first += multiple
    last = size - min_units
    last -= (last - first) % step
    if first <= last:
        return _Allowed(first, last, step, zero=gone == 0 and surplus <= 0)
    return _Allowed(gone, gone, 1, zero=False)  # cannot lose more: untouched, or as it is


def all_allowed(
    sizes: Sequence[int],
    gone: Sequence[int],
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
) -> list[_Allowed]:
    """For every group, how many units it may have lost at the end."""
    n = len(sizes)
    every = zip(
        sizes, gone, _each(divisible, n), _each(min_units, n), multiples or [1] * n, max_units or sizes, strict=True
    )
    return [_allowed(size, lost, d, low, multiple, high) for size, lost, d, low, multiple, high in every]


def _each(value: int | Sequence[int], groups: int) -> Sequence[int]:
    """The number of every group."""
    return [value] * groups if isinstance(value, int) else value


def _any_number(
    divisible: int | Sequence[int], multiples: Sequence[int] | None, max_units: Sequence[int] | None = None
) -> bool:
    """Whether groups may lose any number of units, as long as some stay."""
    return max(_each(divisible, 1), default=1) == max(multiples or [1], default=1) == 1 and max_units is None


def nearest_total(
    sizes: Sequence[int],
    gone: Sequence[int],
    total: int,
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
) -> int:
    """The number of removed units nearest to ``total`` that can be reached (of two, the smaller)."""
    sums = 1
    for allowed in all_allowed(sizes, gone, divisible, min_units, multiples, max_units):
        sums = allowed.add_to(sums)
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
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
) -> list[int]:
    """How many units every group will have lost in the end: a reachable ``total`` in sum, at a low sum of scores.

    Where units leave one by one this is the exact minimum. Otherwise: round that minimum group by group to what is
    allowed, carrying the rounding error along and never leaving the reachable sums; then exchange as many units as
    some group has to lose at a time between two groups, as long as the sum of scores falls.
    """
    lost = [int(g.sum()) for g in gone]
    wanted = _lowest(scores, gone, total, _each(min_units, len(gone)), max_units)
    if _any_number(divisible, multiples):
        return wanted
    allowed = all_allowed([len(g) for g in gone], lost, divisible, min_units, multiples, max_units)
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


def _lowest(
    scores: Scores, gone: Masks, total: int, least: Sequence[int], max_units: Sequence[int] | None = None
) -> list[int]:
    """Units lost per group when the lowest scores go, each group keeping ``least`` and not more than ``max_units``."""
    lost = [int(g.sum()) for g in gone]
    surplus = [0] * len(gone) if max_units is None else [len(g) - m for g, m in zip(gone, max_units, strict=True)]
    must = [max(n, s) for n, s in zip(lost, surplus, strict=True)]
    every = zip(scores, gone, lost, must, least, strict=True)
    pool = [_ranked(s, g)[m - n : max(len(g) - n - low, 0)] for s, g, n, m, low in every]
    groups, _ = _merge(scores, pool, max(total - sum(must), 0))
    return [n + int((groups == i).sum()) for i, n in enumerate(must)]


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
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
) -> list[NDArray[np.int64]]:
    """The next ``count`` units to go, on the way to ``total`` removed units.

    Args:
        scores: per group (units,), low goes first.
        gone: per group (units,), True where the unit was removed before.
        count: how many to choose now.
        total: removed units in the end, these included; a number `nearest_total` returns.
        divisible: see [Note: divisibility]; one number, or one per group.
        min_units: units every group keeps, or one number per group.
        multiples: per group, what it loses in the end is a multiple of this.
        max_units: per group, at most so many stay in the end.

    Returns:
        Per group the chosen units in ascending order, ``count`` in all.
    """
    counts = plan_counts(scores, gone, total, divisible, min_units, multiples, max_units)
    pool = [_ranked(s, g)[: n - int(g.sum())] for s, g, n in zip(scores, gone, counts, strict=True)]
    groups, units = _merge(scores, pool, count)
    assert len(units) == count, f"{count} units asked for, {len(units)} live ones are left in the plan"
    return [np.sort(units[groups == i]) for i in range(len(scores))]


def ceilings(
    scores: Scores,
    gone: Masks,
    total: int,
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
) -> list[int]:
    """How many units each group may have lost while ``total`` stays in reach whatever the others do.

    All but ``min_units`` where any number will do; with ``divisible`` or ``multiples`` the numbers of the plan.
    """
    if _any_number(divisible, multiples, max_units):
        return [max(len(s) - low, 0) for s, low in zip(scores, _each(min_units, len(scores)), strict=True)]
    return plan_counts(scores, gone, total, divisible, min_units, multiples, max_units)


# ---------------------------------------------------------------- what goes first


def priorities(
    scores: Scores,
    gone: Masks,
    room: Sequence[int],
    classes: Sequence[int] | None = None,
    scarcity: float = 0.0,
    savings: NDArray[np.float64] | None = None,
    cost_exponent: float = 0.0,
) -> list[NDArray[np.float64]]:
    """Scores as keys that say across all groups which unit goes first; within a group their order stays.

    Args:
        scores, gone: as in `select`.
        room: units each group may have lost in the end.
        classes: per group a number; groups of one class compete by score, and all classes lose the same share of
            their units. None: all groups compete.
        scarcity: each score times (full size / size when it is the unit's turn) to this power: a group that was
            emptied gives away the rest dearly.
        savings: per group, what a unit of it saves; each score is divided by it to the power ``cost_exponent``.
    """
    keys = [np.asarray(s, dtype=np.float64) for s in scores]
    if scarcity or cost_exponent:
        live = [s[~g] for s, g in zip(keys, gone, strict=True)]
        lowest = min((float(s.min()) for s in live if len(s)), default=0.0)
        keys = [s - min(lowest, 0.0) for s in keys]  # factors need scores that are not negative
    if scarcity:
        for number, (key, mask) in enumerate(zip(keys, gone, strict=True)):
            order = _ranked(key, mask)
            left = len(order) - np.arange(len(order))
            keys[number] = key.copy()
            keys[number][order] = key[order] * (len(key) / left) ** scarcity
    if savings is not None and cost_exponent:
        relative = np.maximum(savings / max(float(savings.max()), 1e-300), 1e-12)  # what saves nothing goes last
        keys = [key / share**cost_exponent for key, share in zip(keys, relative, strict=True)]
    if classes is None:
        return keys
    out = [np.full(len(key), 2.0) for key in keys]  # behind every share
    for number in sorted(set(classes)):
        members = [i for i, c in enumerate(classes) if c == number]
        lost = [int(gone[i].sum()) for i in members]
        pool = [_ranked(keys[i], gone[i])[: max(room[i] - n, 0)] for i, n in zip(members, lost, strict=True)]
        of, units = _merge([keys[i] for i in members], pool, sum(len(p) for p in pool))
        share = (sum(lost) + 1 + np.arange(len(units))) / sum(len(keys[i]) for i in members)
        for place, i in enumerate(members):
            out[i][units[of == place]] = share[of == place]
    return out


# ---------------------------------------------------------------- costs, see [Note: costs]

_CLOSE = 1e-3  # a cost this near to the target, relative to it, is not made any nearer
_APART, _PAIRS = 5e-3, 64  # farther than this, exchanges between two groups are tried, with up to so many groups


def plan_costs(
    scores: Scores,
    gone: Masks,
    cost: Callable[[NDArray[np.bool_]], float],
    target: float,
    divisible: int | Sequence[int] = 1,
    min_units: int | Sequence[int] = 1,
    multiples: Sequence[int] | None = None,
    max_units: Sequence[int] | None = None,
    slack: int | None = None,
) -> list[int]:
    """How many units every group will have lost in the end, so that the cost is at most ``target`` and near it.

    Args:
        scores, gone: as in `select`.
        cost: of what is left when the flagged units of all groups in order are gone; it falls with every unit.
        target: what it may be.
        divisible, min_units, multiples, max_units: as in `select`.
        slack: rungs by which a group may differ from what the scores say; None for any number.

    Returns:
        the numbers; those of the lowest cost where the target is out of reach.
    """
    lost = [int(g.sum()) for g in gone]
    sizes = [len(g) for g in gone]
    allowed = all_allowed(sizes, lost, divisible, min_units, multiples, max_units)
    ladders = [np.array(a.counts, dtype=np.int64) for a in allowed]
    place = places(scores, gone)

    def cost_at(rungs: NDArray[np.int64]) -> float:
        counts = [ladder[r] for ladder, r in zip(ladders, rungs, strict=True)]
        return cost(place < np.repeat(counts, sizes))

    groups, values = [], []
    for number, (score, mask, ladder) in enumerate(zip(scores, gone, ladders, strict=True)):
        if len(ladder) > 1:
            steps = ladder - lost[number]
            ranked = np.asarray(score)[_ranked(score, mask)][steps[0] : steps[-1]]
            means = np.add.reduceat(ranked, steps[:-1] - steps[0]) / np.diff(steps)
            values.append(np.maximum.accumulate(means))  # rounding must not turn the order of a group
            groups.append(np.full(len(means), number, dtype=np.int64))
    if not groups:
        return [int(ladder[0]) for ladder in ladders]
    group = np.concatenate(groups)
    taken = group[np.argsort(np.concatenate(values), kind="stable")]  # ties by group

    def after(count: int) -> NDArray[np.int64]:
        return np.bincount(taken[:count], minlength=len(sizes))

    first = first_within(lambda count: cost_at(after(count)), target, len(taken))
    rungs, tops = after(first), np.array([len(ladder) - 1 for ladder in ladders])
    bottoms = np.zeros_like(tops)
    if slack is not None:
        bottoms, tops = np.maximum(rungs - slack, 0), np.minimum(rungs + slack, tops)
    rungs = _nearer(rungs, bottoms, tops, cost_at, target)
    return [int(ladder[r]) for ladder, r in zip(ladders, rungs, strict=True)]


def places(scores: Scores, gone: Masks) -> NDArray[np.int64]:
    """How many units of its group go before each unit; -1 for those that are gone.  (units of all groups,)"""
    out = []
    for score, mask in zip(scores, gone, strict=True):
        own = np.full(len(mask), -1, dtype=np.int64)
        ranked = _ranked(score, mask)
        own[ranked] = int(mask.sum()) + np.arange(len(ranked))
        out.append(own)
    return np.concatenate(out)


def first_within(cost: Callable[[int], float], target: float, last: int) -> int:
    """The smallest count up to ``last`` whose cost is at most ``target``; ``last`` if there is none."""
    if cost(0) <= target:
        return 0
    low, high = 0, last  # the cost at `low` is above the target
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) > target else (low, middle)
    return high


def _nearer(
    rungs: NDArray[np.int64],
    bottoms: NDArray[np.int64],
    tops: NDArray[np.int64],
    cost: Callable[[NDArray[np.int64]], float],
    target: float,
) -> NDArray[np.int64]:
    """Give back rungs, the one that saved most first, or exchange some for others, while the cost stays within."""
    now, groups = cost(rungs), range(len(rungs))

    def given_back() -> Iterator[NDArray[np.int64]]:
        return (_moved(rungs, group, -1) for group in groups if rungs[group] > bottoms[group])

    def exchanged() -> Iterator[NDArray[np.int64]]:
        """One rung of a group given back for as few as do of another; or one taken for as many as may be given back."""
        for one, other in itertools.permutations(groups, 2):
            for by in (-1, 1):
                if bottoms[one] <= rungs[one] + by <= tops[one]:
                    base = _moved(rungs, one, by)
                    ends = (0, tops[other] - rungs[other]) if by < 0 else (bottoms[other] - rungs[other], 0)
                    low, high = int(ends[0]), int(ends[1])
                    costs = functools.partial(_cost_moved, cost, base, other, low)
                    yield _moved(base, other, low + first_within(costs, target, high - low))

    def best(trials: Iterable[NDArray[np.int64]]) -> tuple[float, NDArray[np.int64]] | None:
        found: tuple[float, NDArray[np.int64]] | None = None
        for trial in trials:
            value = cost(trial)
            if now < value <= target and (found is None or value > found[0]):
                found = value, trial
        return found

    while target - now > _CLOSE * target:
        found = best(given_back())
        if found is None and target - now > _APART * target and len(rungs) <= _PAIRS:
            found = best(exchanged())
        if found is None:
            break
        now, rungs = found
    return rungs


def _moved(rungs: NDArray[np.int64], group: int, by: int) -> NDArray[np.int64]:
    out = rungs.copy()
    out[group] += by
    return out


def _cost_moved(
    cost: Callable[[NDArray[np.int64]], float], rungs: NDArray[np.int64], group: int, low: int, by: int
) -> float:
    return cost(_moved(rungs, group, low + by))
