"""What training loops do with optimizers: a table of habits, and two facts that hold for every row and method.

Until pruning begins, weights and state are those of the base optimizer alone, bit for bit. After it, the
units asked for are at zero, and the user's param groups are as they were.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from only_train_once.optim import attach
from tests.methods import config, starting
from tests.reference.nets import batch, loss_of, make, tensors_of
from tests.test_optim_resume import assert_same, through_file

NET, START, END = "conv", 8, 26
METHODS = ("hesso", "hspg", "dhspg", "ada_hspg", "hesso_cric")

Run = tuple[nn.Module, Any]
Loop = Callable[[nn.Module, Any, range], Run]


def loss_at(model: nn.Module, step: int) -> Tensor:
    return loss_of(model, batch(NET, step, next(model.parameters()).dtype))


def plainly(model: nn.Module, optimizer: Any, steps: range) -> Run:
    for step in steps:
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
    return model, optimizer


# -- param groups ----------------------------------------------------------------------------------------------------


def everything(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3, foreach=False, **options)


def by_layer(model: nn.Module) -> Optimizer:
    """Layer-wise learning rates, weight decay for matrices only, and a mark of the user's."""
    groups = []
    for depth, layer in enumerate(model.children()):
        for decays in (True, False):
            chosen = [p for p in layer.parameters() if (p.dim() > 1) is decays]
            decay = 0.1 if decays else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": 3e-3 * 0.8**depth, "weight_decay": decay, "depth": depth})
    return AdamW(groups, foreach=False)


def by_name(model: nn.Module) -> Optimizer:
    return AdamW(list(model.named_parameters()), lr=3e-3, foreach=False)


def freeze_some(model: nn.Module) -> Optimizer:
    """Parameters that nobody trains are in the param groups all the same."""
    model.fc.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    return everything(model, weight_decay=0.1)


def all_but_a_late_one(model: nn.Module) -> Optimizer:
    model.late = nn.Parameter(torch.ones(4))
    return AdamW([p for n, p in model.named_parameters() if n != "late"], lr=3e-3, foreach=False)


def add_a_group_late(model: nn.Module, optimizer: Any, steps: range) -> Run:
    for step in steps:
        if step == 4:
            optimizer.add_param_group({"params": [model.late], "lr": 1e-2})
        optimizer.zero_grad()
        loss = loss_at(model, step)
        (loss + (model.late * loss.detach()).square().sum()).backward()  # type: ignore[operator]
        optimizer.step()
    return model, optimizer


# -- steps -----------------------------------------------------------------------------------------------------------


def by_closure(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """Lightning always passes one."""
    for step in steps:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, step)  # noqa: B023
            loss.backward()
            return loss

        assert bool(optimizer.step(closure).isfinite())
    return model, optimizer


