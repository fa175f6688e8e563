"""HESSO against its slow version, selection against brute force, and attaching against plain torch optimizers."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from only_train_once.criteria import CRITERIA, WITH_ACTIVATIONS
from only_train_once.errors import ConfigurationError, NothingPrunableError, NumericalError
from only_train_once.groups import PruningGroup, Role
from only_train_once.importance import PRESETS
from only_train_once.optim import attach, build
from only_train_once.optim.scoring import Scoring
from only_train_once.optim.selection import nearest_total, plan_counts, select, units_for
from tests.methods import BOUNDARIES, CONFIGS, PLAN, SLOW, config, starting
from tests.reference.ada_hspg import PaperAdaHspg
from tests.reference.hesso_cric import PaperCric
from tests.reference.hspg import PaperHalfSpace
from tests.reference.nets import LayerNormStream, batch, group, loss_of, make, tensors_of

Maker = Callable[[Any], Optimizer]


def sgd(params: Any, **kw: Any) -> Optimizer:
    return SGD(params, lr=0.02, momentum=0.9, **{"foreach": False, **kw})


def adamw(params: Any, **kw: Any) -> Optimizer:
    return AdamW(params, lr=3e-3, **{"foreach": False, **kw})


def attached(model: nn.Module, maker: Maker, groups: list[PruningGroup] | None = None, **arguments: Any) -> Any:
    given = model.groups() if groups is None else groups  # type: ignore[operator]
    return attach(
        maker(model.parameters()),
        given,
        tensors_of(model),
        **(arguments if "method" in arguments else {**PLAN, **arguments}),
    )


def train(model: nn.Module, optimizer: Optimizer, net: str, steps: range, dtype: torch.dtype = torch.float64) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(net, step, dtype)).backward()
        optimizer.step()


def scores_at_start(optimizer: Any) -> bool:
    """Whether the first step of pruning looks at gradients."""
    return bool(optimizer._method.next_scoring() == optimizer._method.schedule.start_pruning_step)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(tensors_of(a).items(), tensors_of(b).values(), strict=True):
        assert torch.equal(x, y), name


# -- the method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("maker", "strength"), [(sgd, 1.5), (adamw, 12.0)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("net", ["residual", "layer_norm"])
@pytest.mark.parametrize("method", SLOW)
def test_equal_to_the_slow_version_step_by_step(method: str, net: str, maker: Maker, strength: float) -> None:
    """HESSO bit for bit; the others sum in another order, and then to rounding."""
    fast, slow = make(net), make(net)
    arguments, slow_version = SLOW[method](strength)
    optimizer = attach(maker(fast.parameters()), fast.groups(), tensors_of(fast), **arguments)  # type: ignore[operator]
    paper = slow_version(maker(slow.parameters()), slow.groups(), dict(slow.named_parameters()))  # type: ignore[operator]
    if isinstance(paper, PaperCric):
        paper.buffers = dict(slow.named_buffers())
    tolerance = 0 if method == "hesso" else 1e-10
    for step in range(200):
        train(fast, optimizer, net, range(step, step + 1))
        slow.zero_grad()
        loss_of(slow, batch(net, step)).backward()
        paper.step()
        for (name, x), y in zip(tensors_of(fast).items(), tensors_of(slow).values(), strict=True):
            where = f"{name} at step {step}"
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, w=where: f"{w}: {m}")
        if isinstance(paper, PaperHalfSpace) and paper.n < paper.end:
            zero = optimizer._method.space.fetch()  # type: ignore[attr-defined]
            assert sorted(paper.zero) == [u for u, at_zero in zip(paper.all_units, zero, strict=True) if at_zero]
    chosen = [(i, u) for i, g in enumerate(paper.groups) for u in optimizer.removed[g.name]]  # type: ignore[attr-defined]
    assert sorted(paper.gone) == chosen
    assert len(chosen) == paper.total > 0
    if isinstance(paper, PaperAdaHspg):
        assert set(paper.kinds) == {"half", "prox"} or (net, maker) == ("residual", sgd)
        assert paper.epsilon == optimizer._method.epsilon > 0.7  # type: ignore[attr-defined]
    if isinstance(paper, PaperCric):
        assert paper.ramp_start == optimizer._method.when["start"]  # type: ignore[attr-defined]
        assert paper.cycle > 1 or (method, net) != ("hesso_cric", "layer_norm")
    if isinstance(paper, PaperHalfSpace):
        assert not optimizer._method.space.before  # type: ignore[attr-defined]  # no copy is kept
        assert paper.zero  # the projection has done some of it


@pytest.mark.parametrize(
    "maker", [lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2), lambda p: AdamW(p, lr=3e-3)]
)
@pytest.mark.parametrize("net", ["conv", "residual", "mlp", "attention", "layer_norm"])
@pytest.mark.parametrize("method", CONFIGS)
def test_removed_units_stay_at_zero_for_thirty_more_steps(net: str, maker: Maker, method: str) -> None:
    model = make(net, dtype=torch.float32)
    optimizer = attached(model, maker, **config(method))
    train(model, optimizer, net, range(46), torch.float32)
    assert optimizer.compute_metrics().num_zero_groups == units_for(sum(g.size for g in model.groups()), 0.5)  # type: ignore[operator]
    for g in model.groups():  # type: ignore[operator]
        for s in g.with_role(Role.ZERO, Role.CONSUMER):
            cut = tensors_of(model)[s.param].movedim(s.dim, 0)[s.index[optimizer.removed[g.name]].ravel()]
            assert torch.equal(cut, torch.zeros_like(cut)), s


def test_layer_norm_width_needs_its_pins() -> None:
    # chosen by hand, so that the stream does lose units
    scores = lambda g, p, q: torch.arange(g.size) + (100.0 if g.name == "up" else 0.0)  # noqa: E731
    left = {}
    for pinned, fixed in [(True, True), (False, True), (True, False)]:
        model = make("layer_norm")
        assert isinstance(model, LayerNormStream)
        optimizer = attached(
            model,
            adamw,
            model.groups(pinned),
            importance_score_criteria=scores,
            fixed_zero_groups=fixed,
            target_group_sparsity=0.2,
        )
        train(model, optimizer, "layer_norm", range(46))
        assert optimizer.removed == {"width": [0, 1, 2], "up": []}
        left[pinned, fixed] = float(model.embed.weight[:3].detach().abs().max())
    assert left[True, True] == 0
    assert left[False, True] > 1e-4
    assert left[True, False] > 1e-4


def test_pin_always_holds_what_nothing_else_holds() -> None:
    model = make("layer_norm")
    scores = lambda g, p, q: torch.arange(g.size) + (100.0 if g.name == "up" else 0.0)  # noqa: E731
    optimizer = attached(model, adamw, model.groups(False), importance_score_criteria=scores, pin="always")  # type: ignore[operator]
    train(model, optimizer, "layer_norm", range(46))
    assert model.embed.weight[optimizer.removed["width"]].eq(0).all()  # type: ignore[union-attr, index]


def test_a_frozen_consumer_makes_the_unit_pinned_and_is_left_alone() -> None:
    model = make("mlp")
    model.fc2.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = model.fc2.weight.clone()  # type: ignore[union-attr, operator]
    optimizer = attach(
        adamw([p for p in model.parameters() if p.requires_grad]), model.groups(), tensors_of(model), **PLAN
    )  # type: ignore[operator]
    train(model, optimizer, "mlp", range(30))
    assert optimizer.compute_metrics().num_zero_groups == 6  # type: ignore[attr-defined]
    assert torch.equal(model.fc2.weight, before)  # type: ignore[arg-type]


def test_follow_slices_are_never_changed() -> None:
    model, plain = make("attention"), make("attention")
    optimizer = attached(model, lambda p: SGD(p, lr=0.0))
    train(model, optimizer, "attention", range(20))
    assert optimizer.compute_metrics().num_zero_groups == 2
    for name in ("q", "k"):
        assert torch.equal(getattr(model, name).weight, getattr(plain, name).weight)


def test_ramp_is_linear_without_gradient_and_ends_with_the_period() -> None:
    model = make("mlp")
    start = model.fc1.weight.detach().clone()  # type: ignore[union-attr, operator]
    optimizer = attached(model, lambda p: SGD(p, lr=0.0), start_pruning_step=2, pruning_steps=5, pruning_periods=1)
    for step in range(9):
        train(model, optimizer, "mlp", range(step, step + 1))
        share = min(max(5 - (step - 1), 0) / 5, 1.0) if step >= 2 else 1.0
        units = optimizer.redundant["fc1"]
        assert len(units) == (6 if step >= 2 else 0)
        torch.testing.assert_close(model.fc1.weight[units], share * start[units], rtol=1e-12, atol=0)  # type: ignore[union-attr, index]
        assert len(optimizer.removed["fc1"]) == (6 if step >= 6 else 0)


def test_one_step_one_period_zeroes_at_once_with_the_state() -> None:
    model = make("mlp")
    optimizer = attached(model, adamw, start_pruning_step=3, pruning_steps=1, pruning_periods=1)
    train(model, optimizer, "mlp", range(3))
    assert optimizer.compute_metrics().num_zero_groups == 0
    train(model, optimizer, "mlp", range(3, 4))
    units = optimizer.removed["fc1"]
    assert len(units) == 6
    for key in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[model.fc1.weight][key]  # type: ignore[union-attr, index]
        assert state[units].eq(0).all()
        assert state.ne(0).any()


@pytest.mark.parametrize(("sparsity", "divisible", "expected"), [(0.29, 1, 5), (0.5, 2, 9), (0.99, 1, 16)])
def test_totals(sparsity: float, divisible: int, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    model = make("layer_norm")  # 8 + 10 units
    caplog.set_level(logging.WARNING)
    optimizer = attached(model, sgd, target_group_sparsity=sparsity, group_divisible=divisible)
    train(model, optimizer, "layer_norm", range(20))
    requested = units_for(18, sparsity)
    reached = requested - optimizer.shortfall
    assert optimizer.compute_metrics().num_zero_groups == reached
    assert (optimizer.shortfall != 0) == any(
        f"{requested} of 18 units were requested, {reached} will be removed" in r.getMessage() for r in caplog.records
    )
    if divisible == 1:
        assert reached == expected
    else:
        assert (requested, reached) == (9, 8)
        assert all((g.size - len(optimizer.removed[g.name])) % divisible == 0 for g in model.groups())  # type: ignore[operator]


def test_scores_come_from_gradients_averaged_over_the_window() -> None:
    seen: list[torch.Tensor] = []

    def spy(g: PruningGroup, p: Any, q: Any) -> torch.Tensor:
        assert set(q) == {"fc1.weight", "fc1.bias", "fc2.weight"}  # all that the group cuts
        seen.append(q["fc1.weight"].clone())
        return torch.arange(g.size).double()

    model = make("mlp")
    optimizer = attached(model, sgd, importance_score_criteria=spy, pruning_periods=3, pruning_steps=12)
    gradients, gone = [], []
    for step in range(16):
        optimizer.zero_grad()
        loss_of(model, batch("mlp", step)).backward()
        gradients.append(model.fc1.weight.grad.clone())  # type: ignore[union-attr]
        gone.append(optimizer.removed["fc1"])
        optimizer.step()
    assert len(seen) == 3
    assert [len(gone[first]) for first in (4, 8, 12)] == [0, 2, 4]
    for average, first in zip(seen, (4, 8, 12), strict=True):
        mean = sum(gradients[first - 3 : first + 1]) / 4
        mean[gone[first]] = 0.0  # what is gone has no say, also where it was not yet in the window's first steps
        torch.testing.assert_close(average, mean, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("net", ["conv", "residual"])
@pytest.mark.parametrize("name", sorted({*CRITERIA, *PRESETS} - WITH_ACTIVATIONS))  # those: test_activations.py
def test_every_criterion_prunes_by_name(name: str, net: str) -> None:
    model = make(net)
    optimizer = attached(model, sgd, importance_score_criteria=name)
    train(model, optimizer, net, range(20))
    assert optimizer.compute_metrics().num_zero_groups == 7


def test_squared_gradients_are_averaged_over_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    score = Scoring.score
    spy = lambda self, g, q, p: (seen.append(q["fc1.weight"].clone()), score(self, g, q, p))[1]  # noqa: E731
    monkeypatch.setattr(Scoring, "score", spy)
    model = make("mlp")
    optimizer = attached(model, sgd, importance_score_criteria="fisher_diagonal")
    gradients, gone = [], []
    for step in range(16):
        optimizer.zero_grad()
        loss_of(model, batch("mlp", step)).backward()
        gradients.append(model.fc1.weight.grad.clone())  # type: ignore[union-attr]
        gone.append(optimizer.removed["fc1"])
        optimizer.step()
    for average, first in zip(seen, (4, 8, 12), strict=True):
        expected = sum(g.square() for g in gradients[first - 3 : first + 1]) / 4
        expected[gone[first]] = 0.0
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("criteria", ["group_fisher", {"group_fisher": 1.0, "fisher_diagonal": 0.0}])
def test_squares_of_products_are_averaged_over_the_window(criteria: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    score = Scoring.score
    spy = lambda self, g, q, p: (seen.append(p[0].clone()), score(self, g, q, p))[1]  # noqa: E731
    monkeypatch.setattr(Scoring, "score", spy)
    model = make("mlp")
    optimizer = attached(model, sgd, importance_score_criteria=criteria)
    assert optimizer._method.groups[0].name == "fc1"
    squares = []
    for step in range(16):
        optimizer.zero_grad()
        loss_of(model, batch("mlp", step)).backward()
        fc1: Any = model.fc1
        squares.append(((fc1.weight * fc1.weight.grad).sum(1) + fc1.bias * fc1.bias.grad).detach().square())
        optimizer.step()
        sums = optimizer._method.scoring.average.sums
        assert bool(sums) == (criteria != "group_fisher" and step in (*range(1, 4), *range(5, 8), *range(9, 12)))
    assert len(seen) == 3
    for average, first in zip(seen, (4, 8, 12), strict=True):
        torch.testing.assert_close(average, sum(squares[first - 3 : first + 1]) / 4, rtol=1e-12, atol=1e-15)


# -- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "hesso_cric"])
def test_a_strange_gradient_stops_before_any_weight_changes(bad: float, closure: bool, method: str) -> None:
    model = make("mlp")
    scoring = BOUNDARIES[method][0]
    optimizer = attached(model, adamw, **config(method))
    train(model, optimizer, "mlp", range(scoring))
    before = copy.deepcopy(model.state_dict())

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch("mlp", scoring))
        loss.backward()
        model.fc1.weight.grad[0, 0] = bad  # type: ignore[union-attr, index]
        return loss

    if not closure:
        evaluate()
    with pytest.raises(NumericalError, match=r"not finite in (fc1\.weight|some tensor)"):
        optimizer.step(evaluate if closure else None)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    train(model, optimizer, "mlp", range(scoring, 40))  # the next good batch goes on
    assert optimizer.compute_metrics().num_zero_groups == 6


def test_a_strange_gradient_early_in_a_window_is_told_and_forgotten() -> None:
    model = make("mlp")
    optimizer = attached(model, adamw, importance_score_criteria="group_fisher")
    scoring = BOUNDARIES["hesso"][0]
    train(model, optimizer, "mlp", range(scoring - 1))
    fc1: Any = model.fc1
    optimizer.zero_grad()
    loss_of(model, batch("mlp", 0)).backward()
    weights = copy.deepcopy(model.state_dict())
    fc1.weight.grad[0, 0] = torch.nan
    optimizer.step()
    model.load_state_dict(weights)  # as who skips a bad step does
    for state in optimizer.state.values():
        for value in state.values():
            value.nan_to_num_()
    optimizer.zero_grad()
    loss_of(model, batch("mlp", scoring)).backward()
    with pytest.raises(NumericalError, match=r"averaged over 4 step\(s\) are not finite in an earlier step"):
        optimizer.step()
    train(model, optimizer, "mlp", range(scoring, 40))
    assert optimizer.compute_metrics().num_zero_groups == 6


@pytest.mark.parametrize("at", [4, 5, 6])
def test_a_strange_gradient_in_a_cycle_does_not_count(at: int) -> None:
    """The weights it spoils are those of a simulation, which is put back."""
    model = make("mlp")
    optimizer = attached(model, adamw, **config("hesso_cric", max_cycle_period=1))
    method = optimizer._method
    for step in range(24):
        optimizer.zero_grad()
        loss_of(model, batch("mlp", step)).backward()
        if step == at:
            model.fc1.weight.grad[0, 0] = torch.nan  # type: ignore[union-attr, index]
        before = int(method._count)
        optimizer.step()
        if method._in_cycles or step == 6:
            assert int(method._count) == before + (4 <= step < at)  # once spoilt, the rest of the cycle is lost
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.compute_metrics().num_zero_groups == 6


def test_a_strange_score_names_its_unit() -> None:
    model = make("mlp")
    optimizer = attached(model, sgd, importance_score_criteria=lambda g, p, q: torch.tensor([0.0] * 11 + [torch.nan]))
    train(model, optimizer, "mlp", range(4))
    with pytest.raises(NumericalError, match="score of unit 11 of group 'fc1' is nan"):
        train(model, optimizer, "mlp", range(4, 5))


# -- selection ----------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], int, int]:
    divisible = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    levels = st.integers(0, 3)  # few levels: many ties
    scores = [np.array(draw(st.lists(levels, min_size=n, max_size=n)), dtype=float) for n in sizes]
    gone = []
    for n in sizes:
        flags = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
        gone.append(flags if divisible == 1 and not flags.all() and draw(st.booleans()) else np.zeros(n, dtype=bool))
    total = draw(st.integers(0, sum(sizes)))
    return scores, gone, total, divisible


def reachable(sizes: list[int], lost: list[int], divisible: int) -> set[int]:
    options = [
        [c for c in range(g, n) if c == g == 0 or (n - c) % divisible == 0] or [g]
        for n, g in zip(sizes, lost, strict=True)
    ]
    return {sum(c) for c in itertools.product(*options)}


@given(cases())
@settings(max_examples=300, deadline=None)
def test_selection_is_exact(case: tuple[list[np.ndarray], list[np.ndarray], int, int]) -> None:
    scores, gone, total, divisible = case
    sizes, lost = [len(s) for s in scores], [int(g.sum()) for g in gone]
    sums = reachable(sizes, lost, divisible)
    nearest = nearest_total(sizes, lost, total, divisible)
    assert nearest == min(sums, key=lambda s: (abs(s - total), s))
    counts = plan_counts(scores, gone, nearest, divisible)
    assert sum(counts) == nearest
    for n, g, c in zip(sizes, lost, counts, strict=True):
        assert g <= c < n
        assert c == g == 0 or (n - c) % divisible == 0 or divisible == 1
    count = nearest - sum(lost)
    picked = select(scores, gone, count, nearest, divisible)
    assert [len(p) for p in picked] == [c - g for c, g in zip(counts, lost, strict=True)]
    for p, g in zip(picked, gone, strict=True):
        assert len(set(p.tolist())) == len(p)
        assert not g[p].any()
    if divisible == 1:  # exactly the brute-force order, each group keeping its last unit
        left, wanted = [n - g for n, g in zip(sizes, lost, strict=True)], []
        live = [(s, i, u) for i, row in enumerate(scores) for u, s in enumerate(row) if not gone[i][u]]
        for _, i, u in sorted(live):
            if len(wanted) < count and left[i] > 1:
                left[i] -= 1
                wanted.append((i, u))
        assert sorted(wanted) == [(i, u) for i, p in enumerate(picked) for u in p.tolist()]


@given(cases(), st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_groups_that_lose_units_in_multiples(case: Any, multiples: list[int], periods: int) -> None:
    """Against all combinations of counts: the nearest total, reached over periods, and no group with another count."""
    scores, gone, total, divisible = case
    gone, multiples = [np.zeros_like(g) for g in gone], multiples[: len(gone)]
    sizes = [len(s) for s in scores]
    options = [
        [c for c in range(n) if c == 0 or (c % m == 0 and (n - c) % divisible == 0)]
        for n, m in zip(sizes, multiples, strict=True)
    ]
    combinations = list(itertools.product(*options))
    nearest = nearest_total(sizes, [0] * len(sizes), total, divisible, multiples=multiples)
    assert nearest == min({sum(c) for c in combinations}, key=lambda s: (abs(s - total), s))
    for period in range(periods):
        count = nearest * (period + 1) // periods - sum(int(g.sum()) for g in gone)
        for g, units in zip(gone, select(scores, gone, count, nearest, divisible, multiples=multiples), strict=True):
            assert not g[units].any()
            g[units] = True
    assert tuple(int(g.sum()) for g in gone) in combinations
    assert sum(int(g.sum()) for g in gone) == nearest


@given(st.lists(st.tuples(st.integers(2, 5), st.sampled_from([1, 2, 4])), min_size=1, max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_multiples_at_a_low_sum_of_scores(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Where multiples divide each other and one group has each, no exchange is left that would lower the sum."""
    scores = [np.random.default_rng(i).random(n * m) for i, (n, m) in enumerate(shapes)]
    gone, multiples = [np.zeros(len(s), dtype=bool) for s in scores], [m for _, m in shapes]
    sizes = [len(s) for s in scores]
    total = nearest_total(sizes, [0] * len(sizes), data.draw(st.integers(0, sum(sizes))), multiples=multiples)
    counts = plan_counts(scores, gone, total, multiples=multiples)

    def cost(counts: Any) -> float:
        return float(sum(np.sort(s)[:c].sum() for s, c in zip(scores, counts, strict=True)))

    assert sum(counts) == total
    for i, j in itertools.permutations(range(len(sizes)), 2):
        step = math.lcm(multiples[i], multiples[j])
        moved = [c + step * (k == i) - step * (k == j) for k, c in enumerate(counts)]
        if moved[j] >= 0 and moved[i] < sizes[i]:
            assert cost(moved) >= cost(counts) - 1e-9


