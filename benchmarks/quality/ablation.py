"""Ideas, one at a time: name -> the recipe with what differs."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.quality import peers
from benchmarks.quality.competitors import Competitor, once
from benchmarks.quality.distillation import taught_once
from benchmarks.quality.ideas import another_method, recalibrated, rewound

BASE = {"start": 0.1, "length": 0.4, "per_left": None, "of": "flops"}


def _with(**recipe: Any) -> Competitor:
    return functools.partial(once, recipe={**BASE, **recipe})


SHARES = (
    (0.1, 0.1),
    (0.2, 0.2),
    (0.1, 0.4),
    (0.3, 0.3),
    (0.1, 0.6),
    (0.2, 0.5),
    (0.05, 0.4),
    (0.1, 0.2),
    (0.2, 0.1),
    (0.05, 0.1),
    (0.02, 0.1),
    (0.02, 0.05),
    (0.02, 0.2),
    (0.05, 0.2),
    (0.05, 0.166),
    (0.1, 0.166),
)
VARIANTS: dict[str, Competitor] = {
    **{f"dense {a}, pruning {b} of the FLOPs": _with(start=a, length=b) for a, b in SHARES},
    "chosen": functools.partial(once, recipe={}),
    "chosen, widths in multiples of 8": functools.partial(once, recipe={}, align=8),
    "chosen, 16 periods": functools.partial(once, recipe={"periods": 16}),
    "chosen, Fisher": functools.partial(once, recipe={"criteria": "fisher_diagonal"}),
    "chosen, group Fisher": functools.partial(once, recipe={"criteria": "group_fisher"}),
    "chosen, Taylor, first order": functools.partial(once, recipe={"criteria": "taylor_first_order"}),
    "chosen, cost exponent 0.5": functools.partial(once, recipe={"cost_exponent": 0.5}),
    "chosen, taught by its average": functools.partial(taught_once, recipe={}),
    "chosen, scarcity 1": functools.partial(once, recipe={"scarcity": 1.0}),
    "chosen, scarcity 8": functools.partial(once, recipe={"scarcity": 8.0}),
    "chosen, not rescaled": functools.partial(once, recipe={"rescale": False}),
    "chosen, rescaled": functools.partial(once, recipe={"rescale": True}),
    "chosen, scarcity 3": functools.partial(once, recipe={"scarcity": 3.0}),
    "chosen, magnitude": functools.partial(once, recipe={"criteria": "magnitude"}),
    "chosen, shares and allocation for fresh weights": functools.partial(
        once, recipe={"start": 0.1, "length": 0.2, "cost_exponent": 0.25, "scarcity": 3.0}
    ),
    "chosen, all for fresh weights": functools.partial(
        once, recipe={"start": 0.1, "length": 0.2, "cost_exponent": 0.25, "scarcity": 3.0, "criteria": "magnitude"}
    ),
    "chosen, learning rate rises again": functools.partial(rewound, whole_first=False),
    "chosen, a learning-rate schedule for each part": functools.partial(rewound, whole_first=True),
    "chosen, batch norms measured anew": recalibrated,
    "HESSO-CRIC (corrected choice, one ramp)": functools.partial(another_method, method="hesso_cric"),
    "DHSPG (growing decay, half-space)": functools.partial(another_method, method="dhspg"),
    "first recipe (shares of steps)": functools.partial(once, recipe={"start": 0.1, "length": 0.2, "of": "steps"}),
    "16 periods": _with(periods=16),
    "4 periods": _with(periods=4),
    "linear ramp": _with(ramp="linear"),
    "scarcity 0": _with(scarcity=0.0),
    "scarcity 1": _with(scarcity=1.0),
    "scarcity 6": _with(scarcity=6.0),
    "cost exponent 0": _with(cost_exponent=0.0),
    "cost exponent 0.5": _with(cost_exponent=0.5),
    "cost exponent 1": _with(cost_exponent=1.0),
    "scarcity 3, cost 0.5, 16 periods": _with(cost_exponent=0.5, periods=16),
    "magnitude of what becomes zero": _with(roles=("zero",)),
    "Fisher": _with(criteria="fisher_diagonal"),
    "Taylor, first order": _with(criteria="taylor_first_order"),
    "HESSO's five terms": _with(criteria="default"),
    "tp_magnitude, schedule by budget": functools.partial(peers.cut_once, schedule="budget"),
}
