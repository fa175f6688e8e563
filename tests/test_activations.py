"""Scores from activations: which positions are whose, over the zoo; windows, copies, files, cuts."""

from __future__ import annotations

import copy
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO
from only_train_once.errors import CheckpointError, ConfigurationError, NumericalError
from only_train_once.groups import GroupList, PruningGroup, Role, find_groups
from only_train_once.inputs import call_model
from only_train_once.optim import attach
from only_train_once.optim.candidates import Candidates, find_candidates
from only_train_once.optim.watching import Activations
from only_train_once.recorder import tensors_in
from only_train_once.trace import trace
from tests.pruning import randomize
from tests.zoo import ZOO, ConvNet


def candidates_of(model: nn.Module, groups: GroupList) -> Candidates:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return find_candidates(optimizer, groups, tensors, model=model)


def _seen(group: PruningGroup, groups: GroupList) -> bool:
    workload = groups.workload
    assert workload is not None
    return any(group.name in workload.extents[sight.extent].units for sight in workload.sights)


def visible(model: nn.Module, groups: GroupList) -> GroupList:
    """The groups that can be seen; the others are refused by name."""
    seen = []
    for group in groups.prunable:
        with (
            nullcontext()
            if _seen(group, groups)
            else pytest.raises(ConfigurationError, match=f"cannot score {re.escape(group.name)}: no module is given")
        ):
            Activations(candidates_of(model, groups.of([group])))
            seen.append(group)
    return groups.of(seen)