@given(cases(), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_periods_reach_the_total_whatever_the_scores_do(case: Any, periods: int, random: Any) -> None:
    scores, gone, total, divisible = case
    gone = [np.zeros_like(g) for g in gone]
    total = nearest_total([len(s) for s in scores], [0] * len(scores), total, divisible)
    for period in range(periods):
        due = total * (period + 1) // periods - sum(int(g.sum()) for g in gone)
        fresh = [np.array([random.random() for _ in s]) for s in scores]
        for g, units in zip(gone, select(fresh, gone, due, total, divisible), strict=True):
            assert not g[units].any()
            g[units] = True
    assert sum(int(g.sum()) for g in gone) == total
    assert all(not g.any() or (~g).sum() % divisible == 0 for g in gone)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_divisible_plan_is_close_to_the_cheapest(case: Any) -> None:
    """On groups whose sizes are multiples of d the exchange of chunks ends at the optimum: the costs are convex."""
    scores, gone, total, d = case
    scores = [np.concatenate([s] * d) + np.arange(len(s) * d) * 1e-3 for s in scores]
    gone = [np.zeros(len(s), dtype=bool) for s in scores]
    sizes = [len(s) for s in scores]
    total = nearest_total(sizes, [0] * len(sizes), total * d, d)

    def cost(counts: Any) -> float:
        return float(sum(np.sort(s)[:c].sum() for s, c in zip(scores, counts, strict=True)))

    options = [range(0, n, d) for n in sizes]
    best = min(cost(c) for c in itertools.product(*options) if sum(c) == total)
    assert cost(plan_counts(scores, gone, total, d)) == pytest.approx(best, abs=1e-9)


def test_ties_go_by_group_then_index() -> None:
    scores, gone = [np.zeros(4), np.zeros(3)], [np.zeros(4, dtype=bool), np.zeros(3, dtype=bool)]
    for count, expected in [(2, [[0, 1], []]), (4, [[0, 1, 2], [0]])]:
        assert [p.tolist() for p in select(scores, gone, count, total=5)] == expected
    gone[0][1] = True
    assert [p.tolist() for p in select(scores, gone, 1, total=4)] == [[0], []]


def test_selection_of_a_large_network_is_exact() -> None:
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in rng.integers(100, 2000, 150)]
    scores, gone = [rng.random(n) for n in sizes], [np.zeros(n, dtype=bool) for n in sizes]
    total = nearest_total(sizes, [0] * len(sizes), sum(sizes) // 2, 8)
    picked = select(scores, gone, total, total, 8)
    assert sum(map(len, picked)) == total
    assert all(not len(p) or (n - len(p)) % 8 == 0 for p, n in zip(picked, sizes, strict=True))


def test_sparsity_is_read_as_a_decimal() -> None:
    assert [units_for(100, s) for s in (0.29, 0.57, 0.58, 0.0, 0.999)] == [29, 57, 58, 0, 99]


# -- attaching ----------------------------------------------------------------------------------------------------

BASES: dict[str, Maker] = {
    "sgd nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3, foreach=False),
    "sgd foreach": lambda p: SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "sgd fused": lambda p: SGD(p, lr=0.02, momentum=0.9, fused=True),
    "adam": lambda p: Adam(p, lr=1e-3, foreach=False),
    "adam foreach": lambda p: Adam(p, lr=1e-3, foreach=True),
    "adam fused": lambda p: Adam(p, lr=1e-3, fused=True),
    "adamw": lambda p: AdamW(p, lr=1e-3, foreach=False),
    "adamw foreach": lambda p: AdamW(p, lr=1e-3, amsgrad=True, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_sparsity_zero_is_the_base_optimizer_bit_for_bit(base: str, method: str) -> None:
    a, b = (make("conv", dtype=torch.float32) for _ in range(2))
    none = {name: 0.0 for name in config(method) if name.endswith("group_sparsity")}
    plain, ours = BASES[base](a.parameters()), attached(b, BASES[base], **config(method, **none))
    train(a, plain, "conv", range(20), torch.float32)
    train(b, ours, "conv", range(20), torch.float32)
    assert_same(a, b)
    assert isinstance(ours, type(plain))
    assert ours.redundant == {"conv1": [], "conv2": []}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_before_pruning_starts_nothing_differs(base: str, method: str) -> None:
    a, b = (make("conv", dtype=torch.float32) for _ in range(2))
    plain, ours = BASES[base](a.parameters()), attached(b, BASES[base], **config(method, **starting(method, 20)))
    train(a, plain, "conv", range(20), torch.float32)
    train(b, ours, "conv", range(20), torch.float32)
    assert_same(a, b)
    train(b, ours, "conv", range(20, 34), torch.float32)
    assert ours.compute_metrics().num_zero_groups == 7


OTHERS = ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor"]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", OTHERS)
def test_any_torch_optimizer_ends_at_zero(name: str, method: str) -> None:
    model = make("conv")
    run = {"named_tensors": tensors_of(model), "groups": model.groups()}  # type: ignore[operator]
    optimizer = build(**run, variant=name, lr=1e-3, **config(method))
    train(model, optimizer, "conv", range(40))
    assert optimizer.compute_metrics().num_zero_groups == 7  # type: ignore[attr-defined]
    assert optimizer.removed == optimizer.redundant  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", CONFIGS)
def test_lbfgs_with_its_many_closures(method: str) -> None:
    model = make("mlp")
    optimizer = attached(model, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4), **config(method))
    calls, scored = 0, []
    original = optimizer._method.before
    optimizer._method.before = lambda o: (scored.append(calls), original(o))
    for step in range(30):

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, batch("mlp", step))  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    assert calls > 60
    assert len(scored) == 30  # once per step, after its first evaluation
    metrics = optimizer.compute_metrics()
    assert (metrics.step, metrics.num_zero_groups) == (30, 6)


