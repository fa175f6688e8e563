"""Units that leave while training goes on: the same result as without, from smaller tensors."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import only_train_once
from only_train_once import OTO, cutting
from only_train_once.cutting import CutEvent
from only_train_once.errors import CheckpointError, ConfigurationError, NothingPrunableError
from only_train_once.groups import GroupList, Kind, ParamSlice, PruningGroup, Role
from only_train_once.inputs import call_model, cast_inputs, fresh_inputs, named_outputs
from only_train_once.optim import attach
from tests.methods import CONFIGS, config
from tests.reference.nets import NETS, batch, loss_of, make
from tests.test_optim_resume import assert_same, through_file
from tests.zoo import ZOO, Case

END = 20  # after the 12 steps of pruning that begin at step 4
Make = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=3e-3),
    "amsgrad": lambda p: Adam(p, lr=3e-3, amsgrad=True, weight_decay=1e-3),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}
SHORT = {"target_group_sparsity": 0.4, "start_pruning_step": 2, "pruning_steps": 8, "pruning_periods": 2}


class Run:
    """A network of ``reference/nets.py`` under OTO, and the events of its cuts."""

    def __init__(
        self,
        net: str,
        make_optimizer: Make,
        cuts: bool,
        method: str = "hesso",
        dtype: torch.dtype = torch.float64,
        **changes: Any,
    ) -> None:
        arguments = config(method, **changes)
        if "lmbda" in arguments:
            arguments |= {"lmbda": 5.0, "epsilon": 0.9}
        if net == "layer_norm":
            arguments |= {"target_group_sparsity": 0.7}  # or only the inner width would go
        self.net, self.dtype = net, dtype
        self.model = make(net, dtype=dtype)
        self.oto = OTO(self.model, batch(net, 0, dtype), wide=True)
        self.optimizer: Any = make_optimizer(self.model.parameters())
        self.oto.attach(self.optimizer, physical_cuts=cuts, **arguments)
        self.events: list[CutEvent] = []
        if cuts:
            self.optimizer.register_cut_hook(self.events.append)

    def train(self, *steps: int) -> Run:
        for step in range(*steps):
            self.optimizer.zero_grad()
            loss_of(self.model, batch(self.net, step, self.dtype)).backward()
            self.optimizer.step()
        return self


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t for _, t in named_outputs(call_model(model.eval(), inputs))]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [t.shape for t in found] == [t.shape for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-8 * float(b.abs().max())


# -- the result is that of the uncut run ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("net", [n for n in NETS if n != "attention"])  # its heads are written as a number
def test_every_method_and_optimizer_ends_where_it_would_have(net: str, name: str, method: str) -> None:
    whole = Run(net, OPTIMIZERS[name], False, method).train(END)
    less = Run(net, OPTIMIZERS[name], True, method).train(END)
    assert less.optimizer.removed == whole.optimizer.removed
    assert sum(map(len, whole.optimizer.removed.values())) == whole.optimizer._method.total
    assert len(less.events) == (3 if method == "hesso" else 1)
    for group in less.oto.groups.prunable:
        gone = less.optimizer.removed[group.name]
        assert group.origin is not None or not gone
        numbers = np.arange(group.size) if group.origin is None else group.origin.numbers
        assert sorted([*numbers, *gone]) == list(range(group.size + len(gone)))
    small, large = less.oto.construct_subnet(), whole.oto.construct_subnet()
    for (n, a), b in zip(small.model.state_dict().items(), large.model.state_dict().values(), strict=True):
        assert a.shape == b.shape, n
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12), n
    assert [p.shape for p in less.model.parameters()] == [p.shape for p in small.model.parameters()]
    assert small.report.verified_difference is not None
    assert small.report.verified_difference <= 1e-9
    now, then = less.optimizer.compute_metrics(), whole.optimizer.compute_metrics()
    assert (now.num_zero_groups, now.num_redundant_groups) == (then.num_zero_groups, then.num_redundant_groups)
    assert now.norm_params == pytest.approx(then.norm_params, rel=1e-9)


def trained(
    case: Case, cuts: bool, make_optimizer: Make | None = None, **arguments: Any
) -> tuple[OTO, Any, Any, list[CutEvent]] | None:
    model, inputs = case.build().double().train(), cast_inputs(case.inputs(), torch.double)
    for part in model.modules():  # noise is drawn for the shapes there are, so it differs
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0  # type: ignore[assignment]
    oto = OTO(model, inputs, wide=True)
    usual = SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-2)
    optimizer: Any = usual if make_optimizer is None else make_optimizer(model.parameters())
    try:
        oto.attach(optimizer, physical_cuts=cuts, **SHORT, **arguments)
    except NothingPrunableError:
        return None
    events: list[CutEvent] = []
    optimizer.register_cut_hook(events.append)
    for step in range(12):
        torch.manual_seed(step)
        found = [t for _, t in named_outputs(call_model(model, fresh_inputs(inputs, step))) if t.requires_grad]
        real = [t.real if t.is_complex() else t for t in found]
        optimizer.zero_grad()
        torch.stack([t.square().mean() + t.sin().mean() for t in real]).sum().backward()
        optimizer.step()
    return oto, optimizer, inputs, events


NO_FLOAT64 = {
    *("written_buffer", "lru", "hyena", "grouped_experts", "grouped_transposed"),
    *("graph_attention", "conformer", "fourier_operator"),
}


@pytest.mark.parametrize("name", [n for n in ZOO if n not in NO_FLOAT64])
def test_every_structure_ends_where_it_would_have(name: str) -> None:
    ends_alike(name)


@pytest.mark.parametrize("make_optimizer", [v for k, v in OPTIMIZERS.items() if k != "sgd"])
@pytest.mark.parametrize("name", ["residual", "grouped", "shuffle", "layer_norm", "rms_norm", "grouped_query", "tied"])
def test_structures_end_alike_under_any_optimizer(name: str, make_optimizer: Make) -> None:
    ends_alike(name, make_optimizer)


def ends_alike(name: str, make_optimizer: Make | None = None, **arguments: Any) -> None:
    runs = []
    for cuts in (False, True):
        torch.manual_seed(0)
        runs.append(trained(ZOO[name], cuts, make_optimizer, **arguments))
    whole, less = runs
    if whole is None or less is None:
        assert whole is less
        return
    assert less[1].removed == whole[1].removed
    assert len(less[3]) == len(
        {n for n in (1, 2) if whole[1]._method.total >= n}
    )  # a period without a unit cuts nothing
    small, large = less[0].construct_subnet(), whole[0].construct_subnet()
    assert small.report.excluded == large.report.excluded == {}
    assert [p.shape for p in small.model.parameters()] == [p.shape for p in large.model.parameters()]
    assert [p.shape for p in less[0].model.parameters()] == [p.shape for p in small.model.parameters()]
    inputs = fresh_inputs(less[2], 99)
    assert_close(outputs(small.model, inputs), outputs(large.model, inputs))
    assert_close(outputs(less[0].model, inputs), outputs(large.model, inputs))


NORMS = [
    *("layer_norm", "rms_norm", "hand_rms_norm", "weightless_rms_norm", "power_rms_norm", "hand_layer_norm"),
    *("unbiased_rms_norm", "scaled_rms_norm", "offset_layer_norm", "active_layer_norm"),
    *("literal_rms_norm", "literal_layer_norm"),
]


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_any_kind_train_on(name: str) -> None:
    """Their width is cut twice, and goes on being counted in full; a rescaled weight would train differently."""

    def width_first(group: PruningGroup, *_: Any) -> Tensor:
        return torch.arange(group.size) + (0.0 if group.name.endswith(":width") else 100.0)

    runs = []
    for cuts in (False, True):
        torch.manual_seed(0)
        found = trained(ZOO[name], cuts, importance_score_criteria=width_first, align=1)
        assert found is not None
        runs.append(found)
    whole, less = runs
    width = next(n for n in whole[1].removed if n.endswith(":width"))
    assert len(whole[1].removed[width]) >= 11
    assert [width in event.removed for event in less[3]] == [True, True]
    inputs = fresh_inputs(less[2], 99)
    small, large = less[0].construct_subnet(), whole[0].construct_subnet()
    assert_close(outputs(small.model, inputs), outputs(large.model, inputs))
    assert_close(outputs(less[0].model, inputs), outputs(large.model, inputs))
    assert small.report.verified_difference is not None
    assert small.report.excluded == {}


class Settings:
    """Not a module."""

    heads = 4


class Configured(nn.Module):
    """Reads the number of its heads from an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).unflatten(-1, (self.settings.heads, -1)).relu().flatten(-2))


