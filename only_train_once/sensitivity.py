"""How much a metric changes when units of one group are at zero: which layers can give, before anything is trained.

Each group alone, at each level, loses its lowest units by a criterion; the user's function says how good the model is
then; the weights are put back. It is a picture of the untrained cut, so it is a pessimistic one: training afterwards
brings back most of a small loss. What it shows well is which groups differ from the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .errors import CheckpointError, ConfigurationError
from .groups import PruningGroup, Role
from .importance import Criteria, check_groups, needs_gradients, resolve, score_groups
from .inputs import observing
from .masking import regions
from .optim.selection import removable
from .report import render

logger = logging.getLogger(__name__)

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_OWNED = (Role.ZERO, Role.CONSUMER)


@dataclass(frozen=True)
class GroupSensitivity:
    """One group.

    Attributes:
        name: of the group; "all groups" for all of them at once.
        size: units.
        removed: (levels,) units at zero.
        values: (levels,) the metric then.
    """

    name: str
    size: int
    removed: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """A metric against the share of units at zero, group by group.

    Attributes:
        metric: what the values are.
        higher_is_better: whether more of it is better.
        baseline: its value with all units.
        levels: shares of the units.
        groups: in network order.
        together: all groups at once.
    """

    metric: str
    higher_is_better: bool
    baseline: float
    levels: tuple[float, ...]
    groups: tuple[GroupSensitivity, ...]
    together: GroupSensitivity

    def loss(self, of: GroupSensitivity) -> tuple[float, ...]:
        """(levels,) how much worse than the baseline; below 0 where it is better."""
        sign = 1.0 if self.higher_is_better else -1.0
        return tuple(sign * (self.baseline - value) for value in of.values)

    def tolerated(self, tolerance: float) -> dict[str, int]:
        """Group -> units it can lose, alone and untrained, before the metric is worse by more than ``tolerance``.

        Of the levels that were tried, the last one below the first that is too much; 0 where none is.
        """
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise ConfigurationError(
                f"tolerance is {tolerance!r}; it has to be a number, at least 0, in the unit of {self.metric}"
            )
        out = {}
        for group in self.groups:
            lost = 0
            for removed, loss in zip(group.removed, self.loss(group), strict=True):
                if not loss <= tolerance:
                    break
                lost = removed
            out[group.name] = lost
        return out

    def min_units(self, tolerance: float) -> dict[str, int]:
        """``min_units`` for an optimizer: every group keeps what `tolerated` says that it needs."""
        lost = self.tolerated(tolerance)
        return {group.name: max(group.size - lost[group.name], 1) for group in self.groups}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` wrote; :class:`CheckpointError` names what is wrong."""
        try:
            return cls(
                str(data["metric"]),
                bool(data["higher_is_better"]),
                float(data["baseline"]),
                tuple(map(float, data["levels"])),
                tuple(_from_dict(g) for g in data["groups"]),
                _from_dict(data["together"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this is no sensitivity analysis: {type(error).__name__}: {error}") from error

    def __rich__(self) -> Table:
        better = "higher is better" if self.higher_is_better else "lower is better"
        title = f"{self.metric} ({better}), {self.baseline:.4g} with all units"
        table = Table("group", "units", title=title, title_justify="left")
        for level in self.levels:
            table.add_column(f"-{level:.0%}", justify="right")
        for group in (*self.groups, self.together):
            table.add_row(Text(group.name), str(group.size), *(f"{value:.4g}" for value in group.values))
        return table

    def __str__(self) -> str:
        return render(self.__rich__())

    def plot(self, path: str | Path) -> Path:
        """Draw groups against levels, coloured by how much worse the metric is, into an SVG, PNG or PDF file.

        Needs matplotlib, ``pip install only_train_once[viz]``.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigurationError(
                "plot() needs matplotlib: pip install only_train_once[viz]; print(sensitivity) shows the numbers"
            ) from error
        rows = (*self.groups, self.together)
        losses = np.array([self.loss(g) for g in rows])
        figure = Figure(figsize=(2.5 + 0.9 * len(self.levels), 1.5 + 0.28 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        top = float(losses.max(initial=0.0)) or 1.0
        image = axes.imshow(losses, aspect="auto", cmap="YlOrRd", vmin=min(0.0, float(losses.min())), vmax=top)
        axes.set_xticks(range(len(self.levels)), [f"{level:.0%}" for level in self.levels])
        axes.set_yticks(range(len(rows)), [f"{g.name} ({g.size})" for g in rows])
        axes.set_xlabel("units at zero, nothing trained since")
        axes.set_title(f"{self.metric}, {self.baseline:.4g} with all units", loc="left")
        for row, group in enumerate(rows):
            for column, value in enumerate(group.values):
                dark = losses[row, column] > 0.6 * top
                axes.text(
                    column, row, f"{value:.3g}", ha="center", va="center", size=8, color="white" if dark else "black"
                )
        figure.colorbar(image, label="worse by")
        target = Path(path)
        try:
            figure.savefig(target)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{target} cannot be written: {error}") from error
        return target


def _from_dict(data: Mapping[str, Any]) -> GroupSensitivity:
    return GroupSensitivity(
        str(data["name"]), int(data["size"]), tuple(map(int, data["removed"])), tuple(map(float, data["values"]))
    )


def analyse(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    tensors: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], Any],
    *,
    levels: Sequence[float] = LEVELS,
    criteria: Criteria = "magnitude",
    roles: Collection[Role] = _OWNED,
    metric: str = "metric",
    higher_is_better: bool = True,
) -> Sensitivity:
    """The metric with the lowest units of every group, alone and together, at zero.

    ``evaluate`` is called ``(groups + 1) * levels + 1`` times, on the model in evaluation mode, without gradients.

    Args:
        model: its weights are changed and put back.
        groups: prunable groups of it.
        tensors: its parameters by name.
        evaluate: model -> a finite number.
        levels: shares of a group's units, rising, in (0, 1).
        criteria: scores of the units; those that look at gradients take them from ``.grad``.
        roles: slices that the scores look at.
        metric: what ``evaluate`` returns, for the table and the plot.
        higher_is_better: whether more of it is better.
    """
    levels = _checked_levels(levels)
    if not callable(evaluate):
        raise ConfigurationError(f"evaluate is {evaluate!r}; give a function of the model that returns a number")
    if not groups:
        raise ConfigurationError("no group is prunable: there is nothing to be sensitive to, see oto.explain()")
    scores = _scores(groups, tensors, criteria, roles)
    # Lowest first; each level takes a prefix.
    order = [np.argsort(score, kind="stable") for score in scores]
    taken = [[removable(group, level) for level in levels] for group in groups]
    with observing(model):
        baseline = _value(evaluate, model, "all units")
        rows = []
        for number, (group, counts) in enumerate(zip(groups, taken, strict=True)):
            values: dict[int, float] = {0: baseline}
            for count in counts:
                if count not in values:
                    with _at_zero([group], {group.name: order[number][:count]}, tensors):
                        values[count] = _value(evaluate, model, f"{count} units of {group.name} at zero")
            rows.append(GroupSensitivity(group.name, group.size, tuple(counts), tuple(values[c] for c in counts)))
            logger.info("%d of %d groups: %s", number + 1, len(groups), group.name)
        together = []
        for place, level in enumerate(levels):
            units = {g.name: o[: t[place]] for g, o, t in zip(groups, order, taken, strict=True)}
            with _at_zero(groups, units, tensors):
                together.append(_value(evaluate, model, f"{level:.0%} of all groups at zero"))
    sums = tuple(sum(t[place] for t in taken) for place in range(len(levels)))
    all_groups = GroupSensitivity("all groups", sum(g.size for g in groups), sums, tuple(together))
    return Sensitivity(metric, higher_is_better, baseline, levels, tuple(rows), all_groups)


def _checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    sound = isinstance(levels, Sequence) and len(levels) > 0
    if not sound or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1 for x in levels):
        raise ConfigurationError(f"levels is {levels!r}; give shares of the units, each between 0 and 1")
    if list(levels) != sorted(set(levels)):
        raise ConfigurationError(f"levels is {levels!r}; give them rising, each once")
    return tuple(float(x) for x in levels)


def _scores(
    groups: Sequence[PruningGroup], tensors: Mapping[str, Tensor], criteria: Criteria, roles: Collection[Role]
) -> list[NDArray[np.float64]]:
    resolved = resolve(criteria)
    check_groups(groups, resolved)
    gradients = {n: t.grad for n, t in tensors.items() if t.grad is not None}
    if not callable(resolved) and needs_gradients(resolved):
        owners = {s.param: g.name for g in groups for s in g.with_role(*roles)}
        missing = next((n for n in owners if n not in gradients and tensors[n].requires_grad), None)
        if missing is not None:
            raise ConfigurationError(
                f"criterion {criteria!r} looks at gradients, and {missing!r} (group {owners[missing]!r}) has none: "
                f"call loss.backward() first, or take 'magnitude'"
            )
    zeros = {n: gradients.get(n, torch.zeros_like(t)) for n, t in tensors.items()}
    with torch.no_grad():
        found = score_groups(groups, tensors, zeros, criteria, roles, {n: g.square() for n, g in zeros.items()})
    return [score.double().cpu().numpy() for score in found]


def _value(evaluate: Callable[[nn.Module], Any], model: nn.Module, what: str) -> float:
    found = evaluate(model)
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"evaluate returned {type(found).__name__} with {what}; it has to return a number"
        ) from (error)
    if not math.isfinite(value):
        raise ConfigurationError(f"evaluate returned {value} with {what}; it has to return a finite number")
    return value


@contextmanager
def _at_zero(
    groups: Sequence[PruningGroup], units: Mapping[str, NDArray[np.int64]], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Units at zero inside of the block; their tensors as they were behind it."""
    touched = regions(groups, units, tensors, (Role.ZERO,))
    before = {region.name: tensors[region.name].detach().clone() for region in touched}
    try:
        for region in touched:
            region.zero_(tensors[region.name])
        yield
    finally:
        for name, values in before.items():
            tensors[name].detach().copy_(values)