def test_param_groups_are_untouched() -> None:
    model = make("conv")
    convs = [p for n, p in model.named_parameters() if "conv" in n]
    rest = [p for n, p in model.named_parameters() if "conv" not in n]
    base = AdamW([{"params": convs, "lr": 1e-3, "weight_decay": 0.0}, {"params": rest, "lr": 1e-4}], lr=1.0)
    before = [dict(g) for g in base.param_groups]
    same = attach(base, model.groups(), tensors_of(model), **PLAN)  # type: ignore[operator]
    assert same is base
    assert type(base).__name__ == "AdamW"
    train(model, base, "conv", range(20))
    assert [dict(g) for g in base.param_groups] == before
    assert same.compute_metrics().num_zero_groups == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("keyword", [False, True])
def test_closure_returns_its_loss_and_trains_alike(keyword: bool, method: str) -> None:
    a, b = make("conv"), make("conv")
    plain, ours = (attached(m, sgd, **config(method)) for m in (a, b))
    train(a, plain, "conv", range(20))
    for step in range(20):

        def closure() -> torch.Tensor:
            ours.zero_grad()
            loss = loss_of(b, batch("conv", step))  # noqa: B023
            loss.backward()
            return loss

        loss = ours.step(closure=closure) if keyword else ours.step(closure)
        assert isinstance(loss, torch.Tensor)
        assert loss.requires_grad
    assert_same(a, b)
    assert ours.compute_metrics().num_zero_groups == 7


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("first", ["scheduler", "attach"])
def test_learning_rate_scheduler(first: str, method: str) -> None:
    a, b = make("conv"), make("conv")
    plain, ours = sgd(a.parameters()), sgd(b.parameters())
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)  # noqa: E731
    if first == "scheduler":
        theirs = schedule(ours)
    attach(ours, b.groups(), tensors_of(b), **config(method, **starting(method, 12)))  # type: ignore[operator]
    if first == "attach":
        theirs = schedule(ours)
    reference = schedule(plain)
    for step in range(12):
        train(a, plain, "conv", range(step, step + 1))
        train(b, ours, "conv", range(step, step + 1))
        reference.step()
        theirs.step()
        assert plain.param_groups[0]["lr"] == ours.param_groups[0]["lr"]
    assert_same(a, b)
    if scores_at_start(ours):
        ours.zero_grad()
        loss_of(b, batch("conv", 12)).backward()
        b.conv1.weight.grad[0] = torch.nan  # type: ignore[union-attr, index]
        with pytest.raises(NumericalError):
            ours.step()
    train(b, ours, "conv", range(12, 30))  # a step that raised does not switch the method off
    assert ours.compute_metrics().num_zero_groups == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", CONFIGS)