def test_attributes_outside_of_modules_are_undone_too() -> None:
    model = Configured().double()
    rows = np.arange(8).reshape(4, 2)
    slices = (
        *(ParamSlice(f"up.{leaf}", 0, rows, Role.ZERO, 8) for leaf in ("weight", "bias")),
        ParamSlice("down.weight", 1, rows, Role.CONSUMER, 8),
        ParamSlice("settings.heads", 0, np.arange(4)[:, None], Role.ATTRIBUTE, 4),
    )
    groups = GroupList([PruningGroup("up:heads", Kind.HEAD, slices)])
    optimizer: Any = attach(SGD(model.parameters(), lr=0.1), groups, dict(model.named_parameters()), pruning_steps=2)
    cuts = cutting.LiveCuts(model, groups, torch.randn(3, 6))
    cuts.attach(optimizer, by_itself=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 6, dtype=torch.double)).square().mean().backward()
        optimizer.step()
    assert (model.settings.heads, model.up.out_features) == (2, 4)
    full: Any = cuts.full_model()
    assert (full.settings.heads, full.up.out_features, full.up.weight.shape) == (4, 8, (8, 6))
    assert (model.settings.heads, model.up.out_features) == (2, 4)
    inputs = torch.randn(3, 6, dtype=torch.double)
    assert_close(outputs(full, inputs), outputs(model, inputs))
    assert sorted(optimizer.removed["up:heads"]) == torch.nonzero(full.up.bias.view(4, 2).sum(1) == 0).ravel().tolist()