@contextmanager
def inputs_of_modules(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Path of a module -> the first tensor it was given, call by call."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    paths = {id(m): path for path, m in model.named_modules()}

    def note(module: nn.Module, args: Any) -> None:
        first = next(tensors_in(args), None)
        if id(module) in paths and first is not None:
            found[paths[id(module)]].append(first.detach().clone())

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def analysed(name: str, wide: bool) -> tuple[nn.Module, Any, GroupList]:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    randomize(model)
    model.requires_grad_(True)
    return model, inputs, find_groups(trace(model, inputs), wide=wide)


@pytest.mark.parametrize("wide", [False, True], ids=["default", "wide"])
@pytest.mark.parametrize("name", ZOO)
def test_what_readers_are_given(name: str, wide: bool) -> None:
    """Against the columns by which linear layers and convolutions read a unit: the slices say which they are."""
    model, inputs, groups = analysed(name, wide)
    groups = visible(model, groups)
    if not groups:
        return
    activations = Activations(candidates_of(model, groups))
    activations.watch(True)
    with inputs_of_modules(model) as given:
        call_model(model, inputs)
    activations.take()
    activations.watch(False)
    modules = dict(model.named_modules())
    for group, found in zip(groups, activations.means(), strict=True):
        readers = {}
        for s in group.with_role(Role.CONSUMER):
            path, _, leaf = s.param.rpartition(".")
            module = modules.get(path)
            plain = isinstance(module, nn.Linear) or (
                isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
            )
            if plain and leaf == "weight" and s.dim == (0 if getattr(module, "transposed", False) else 1):
                readers[path] = s.index
        known = {s.module for s, w in zip(activations.sights, activations._wanted, strict=True) if group.name in w}
        if not readers or known != readers.keys():
            continue  # others read it, too
        totals, counts = np.zeros(group.size), 0
        for path, index in readers.items():
            for tensor in given[path]:
                dim = -1 if isinstance(modules[path], nn.Linear) else tensor.dim() - _spatial(modules[path]) - 1
                rows = tensor.abs().movedim(dim, 0).flatten(1)
                totals += [float(rows[index[u]].sum()) for u in range(group.size)]
                counts += rows[index[0]].numel()
        np.testing.assert_allclose(found.numpy(), totals / max(counts, 1), rtol=1e-5, atol=1e-30, err_msg=group.name)


def _spatial(module: nn.Module) -> int:
    return len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0  # type: ignore[arg-type]


# -- in a run --------------------------------------------------------------------------------------------------------

START, PERIOD, WINDOW = 4, 6, 3
PLAN: dict[str, Any] = {
    "target_group_sparsity": 0.5,
    "start_pruning_step": START,
    "pruning_steps": 2 * PERIOD,
    "pruning_periods": 2,
    "window": WINDOW,
    "importance_score_criteria": "activation",
}


def a_run(**changes: Any) -> tuple[nn.Module, OTO, Any]:
    torch.manual_seed(1)
    model = ConvNet().double()
    randomize(model)
    oto = OTO(model, images(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = {**PLAN, **changes}
    return model, oto, oto.attach(optimizer, config.pop("method", "hesso"), **config)


def images(step: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(model: nn.Module, optimizer: Any, steps: range, parts: int = 1) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        for part in images(step).chunk(parts):
            (model(part).square().mean() / parts).backward()
        optimizer.step()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("parts", [1, 2])
def test_the_mean_is_over_the_window(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes of the last steps before a scoring, whole or in parts; those without gradients do not count."""
    model, _, optimizer = a_run()
    seen: list[list[Tensor]] = []
    own = Activations.means
    monkeypatch.setattr(Activations, "means", lambda self: seen.append(own(self)) or seen[-1])
    means = []
    for step in range(START + PERIOD + 1):
        assert (hooks_of(model) > 0) == (START - WINDOW < step <= START or step > START + PERIOD - WINDOW)
        with torch.no_grad():
            model(100 * images(step))
        with inputs_of_modules(model) as given:
            train(model, optimizer, range(step, step + 1), parts)
        means.append({g.name: _mean_given(optimizer, g, given) for g in optimizer._method.groups})
    train(model, optimizer, range(step + 1, START + 2 * PERIOD))
    assert len(seen) == 2
    assert hooks_of(model) == 0
    assert optimizer.compute_metrics().num_zero_groups > 0
    for last, found in zip((START, START + PERIOD), seen, strict=True):
        for group, values in zip(optimizer._method.groups, found, strict=True):
            window = [means[step][group.name] for step in range(last - WINDOW + 1, last + 1)]
            torch.testing.assert_close(values, torch.stack(window).mean(0))


def _mean_given(optimizer: Any, group: Any, given: dict[str, list[Tensor]]) -> Tensor:
    (sight,) = (
        s
        for s, wanted in zip(
            optimizer._method.scoring.activations.sights, optimizer._method.scoring.activations._wanted, strict=True
        )
        if group.name in wanted
    )
    index = next(s.index for s in group.with_role(Role.CONSUMER) if s.param.startswith(sight.module))
    together = torch.cat([t.movedim(sight.dim, 0).flatten(1) for t in given[sight.module]], dim=1).abs()
    return together[torch.from_numpy(index)].mean(dim=(1, 2))


@pytest.mark.parametrize("method", ["hesso", "dhspg", "hesso_cric"])
def test_the_units_that_are_least_active_go(method: str) -> None:
    """A tenth of the units put out a thousandth of what the others do, with weights that are no smaller."""
    own = {"start_cric_step": START, "sampling_steps": 3, "max_cycle_period": 2, "hybrid_training_steps": 5}
    plan = {"dhspg": {"lmbda": 2.0}, "hesso_cric": own}.get(method, {})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    quiet = torch.tensor([3, 11])
    with torch.no_grad():
        model[0].bias[quiet] = -20.0
    x = torch.randn(8, 6, dtype=torch.float64)
    oto = OTO(model, x)
    config = {k: v for k, v in PLAN.items() if method != "hesso_cric" or k[:6] in ("target", "import")}
    optimizer = oto.attach(
        torch.optim.SGD(model.parameters(), lr=1e-3), method, **{**config, "target_group_sparsity": 0.1, **plan}
    )
    for _ in range(START + 2 * PERIOD):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.removed == {"0": quiet.tolist()}
    assert hooks_of(model) == 0


@pytest.mark.parametrize("stop", [START - 1, START, START + 2, START + PERIOD - 1])
@pytest.mark.parametrize("method", ["hesso", "dhspg"])
def test_a_run_goes_on_from_a_file(method: str, stop: int) -> None:
    model, _, optimizer = a_run(method=method)
    train(model, optimizer, range(START + 2 * PERIOD))
    first, _, halted = a_run(method=method)
    train(first, halted, range(stop))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": halted.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second, oto, resumed = a_run(method=method)
    oto.resume(resumed, saved["optimizer"], saved["model"])
    train(second, resumed, range(stop, START + 2 * PERIOD))
    assert_alike(model, second)
    assert resumed.removed == optimizer.removed


@pytest.mark.parametrize("stop", [START - 1, START + 2])
def test_copies_go_on_by_themselves(stop: int) -> None:
    model, _, optimizer = a_run()
    train(model, optimizer, range(stop))
    other, copied = copy.deepcopy((model, optimizer))
    lone = copy.deepcopy(model)
    hooks = hooks_of(model)
    lone(100 * images(0))
    train(other, copied, range(stop, START + 2 * PERIOD))
    train(model, optimizer, range(stop, START + 2 * PERIOD))
    assert_alike(model, other)
    assert hooks_of(lone) == hooks_of(model) == hooks_of(other) == 0
    assert (hooks > 0) == (stop == START - 1)


def test_units_that_leave_physically() -> None:
    model, _, optimizer = a_run()
    train(model, optimizer, range(START + 2 * PERIOD))
    smaller, _, cutting = a_run(physical_cuts=True)
    train(smaller, cutting, range(START + 2 * PERIOD))
    assert cutting.removed == optimizer.removed
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(smaller(images(0)), model(images(0)))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_weights_in_no_module_cannot_be_watched() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a) @ self.b

    model = Inner()
    oto = OTO(model, torch.randn(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="'activation' cannot score a: no module is given or returns what"):
        oto.attach(optimizer, importance_score_criteria="activation")
    oto.attach(optimizer, importance_score_criteria="taylor_first_order")  # nothing was changed


def test_without_modules_or_analysis() -> None:
    model = ConvNet()
    groups = find_groups(trace(model, torch.randn(2, 3, 8, 8)))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, other, text in (
        (groups, None, r"attach\(..., model=model\) would tell which"),
        (tuple(groups), model, r"the groups of find_groups\(trace\(model, x\)\) would tell which"),
        (groups, nn.Sequential(model), "the model has no module '(conv|fc|bn)"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            attach(optimizer, given, tensors, model=other, importance_score_criteria="activation")
    attach(optimizer, groups, tensors, model=model, importance_score_criteria="activation")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_calls_no_hooks() -> None:
    model, _, optimizer = a_run(start_pruning_step=2 * WINDOW)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigurationError, match=r"no forward pass with gradients went through .* A compiled model"):
        train(compiled, optimizer, range(2 * WINDOW + 1))
    torch.compiler.reset()


def test_other_shapes_than_in_the_analysis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = OTO(model, torch.randn(8, 6)).attach(
        torch.optim.SGD(model.parameters(), lr=0.1), importance_score_criteria="activation"
    )
    with pytest.raises(
        ConfigurationError, match=r"'2' is given a tensor of 2 dims with 20 positions in dim 1.*\(8, 5, 20"
    ):
        model(torch.randn(8, 5, 6))
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()


def test_damaged_states_and_infinite_activations() -> None:
    model, _, optimizer = a_run()
    train(model, optimizer, range(START - 1))
    state = optimizer.state_dict()
    for damage in ({"sums": torch.zeros(3), "counts": [1]}, {"sums": state, "counts": None}, 3):
        broken = copy.deepcopy(state)
        broken["param_groups"][0]["only_train_once"]["activations"] = damage
        with pytest.raises(CheckpointError, match="'activations' is"):
            optimizer.load_state_dict(broken)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(START - 1, START))
    model(images(0) * torch.inf)
    with pytest.raises(NumericalError, match="the score of unit"):
        optimizer.step()
    train(model, optimizer, range(START, START + 2 * PERIOD))
    assert optimizer.compute_metrics().num_zero_groups > 0