def test_clipping_and_accumulation_count_one_step_per_update(method: str) -> None:
    model = make("conv")
    optimizer = attached(model, sgd, **config(method))
    for step in range(16):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for half in range(2):
            (loss_of(model, batch("conv", 2 * step + half)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    metrics = optimizer.compute_metrics()
    assert (metrics.step, metrics.period, metrics.num_zero_groups) == (16, config(method).get("pruning_periods", 1), 7)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_and_scores_unscaled(fused: bool) -> None:
    a, b = (make("conv", dtype=torch.float32) for _ in range(2))
    maker = lambda p: AdamW(p, lr=1e-3, fused=fused, foreach=False)  # noqa: E731
    scores: list[torch.Tensor] = []

    def spy(g: PruningGroup, p: Any, q: Any) -> torch.Tensor:
        scores.append(q[f"{g.name}.weight"].clone())
        return torch.arange(g.size).float()

    plain = attached(a, maker, importance_score_criteria=spy)
    ours = attached(b, maker, importance_score_criteria=spy)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(16):
        train(a, plain, "conv", range(step, step + 1), torch.float32)
        if step in (2, 5, 9):  # before the window, and inside two periods
            ours.zero_grad()
            scaler.scale(loss_of(b, batch("conv", step, torch.float32))).backward()
            b.fc.bias.grad.fill_(torch.inf)  # type: ignore[union-attr, operator]
            norms = copy.deepcopy({n: p.detach() for n, p in b.named_parameters()})
            counted = ours.compute_metrics().step
            scaler.step(ours)
            scaler.update()
            assert all(torch.equal(norms[n], p) for n, p in b.named_parameters())
            assert ours.compute_metrics().step == counted
        ours.zero_grad()
        with torch.no_grad():  # the skipped forward passes moved the running statistics
            for x, y in zip(a.buffers(), b.buffers(), strict=True):
                y.copy_(x)
        scaler.scale(loss_of(b, batch("conv", step, torch.float32))).backward()
        scaler.step(ours)
        scaler.update()
    assert ours.compute_metrics().num_zero_groups == 7
    assert plain.redundant == ours.redundant
    assert len(scores) == 12
    torch.testing.assert_close(scores[0], scores[2], rtol=2e-2, atol=1e-4)  # first scoring of both: same scale


def test_parameters_without_gradient_and_sparse_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6, sparse=True)
            self.fc, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)

    torch.manual_seed(0)
    model = Net()
    cuts = [("table.weight", 1, Role.ZERO), ("fc.weight", 1, Role.CONSUMER), ("unused.weight", 1, Role.CONSUMER)]
    other = group("unused", 2, model, [("unused.weight", 0, Role.ZERO), ("unused.bias", 0, Role.ZERO)])
    optimizer = attached(model, lambda p: SGD(p, lr=0.1), [group("table", 6, model, cuts), other])
    for step in range(18):
        optimizer.zero_grad()
        model.fc(model.table(torch.tensor([step % 7, 2]))).square().sum().backward()
        optimizer.step()
    assert optimizer.compute_metrics().num_zero_groups == 4