@pytest.mark.parametrize(
    "criteria", ["otov2", "cosine_similarity", "avg_magnitude", "fisher_diagonal", "group_fisher", "lamp", "fpgm"]
)
@pytest.mark.parametrize("net", ["conv", "residual", "layer_norm"])
def test_scores_are_those_of_the_uncut_run(net: str, criteria: str) -> None:
    seen: list[list[Any]] = []
    for cuts in (False, True):
        run = Run(net, OPTIMIZERS["sgd"], cuts, importance_score_criteria=criteria)
        scoring, scores = run.optimizer._method.scoring, []
        own = scoring.scores
        scoring.scores = lambda *a, own=own, scores=scores: scores.append((a[2], own(*a))) or scores[-1][1]
        run.train(END)
        seen.append(scores)
    assert len(seen[0]) == 3
    for (gone, whole), (also, less) in zip(*seen, strict=True):
        assert (gone == also).all()
        live = ~gone
        np.testing.assert_allclose(np.concatenate(less)[live], np.concatenate(whole)[live], rtol=1e-9)


def test_dropped_gradients_change_nothing_that_clipping_sees() -> None:
    """The norm that clips is that of the uncut run: what is at zero has no gradient, unless it had to be pinned."""

    def norms(net: str, cuts: bool) -> list[float]:
        run = Run(net, OPTIMIZERS["sgd"], cuts)
        found = []
        for step in range(END):
            run.optimizer.zero_grad()
            loss_of(run.model, batch(net, step)).backward()
            found.append(float(nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)))
            run.optimizer.step()
        return found

    assert norms("residual", cuts=True) == pytest.approx(norms("residual", cuts=False), rel=1e-9)
    pinned = np.abs(np.array(norms("layer_norm", cuts=True)) / np.array(norms("layer_norm", cuts=False)) - 1)
    assert pinned[:8].max() < 1e-12  # before the first cut
    assert 1e-9 < pinned.max() < 0.1  # the layer norm's statistics leak gradient into what is gone


