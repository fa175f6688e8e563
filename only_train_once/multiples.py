"""How many units of a group may leave at a time, where an operator wants rows of a certain length.

A rule says that what leaves of a dim is a multiple of ``n`` indices (`Context.multiple`); the full dim is as long as
the operator wants it, so what stays is then as well. With p indices per unit, units leave in multiples of
n / gcd(n, p). Several groups in one dim, side by side, each keep to that.

[Note: products]
Where a dim is merged from others (heads * head_dim), an index leaves with either. Of the (H - r) * (D - s) indices left
after r heads and s positions, H * D - r * D - s * H + r * s, the first three terms are multiples as above; the last is
when one of the two leaves in multiples of n itself. That is asked of all such groups but the one with the fewest units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .labels import Ids, Solution


def leave_in_multiples(
    solution: Solution, multiples: Sequence[tuple[Ids, int]], groups: Sequence[Ids]
) -> list[int | None]:
    """For each group of units in which multiples they may leave; None where there is no such number.

    Args:
        solution: the constraints, solved.
        multiples: (ids of a dim, n): what leaves of them is a multiple of n.
        groups: (units,) classes, for each group.
    """
    found: list[int | None] = [1] * len(groups)
    group_of = np.full(len(solution.frozen), -1, dtype=np.int64)
    for number, units in enumerate(groups):
        group_of[units] = number
    distinct = {(solution.of_id[ids].tobytes(), of): ids for ids, of in multiples}
    for (_, of), ids in distinct.items():
        units, places = solution.removed_by(ids)
        known = group_of[units] >= 0
        units, places = units[known], places[known]
        per_unit = np.bincount(units, minlength=len(solution.frozen))
        pairs = np.unique(np.stack([places, group_of[units]]), axis=1)
        twice = np.bincount(pairs[0], minlength=len(ids))[pairs[0]] > 1  # places that several groups remove
        crossing = sorted(set(pairs[1][twice].tolist()), key=lambda number: len(groups[number]))[1:]
        for number in np.unique(pairs[1]).tolist():
            counts = per_unit[groups[number]]
            alone = int((pairs[1] == number).sum()) == int(counts.sum())  # no two of its units share a place
            if not alone or (counts != counts[0]).any():
                found[number] = None
                continue
            need = of if number in crossing else of // math.gcd(of, int(counts[0]))
            before = found[number]
            found[number] = None if before is None else math.lcm(before, need)
    return found