def accumulating_and_clipping(model: nn.Module, optimizer: Any, steps: range) -> Run:
    for step in steps:
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(3):
            (loss_at(model, 3 * step + part) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    return model, optimizer


def with_gaps(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """Some parameters have no gradient in some steps."""
    for step in steps:
        optimizer.zero_grad()
        loss_at(model, step).backward()
        if step % 2:
            model.bn2.weight.grad = model.fc.bias.grad = None  # type: ignore[union-attr]
        optimizer.step()
    return model, optimizer


def scaled(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """A gradient overflows now and then; `step` is then not called, or told to skip."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in steps:
        for overflows in (True, False) if step in (2, 10, 13) else (False,):
            optimizer.zero_grad()
            scaler.scale(loss_at(model, step)).backward()
            if overflows:
                model.fc.bias.grad.fill_(torch.inf)  # type: ignore[union-attr, operator]
            scaler.step(optimizer)
            scaler.update()
    return model, optimizer


def under_autocast(dtype: torch.dtype) -> Loop:
    def loop(model: nn.Module, optimizer: Any, steps: range) -> Run:
        for step in steps:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_at(model, step)
            loss.backward()
            optimizer.step()
        return model, optimizer

    return loop


def in_bfloat16(model: nn.Module) -> Optimizer:
    return everything(model.bfloat16())


# -- schedules -------------------------------------------------------------------------------------------------------


def scheduled(make_one: Callable[[Optimizer], Any]) -> Loop:
    """The scheduler is made after the method is attached, and lives on with the run."""
    made: dict[int, Any] = {}

    def loop(model: nn.Module, optimizer: Any, steps: range) -> Run:
        scheduler = made.setdefault(id(optimizer), None) or make_one(optimizer)
        made[id(optimizer)] = scheduler
        for step in steps:
            plainly(model, optimizer, range(step, step + 1))
            scheduler.step()
        return model, optimizer

    return loop


# -- around the optimizer --------------------------------------------------------------------------------------------


def averaged(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """An exponential moving average of the weights is kept beside."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in steps:
        plainly(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    assert all(bool(p.isfinite().all()) for p in average.parameters())
    return model, optimizer


def moved(value: Any) -> Any:
    """Every tensor in nested containers on the device, as accelerate moves a state."""
    if isinstance(value, dict):
        return type(value)({k: moved(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v) for v in value)
    return value.to("cpu") if isinstance(value, Tensor) else value


def prepared(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """What accelerate calls: a round trip of the state, then a ``step`` replaced on the instance around each step."""
    optimizer.load_state_dict(moved(optimizer.state_dict()))
    original = optimizer.step
    called = 0

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        return original(*args, **kwargs)

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in steps:
        optimizer.zero_grad()
        scaler.scale(loss_at(model, step)).backward()
        optimizer.step = patched
        scaler.step(optimizer)
        optimizer.step = original
        scaler.update()
    assert called == len(steps)
    return model, optimizer


def by_accelerate(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """Prepared anew, as after a restart, with everything saved to a folder and loaded in between."""
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        wrapped, prepared_optimizer = accelerator.prepare(model, optimizer)
        for step in steps:
            prepared_optimizer.zero_grad()
            accelerator.backward(loss_at(wrapped, step))
            accelerator.clip_grad_norm_(wrapped.parameters(), 100.0)
            prepared_optimizer.step()
            if step % 5 == 0:
                with tempfile.TemporaryDirectory() as folder:
                    accelerator.save_state(folder)
                    accelerator.load_state(folder)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert wrapped is model
    assert prepared_optimizer.optimizer is optimizer
    return model, optimizer


def schedule_free(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """Trained at one set of weights, left at another, their average."""
    optimizer.train()
    plainly(model, optimizer, steps)
    optimizer.eval()
    return model, optimizer


def saved_at_first(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """``torch.distributed.checkpoint`` makes an empty optimizer take a step, to see its state."""
    optimizer.zero_grad()
    get_optimizer_state_dict(model, optimizer)
    return plainly(model, optimizer, steps)


def saved_in_between(model: nn.Module, optimizer: Any, steps: range) -> Run:
    for step in steps:
        plainly(model, optimizer, range(step, step + 1))
        optimizer.load_state_dict(through_file(optimizer.state_dict()))
    return model, optimizer


def copied(model: nn.Module, optimizer: Any, steps: range) -> Run:
    """Training goes on with copies every few steps."""
    for step in steps:
        plainly(model, optimizer, range(step, step + 1))
        if step % 3 == 0:
            model, optimizer = copy.deepcopy((model, optimizer))
    return model, optimizer


def compiled_model(model: nn.Module, optimizer: Any, steps: range) -> Run:
    run = torch.compile(model, backend="aot_eager")
    for step in steps:
        optimizer.zero_grad()
        loss_of(run, batch(NET, step, torch.float32)).backward()  # type: ignore[arg-type]
        optimizer.step()
    return model, optimizer


def compiled_step(model: nn.Module, optimizer: Any, steps: range) -> Run:
    step_now = torch.compile(optimizer.step, backend="aot_eager")
    for step in steps:
        optimizer.zero_grad()
        loss_at(model, step).backward()
        step_now()
    return model, optimizer


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habit:
    """How a run is made and trained.

    Attributes:
        loop: trains some steps; gives back model and optimizer, which may be others by then.
        base: model -> the base optimizer.
        methods: with which it is tried.
    """

    loop: Loop = plainly
    base: Callable[[nn.Module], Optimizer] = everything
    methods: tuple[str, ...] = METHODS


HABITS: dict[str, Habit] = {
    "layer-wise rates, decay and no decay": Habit(base=by_layer),
    "named parameters": Habit(base=by_name),
    "frozen parameters": Habit(base=freeze_some),
    "a param group added late": Habit(add_a_group_late, all_but_a_late_one),
    "learning rate in a tensor": Habit(base=lambda m: AdamW(m.parameters(), lr=torch.tensor(3e-3), foreach=False)),
    "closure": Habit(by_closure),
    "accumulation, clipping, zero_grad both ways": Habit(accumulating_and_clipping),
    "missing gradients": Habit(with_gaps),
    "overflow": Habit(scaled),
    "overflow, fused": Habit(scaled, lambda m: AdamW(m.parameters(), lr=3e-3, fused=True)),
    "autocast bf16": Habit(under_autocast(torch.bfloat16)),
    "autocast fp16": Habit(under_autocast(torch.float16)),
    "bf16 weights": Habit(base=in_bfloat16),
    "one cycle": Habit(scheduled(lambda o: OneCycleLR(o, 1e-2, total_steps=END + 1))),
    "warm-up from 0": Habit(scheduled(lambda o: LambdaLR(o, lambda step: min(step / 4, 1.0)))),
    "warm-up from 0, without state": Habit(
        scheduled(lambda o: LambdaLR(o, lambda step: min(step / 4, 1.0))), lambda m: SGD(m.parameters(), lr=0.02)
    ),
    "moving average": Habit(averaged),
    "accelerate": Habit(prepared),
    "accelerate itself": Habit(by_accelerate),
    "schedule-free AdamW": Habit(
        schedule_free, lambda m: AdamWScheduleFree(m.parameters(), lr=3e-3, weight_decay=0.1, foreach=False)
    ),
    "schedule-free SGD": Habit(schedule_free, lambda m: SGDScheduleFree(m.parameters(), lr=0.02, foreach=True)),
    "schedule-free RAdam": Habit(schedule_free, lambda m: RAdamScheduleFree(m.parameters(), lr=3e-3)),
    "first step of distributed checkpoint": Habit(saved_at_first),
    "saved and loaded after every step": Habit(saved_in_between),
    "deepcopy": Habit(copied),
    "compiled model": Habit(compiled_model, methods=("hesso",)),
    "compiled step": Habit(compiled_step, methods=("hesso", "dhspg", "hesso_cric")),
    "compiled step, capturable": Habit(compiled_step, lambda m: everything(m, capturable=True), ("hesso", "hspg")),
}


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


_SCHEDULED = ("params", "lr", "initial_lr", "betas")  # what a loop may change, and where some optimizers count:
_COUNTED = ("k", "lr_max", "rho", "scheduled_lr", "train_mode", "weight_sum")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize(
    ("habit", "method"), [pytest.param(h, m, id=f"{n}-{m}") for n, h in HABITS.items() for m in h.methods]
)
def test_habit(habit: Habit, method: str) -> None:
    models = [make(NET, dtype=torch.float32) for _ in range(2)]
    plain, ours = (habit.base(model) for model in models)
    run = {"groups": models[1].groups(), "named_tensors": tensors_of(models[1])}  # type: ignore[operator]
    attach(ours, **run, **config(method, **starting(method, START)))
    before = [{k: v for k, v in g.items() if k not in (*_SCHEDULED, *_COUNTED)} for g in ours.param_groups]
    base_model, plain = habit.loop(models[0], plain, range(START))
    model, ours = habit.loop(models[1], ours, range(START))
    assert_same(model.state_dict(), base_model.state_dict())
    assert_same(list(ours.state.values()), list(plain.state.values()))
    assert ours.compute_metrics().step == START
    model, ours = habit.loop(model, ours, range(START, END))
    metrics = ours.compute_metrics()
    assert (metrics.step, metrics.num_zero_groups) == (END, 7)
    assert sum(map(len, ours.removed.values())) == 7
    assert [{k: g[k] for k in b} for g, b in zip(ours.param_groups, before, strict=False)] == before
    assert isinstance(ours, type(plain))
