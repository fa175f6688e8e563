"""What to ask for when nothing is known yet: a target and a schedule from the number of training steps.

The schedule is the recipe's (`recipe.py`). The target is a rule of thumb: small networks on digits have kept their
accuracy at 30 % of their FLOPs where there were `_ENOUGH` steps or more (``benchmarks/results/quality.md``), and less
may go in a shorter training, whose steps after pruning are what brings the accuracy back. A sensitivity analysis
(`sensitivity.py`) of the model says it better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .budgets import CostModel
from .errors import ConfigurationError
from .groups import GroupList
from .optim.arguments import whole
from .recipe import Recipe
from .sensitivity import Sensitivity

_ENOUGH, _FEW = 600, 200  # steps
_LEFT = {_ENOUGH: 0.3, _FEW: 0.5, 0: 0.7}  # from so many steps on, share of the FLOPs
_ROOM = 1.2  # the target is this much above the smallest that can be reached, so that there is something to choose
_PERIOD = 5  # steps a period has at least


@dataclass(frozen=True)
class Suggestion:
    """Arguments for `OTO.attach(optimizer, "hesso", ...)` or `OTO.hesso(...)`, and why.

    Attributes:
        arguments: by name.
        reasons: one sentence each.
    """

    arguments: dict[str, Any]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return "\n".join([f"oto.hesso({shown})", *(f"- {reason}" for reason in self.reasons)])


def suggest(
    groups: GroupList,
    model: CostModel,
    total_steps: int,
    recipe: Recipe,
    sensitivity: Sensitivity | None = None,
    tolerance: float | None = None,
    *,
    normalized: bool = True,
) -> Suggestion:
    """A target and a schedule.

    Args:
        groups: of the network; what ``model`` counts.
        model: its costs.
        total_steps: steps of the whole training.
        recipe: shares of the steps.
        normalized: whether the network has normalizations.
        sensitivity: an analysis of this model; groups then keep what they need to stay within ``tolerance``.
        tolerance: by how much the metric may be worse when a group alone is cut, untrained.

    Raises:
        ConfigurationError: too few steps; one of ``sensitivity`` and ``tolerance`` is missing.
    """
    if (sensitivity is None) != (tolerance is None):
        given, missing = ("tolerance", "sensitivity") if sensitivity is None else ("sensitivity", "tolerance")
        raise ConfigurationError(f"{given} is given without {missing}: suggest(..., sensitivity=..., tolerance=...)")
    whole("total_steps", total_steps, 1)
    prunable = groups.prunable
    keep = dict.fromkeys((g.name for g in prunable), 1)
    if sensitivity is not None and tolerance is not None:
        known = sensitivity.min_units(tolerance)
        keep = {name: known.get(name, 1) for name in keep}
    removed = {g.name: list(range(max((g.size - keep[g.name]) // g.multiple * g.multiple, 0))) for g in prunable}
    wanted = next(left for least_steps, left in _LEFT.items() if total_steps >= least_steps)
    full, least = model.costs(), model.costs(removed)
    if full.flops is None or least.flops is None:
        measure, left = None, 1.0
        possible = sum(map(len, removed.values())) / max(sum(g.size for g in prunable), 1) / _ROOM
        target = {"target_group_sparsity": round(min(1 - wanted, possible), 3)}
        why = "a share of the units: the operators of these groups are not known, so FLOPs cannot be told"
    else:
        floor = least.flops / full.flops
        measure, left = "flops", min(max(wanted, _ROOM * floor), 1.0)
        target = {"target_flops": round(left + 5e-4, 3) if left < 1 else 1.0}
        why = (
            f"{wanted:.0%} of the FLOPs kept is a rule of thumb for {total_steps} steps"
            if left == wanted
            else f"{left:.0%} of the FLOPs are kept: the smallest that can be reached is {floor:.0%}"
        )
    arguments = recipe.arguments(total_steps, measure, left, normalized=normalized) | target
    arguments["importance_roles"] = tuple(role.value for role in recipe.roles)  # as one would write them
    start, steps = arguments["start_pruning_step"], arguments["pruning_steps"]
    arguments["pruning_periods"] = max(1, min(arguments["pruning_periods"], steps // _PERIOD))
    reasons = [
        f"of {total_steps} steps {start} come before pruning, {steps} prune in {arguments['pruning_periods']} periods, "
        f"and {total_steps - start - steps} train what is left"
    ]
    if sensitivity is not None:
        arguments["min_units"] = {name: n for name, n in keep.items() if n > 1}
        held = [g.name for g in prunable if keep[g.name] > 0.9 * g.size]
        reasons.append(
            f"min_units: what each group needs for {sensitivity.metric} to stay within {tolerance:g} when it alone is "
            f"cut, untrained" + (f"; {', '.join(held[:5])} can hardly lose anything" if held else "")
        )
    if "rescale" in arguments:
        reasons.append("rescale: nothing is normalized here, so weights that read fewer units have to be larger")
    reasons += [why, "scarcity keeps any layer from being emptied; the scores look at what reads a unit, too"]
    return Suggestion(arguments, tuple(reasons))
