"""Scores of all units at one step: the one place of a run that waits for the device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from only_train_once.criteria import ACTIVATIONS, PRODUCT_SQUARES, Prepared, prepare
from only_train_once.errors import NumericalError
from only_train_once.groups import PruningGroup, Role
from only_train_once.importance import (
    Criteria,
    check_groups,
    needs_activations,
    needs_gradients,
    needs_means,
    needs_products,
    needs_squares,
    resolve,
    score_groups,
)
from only_train_once.masking import Region, precise
from only_train_once.optim.arguments import tensor_roles, whole
from only_train_once.optim.average import GradientAverage, Means, ProductSquares, params_of
from only_train_once.optim.candidates import Candidates
from only_train_once.optim.cutting import Kept, cut
from only_train_once.optim.state import check_shapes, damaged, saved_count
from only_train_once.optim.watching import Activations
from only_train_once.sharding import Shares, like, local, part_of, shares_of

logger = logging.getLogger(__name__)

SUMS, SQUARES = "gradient_sum", "gradient_square_sum"  # what the sums of an unfinished window are saved as
_MAX_WINDOW = 10


class Scoring:
    """Scores from gradients averaged over the last ``window`` steps before a scoring, that step included.

    Args:
        candidates: what is scored.
        criteria: see ``importance.resolve``.
        roles: slices the named criteria look at; a user's function is shown the gradients of all slices.
        window: steps to average over, at most ``length``; None for 10 at most.
        length: steps between two scorings.
    """

    def __init__(
        self, candidates: Candidates, criteria: Criteria, roles: Collection[Role], window: int | None, length: int
    ) -> None:
        self.groups = self.current = candidates.groups  # see [Note: numbers of units]
        self.present = np.ones(sum(g.size for g in self.groups), dtype=np.bool_)
        self.tensors = candidates.tensors
        self.roles = tensor_roles(roles)
        self.criteria = resolve(criteria)
        if window is not None:
            whole("window", window, 1)
        averages = needs_gradients(self.criteria) or needs_activations(self.criteria)
        self.window = min(length, window or _MAX_WINDOW) if averages else 1
        seen = tuple(Role) if callable(self.criteria) else self.roles
        check_groups(self.groups, self.criteria)
        self.activations = Activations(candidates) if needs_activations(self.criteria) else None
        only_activations = averages and not needs_gradients(self.criteria)
        names = [] if only_activations else params_of(self.groups, seen, candidates.trained)
        squares = needs_squares(self.criteria)
        self.single = GradientAverage(names, squares)  # of one step: nothing is ever added
        self.average = GradientAverage(names if needs_means(self.criteria) or not averages else [], squares)
        device = next(t.device for t in self.tensors.values())
        self.products = (
            ProductSquares(self.groups, self.roles, device) if needs_products(self.criteria) else None
        )  # of the steps that `average` counts

    def collect(self, optimizer: Optimizer, step: int, scoring: int) -> None:
        """Add the gradients of ``step`` if it lies in the window that ends with the step ``scoring``."""
        first = scoring - self.window + 1
        # One more would be this step's, added before something interrupted it.
        if first <= step and self.average.count <= step - first:
            self.average.add(optimizer, self.tensors)
            if self.products is not None:
                self.products.add(self.tensors, self.single.mean(optimizer, self.tensors))
            if self.activations is not None:
                self.activations.take()

    def watch(self, step: int, scoring: int | None) -> None:
        """Before the forward pass of ``step``: look at activations if it lies in the window before ``scoring``."""
        if self.activations is not None:
            self.activations.watch(scoring is not None and scoring - self.window < step <= scoring)

    def reset(self) -> None:
        """Forget what was averaged."""
        self.average.reset()
        for seen in (self.activations, self.products):
            if seen is not None:
                seen.reset()

    def scores(
        self, optimizer: Optimizer, step: int, ignored: NDArray[np.bool_], gone: Sequence[Region] = ()
    ) -> list[NDArray[np.float64]]:
        """Per group the scores of its units; ends the window.

        Entries that are ``gone`` with removed units count as without gradient, also in the steps of the window in which
        they were not yet: units that share them (a row, with the column of a unit before it; a head, with a position
        in all heads) are scored by what is left of them.

        Raises:
            NumericalError: an averaged gradient, or the score of a unit that is not ``ignored``, is not finite. No
                weight was changed, and the window is intact unless an earlier step had spoilt it.
        """
        shares = shares_of(self.tensors)
        gradients, squares = self.means(optimizer, gone)
        strange = {n: (~gradients.finite(n)).to(torch.int32) for n in gradients}
        products = None
        if self.products is not None:
            now = self.single.mean(optimizer, self.tensors, gone)
            products = self.products.means(self.tensors, now, self.average.count + 1)
            # A sum is the same in all processes, and was spoilt by an earlier step.
            strange["an earlier step"] = (~torch.isfinite(self.products.sums)).any().to(torch.int32)
        scores = self.score(gradients, squares, products)
        values, count = _fetch(scores, shares.sum(list(strange.values())), shares)
        bad = [n for n, found in zip(strange, count, strict=True) if found]
        if bad:
            steps = self.average.count + 1
            self.average.reset_unless_finite(self.tensors)
            if "an earlier step" in bad:
                self.reset()
            raise NumericalError(
                f"step {step}: the gradients averaged over {steps} step(s) are not finite in "
                f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}; no unit can be scored. No weight was changed: "
                f"skip this batch, lower the learning rate, or use a GradScaler"
            )
        everyone = np.zeros(len(self.present))  # who has left is at zero, and scores 0
        everyone[self.present] = values
        per_group = split(everyone, self.groups)
        for group, score, skip in zip(self.groups, per_group, split(ignored, self.groups), strict=True):
            odd = np.flatnonzero(~np.isfinite(score) & ~skip)
            if len(odd):
                if self.activations is not None:
                    self.activations.reset()
                raise NumericalError(
                    f"step {step}: the score of unit {odd[0]} of group {group.name!r} is {score[odd[0]]}; "
                    f"no weight was changed. Look for NaN or infinite weights in "
                    f"{', '.join(s.param for s in group.with_role(Role.ZERO))}"
                )
        self.reset()
        return per_group

    def means(self, optimizer: Optimizer, gone: Sequence[Region] = ()) -> tuple[Means, Means | None]:
        """Gradients, and their squares if wanted, averaged over the window; of this step where no mean is wanted."""
        average = self.average if self.average.names else self.single
        return average.mean(optimizer, self.tensors, gone), average.mean_square(optimizer, self.tensors, gone)

    def score(
        self,
        gradients: Mapping[str, Tensor],
        squares: Mapping[str, Tensor] | None,
        products: Sequence[Tensor] | None = None,
        prepared: Prepared | None = None,
    ) -> list[Tensor]:
        """Scores of all groups from means of gradients and, if they are kept, of their squares, on the device.

        ``products``: per group the means of `ProductSquares`; None for those of the gradients alone. ``prepared``: see
        `prepare`.
        """
        seen = None if self.activations is None else self.activations.means()
        return score_groups(
            self.current, self.tensors, gradients, self.criteria, self.roles, squares, seen, products, prepared
        )

    def prepare(self) -> Prepared | None:
        """What makes scoring at every step faster, if it can be made."""
        return None if callable(self.criteria) else prepare(self.current, self.tensors, self.roles)

    def leave(self, groups: Sequence[PruningGroup], present: NDArray[np.bool_], kept: Kept) -> None:
        """Units have left, see `Method.leave`; a window that has begun goes on."""
        self.current, self.present = tuple(groups), present
        if self.activations is not None:
            self.activations.leave(present)
        if self.products is not None:
            self.products.leave(groups, present)
        for sums in (self.average.sums, self.average.squares):
            sums.update({name: cut(sums[name], kept[name]) for name in sums.keys() & kept.keys()})

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        seen = {} if self.activations is None else {ACTIVATIONS: self.activations.state()}
        squares = {} if self.products is None else {PRODUCT_SQUARES: self.products.sums.cpu()}
        return {"window_count": self.average.count, **seen, **squares}

    @property
    def companions(self) -> dict[str, dict[str, Tensor]]:
        kept = {SUMS: self.average.sums, SQUARES: self.average.squares}
        return {
            what: {n: like(self.tensors[n], v) for n, v in values.items()} for what, values in kept.items() if values
        }

    def expect(self, what: Mapping[str, Collection[str]]) -> None:
        """Begin sums at 0, for the values of a file to replace."""
        for name, sums in ((SUMS, self.average.sums), (SQUARES, self.average.squares)):
            sums.update({n: precise(torch.zeros_like(local(self.tensors[n]))) for n in what.get(name, ())})

    def check_state(self, state: Mapping[str, Any], companions: Mapping[str, Mapping[str, Any]]) -> None:
        saved_count(state, "window_count")
        seen = state.get(ACTIVATIONS)
        if seen is not None and self.activations is not None and not self.activations.fits(seen):
            raise damaged(ACTIVATIONS, seen, "sums and counts of activations")
        squares = state.get(PRODUCT_SQUARES)
        if squares is not None and self.products is not None and not self.products.fits(squares):
            raise damaged(PRODUCT_SQUARES, squares, "a number for every unit")
        for what in (SUMS, SQUARES):
            check_shapes(what, companions.get(what, {}), self.tensors)

    def load_state(self, state: Mapping[str, Any], companions: Mapping[str, Mapping[str, Any]]) -> None:
        self.reset()
        if self.activations is not None and state.get(ACTIVATIONS) is not None:
            self.activations.load_state(state[ACTIVATIONS])
        count, sums = int(state["window_count"]), companions.get(SUMS, {})
        products = state.get(PRODUCT_SQUARES)
        lost = (not sums and needs_means(self.criteria)) or (products is None and self.products is not None)
        if count and lost:
            logger.warning(
                "the saved state lies %d step(s) into an averaging window, but its gradient sums were not saved with "
                "it: the average starts afresh",
                count,
            )
            return
        if self.products is not None and products is not None:
            self.products.restore(products)
        squares = companions.get(SQUARES, {})
        self.average.sums, self.average.squares = (
            {n: part_of(v, self.tensors[n]).to(self.tensors[n].device, copy=True) for n, v in saved.items()}
            for saved in (sums, squares)
        )
        self.average.count = count


def _fetch(
    scores: Sequence[Tensor], flags: Sequence[Tensor], shares: Shares
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of all groups in order and flags, brought to the host in one transfer, the same in every process."""
    device = scores[0].device
    packed = [s.double().to(device) for s in scores]
    units = sum(len(s) for s in scores)
    if flags:
        packed.append(torch.stack([f.to(device) for f in flags]).double())
    values = shares.agreed(torch.cat(packed)).cpu().numpy()
    return values[:units], values[units:]


def split(flat: NDArray[Any], groups: Sequence[PruningGroup]) -> list[NDArray[Any]]:
    """One value per unit of all groups in order -> one array per group, views of the same memory."""
    return np.split(flat, np.cumsum([g.size for g in groups])[:-1])


def units_by_group(flat: NDArray[np.bool_], groups: Sequence[PruningGroup]) -> dict[str, NDArray[np.int64]]:
    """Group name -> units, from one flag per unit of all groups in order."""
    parts = zip(groups, split(flat, groups), strict=True)
    return {g.name: np.flatnonzero(part).astype(np.int64) for g, part in parts}
