"""When to prune how much in one training, so that a small network comes out well: the settings of `OTO.train_once`.

Train as usual at first, then prune in periods, so that the FLOPs shrink geometrically: period p of ``periods`` costs
``left ** (p / periods)`` of the full network, and spend the rest on what is left, all on one learning-rate schedule.
There are four recipes. Three are for fresh weights, and differ in how long these parts are and what that is a share
of:

- `CHEAPER`, of the steps: a training of so many steps, which costs less than the full network's.
- `EQUAL_COST`, of the FLOPs: a training that costs what ``full_steps`` steps of the full network cost, and has more
  steps, as many as `Recipe.steps_within` says. A small network costs little, so what comes after pruning is nearly
  all of these steps, and the smaller it gets the earlier pruning is over::

    >>> EQUAL_COST.steps_within(1000, left=0.1)
    7559
    >>> EQUAL_COST.when(7559, left=0.1)
    {'start_pruning_step': 100, 'pruning_steps': 445, 'pruning_periods': 8}
    >>> round(CHEAPER.cost(1000, left=0.1))
    260

- `UNDERTRAINED`, of the FLOPs, too, and of fewer: for trainings that end before the full network has learned what it
  can, as those of language models do. If twice as many steps of it make its validation loss clearly lower, a small
  network with many steps wins, and what the large one takes is lost.
- `PRETRAINED`, for weights that know something, shares of the FLOPs, too: pruning starts at once, nearly, takes the
  less time the less is to be left, and what a unit is worth is asked of the loss (group Fisher) rather than of the
  lengths of weights.

``benchmarks/results/quality_ablation.md`` has what was measured to choose the settings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .budgets import MEASURES
from .errors import ConfigurationError
from .groups import Role
from .optim.arguments import flag, one_of, share, whole
from .schedules import left_due, period_lengths

_SHORTEST = 10  # steps, for each of the three parts to have some


@dataclass(frozen=True)
class Recipe:
    """Settings of `OTO.train_once`; the arguments of HESSO that they become are `arguments`.

    Attributes:
        start: share of the steps before pruning.
        length: share of the steps that prune.
        periods: into which these are cut; the network gets smaller after each.
        of: what ``start`` and ``length`` are shares of: "steps", or the "flops" of a run with a target in FLOPs.
        ramp, scarcity, cost_exponent: see `optim.arguments.Budget`.
        criteria: scores of units.
        roles: slices that the scores look at.
        per_left: ``length`` is at most so many times what is left in the end, if given: the smaller a network gets,
            the more of its own steps the same share costs.
        rescale: see `optim.Hesso`; None for networks in which nothing is normalized: a normalization keeps
            activations as large as they are.
    """

    start: float = 0.1
    length: float = 0.2
    periods: int = 8
    of: str = "steps"
    ramp: str = "geometric"
    scarcity: float = 3.0
    cost_exponent: float = 0.25
    criteria: Any = "magnitude"
    roles: Collection[Role] = (Role.ZERO, Role.CONSUMER)
    per_left: float | None = None
    rescale: bool | None = None

    def __post_init__(self) -> None:
        share("start", self.start)
        if not 0 < self.length <= 1 - self.start:
            raise ConfigurationError(
                f"length is {self.length!r}; the rule is 0 < length <= 1 - start, {1 - self.start}"
            )
        if self.per_left is not None and not self.per_left > 0:
            raise ConfigurationError(f"per_left is {self.per_left!r}; the rule is a number above 0, or None")
        whole("periods", self.periods, 1)
        one_of("of", self.of, ("steps", "flops"))
        if self.rescale is not None:
            flag("rescale", self.rescale)

    def when(self, total_steps: int, left: float = 1.0) -> dict[str, int]:
        """Start, length and number of periods in a run of so many steps that ends with ``left`` of the FLOPs."""
        whole("total_steps", total_steps, _SHORTEST)
        start, length = self._step_shares(left)
        steps = max(round(length * total_steps), 1)
        return {
            "start_pruning_step": min(round(start * total_steps), total_steps - steps),
            "pruning_steps": steps,
            "pruning_periods": min(self.periods, steps),
        }

    def _step_shares(self, left: float) -> tuple[float, float]:
        length = self.length if self.per_left is None else min(self.length, self.per_left * left)
        if self.of == "steps":
            return self.start, length
        during = sum(self._during(left, self.periods)) / self.periods
        before, pruning, rest = self.start, length / during, (1 - self.start - length) / left
        total = before + pruning + rest
        return before / total, pruning / total

    def _during(self, left: float, periods: int) -> list[float]:
        """Share of the FLOPs of a step in each period."""
        return [1.0, *(left_due(p, periods, 1.0, left, self.ramp) for p in range(periods - 1))]

    def arguments(
        self, total_steps: int, measure: str | None, left: float = 1.0, *, normalized: bool = True
    ) -> dict[str, Any]:
        """Arguments of HESSO for a run of so many steps.

        Args:
            total_steps: of the run.
            measure: of the target; None for a share of the units.
            left: share of the FLOPs of a step that is left in the end.
            normalized: whether the network has normalizations.
        """
        rescale = not normalized if self.rescale is None else self.rescale
        return {
            **self.when(total_steps, left),
            "importance_score_criteria": self.criteria,
            "importance_roles": tuple(self.roles),
            "ramp": self.ramp,
            "scarcity": self.scarcity,
            "cost_exponent": 0.0 if measure is None else self.cost_exponent,
            **({"rescale": True} if rescale else {}),
        }

    def cost(self, total_steps: int, left: float) -> float:
        """FLOPs of a run, in steps of the full network, when ``left`` of the FLOPs of a step are left in the end."""
        when = self.when(total_steps, left)
        start, steps, periods = when["start_pruning_step"], when["pruning_steps"], when["pruning_periods"]
        lengths, levels = period_lengths(steps, periods), self._during(left, periods)
        pruning = sum(n * level for n, level in zip(lengths, levels, strict=True))
        return start + pruning + (total_steps - start - steps) * left

    def steps_within(self, full_steps: int, left: float) -> int:
        """The most steps whose FLOPs are at most those of ``full_steps`` steps of the full network."""
        whole("full_steps", full_steps, _SHORTEST)
        if not 0 < left <= 1:
            raise ConfigurationError(f"left is {left!r}; the rule is 0 < left <= 1, the share of FLOPs in the end")
        low, high = full_steps, math.ceil(full_steps / left) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost(middle, left) <= full_steps else (low, middle)
        return low


CHEAPER = Recipe(of="steps")
EQUAL_COST = Recipe(start=0.1, length=0.2, of="flops")
UNDERTRAINED = Recipe(start=0.02, length=0.05, of="flops")
PRETRAINED = Recipe(
    start=0.02, length=0.4, per_left=1.6, of="flops", criteria="group_fisher", cost_exponent=1.0, scarcity=1.0,
    rescale=False,
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = {
    "cheaper": CHEAPER, "equal_cost": EQUAL_COST, "undertrained": UNDERTRAINED, "pretrained": PRETRAINED
}  # fmt: skip


def recipe_for(wanted: Recipe | str | None, full_steps: int | None) -> Recipe:
    """The recipe of that name; without one, that which fits how the length of the training is given."""
    if wanted is None:
        return CHEAPER if full_steps is None else EQUAL_COST
    if isinstance(wanted, Recipe):
        return wanted
    one_of("recipe", wanted, tuple(RECIPES))
    return RECIPES[wanted]


def measure_of(config: Mapping[str, Any]) -> str | None:
    """What the target among the arguments is in; None for a share of the units."""
    return next((m for m in MEASURES if config.get(f"target_{m}") is not None), None)


def one_length(total_steps: int | None, full_steps: int | None, config: Mapping[str, Any]) -> None:
    """Refuse anything but one of the two; what the full network's steps buy is only known with a target in FLOPs."""
    if (total_steps is None) == (full_steps is None):
        raise ConfigurationError(
            f"total_steps is {total_steps!r} and full_steps is {full_steps!r}: give the steps of this training, or "
            "those of a training of the full network that costs as much"
        )
    if full_steps is not None and config.get("target_flops") is None:
        raise ConfigurationError(
            f"full_steps is {full_steps!r} without target_flops, so it is not known what this training costs: give "
            "target_flops, or total_steps"
        )