# -- everything stays what it was -------------------------------------------------------------------------------------


def test_objects_stay_and_get_smaller() -> None:
    run = Run("layer_norm", OPTIMIZERS["amsgrad"], cuts=True)
    parameters, buffers = dict(run.model.named_parameters()), dict(run.model.named_buffers())
    run.model.ln.weight.mark = "mine"  # type: ignore[union-attr]
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 5)
    for step in range(END):
        run.train(step, step + 1)
        scheduler.step()
    assert all(p is parameters[n] for n, p in run.model.named_parameters())
    assert all(b is buffers[n] for n, b in run.model.named_buffers())
    assert run.optimizer.param_groups[0]["params"] == list(parameters.values())
    assert run.optimizer.get_learning_rate() == pytest.approx(3e-3 * 0.1**4)
    assert run.model.ln.weight.mark == "mine"  # type: ignore[union-attr]
    assert type(run.model.ln) is only_train_once.norms.FullWidthLayerNorm
    assert sum(p.numel() for p in parameters.values()) < 200
    for parameter in parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        state = run.optimizer.state[parameter]
        assert {k: v.shape for k, v in state.items()} == {
            "step": torch.Size([]), **dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), parameter.shape)
        }  # fmt: skip
    assert all(
        type(m) is type(n) for m, n in zip(make("layer_norm").modules(), run.oto._full()[0].modules(), strict=True)
    )


def test_events_tell_what_left_by_the_numbers_it_always_had() -> None:
    run = Run("residual", OPTIMIZERS["sgd"], cuts=True)
    calls: list[int] = []
    handle = run.optimizer.register_cut_hook(lambda event: calls.append(event.step))
    run.train(12)
    handle.remove()
    run.train(12, END)
    assert calls == [8, 12]
    assert [e.step for e in run.events] == [8, 12, 16]
    together: dict[str, list[int]] = {name: [] for name in run.optimizer.removed}
    for event in run.events:
        for name, units in event.removed.items():
            together[name] += units
        for shapes in event.shapes.values():
            assert np.prod(shapes[0]) > np.prod(shapes[1])
        assert event.model is run.model
    assert {name: sorted(units) for name, units in together.items()} == run.optimizer.removed
    assert any(max(units) >= run.oto.groups[name].size for name, units in together.items() if units)
    assert str(run.events[0]).startswith("step 8: ")


def test_compact_cuts_when_told_to() -> None:
    run = Run("residual", OPTIMIZERS["sgd"], cuts=False)
    whole = Run("residual", OPTIMIZERS["sgd"], cuts=False).train(END)
    assert run.oto.compact(run.optimizer) is None  # nothing is settled
    run.train(10)  # in the middle of the second period
    event = run.oto.compact(run.optimizer)
    assert event is not None
    assert sum(map(len, event.removed.values())) == 2
    run.train(10, END)
    assert run.optimizer.removed == whole.optimizer.removed
    last = run.oto.compact(run.optimizer, verify=False)
    assert last is not None
    assert sum(map(len, last.removed.values())) == 5
    assert run.oto.compact(run.optimizer) is None
    assert_same(
        {n: t.shape for n, t in run.model.state_dict().items()},
        {n: t.shape for n, t in whole.oto.construct_subnet().model.state_dict().items()},
    )


def test_another_round_prunes_what_is_left() -> None:
    run = Run("residual", OPTIMIZERS["sgd"], cuts=True).train(END)
    gone = run.optimizer.removed
    second: Any = SGD(run.model.parameters(), lr=0.02, momentum=0.9)
    run.oto.attach(second, physical_cuts=True, target_group_sparsity=0.3, pruning_steps=4, pruning_periods=2)
    assert second.compute_metrics().num_zero_groups == 0
    events: list[CutEvent] = []
    second.register_cut_hook(events.append)
    for step in range(2):
        second.zero_grad()
        loss_of(run.model, batch("residual", step)).backward()
        second.step()
    assert len(events) == 1
    for name, units in events[0].removed.items():
        assert not set(units) & set(gone[name])  # by the numbers of the full network
    assert second.compute_metrics().num_zero_groups == 1 == sum(map(len, second.removed.values()))
    again = Run("residual", OPTIMIZERS["sgd"], cuts=True)
    again.oto.resume(again.optimizer, run.optimizer.state_dict(), run.model.state_dict())  # knows of both
    assert again.optimizer.removed == gone
    assert_same(dict(again.model.state_dict()), dict(run.model.state_dict()))
    subnet = run.oto.construct_subnet()
    assert subnet.report.units_removed == 8
    assert_close(outputs(subnet.model, batch("residual", 99)), outputs(run.model, batch("residual", 99)))