@pytest.mark.parametrize("method", CONFIGS)
def test_maximize_gives_the_same_units_as_minimizing_the_negative(method: str) -> None:
    a, b = make("conv"), make("conv")
    down, up = attached(a, sgd, **config(method)), attached(b, lambda p: sgd(p, maximize=True), **config(method))
    for step in range(20):
        train(a, down, "conv", range(step, step + 1))
        up.zero_grad()
        (-loss_of(b, batch("conv", step))).backward()
        up.step()
    assert_same(a, b)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_copies_go_on_alone(how: str, at: int, method: str) -> None:
    a = make("conv")
    ours = attached(a, adamw, **config(method))
    train(a, ours, "conv", range(at))
    b, copied = copy.deepcopy((a, ours)) if how == "deepcopy" else pickle.loads(pickle.dumps((a, ours)))
    assert type(copied) is type(ours)
    train(a, ours, "conv", range(at, 20))
    frozen = copy.deepcopy(a.state_dict())
    train(b, copied, "conv", range(at, 20))
    assert_same(a, b)
    assert all(torch.equal(frozen[n], t) for n, t in a.state_dict().items())
    assert copied.removed == ours.removed
    assert copied.compute_metrics().num_zero_groups == 7


def test_a_subclass_that_calls_its_hooked_parent_counts_one_step() -> None:
    class Louder(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    model = make("conv")
    SGD(model.parameters(), lr=0.1)  # makes sure that the parent is hooked, too
    optimizer = attached(model, lambda p: Louder(p, lr=0.01))
    train(model, optimizer, "conv", range(20))
    assert optimizer.compute_metrics().step == 20
    assert optimizer.compute_metrics().num_zero_groups == 7


def test_hooks_of_the_user_run_once_each() -> None:
    model = make("conv")
    base, calls = sgd(model.parameters()), []
    base.register_step_pre_hook(lambda *_: calls.append("pre"))
    attach(base, model.groups(), tensors_of(model), **PLAN)  # type: ignore[operator]
    base.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, base, "conv", range(3))
    assert calls == ["pre", "post"] * 3