def test_gradients_and_hooks_go_on() -> None:
    """With graphs still alive, hooks on parameters, and gradients of several backward passes."""
    run = Run("residual", OPTIMIZERS["sgd"], cuts=True)
    whole = Run("residual", OPTIMIZERS["sgd"], cuts=False)
    shapes: list[torch.Size] = []
    weight = run.model.a.weight  # type: ignore[union-attr]
    weight.register_hook(lambda g: shapes.append(g.shape))
    weight.register_post_accumulate_grad_hook(lambda p: shapes.append(p.grad.shape))
    alive = []
    for each in (run, whole):
        for step in range(END):
            loss_of(each.model, batch("residual", step)).backward()
            loss_of(each.model, batch("residual", 50 + step)).backward()
            alive.append(loss_of(each.model, batch("residual", step)))
            before = {n: p.grad.clone() for n, p in each.model.named_parameters()}
            each.optimizer.step()
            for name, parameter in each.model.named_parameters():
                assert parameter.grad.shape == parameter.shape
                assert set(parameter.grad.ravel().tolist()) <= set(before[name].ravel().tolist())
            each.optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert run.optimizer.removed == whole.optimizer.removed
    inputs = batch("residual", 99)
    assert_close(outputs(run.model, inputs), outputs(whole.model, inputs))
    assert len(shapes) == 4 * END
    assert shapes[0] == (6, 8, 3, 3)
    assert shapes[-1] == weight.shape != shapes[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alive[0].backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_goes_on(backend: str) -> None:
    torch._dynamo.reset()
    run = Run("residual", OPTIMIZERS["adamw"], cuts=True)
    whole = Run("residual", OPTIMIZERS["adamw"], cuts=False).train(END)
    compiled = torch.compile(run.model, backend=backend)
    run.optimizer.cut_also(compiled)  # is the model itself: cut once
    for step in range(END):
        run.optimizer.zero_grad()
        loss_of(compiled, batch("residual", step)).backward()
        run.optimizer.step()
    assert run.optimizer.removed == whole.optimizer.removed
    inputs = batch("residual", 99)
    assert_close(outputs(compiled, inputs), outputs(whole.model, inputs))


def test_averages_are_cut_along() -> None:
    run = Run("layer_norm", OPTIMIZERS["sgd"], cuts=True)
    averaged = torch.optim.swa_utils.AveragedModel(
        run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    plain = copy.deepcopy(run.model)
    second: Any = SGD([run.model.head.weight], lr=0.0, momentum=0.9)  # type: ignore[union-attr]
    run.optimizer.cut_also(averaged, plain, second)
    for step in range(END):
        run.train(step, step + 1)
        second.step()
        averaged.update_parameters(run.model)
    shapes = [p.shape for p in run.model.parameters()]
    assert [p.shape for p in averaged.module.parameters()] == [p.shape for p in plain.parameters()] == shapes
    inputs = batch("layer_norm", 99)
    assert outputs(averaged, inputs)[0].isfinite().all()
    assert second.state[run.model.head.weight]["momentum_buffer"].shape == run.model.head.weight.shape  # type: ignore[union-attr]
    width = run.oto.groups["embed:width"].origin
    assert width is not None
    assert torch.equal(plain.embed.bias, make("layer_norm").embed.bias[width.numbers])  # type: ignore[union-attr, index]


def rank(number: int, meeting: str, rebuild: bool) -> None:
    """One of two processes: after every step, the gradients of both have to agree."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2)
    if not rebuild:
        cutting._rebuild = lambda wrapper: None
    for options in WRAPPED:
        run = Run("residual", OPTIMIZERS["sgd"], cuts=True)
        wrapped = DistributedDataParallel(run.model, **options)
        for step in range(END):
            run.optimizer.zero_grad()
            loss_of(wrapped, batch("residual", step)[number::2]).backward()
            for parameter in run.model.parameters():
                assert parameter.grad is not None
                both = [torch.empty_like(parameter.grad) for _ in range(2)]
                distributed.all_gather(both, parameter.grad.contiguous())
                assert torch.equal(*both), f"step {step} with {options}"
            run.optimizer.step()
        assert [e.step for e in run.events] == [8, 12, 16]
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of torch's may outlive the interpreter, and then abort the process now and then.
    os._exit(0)


WRAPPED: tuple[dict[str, Any], ...] = (
    {},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "find_unused_parameters": True},
)


def test_gradients_go_on_being_reduced(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path / "meeting"), True), nprocs=2)


def test_without_a_new_reducer_gradients_would_differ(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"AssertionError: step 8 with {}"):
        torch.multiprocessing.spawn(rank, (str(tmp_path / "meeting"), False), nprocs=2)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    run = Run("residual", OPTIMIZERS["adamw"], cuts=True).train(10)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    again_model, again = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    run.train(10, END)
    for other, its in ((model, optimizer), (again_model, again)):
        assert [p.shape for p in other.parameters()] != [p.shape for p in run.model.parameters()]
        for step in range(10, END):
            its.zero_grad()
            loss_of(other, batch("residual", step)).backward()
            its.step()
        assert_same(dict(other.state_dict()), dict(run.model.state_dict()))
        assert its.removed == run.optimizer.removed


# -- stopping and continuing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hesso", "hspg, prox", "dhspg", "hesso_cric"])
@pytest.mark.parametrize("net", ["conv", "layer_norm"])
@pytest.mark.parametrize("stop", [3, 8, 10, 12, 13, 17])
def test_a_fresh_process_continues_bit_for_bit(net: str, method: str, stop: int) -> None:
    """Also in mid-period, with a window that has begun, after one or more cuts."""
    run = Run(net, OPTIMIZERS["adamw"], True, method, torch.float32).train(stop)
    saved = through_file({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    fresh = Run(net, OPTIMIZERS["adamw"], True, method, torch.float32)
    fresh.oto.resume(fresh.optimizer, saved["optimizer"], saved["model"])
    assert fresh.optimizer.removed == run.optimizer.removed
    assert len(fresh.events) == (1 if run.events else 0)
    assert_same(fresh.optimizer.state_dict(), saved["optimizer"])
    run.train(stop, END)
    fresh.train(stop, END)
    assert_same(dict(fresh.model.state_dict()), dict(run.model.state_dict()))
    assert_same(fresh.optimizer.state_dict(), run.optimizer.state_dict())
    assert fresh.optimizer.removed == run.optimizer.removed
    small, other = run.oto.construct_subnet(), fresh.oto.construct_subnet()
    assert_same(dict(small.model.state_dict()), dict(other.model.state_dict()))
    assert {n: c.kept for n, c in small.record.tensors.items()} == {n: c.kept for n, c in other.record.tensors.items()}


def test_a_saved_subnet_loads_from_the_original_constructor(tmp_path: Any) -> None:
    run = Run("layer_norm", OPTIMIZERS["sgd"], cuts=True).train(END)
    subnet = run.oto.construct_subnet()
    subnet.save(tmp_path)
    loaded = only_train_once.load(tmp_path, build=lambda: make("layer_norm"))
    inputs = batch("layer_norm", 99)
    assert_close(outputs(loaded, inputs), outputs(run.model, inputs))
    assert subnet.record.tensors["embed.weight"].shape == (8, 6)
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in run.model.parameters()]


def test_what_has_left_does_not_come_back() -> None:
    run = Run("conv", OPTIMIZERS["sgd"], cuts=True).train(8)
    early = through_file(run.optimizer.state_dict())
    run.train(8, END)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"7 units have left this network, 2 had .* units cannot come back"):
        run.optimizer.load_state_dict(early)
    assert_same(run.optimizer.state_dict(), before)
    del early["param_groups"][0]["only_train_once"]["absent"]  # as states of earlier versions are
    with pytest.raises(CheckpointError, match="7 units have left this network, 0 had"):
        run.optimizer.load_state_dict(early)
    early = before
    plain = Run("conv", OPTIMIZERS["sgd"], cuts=False)
    with pytest.raises(CheckpointError, match="make the optimizer with physical_cuts=True"):
        plain.optimizer.load_state_dict(early)
    damaged = copy.deepcopy(early)
    damaged["param_groups"][0]["only_train_once"]["absent"][:6] = 1
    fresh = Run("conv", OPTIMIZERS["sgd"], cuts=True)
    before = copy.deepcopy(fresh.optimizer.state_dict())
    with pytest.raises(CheckpointError, match="have left the network, but they cannot leave this one"):
        fresh.optimizer.load_state_dict(damaged)
    state = copy.deepcopy(early)
    state["param_groups"][0]["only_train_once"]["chosen"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="14 units"):
        fresh.optimizer.load_state_dict(state)
    assert_same(fresh.optimizer.state_dict(), before)
    assert [p.shape for p in fresh.model.parameters()] == [p.shape for p in make("conv").parameters()]


# -- what is refused ---------------------------------------------------------------------------------------------------


class Odd(SGD):
    """Keeps something of a shape that says nothing."""

    entry: Any = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["blocks"] = self.entry(parameter)
        return super().step(closure)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda p: torch.zeros(7), r"Odd keeps 'blocks' of shape \[7\] for 'conv\d.weight' of shape \["),
        (lambda p: torch.zeros(p.shape[0]), r"Odd keeps 'blocks' of shape \[8\] for 'conv2.weight' of shape \[8, 6"),
        (lambda p: [torch.zeros(3), torch.zeros(3)], "Odd keeps 'blocks' a list of tensors for 'conv1.weight'"),
        (lambda p: {"deep": torch.zeros(2, 2)}, r"Odd keeps 'deep' of shape \[2, 2\]"),
    ],
)
def test_state_of_another_shape_is_refused_before_anything_changes(entry: Any, message: str) -> None:
    kind = type("Odd", (Odd,), {"entry": staticmethod(entry)})
    run = Run("conv", lambda p: kind(p, lr=0.02, momentum=0.9), cuts=True)
    run.train(7)
    with pytest.raises(ConfigurationError, match=message):
        run.train(7, 8)
    assert [p.shape for p in run.model.parameters()] == [p.shape for p in make("conv").parameters()]
    assert run.optimizer.state[run.model.conv1.weight]["momentum_buffer"].shape == (6, 3, 3, 3)  # type: ignore[union-attr]
    run.optimizer._cuts_by_itself = False
    run.train(8, END)  # the loop can go on without cuts
    assert run.optimizer.compute_metrics().num_zero_groups == 7


def test_state_of_rows_and_columns_is_cut() -> None:
    run = Run("mlp", lambda p: torch.optim.Adafactor(p, lr=1e-2), cuts=True).train(END)
    state = run.optimizer.state[run.model.fc2.weight]  # type: ignore[union-attr]
    assert {k: tuple(v.shape) for k, v in state.items()} == {"step": (), "row_var": (4, 1), "col_var": (1, 6)}


def test_what_cannot_be_cut_is_refused_at_once() -> None:
    run = Run("conv", OPTIMIZERS["sgd"], cuts=False)
    with pytest.raises(ConfigurationError, match="units cannot leave physically under LBFGS"):
        run.oto.attach(torch.optim.LBFGS(run.model.parameters()), physical_cuts=True)
    with pytest.raises(ConfigurationError, match=r"physical_cuts is 1; it has to be True or False"):
        run.oto.hesso(physical_cuts=1)
    with pytest.raises(ConfigurationError, match="no units leave under this optimizer"):
        run.optimizer.cut_also(run.model)
    with pytest.raises(ConfigurationError, match="no method is attached to this SGD"):
        run.oto.compact(SGD(run.model.parameters(), lr=0.1))
    other = Run("conv", OPTIMIZERS["sgd"], cuts=True)
    with pytest.raises(ConfigurationError, match="attached by another OTO object"):
        run.oto.compact(other.optimizer)
    with pytest.raises(ConfigurationError, match="cut_also was given a str; it takes modules and optimizers"):
        other.optimizer.cut_also("model")
    with pytest.raises(ConfigurationError, match="has another group 'fc1' than the one whose units leave"):
        other.optimizer.cut_also(Run("mlp", OPTIMIZERS["sgd"], cuts=False).optimizer)
    busy: Any = SGD(other.model.parameters(), lr=0.1)
    other.oto.attach(busy, "hspg", pruning_steps=40)
    other.train(7)
    with pytest.raises(ConfigurationError, match="cannot leave while 'hspg', attached to another, is at work"):
        other.train(7, 8)
    assert [p.shape for p in other.model.parameters()] == [p.shape for p in make("conv").parameters()]
    del busy
    other.train(8, END)
    with pytest.raises(ConfigurationError, match="analyse what is left of it"):
        other.oto.partition_pzigs()
    with pytest.raises(ConfigurationError, match="freeze groups before training"):
        other.oto.mark_unprunable_by_param_names(["conv1"])


class Wrapped(Tensor):
    """A tensor of another kind, as sharded and quantized ones are."""


def test_parameters_that_are_no_plain_tensors_are_refused() -> None:
    model = make("conv")
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach().as_subclass(Wrapped))  # type: ignore[union-attr, arg-type]
    optimizer = SGD(model.parameters(), lr=0.1)
    oto = OTO(make("conv"), batch("conv", 0))
    oto.model = model
    with pytest.raises(ConfigurationError, match=r"'conv1.weight' is a \w+, not a plain tensor"):
        oto.attach(optimizer, physical_cuts=True)


def test_a_module_that_is_no_copy_is_refused_before_anything_changes() -> None:
    run = Run("conv", OPTIMIZERS["sgd"], cuts=True)
    stranger = make("mlp")
    run.optimizer.cut_also(stranger)
    with pytest.raises(only_train_once.errors.SurgeryError, match="which Mlp does not have"):
        run.train(8)
    assert [p.shape for p in run.model.parameters()] == [p.shape for p in make("conv").parameters()]
    del stranger  # not kept alive
    run.train(8, END)
    assert len(run.events) == 2


def test_a_group_that_is_not_exact_keeps_its_units(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    from only_train_once import exact

    real = exact.construct_subnet

    def spoiling(model: nn.Module, groups: Any, removed: dict[str, list[int]], **options: Any) -> Any:
        subnet, record = real(model, groups, removed, **options)
        if removed.get("conv1"):
            with torch.no_grad():
                subnet.conv1.weight.mul_(1.01)  # type: ignore[union-attr, operator]
        return subnet, record

    monkeypatch.setattr(exact, "construct_subnet", spoiling)

    def first_conv1(group: PruningGroup, *_: Any) -> Tensor:
        return torch.arange(group.size) + (4.0 if group.name == "conv2" else 0.0)

    with caplog.at_level(logging.WARNING):
        run = Run("conv", OPTIMIZERS["adamw"], cuts=True, importance_score_criteria=first_conv1).train(END)
    assert caplog.text.count("units of group conv1 stay, at zero") == 1
    assert run.oto.groups["conv1"].size == 6
    assert run.oto.groups["conv2"].size == 8 - len(run.optimizer.removed["conv2"]) < 8
    assert run.optimizer.removed["conv1"] == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    subnet = run.oto.construct_subnet()
    assert {g.name: g.removed for g in subnet.report.groups if g.removed} == {
        name: len(units) for name, units in run.optimizer.removed.items()
    }