@pytest.mark.parametrize("method", CONFIGS)
def test_an_initialising_step_of_distributed_checkpoint_changes_nothing(method: str) -> None:
    for maker in (adamw, lambda p: SGD(p, lr=0.1)):
        model = make("mlp")
        before = copy.deepcopy(model.state_dict())
        at_once = {n: 1 for n in config(method) if n.endswith(("_steps", "_periods", "_cycle_period"))}
        at_once |= starting(method, 0)
        optimizer = attached(model, maker, **config(method, **at_once))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        rate = optimizer.get_learning_rate()
        optimizer.set_learning_rate(0.0)
        optimizer.step(closure=None)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert optimizer.compute_metrics().step == 0
        assert optimizer.redundant == {"fc1": []}
        optimizer.set_learning_rate(rate)
        train(model, optimizer, "mlp", range(2 if method == "hesso_cric" else 1))
        assert optimizer.compute_metrics().num_zero_groups == 6


def test_metrics_describe_the_network() -> None:
    model = make("conv")
    optimizer = attached(model, sgd)
    train(model, optimizer, "conv", range(9))
    m = optimizer.compute_metrics()
    params = tensors_of(model)
    zero = [params[n] for n in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias")]
    zero += [params[n] for n in ("conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias")]
    assert m.norm_params == pytest.approx(float(torch.cat([z.detach().flatten() for z in zero]).norm()))
    assert m.norm_params**2 == pytest.approx(m.norm_important_groups**2 + m.norm_redundant_groups**2)
    chosen = sum(len(u) for u in optimizer.redundant.values())
    assert (m.num_redundant_groups, m.num_important_groups) == (chosen, 14 - chosen) == (4, 10)
    assert (m.num_zero_groups, m.group_sparsity, m.period, m.step) == (2, 2 / 14, 2, 9)
    assert optimizer.compute_group_sparsity_param_norm() == (m.group_sparsity, m.norm_params, 2)
    assert optimizer.compute_norm_groups() == (m.norm_important_groups, m.norm_redundant_groups, 10, 4)
    assert optimizer.get_learning_rate() == 0.02


class Asked(TorchDispatchMode):
    """Counts the operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", CONFIGS)
def test_the_host_never_waits_except_where_a_period_begins(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("layer_norm")
    maker = lambda p: SGD(p, lr=0.02, momentum=0.9, foreach=True)  # noqa: E731
    optimizer = attached(model, maker, **config(method))
    fetched: list[int] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t, *a, **k: (fetched.append(optimizer._method.step), cpu(t))[1])
    train(model, optimizer, "layer_norm", range(1))  # an optimizer without state is asked whether this step is real
    for step in range(1, 24):
        optimizer.zero_grad()
        loss_of(model, batch("layer_norm", step)).backward()
        with Asked() as asked:
            optimizer.step()
        assert asked.count == 0, step
    assert sorted(set(fetched)) == BOUNDARIES[method]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("maker", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
def test_exactly_the_number_asked_for_and_no_dead_group(sparsity: float, maker: Maker, method: str) -> None:
    arguments = config(method, target_group_sparsity=sparsity)
    if "tolerance_group_sparsity" in arguments:
        arguments["tolerance_group_sparsity"] = min(0.2, 0.99 - sparsity)
    for net, seed in [("conv", 0), ("residual", 1), ("layer_norm", 2)]:
        model = make(net, seed)
        optimizer = attached(model, maker, **arguments)
        train(model, optimizer, net, range(20))
        sizes = {g.name: g.size for g in model.groups()}  # type: ignore[operator]
        expected = min(units_for(sum(sizes.values()), sparsity), sum(sizes.values()) - len(sizes))
        metrics = optimizer.compute_metrics()
        assert metrics.num_zero_groups == sum(map(len, optimizer.removed.values())) == expected
        assert optimizer.removed == optimizer.redundant
        assert all(len(units) < sizes[name] for name, units in optimizer.removed.items())


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("divisible", [2, 3])
def test_numbers_per_group_are_multiples(divisible: int, method: str) -> None:
    for net in ("conv", "residual", "layer_norm"):
        model = make(net)
        optimizer = attached(model, sgd, **config(method, group_divisible=divisible))
        train(model, optimizer, net, range(20))
        requested = units_for(sum(g.size for g in model.groups()), 0.5)  # type: ignore[operator]
        assert optimizer.compute_metrics().num_zero_groups == requested - optimizer.shortfall
        for g in model.groups():  # type: ignore[operator]
            lost = len(optimizer.removed[g.name])
            assert not lost or (g.size - lost) % divisible == 0


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_group_sparsity": 1.0}, "target_group_sparsity is 1.0; the rule is 0 <= sparsity < 1"),
        ({"target_group_sparsity": -0.1}, "target_group_sparsity is -0.1"),
        ({"target_group_sparsity": float("nan")}, "target_group_sparsity is nan"),
        ({"target_group_sparsity": "a"}, "target_group_sparsity is 'a'"),
        ({"pruning_steps": 2}, r"pruning_steps \(2\) < pruning_periods \(3\)"),
        ({"pruning_steps": None}, "pruning_steps is None"),
        ({"pruning_periods": 0}, "pruning_periods is 0"),
        ({"start_pruning_step": -1}, "start_pruning_step is -1"),
        ({"group_divisible": 0}, "group_divisible is 0"),
        ({"window": 0}, "window is 0"),
        ({"pin": "sometimes"}, "pin is 'sometimes'"),
        ({"importance_score_criteria": "best"}, "names 'best'"),
        ({"importance_roles": ("norm",)}, "importance_roles"),
        ({"method": "magic"}, r"method is 'magic'; known methods are \[.*'hesso'"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything(config: dict[str, Any], message: str) -> None:
    model = make("conv")
    base = sgd(model.parameters())
    with pytest.raises(ConfigurationError, match=message):
        attach(base, model.groups(), tensors_of(model), **{**PLAN, **config})  # type: ignore[operator]
    assert type(base) is SGD
    assert not base._optimizer_step_pre_hooks


def test_attaching_twice_or_to_nothing_is_refused() -> None:
    model = make("conv")
    optimizer = attached(model, sgd)
    with pytest.raises(ConfigurationError, match="'hesso' is attached to this SGD already"):
        attach(optimizer, model.groups(), tensors_of(model))  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="cannot attach to 'ConvNet'"):
        attach(model, model.groups(), tensors_of(model))  # type: ignore[operator, type-var]


def test_parameters_missing_from_the_optimizer_are_named() -> None:
    model = make("conv")
    with pytest.raises(ConfigurationError, match=r"conv2.bias \(group conv2\)"):
        attached(model, lambda p: SGD([p for n, p in model.named_parameters() if n != "conv2.bias"], lr=0.1))


def test_groups_that_are_not_trained_are_left_alone() -> None:
    model = make("conv")
    model.bn1.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    optimizer = attached(model, sgd)
    train(model, optimizer, "conv", range(20))
    assert list(optimizer.removed) == ["conv2"]
    assert len(optimizer.removed["conv2"]) == 4
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(NothingPrunableError, match=r"conv1: not trained \(requires_grad=False\): conv1.weight"):
        attached(model, sgd)
    with pytest.raises(NothingPrunableError, match="there is no group at all"):
        attach(SGD(make("mlp").parameters(), lr=0.1), [], {})


@pytest.mark.parametrize(
    ("arguments", "cls", "expected"),
    [
        ({}, SGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}),
        ({"variant": "sgd", "first_momentum": 0.9, "dampening": 0.1}, SGD, {"momentum": 0.9, "dampening": 0.1}),
        ({"variant": "adam"}, Adam, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
        ({"variant": "adamw"}, AdamW, {"betas": (0.9, 0.999), "weight_decay": 1e-2}),
        ({"variant": "AdamW", "second_momentum": 0.95, "eps": 1e-6}, AdamW, {"betas": (0.9, 0.95), "eps": 1e-6}),
        ({"variant": torch.optim.RMSprop, "first_momentum": 0.5}, torch.optim.RMSprop, {"momentum": 0.5}),
        ({"variant": "nadam", "first_momentum": 0.8}, torch.optim.NAdam, {"betas": (0.8, 0.999)}),
    ],
)
def test_builder_speaks_the_references_names(arguments: dict[str, Any], cls: Any, expected: dict[str, Any]) -> None:
    model = make("conv")
    optimizer = build("hesso", tensors_of(model), model.groups(), device="cuda", **arguments)  # type: ignore[operator]
    assert isinstance(optimizer, cls)
    assert {k: optimizer.param_groups[0][k] for k in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "sgdx"}, "variant is 'sgdx'"),
        ({"variant": 3}, "variant is 3"),
        ({"variant": "sgd", "second_momentum": 0.9}, "SGD has only one"),
        ({"variant": "adam", "dampening": 0.9}, "Adam has no argument dampening"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_builder_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    model = make("conv")
    with pytest.raises(ConfigurationError, match=message):
        build("hesso", tensors_of(model), model.groups(), **arguments)  # type: ignore[operator]
