"""Bad input: each ends in an exception of the library's own tree that says what to do, and nothing is lost.

One table. A row acts on a fresh `World` and says which exception comes and what its message has to hold: the thing, its
value, the rule, the way out. Whatever the row is about, the world is the same afterwards, bit for bit.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import logging
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from only_train_once import OTO, Subnet, construct_subnet, find_groups, inflate, load, trace, verify_subnet
from only_train_once.criteria import taylor_first_order
from only_train_once.errors import (
    CheckpointError,
    ConfigurationError,
    NothingPrunableError,
    NumericalError,
    OTOError,
    SurgeryError,
    TraceError,
    VerificationError,
)
from only_train_once.groups import PruningGroup
from only_train_once.inputs import call_model
from only_train_once.masking import Tensors
from only_train_once.optim import attach

from .zoo import MLP, ZOO, Case, ConvNet, Gated

X = torch.linspace(-1, 1, 18).reshape(3, 6)
SCHEDULE: dict[str, Any] = dict(target_group_sparsity=0.5, start_pruning_step=2, pruning_steps=6, pruning_periods=3)
TOTAL = 5  # of ten units
SCORING = 4  # a step at which a period begins


def batch(i: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(i))


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        backward(model, optimizer, batch(i))
        optimizer.step()


def fresh_model() -> MLP:
    torch.manual_seed(0)
    return MLP()


class World:
    """A model with its OTO, one in the middle of training, and a saved subnet: what bad input could spoil."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = fresh_model().train()
        self.model.fc2.eval()  # modes that differ show when one is set for all
        self.oto = OTO(self.model, dummy_input=X)
        self.plain = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.trained = fresh_model()
        self.optimizer = OTO(self.trained, dummy_input=X).hesso(variant="adamw", lr=1e-2, **SCHEDULE)
        train(self.trained, self.optimizer, range(SCORING))
        self.saved = directory / "saved"
        self.subnet().save(self.saved)
        self.file = directory / "file"
        self.file.write_text("not a folder")

    def subnet(self) -> Subnet:
        oto = OTO(fresh_model(), dummy_input=X)
        oto.random_set_zero_groups(0.5, seed=0)
        return oto.construct_subnet()

    def hesso(self, **changes: Any) -> Any:
        return self.oto.hesso(**{"variant": "sgd", "lr": 0.1, **SCHEDULE, **changes})

    def state(self, **changes: Any) -> dict[str, Any]:
        """The optimizer's state with entries of the method replaced, or removed where the value is ``...``."""
        state = copy.deepcopy(self.optimizer.state_dict())
        entry = state["param_groups"][0]["only_train_once"]
        entry.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del entry[name]
        return state

    def damaged(self, name: str, change: Callable[[bytes], bytes]) -> Path:
        """A copy of the saved folder with one file changed."""
        folder = self.directory / "damaged"
        folder.mkdir()
        for path in self.saved.iterdir():
            data = path.read_bytes()
            (folder / path.name).write_bytes(change(data) if path.name == name else data)
        return folder

    def snapshot(self) -> Any:
        facts: list[Any] = []
        for model in (self.model, self.trained):
            for name, t in model.state_dict(keep_vars=True).items():
                facts.append((name, id(t), t.requires_grad, t.detach().numpy().tobytes()))
                facts.append(None if t.grad is None else t.grad.numpy().tobytes())
            facts += [(name, m.training, len(m._forward_hooks), vars(m).keys()) for name, m in model.named_modules()]
        for optimizer in (self.plain, self.optimizer):
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            facts += [type(optimizer), saved.getvalue()]
        facts += [
            self.oto.model is self.model,
            str(self.oto.groups),
            self.file.read_text(),
            sorted(Path.cwd().iterdir()),
        ]
        facts += [(path.name, path.read_bytes()) for path in sorted(self.saved.iterdir())]
        return facts


class Raises(MLP):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the cat is out")


class CannotBeCopied(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class WithoutParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class ReturnsNothing(MLP):
    def forward(self, x: Tensor) -> None:
        return None


class NeedsAnArgument(MLP):
    def __init__(self, width: int) -> None:
        super().__init__()


class TwiceAsWide(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(20, 3)


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)


def nan_at_scoring(world: World) -> None:
    parameters = list(world.trained.parameters())
    gradients = [p.grad for p in parameters]
    backward(world.trained, world.optimizer, torch.full((3, 6), math.nan))
    try:
        world.optimizer.step()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient  # the bad ones are the caller's, everything else has to be as it was


def script(world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.trace(MLP(), X)
    OTO(model, X)


def with_nan_everywhere(world: World) -> None:
    model = fresh_model()
    oto = OTO(model, dummy_input=X)
    with torch.no_grad():
        model.fc2.weight.fill_(math.nan)
    oto.construct_subnet()


def empty_batch(world: World) -> None:
    OTO(fresh_model(), dummy_input=torch.zeros(0, 6)).construct_subnet()


def report_without_json(world: World) -> None:
    subnet = world.subnet()
    from only_train_once.checkpoint import save

    save(subnet.model, subnet.record, {"value": object()}, world.saved)


def local_class(world: World) -> None:
    class Local(MLP):
        pass

    target = world.directory / "out"
    try:
        OTO(Local(), dummy_input=X).construct_subnet(target)
    finally:
        assert list(target.iterdir()) == []


def another_optimizer(world: World) -> None:
    world.optimizer.load_state_dict(torch.optim.AdamW(ConvNet().parameters()).state_dict())


def another_model(world: World) -> None:
    other = OTO(ConvNet(), torch.randn(2, 3, 8, 8)).hesso(variant="adamw", **SCHEDULE)
    world.optimizer.load_state_dict(other.state_dict())


def sums_of_another_shape(world: World) -> None:
    state = copy.deepcopy(world.optimizer.state_dict())
    for entry in state["state"].values():
        entry["only_train_once_gradient_sum"] = torch.zeros(2)
    world.optimizer.load_state_dict(state)


def foreign_tensors(world: World) -> Path:
    oto = OTO(Gated(), dummy_input=X)
    oto.construct_subnet().save(world.directory / "other")
    other = (world.directory / "other" / "model.safetensors").read_bytes()
    return world.damaged("model.safetensors", lambda data: other)


def newer(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "format": 99}).encode()


@dataclass(frozen=True)
class Row:
    """What is done, which exception comes, and a regular expression for its message."""

    id: str
    act: Callable[[World], Any]
    error: type[OTOError]
    match: str


C, K = ConfigurationError, CheckpointError
WHOLE = r"it has to be a whole number, at least"
FORMS = "give a tensor, a tuple of positional arguments or a dict of keyword arguments"


def arguments(error: type[OTOError], match: str, **values: list[Any]) -> list[Row]:
    """Rows of ``oto.hesso`` with one argument changed; ``{value}`` in ``match`` is the value as it prints."""

    def act(world: World, changes: dict[str, Any]) -> Any:
        return world.hesso(**changes)

    rows = []
    for name, bad in values.items():
        for value in bad:
            text = match.replace("{name}", name).replace("{value}", "".join(map(_escape, repr(value))))
            rows.append(Row(f"hesso-{name}={value!r:.25}", functools.partial(act, changes={name: value}), error, text))
    return rows


def _escape(character: str) -> str:
    return character if character.isalnum() or character.isspace() else f"\\{character}"


HESSO = [
    *arguments(
        C,
        "{name} is {value}; the rule is 0 <= sparsity < 1",
        target_group_sparsity=[-1, -1e-9, 1, 1.0, 1.5, math.nan, math.inf, True, "0.5", None, [0.5]],
    ),
    *arguments(C, f"{{name}} is {{value}}; {WHOLE} 0", start_pruning_step=[-1, 1.5, "3", True, None, math.nan]),
    *arguments(
        C,
        f"{{name}} is {{value}}; {WHOLE} 1",
        pruning_steps=[-1, 0, 1.5, "3", True, None],
        pruning_periods=[-1, 0, 1.5, "3", True, None],
        group_divisible=[-1, 0, 1.5, "3", True, None],
        window=[0, -1, 1.5, "3", True],
    ),
    *arguments(C, r"pruning_steps \(6\) < pruning_periods \({value}\).*raise pruning_steps", pruning_periods=[7]),
    *arguments(
        C,
        "{name} is {value}; it has to be a finite number, at least 0",
        lr=[-1, math.nan, math.inf, "0.1", None, True, [0.1], 1j],
        weight_decay=[-1, math.nan, "0.1", True],
        first_momentum=[-1, math.nan, "0.1", True],
    ),
    *arguments(C, "second_momentum=0.5 is given, but SGD has only one", second_momentum=[0.5]),
    *arguments(C, "{name} is {value}; it has to be a finite number$", dampening=[math.nan, "0"]),
    *arguments(
        C,
        r"variant is {value}; give a torch.optim.Optimizer class or one of \['adadelta'.*or make the optimizer",
        variant=["sgdx", "", None, 5, "Optimizer", "lr_scheduler"],
    ),
    *arguments(C, "SGD refuses its arguments .*{name}.*attach to it", foo=[1], nesterov=[True]),
    *arguments(
        C,
        r"{name}.*(known are|give one of|has to be a finite number|give a criterion a weight)",
        importance_score_criteria=[
            "size",
            None,
            5,
            ["magnitude"],
            {},
            {"size": 1.0},
            {"magnitude": 0.0},
        ],
    ),
    *arguments(
        C,
        "'batch_norm_scale' cannot score fc1: no batch norm with a scale; use another criterion",
        importance_score_criteria=["batch_norm_scale", {"magnitude": 1.0, "batch_norm_scale": 0.5}],
    ),
    *arguments(
        C,
        "the weight of criterion 'magnitude' is .*; it has to be a finite number",
        importance_score_criteria=[{"magnitude": math.nan}, {"magnitude": "1"}, {"magnitude": True}],
    ),
    *arguments(
        C,
        r"{name} is {value}; give a tuple of \['zero', 'follow', 'consumer'\], 'zero' among them",
        importance_roles=["zero", (), None, ("weights",), ("consumer",), ("zero", "norm"), 3],
    ),
    *arguments(C, "pin is {value}; it has to be one of .*'auto'", pin=["never", None]),
    *arguments(C, "{name} is {value}; it has to be True or False", fixed_zero_groups=["no", 1, None]),
    Row("hesso-adam-beta", lambda w: w.hesso(variant="adam", first_momentum=2), C, "Adam refuses its .*index 0: 2"),
    Row("hesso-adam-dampening", lambda w: w.hesso(variant="adam", dampening=0.1), C, "Adam has no argument dampening"),
]

LAYERS = {"sizes": [[1, 6]], "seconds": [0.1, 0.2]}


BUDGETED = itertools.cycle(("hesso", "hesso_cric", "hspg", "dhspg", "ada_hspg"))


def budget(name: str, message: str, methods: int = 1, **changes: Any) -> list[Row]:
    """Arguments that all methods share, for some of them in turn."""

    def act(world: World, method: str) -> Any:
        return world.oto.attach(world.plain, method=method, **changes)

    return [
        Row(f"budget-{name}-{method}", functools.partial(act, method=method), C, message)
        for method in itertools.islice(BUDGETED, methods)
    ]


BUDGETS = [
    *(
        row
        for measure in ("params", "flops", "memory")
        for value in (0, -0.1, math.nan, math.inf, True, "half", [0.5])
        for row in budget(
            f"{measure}={value!r}",
            rf"target_{measure} is {_escape(repr(value)) if isinstance(value, str) else '.*'}; the rule is 0 < "
            rf"target_{measure} <= 1, the share that is kept, or the number itself above 1",
            **{f"target_{measure}": value},
        )
    ),
    *(
        row
        for value in (0, 1.5, math.nan, True, "5", "0 ms", "5 min")
        for row in budget(
            f"latency={value!r}",
            "target_latency is .*; the rule is 0 < target_latency <= 1, the share that is kept, or a text like '5 ms'",
            target_latency=value,
        )
    ),
    *budget("two", "target_params and target_flops are given; a network has one", target_params=0.5, target_flops=0.5),
    *budget(
        "units-too",
        r"target_group_sparsity \(0.5\) and target_flops \(0.3\) are given; .* leave one of them",
        methods=5,
        target_flops=0.3,
        target_group_sparsity=0.5,
    ),
    *budget("larger", "target_params is 9999.0; the full model has 103 parameters.*give less", target_params=9999),
    *budget(
        "out-of-reach",
        "target_params is 0.1, that is 10 parameters of 103 parameters; the smallest that can be reached is 13 "
        "parameters, 0.1263 of it: give at least that",
        methods=5,
        target_params=0.1,
    ),
    *budget("no-table", "target_latency is given without a latency_table.*measure_latency", target_latency=0.5),
    *budget("table", "latency_table is 5; it has to be a LatencyTable or the dictionary", latency_table=5),
    *budget("table-rest", "'rest' is -1; it has to be seconds", latency_table={"layers": {}, "rest": -1}),
    *budget("table-layer", "layer 'a' needs 'sizes'", latency_table={"layers": {"a": {"sizes": [[1]]}}}),
    *budget(
        "table-shape",
        r"layer 'a' has \[2\] sizes, and seconds of shape \[3\]",
        latency_table={"layers": {"a": {"sizes": [[1, 6]], "seconds": [1, 2, 3]}}},
    ),
    *budget(
        "table-order",
        "sizes of the layer 'a' have to ascend",
        latency_table={"layers": {"a": {"sizes": [[6, 1]], "seconds": [1, 2]}}},
    ),
    *budget(
        "table-nan",
        "seconds of the layer 'a' have to be numbers, at least 0",
        latency_table={"layers": {"a": {"sizes": [[1, 6]], "seconds": [1, math.nan]}}},
    ),
    *budget(
        "table-missing",
        r"latency_table has no layer 'fc1:addmm'; it has 1, like \['a'\].*groups.workload.operators",
        target_latency=0.5,
        latency_table={"layers": {"a": LAYERS}},
    ),
    *budget(
        "table-dims",
        "the layer 'fc1:addmm' has sizes for 0 dims; units shorten 1 dims of it",
        target_latency=0.5,
        latency_table={"layers": {"fc1:addmm": {"sizes": [], "seconds": 0.1}}},
    ),
    *(
        row
        for name in ("min_units", "max_units")
        for value in (0, -1, 1.5, True, "3", {"fc1": 0}, {1: 1})
        for row in budget(f"{name}={value!r}", rf"{name}.*(has|have) to be (a whole|names)", **{name: value})
    ),
    *budget("min-names", r"min_units names 'fc9', which is no group.*the groups are \['fc1'", min_units={"fc9": 2}),
    *budget(
        "max-below-min",
        "max_units leaves at most 2 of the 10 units of group 'fc1', where at least 3 stay",
        min_units=3,
        max_units=2,
    ),
    *budget("ranking", "ranking is 'local'; it has to be one of .*'per_layer', 'per_block'", ranking="local"),
    *budget("ramp", "ramp is 'cubic'; it has to be one of .*'linear', 'geometric'", ramp="cubic"),
    *budget("scarcity", "scarcity is -1; it has to be a finite number, at least 0", scarcity=-1),
    *budget("cost-exponent", "cost_exponent is .*; it has to be a finite number", cost_exponent=math.nan),
    *budget("cost-of-units", "cost_exponent is 0.5, but the target is a share of units", cost_exponent=0.5),
    Row(
        "budget-groups-alone",
        lambda w: attach(w.plain, list(w.oto.groups), w.oto._named_tensors(), target_flops=0.5),
        C,
        "the flops of a subnet cannot be told from these groups alone: give the GroupList that find_groups",
    ),
    Row("costs-of-no-group", lambda w: w.oto.costs({"fc9": [0]}), C, "a dict from group names to units"),
    Row("costs-of-no-unit", lambda w: w.oto.costs({"fc1": [99]}), C, r"'fc1' has the units 0 to 9; \[99\] are named"),
]

METHODS = [
    Row(
        f"{method}-{name}={value!r}",
        functools.partial(
            lambda w, m, changes: getattr(w.oto, m)(**{**SCHEDULE, **changes}), m=method, changes={name: value}
        ),
        C,
        f"{name}.* is {_escape(repr(value)) if isinstance(value, str) else '.*'}.*{rule}",
    )
    for method, name, values, rule in [
        *(
            (method, name, values, rule)
            for method in ("hspg", "dhspg", "ada_hspg")
            for name, values, rule in [
                ("target_group_sparsity", [-0.1, 1.0, math.nan, "half", True], "the rule is 0 <= sparsity < 1"),
                ("start_pruning_step", [-1, 1.5, None], f"{WHOLE} 0"),
                ("pruning_steps", [0, 1.5, None], f"{WHOLE} 1"),
                ("epsilon", [-0.1, 1.0, math.nan, "0"], "the rule is 0 <= epsilon < 1"),
                ("lmbda", [-1.0, math.nan, "1"], "a finite number, at least 0"),
                ("finish_steps", [0, 1.5, "3"], f"{WHOLE} 1"),
                ("finish_steps", [3], "the last of 3 periods has 2 steps: lower finish_steps"),
                ("pin", ["never"], "one of .*'auto'"),
                ("lr", [-1.0], "a finite number, at least 0"),
            ]
        ),
        ("ada_hspg", "mu", [-1, math.inf], "a finite number, at least 0"),
        ("ada_hspg", "delta", [-1, None], "a finite number, at least 0"),
        ("hspg", "first_stage", ["proximal", None], "one of .*'subgradient', 'prox'"),
        ("hspg", "warm_up_steps", [-1, 1.5], f"{WHOLE} 0"),
        ("dhspg", "direction", ["momentum", None], "one of .*'step', 'gradient'"),
        ("dhspg", "tolerance_group_sparsity", [-0.1, math.nan], "the rule is 0 <= sparsity < 1"),
        ("dhspg", "tolerance_group_sparsity", [0.5], "stays below 1"),
        ("dhspg", "hat_lmbda_coeff", [0.5], "a finite number, at least 1"),
        ("dhspg", "lmbda_amplify", [-1], "a finite number, at least 0"),
    ]
    for value in values
] + [
    *(
        Row(
            f"hesso_cric-{name}={value!r}",
            functools.partial(lambda w, changes: w.oto.hesso_cric(**changes), changes={name: value}),
            C,
            f"{name} is .*{rule}",
        )
        for name, values, rule in [
            ("target_group_sparsity", [-0.1, 1.0, None], "the rule is 0 <= sparsity < 1"),
            ("start_cric_step", [-1, 1.5], f"{WHOLE} 0"),
            ("tolerance", [-1, 0.5], f"{WHOLE} 0"),
            ("sampling_steps", [0, None], f"{WHOLE} 1"),
            ("max_cycle_period", [0, "3"], f"{WHOLE} 1"),
            ("hybrid_training_steps", [0, 1.5], f"{WHOLE} 1"),
        ]
        for value in values
    ),
    Row(
        "hspg-warm-up-behind-start",
        lambda w: w.oto.hspg(**SCHEDULE, warm_up_steps=3),
        C,
        r"warm_up_steps \(3\) > start_pruning_step \(2\).*lower warm_up_steps",
    ),
]

ATTACH = [
    Row(
        "attach-method",
        lambda w: w.oto.attach(w.plain, method="magic"),
        C,
        r"method is 'magic'.*\[.*'dhspg', 'hesso', 'hesso_cric', 'hspg'",
    ),
    Row("attach-method-list", lambda w: w.oto.attach(w.plain, method=["hesso"]), C, r"method is \['hesso'\]"),
    Row("attach-argument", lambda w: w.oto.attach(w.plain, sparsity=0.5), C, "no argument sparsity; it has .*'target"),
    Row("attach-sparsity", lambda w: w.oto.attach(w.plain, target_group_sparsity=2), C, "sparsity is 2; the rule is 0"),
    Row("attach-nothing", lambda w: w.oto.attach(None), C, "cannot attach to 'NoneType'; it has to be a torch.optim"),
    Row("attach-twice", lambda w: w.oto.attach(w.optimizer), C, "'hesso' is attached .* already; make a new one"),
    Row(
        "attach-of-another-model",
        lambda w: w.oto.attach(torch.optim.SGD(MLP().parameters(), lr=0.1)),
        C,
        r"in none of the optimizer's param_groups: fc1.weight \(group fc1\).*give them to the optimizer",
    ),
    Row(
        "attach-one-param-group-misses",
        lambda w: w.oto.attach(
            torch.optim.SGD([{"params": w.model.fc1.parameters()}, {"params": [w.model.fc2.bias]}], lr=0.1)
        ),
        C,
        r"param_groups: fc2.weight \(group fc1\);.*mark their groups unprunable",
    ),
]

MODELS = [
    *(
        Row(
            f"model-{value!r:.20}",
            functools.partial(lambda w, m: OTO(m, X), m=value),
            C,
            "model is a .*torch.nn.Module",
        )
        for value in ("resnet", 5, MLP)
    ),
    *(
        Row(f"inputs-{name}", functools.partial(act, x=value), C, f"example inputs are {what}; {FORMS}")
        for name, value, what in [
            ("none", None, "None"),
            ("str", "x", "a str"),
            ("list", [X], "a list"),
            ("number", 5, "a int"),
            ("array", np.zeros((3, 6)), "a ndarray"),
            ("empty-tuple", (), "an empty tuple"),
            ("empty-dict", {}, "an empty dict"),
        ]
        for act in (
            lambda w, x: OTO(w.model, x),
            lambda w, x: trace(w.model, x),
            lambda w, x: verify_subnet(w.model, w.model, x),
        )
    ),
    Row("inputs-no-tensor", lambda w: OTO(w.model, (5,)), C, "example inputs .*hold no tensor; give"),
    Row("inputs-no-name", lambda w: OTO(w.model, {1: X}), C, f"keyword arguments need names, 1 is none; {FORMS}"),
    *(
        Row(f"inputs-{name}", functools.partial(lambda w, x: OTO(w.model, x), x=value), TraceError, match)
        for name, value, match in [
            ("shape", torch.zeros(3, 7), r"MLP does not run on .*\[\[3, 7\] float32\].*3x7 and 6x10.*dummy_input has"),
            (
                "dtype",
                torch.zeros(3, 6, dtype=torch.long),
                r"MLP does not run on .*\[\[3, 6\] int64\].*dummy_input has",
            ),
            ("scalar", torch.tensor(1.0), "MLP does not run on .*dummy_input has to be what"),
            ("too-many", (X, X), "takes 2 positional arguments but 3 were given.*a tuple of positional arguments"),
            ("other-name", {"y": X}, "unexpected keyword argument 'y'.*a dict of keyword arguments"),
        ]
    ),
    Row("model-raises", lambda w: OTO(Raises(), X), TraceError, "Raises does not run .*RuntimeError: the cat is out"),
    Row("model-no-forward", lambda w: OTO(nn.Module(), X), TraceError, "Module does not run on .*NotImplementedError"),
    Row("model-returns-nothing", lambda w: OTO(ReturnsNothing(), X), TraceError, "ReturnsNothing returned no tensor"),
    Row("model-no-copy", lambda w: OTO(CannotBeCopied(), X), TraceError, "CannotBeCopied cannot be copied .*[Rr]emove"),
    Row("mode-erase", lambda w: OTO(w.model, X, compress_mode="erase"), C, "compress_mode='erase' is not .*'prune'"),
    Row("skip-pattern", lambda w: OTO(w.model, X, skip_patterns="("), C, r"skip_patterns: '\(' is no regular expr"),
    Row("no-model", lambda w: OTO().groups, C, r"no model yet: OTO\(model, dummy_input=x\)"),
    Row("no-parameters", lambda w: OTO(WithoutParameters(), X).hesso(), C, "no tensor has requires_grad=True.*nothing"),
    Row(
        "nothing-trained",
        lambda w: OTO(fresh_model().requires_grad_(False), X).hesso(),
        C,
        "no tensor has requires_grad=True, so there is nothing to train",
    ),
    Row(
        "nothing-prunable",
        lambda w: OTO(nn.Linear(6, 3), X).hesso(),
        NothingPrunableError,
        r"no group can be pruned:\n  weight\[0\]: is a dim of the model's output 0",
    ),
    Row(
        "nothing-left",
        lambda w: _marked("fc1").hesso(),
        NothingPrunableError,
        "no group can be pruned:\n  fc1: marked unprunable: fc1\n",
    ),
]


def _marked(name: str) -> OTO:
    oto = OTO(fresh_model(), X)
    oto.mark_unprunable_by_param_names([name])
    return oto


FACADE = [
    *(
        Row(f"zero-{value!r}", functools.partial(lambda w, s: w.oto.random_set_zero_groups(s), s=value), C, match)
        for value, match in [
            (-1, "target_group_sparsity.*-1.*0 or more, and less than 1"),
            (1.0, "target_group_sparsity.*1.0.*0 or more, and less than 1"),
            (1.5, "target_group_sparsity.*1.5.*0 or more, and less than 1"),
            (math.nan, "target_group_sparsity.*nan.*0 or more, and less than 1"),
        ]
    ),
    Row(
        "mark-unknown",
        lambda w: w.oto.mark_unprunable_by_param_names(["nope.weight"]),
        C,
        r"'nope.weight' is no parameter, buffer, module or node of this MLP.*model.named_parameters\(\)",
    ),
    Row(
        "mark-one-of-two",  # the known one is not marked either
        lambda w: w.oto.mark_unprunable_by_param_names(["fc1.weight", "nope.weight"]),
        C,
        "'nope.weight' is no parameter",
    ),
    Row(
        "mark-node",
        lambda w: w.oto.mark_unprunable_by_node_ids([999]),
        C,
        r"999 is no node: ids run from 0 to \d+, see print",
    ),
    Row("clusters", lambda w: w.oto.cluster_node_groups(0), C, "num_clusters=0: 1 to 1, the number of prunable groups"),
    Row("explain", lambda w: w.oto.explain("nope"), C, "'nope' is no group, parameter, buffer or module of this model"),
    Row(
        "format",
        lambda w: w.oto.construct_subnet(ckpt_format="onnx"),
        C,
        r"ckpt_format='onnx': only 'torch'.*use subnet.save\(dir\)",
    ),
    Row(
        "half",
        lambda w: w.oto.construct_subnet(export_float16=True),
        C,
        r"export_float16=True is not implemented: call subnet.model.half\(\)",
    ),
    Row("nan-weights", with_nan_everywhere, VerificationError, r"nothing to compare.*output \[3, 3\].*Look for NaN"),
    Row(
        "empty-batch",
        empty_batch,
        VerificationError,
        r"nothing to compare.*output \[0, 3\] is empty.*batch of at least",
    ),
    Row("local-class", local_class, K, r"Local cannot be written to .* as a whole module.*[Uu]se subnet.save\(dir\)"),
]

SUBNET = [
    Row("subnet-model", lambda w: construct_subnet(5, w.oto.groups), C, "model is a int, expected a torch.nn.Module"),
    Row("subnet-groups", lambda w: construct_subnet(w.model, 5), C, "groups hold a int, expected what find_groups"),
    Row("subnet-names", lambda w: construct_subnet(w.model, ["a"]), C, "groups hold a str, expected what find_groups"),
    Row(
        "subnet-removed",
        lambda w: construct_subnet(w.model, w.oto.groups, [1]),
        C,
        "removed is a list, expected a dict: group name -> units, or None",
    ),
    Row(
        "subnet-unknown-group",
        lambda w: construct_subnet(w.model, w.oto.groups, {"nope": [1]}),
        C,
        r"removed names the group 'nope', which does not exist; known: \['fc1'",
    ),
    *(
        Row(
            f"subnet-unit-{value!r:.30}",
            functools.partial(lambda w, u: construct_subnet(w.model, w.oto.groups, {"fc1": u}), u=value),
            C,
            match,
        )
        for value, match in [
            ([99], r"removed\['fc1'\] names the unit 99, the group has the units 0 to 9"),
            ([-1], r"removed\['fc1'\] names the unit -1, the group has the units 0 to 9"),
            ([1.5], r"removed\['fc1'\] is \[1.5\], expected a list of units, whole numbers from 0 to 9"),
            (["a"], r"removed\['fc1'\] is \['a'\], expected a list of units, whole numbers from 0 to 9"),
            ([math.nan], r"removed\['fc1'\] is \[nan\], expected a list of units, whole numbers from 0 to 9"),
            (3, r"removed\['fc1'\] is 3, expected a list of units, whole numbers from 0 to 9"),
            ([[1], [2]], r"removed\['fc1'\] is \[\[1\], \[2\]\], expected a list of units"),
            ([[1, 2], [3]], r"removed\['fc1'\] is \[\[1, 2\], \[3\]\], expected a list of units"),
            ([True] * 10, r"removed\['fc1'\] is \[True.*expected a list of units.*give np.flatnonzero\(mask\)"),
        ]
    ),
    Row(
        "subnet-frozen-group",
        lambda w: construct_subnet(w.model, w.oto.groups, {"fc2.weight[0]": [0]}),
        SurgeryError,
        r"'fc2.weight\[0\]' is frozen \(is a dim of the model's output 0\)",
    ),
    Row(
        "subnet-of-another-model",
        lambda w: construct_subnet(OtherNames(), w.oto.groups),
        SurgeryError,
        "group 'fc1' cuts 'fc1.weight', which the model does not have",
    ),
    Row(
        "subnet-of-another-width",
        lambda w: construct_subnet(TwiceAsWide(), w.oto.groups),
        SurgeryError,
        r"expects 10 positions in dim 0 of 'fc1.weight', which has shape \[20, 6\]: the groups belong to another model",
    ),
    Row(
        "subnet-no-copy",
        lambda w: construct_subnet(CannotBeCopied(), w.oto.groups, {"fc1": [0]}),
        SurgeryError,
        "CannotBeCopied cannot be copied .*remove from its attributes",
    ),
    Row(
        "subnet-meta",
        lambda w: construct_subnet(MLP().to("meta"), w.oto.groups),
        SurgeryError,
        r"'fc1.weight' is on the meta device.*name them in construct_subnet\(model, groups, removed\)",
    ),
    Row("verify-full", lambda w: verify_subnet(5, w.model, X), C, "full is a int, expected a torch.nn.Module"),
    Row("verify-subnet", lambda w: verify_subnet(w.model, 5, X), C, "subnet is a int, expected a torch.nn.Module"),
    *(
        Row(
            f"verify-{name}={value!r}",
            functools.partial(lambda w, o: verify_subnet(w.model, w.model, X, **o), o={name: value}),
            C,
            f"{name} is {value!r}, expected a",
        )
        for name, values in {
            "samples": [0, -1, 1.5, "1", True],
            "tolerance": [-1, math.nan, "1", True],
            "seed": [-1, "1", None, True],
        }.items()
        for value in values
    ),
    Row(
        "verify-shape",
        lambda w: verify_subnet(w.model, w.model, torch.zeros(3, 7)),
        TraceError,
        "MLP does not run on its example inputs: .*3x7 and 6x10.*Give what its forward takes",
    ),
    Row(
        "verify-other-weights",
        lambda w: verify_subnet(w.model, MLP(), X),
        VerificationError,
        r"output of the subnet differs in eval mode on input 0: relative difference .* tolerance 1e-09",
    ),
    Row(
        "verify-other-model",
        lambda w: verify_subnet(w.model, nn.Linear(7, 3), X),
        VerificationError,
        "the subnet does not run in eval mode on input 0: RuntimeError",
    ),
]

TRAINING = [
    Row(
        "nan-gradients",
        nan_at_scoring,
        NumericalError,
        r"step 4: .*not finite in fc1.weight.*No weight was changed: skip",
    ),
    Row(
        "state-of-another-model",
        another_model,
        K,
        "another partition into groups: .*'conv1' is only in the saved state",
    ),
    Row("state-of-another-optimizer", another_optimizer, K, "belongs to another AdamW: .*the same parameters"),
    Row("state-sums", sums_of_another_shape, K, r"gradient_sum of fc1.weight.*a tensor of shape \(10, 6\)"),
    *(
        Row(f"state-{value!r:.20}", functools.partial(lambda w, s: w.optimizer.load_state_dict(s), s=value), K, match)
        for value, match in [
            (None, "foreign or damaged.*this is NoneType None; give what optimizer.state_dict"),
            ({}, r"foreign or damaged.*this is dict {}"),
            ([1], r"foreign or damaged.*this is list \[1\]"),
            ({"weight": 1}, r"entries 'state' and 'param_groups', this is a dictionary with \['weight'\]"),
            ({"state": {}, "param_groups": [3]}, "foreign or damaged"),
        ]
    ),
    *(
        Row(f"state-{name}={value!r:.20}", functools.partial(_load_state, changes={name: value}), K, match)
        for _load_state in [lambda w, changes: w.optimizer.load_state_dict(w.state(**changes))]
        for name, value, match in [
            ("version", 99, "format version 99, this library reads 1"),
            ("method", "magic", "saved by method 'magic', not by 'hesso'"),
            ("step", ..., "'step' is 'None', expected a whole number, at least 0"),
            ("step", -3, "'step' is '-3', expected a whole number"),
            ("step", 1.5, "'step' is '1.5', expected a whole number"),
            ("step", math.nan, "'step' is 'nan', expected a whole number"),
            ("group_names", ..., "group_names, group_sizes and group_fingerprints have to be lists of one length"),
            ("group_sizes", [], "group_names, group_sizes and group_fingerprints have to be lists of one length"),
            ("group_sizes", [11], "'fc1' has 11 units in the saved state and 10 here"),
            ("group_fingerprints", ["0"], "'fc1' cuts other tensors or positions"),
            ("schedule", 3, "'schedule' is '3', expected a dictionary"),
            ("window_count", "x", "'window_count' is 'x', expected a whole number"),
            ("chosen", ..., "'chosen' is 'None', expected a tensor of whole numbers"),
            ("chosen", torch.zeros(3), r"for 10 units .* a tensor of shape \(3,\)"),
            (
                "chosen",
                torch.full((10,), 0.5),
                "'chosen' is .*expected a tensor of whole numbers, none of them negative",
            ),
            (
                "chosen",
                torch.full((10,), -1),
                "'chosen' is .*expected a tensor of whole numbers, none of them negative",
            ),
            ("chosen", torch.full((10,), 1), "at most 5 units are chosen and every group keeps one; it says 10 units"),
            ("chosen", torch.tensor([3] + [0] * 9), r"with 2 period\(s\) begun .*in period 3"),
        ]
    ),
]

FILES = [
    *(
        Row(
            f"load-{value!r}",
            functools.partial(lambda w, p: load(p, MLP), p=value),
            C,
            "out_dir is .*: give a folder's path",
        )
        for value in (None, 5, b"saved")
    ),
    Row("load-missing", lambda w: load(w.directory / "no", MLP), K, "no/subnet.json does not exist: .* holds no saved"),
    Row("load-file", lambda w: load(w.file, MLP), K, "file/subnet.json cannot be read: .*Not a directory"),
    Row(
        "load-tensors-missing",
        lambda w: _without_tensors(w),
        K,
        "model.safetensors does not exist.*copy the whole folder",
    ),
    *(
        Row(
            f"load-{name}-{length}-bytes",
            functools.partial(lambda w, n, m: load(w.damaged(n, lambda data: data[:m]), MLP), n=name, m=length),
            K,
            f"damaged/{name} is damaged",
        )
        for name in ("subnet.json", "model.safetensors")
        for length in (0, 100, -1)
    ),
    Row(
        "load-flipped-bit",
        lambda w: load(w.damaged("model.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1])), MLP),
        K,
        "model.safetensors is damaged or belongs to another subnet.json: its SHA-256 is",
    ),
    Row(
        "load-foreign-json",
        lambda w: load(w.damaged("subnet.json", lambda d: b"{}"), MLP),
        K,
        "foreign: its kind is None",
    ),
    Row("load-foreign-tensors", lambda w: load(foreign_tensors(w), MLP), K, "belongs to another subnet.json"),
    Row("load-newer", lambda w: load(w.damaged("subnet.json", newer), MLP), K, "has format 99, .* up to 2: update it"),
    Row("load-build-none", lambda w: load(w.saved), K, "MLP is no model of transformers or timm.*give build="),
    Row("load-build-number-itself", lambda w: load(w.saved, 5), C, "build is 5: give the original constructor"),
    Row("load-device", lambda w: load(w.saved, MLP, device="tpu9"), C, "device is 'tpu9'"),
    Row("save-shards", lambda w: w.subnet().save(w.saved, max_shard_size="many"), C, "max_shard_size is 'many'"),
    Row(
        "save-builder",
        lambda w: w.subnet().save(w.saved, builder={"library": "torchvision", "name": "resnet18"}),
        K,
        "does not make the model that is saved: the record cuts 'fc1.weight', which ResNet does not have",
    ),
    Row("inflate-nothing", lambda w: inflate(None), C, "source is a NoneType: give a Subnet, or the folder"),
    Row("inflate-build", lambda w: inflate(w.saved, Gated), K, "does not fit the model"),
    Row("kept-unknown", lambda w: w.subnet().record.kept("fc9.weight"), C, "no tensor 'fc9.weight' lost anything"),
    Row("load-build-str", lambda w: load(w.saved, "MLP"), C, "build is 'MLP': give the original constructor"),
    Row(
        "load-build-raises",
        lambda w: load(w.saved, lambda: 1 / 0),
        K,
        "build raised ZeroDivisionError: .*give the orig",
    ),
    Row("load-build-argument", lambda w: load(w.saved, NeedsAnArgument), K, "build raised TypeError: .*'width'"),
    Row("load-build-number", lambda w: load(w.saved, lambda: 5), K, "build returned a int, expected the full model"),
    Row(
        "load-other-class",
        lambda w: load(w.saved, ConvNet),
        K,
        r"saved from tests.zoo.basics.MLP, built tests.zoo.basics.ConvNet\): .*fc1",
    ),
    Row(
        "load-other-width",
        lambda w: load(w.saved, TwiceAsWide),
        K,
        r"'fc1.weight' of shape \[10, 6\].*with shape \[20, 6\]",
    ),
    Row("load-subnet", lambda w: load(w.saved, w.subnet().model), K, r"shape \[10, 6\].*\[5, 6\].*another model"),
    Row("save-file", lambda w: w.subnet().save(w.file), K, "file cannot be written: FileExistsError.*another folder"),
    Row("save-below-file", lambda w: w.subnet().save(w.file / "x"), K, "cannot be written: NotADirectoryError"),
    Row("save-no-json", report_without_json, K, "the report of the subnet is no JSON"),
]


def _without_tensors(world: World) -> nn.Module:
    folder = world.damaged("", lambda data: data)
    (folder / "model.safetensors").unlink()
    return load(folder, MLP)


def compressed(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls these beta
        return tensor.to_sparse_csr()


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and these deprecated
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_weight(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network whose first weight is a tensor of another kind."""
    model = fresh_model()
    model.fc1.weight = nn.Parameter(function(model.fc1.weight.detach()), requires_grad=False)
    return model


MISUSE = [
    Row("trace-model", lambda w: trace(5, X), C, "model is a int: a torch.nn.Module is needed"),
    Row(
        "trace-script",
        script,
        TraceError,
        "MLP is a ScriptModule.*give the module",
    ),
    *(
        Row(
            f"trace-{name}",
            functools.partial(lambda w, f: trace(with_weight(f), X), f=function),
            TraceError,
            f"the parameter 'fc1.weight' is {text}, and only a dense tensor can be cut.*keep it as a buffer",
        )
        for name, function, text in [
            ("sparse", lambda t: t.to_sparse(), "sparse_coo"),
            ("sparse-rows", lambda t: compressed(t), "sparse_csr"),
            ("quantized", lambda t: quantized(t), "quantized"),
        ]
    ),
    Row("groups-graph", lambda w: find_groups(w.model), C, r"graph is a MLP: give what trace\(model, inputs\) returns"),
    Row("inputs-without-model", lambda w: OTO(dummy_input=X), C, "dummy_input is given, but no model"),
    *(
        Row(f"no-model-{number}", functools.partial(lambda w, a: a(OTO()), a=act), C, "no model yet: OTO")
        for number, act in enumerate(
            [
                lambda o: o.hesso(),
                lambda o: o.attach(None),
                lambda o: o.construct_subnet(),
                lambda o: o.random_set_zero_groups(0.5),
                lambda o: o.compute_flops(),
                lambda o: o.compute_num_params(),
                lambda o: o.visualize(),
                lambda o: o.mark_unprunable_by_param_names(["fc1"]),
                lambda o: o.mark_unprunable_by_node_ids([0]),
            ]
        )
    ),
    Row("initialize-again", lambda w: w.oto.initialize(ConvNet(), X), TraceError, "ConvNet does not run on"),
    *(
        Row(
            f"zero-{value!r}",
            functools.partial(lambda w, s: w.oto.random_set_zero_groups(s), s=value),
            C,
            "0 or more, and",
        )
        for value in ("0.5", [0.5], True)
    ),
    *(
        Row(
            f"zero-seed-{value!r}",
            functools.partial(lambda w, s: w.oto.random_set_zero_groups(0.5, seed=s), s=value),
            C,
            "seed=.*: a whole number, at least 0, or None",
        )
        for value in ("1", 1.5, True, -1, 2**70)
    ),
    *(
        Row(f"{name}-{value!r}", functools.partial(act, v=value), C, match)
        for name, act, value, match in [
            ("mark", lambda w, v: w.oto.mark_unprunable_by_param_names(v), [5], "param_names holds 5: give a string"),
            (
                "mark",
                lambda w, v: w.oto.mark_unprunable_by_param_names(v),
                None,
                "param_names holds None: give a string",
            ),
            ("mark", lambda w, v: w.oto.mark_unprunable_by_param_names(v), ["layer-1"], "'layer-1' is no parameter"),
            ("mark-node", lambda w, v: w.oto.mark_unprunable_by_node_ids(v), [-1], "-1 is no node"),
            ("mark-node", lambda w, v: w.oto.mark_unprunable_by_node_ids(v), None, "node_ids is None: give a list"),
            ("skip-pattern", lambda w, v: OTO(w.model, X, skip_patterns=v), 5, "skip_patterns holds 5: give a string"),
            ("skip-operators", lambda w, v: w.oto.skip_operators(v), 5, "operators holds 5: give a string"),
            ("clusters", lambda w, v: w.oto.cluster_node_groups(v), "1", "num_clusters='1': 1 to 1"),
            ("clusters", lambda w, v: w.oto.cluster_node_groups(v), True, "num_clusters=True: 1 to 1"),
            ("save", lambda w, v: w.subnet().save(v), None, "out_dir is None: give a folder's path"),
            ("out_dir", lambda w, v: w.oto.construct_subnet(v), 5, "5 is no folder: give a path"),
            ("visualize", lambda w, v: w.oto.visualize(v), 5, "out_dir is 5: give a folder's path"),
        ]
    ),
    Row("out_dir-file", lambda w: w.oto.construct_subnet(w.file), C, "file is a file: give a folder's path"),
    Row("visualize-file", lambda w: w.oto.visualize(w.file), C, "file cannot be made .*give another folder"),
]


ROWS = [*MISUSE, *HESSO, *BUDGETS, *METHODS, *ATTACH, *MODELS, *FACADE, *SUBNET, *TRAINING, *FILES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_input_has_its_error_and_loses_nothing(row: Row, tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.snapshot()
    with pytest.raises(row.error, match=rf"(?s){row.match}") as caught:
        row.act(world)
    assert type(caught.value) is row.error
    assert world.snapshot() == before


def test_the_snapshot_sees_a_change(tmp_path: Path) -> None:
    """The table is only as good as what it compares."""
    changes: list[Callable[[World], Any]] = [
        lambda w: w.model.fc1.weight.data.flatten()[0].add_(1e-7),
        lambda w: w.model.eval(),
        lambda w: w.model.fc1.register_forward_hook(lambda *_: None),
        lambda w: w.oto.attach(w.plain),
        lambda w: w.optimizer.step(),
        lambda w: w.oto.mark_unprunable_by_param_names(["fc1"]),
        lambda w: next(iter(w.saved.iterdir())).write_bytes(b""),
    ]
    for number, change in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        world = World(tmp_path / str(number))
        before = world.snapshot()
        assert world.snapshot() == before
        change(world)
        assert world.snapshot() != before, number


# ---------------------------------------------------------------- runs that are interrupted


class Interrupted(torch.optim.AdamW):
    """Raises in its step when told to, before any weight has changed."""

    now = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if Interrupted.now:
            raise KeyboardInterrupt
        return super().step(closure)


def interrupt() -> None:
    raise KeyboardInterrupt


def _result(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("where", ["backward", "closure", "step"])
@pytest.mark.parametrize("at", [2, 3, 4, 7, 8])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    at: int, where: str, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C anywhere in a step; then that step again, in the same process or from a file. Same bits."""

    scored: list[Tensor] = []

    def score(group: PruningGroup, parameters: Tensors, gradients: Tensors) -> Tensor:
        scored.append(gradients["fc1.weight"].clone())
        return taylor_first_order(group, parameters, gradients)

    def start() -> tuple[nn.Module, Any]:
        scored.clear()
        model = fresh_model()
        optimizer = Interrupted(model.parameters(), lr=1e-2)
        return model, OTO(model, X).attach(optimizer, importance_score_criteria=score, **SCHEDULE)

    model, optimizer = start()
    train(model, optimizer, range(12))
    expected, averages = _result(model), torch.stack(scored)
    assert optimizer.compute_metrics().num_zero_groups == TOTAL

    model, optimizer = start()
    train(model, optimizer, range(at))

    backward(model, optimizer, batch(at))
    monkeypatch.setattr(Interrupted, "now", where == "step")
    with pytest.raises(KeyboardInterrupt):
        {"backward": interrupt, "closure": lambda: optimizer.step(interrupt), "step": optimizer.step}[where]()
    monkeypatch.setattr(Interrupted, "now", False)
    if resume:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        before = list(scored)
        model, optimizer = start()
        scored += before
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(at, 12))
    assert sum(map(len, optimizer.removed.values())) == optimizer.compute_metrics().num_zero_groups == TOTAL
    assert torch.equal(torch.stack(scored), averages)  # each step counted once
    for name, t in _result(model).items():
        assert torch.equal(t, expected[name]), name


def test_after_a_bad_batch_the_run_equals_one_without_it() -> None:
    results = []
    for bad in (False, True):
        model = fresh_model()
        optimizer = OTO(model, X).hesso(variant="adamw", lr=1e-2, **SCHEDULE)
        train(model, optimizer, range(SCORING))
        if bad:
            backward(model, optimizer, torch.full((3, 6), math.inf))
            with pytest.raises(NumericalError, match="step 4"):
                optimizer.step()
        train(model, optimizer, range(SCORING, 12))
        results.append(_result(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---------------------------------------------------------------- a normal module comes back


def pruned(case: Case, model: nn.Module, seed: int = 0) -> Subnet:
    oto = OTO(model, case.inputs(), wide=bool(case.wide))
    oto.random_set_zero_groups(0.5, seed=seed)
    return oto.construct_subnet()


def outputs(model: nn.Module, inputs: Any) -> list[Any]:
    model.eval()
    return tree_leaves(call_model(model, inputs))


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_a_subnet_is_a_model_like_any_other(case: Case, tmp_path: Path) -> None:
    """It is copied, pickled, pruned again, and its state_dict goes into a loaded one and back."""
    first = pruned(case, case.build())
    second = pruned(case, first.model, seed=1)
    assert not first.report.excluded | second.report.excluded
    x = case.inputs()
    expected = outputs(second.model, x)
    parts = list(second.model.modules())
    held = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    if all(tensor.is_leaf for tensor in held):  # torch does not copy a weight that a hook has computed
        assert same(outputs(copy.deepcopy(second.model), x), expected)
    if not any(parametrize.is_parametrized(part) for part in parts):  # torch does not pickle these
        assert same(outputs(pickle.loads(pickle.dumps(second.model)), x), expected)

    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    loaded = load(tmp_path / "first", case.build)
    loaded.load_state_dict(first.model.state_dict(), strict=True)
    first.model.load_state_dict(loaded.state_dict(), strict=True)
    assert same(outputs(loaded, x), outputs(first.model, x))
    again = load(tmp_path / "second", lambda: load(tmp_path / "first", case.build))
    assert same(outputs(again, x), expected)


@pytest.mark.parametrize("name", ["convnet", "fused_attention", "rms_norm", "group_norm", "tied"])
def test_a_subnet_exports_and_compiles(name: str) -> None:
    case = ZOO[name]
    model = pruned(case, case.build()).model.eval()
    x = case.inputs()
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager")
    for other in (exported, compiled):
        torch.testing.assert_close(other(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["convnet", "rms_norm", "fused_attention"])
def test_any_dtype_trains_and_stays(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = ZOO[name]
    model = case.build().to(dtype)
    oto = OTO(model, case.inputs().to(dtype))
    schedule = {**SCHEDULE, "start_pruning_step": 0, "pruning_steps": 3}
    optimizer: Any = oto.hesso(variant="sgd", lr=1e-3, **schedule)
    for _ in range(4):
        optimizer.zero_grad()
        model(case.inputs().to(dtype)).float().square().mean().backward()
        optimizer.step()
    subnet = oto.construct_subnet()
    assert not subnet.report.excluded
    assert "float64" in str(subnet.report.verification)
    assert sum(map(len, optimizer.removed.values())) == optimizer.compute_metrics().num_zero_groups > 0
    subnet.save(tmp_path)
    loaded = load(tmp_path, lambda: case.build().to(dtype))
    for one, two in zip(subnet.model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def test_gradients_modes_hooks_and_random_state_stay() -> None:
    for training in (True, False):
        model = ConvNet().train(training)
        model.bn1.train(not training)
        x = torch.randn(2, 3, 8, 8)
        model(x).sum().backward()
        before = {n: m.training for n, m in model.named_modules()}
        tensors, gradients = (
            _result(model),
            [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None],
        )
        random = torch.get_rng_state()
        oto, other = OTO(model, x), OTO(model, x)  # twice on one model
        oto.compute_flops()
        subnet, again = oto.construct_subnet(), other.construct_subnet()  # and two subnets of it
        assert torch.equal(random, torch.get_rng_state())
        assert {n: m.training for n, m in model.named_modules()} == before
        assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
        assert all(torch.equal(now, then) for now, then in gradients)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert {n: m.training for n, m in subnet.model.named_modules()} == before
        assert subnet.model is not again.model
        assert same(outputs(subnet.model, x), outputs(again.model, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_built_without_gradients_trains(mode: Callable[[], Any], tmp_path: Path) -> None:
    with mode():
        subnet = pruned(ZOO["mlp"], fresh_model())
        subnet.save(tmp_path)
        loaded = load(tmp_path, MLP)
    for model in (subnet.model, loaded):
        model(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def compiled_inside() -> nn.Module:
    model = fresh_model()
    model.fc1 = torch.compile(model.fc1, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = fresh_model()
    model.compile(backend="eager")
    return model


def distributed(directory: Path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(fresh_model())


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        pytest.param(lambda d: nn.DataParallel(fresh_model()), "module.fc1", id="data_parallel"),
        pytest.param(distributed, "module.fc1", id="distributed"),
        pytest.param(lambda d: torch.optim.swa_utils.AveragedModel(fresh_model()), "module.fc1", id="averaged"),
        pytest.param(lambda d: torch.compile(fresh_model(), backend="eager"), "_orig_mod.fc1", id="compiled"),
        pytest.param(lambda d: compiled_inside(), "fc1._orig_mod", id="compiled_inside"),
        pytest.param(lambda d: compiled_in_place(), "fc1", id="compiled_in_place"),
    ],
)
def test_a_wrapped_model_gives_a_wrapped_subnet(wrap: Any, name: str, tmp_path: Path) -> None:
    """Data parallel, distributed, averaged, compiled: the subnet is the same, and runs."""
    try:
        model = wrap(tmp_path)
        oto = OTO(model, X)
        assert [g.name for g in oto.groups.prunable] == [name]
        oto.random_set_zero_groups(0.5, seed=0)
        subnet = oto.construct_subnet()
        assert type(subnet.model) is type(model)
        assert not subnet.report.excluded
        assert subnet.model.get_submodule(name).out_features == 5
        with torch.no_grad():
            torch.testing.assert_close(subnet.model(X), model(X))
    finally:
        torch._dynamo.reset()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_class_of_another_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Same tensors, other forward: loading cannot know, but does not keep quiet."""

    class Renamed(MLP):
        pass

    pruned(ZOO["mlp"], fresh_model()).save(tmp_path)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, MLP)
        assert not caplog.records
        load(tmp_path, Renamed)
    assert "may compute something else (saved from tests.zoo.basics.MLP, built" in caplog.text


def test_operators_that_are_skipped_freeze_what_they_touch() -> None:
    graph = trace(fresh_model(), X)
    assert len(find_groups(graph).prunable) == 1
    assert len(find_groups(graph, skip_operators=["gelu"]).prunable) == 0


class Counts(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_attributes_that_a_forward_writes_stay() -> None:
    model = Counts()
    oto = OTO(model, X)
    oto.compute_flops()
    subnet = oto.construct_subnet()
    assert model.calls == subnet.model.calls == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_may_change_its_dtype_after_the_analysis(dtype: torch.dtype) -> None:
    model = fresh_model()
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5, seed=0)
    model.to(dtype)
    assert oto.construct_subnet().model.fc1.weight.dtype is dtype


def test_shares_are_read_as_decimals() -> None:
    """0.29 of 100 units are 29, though 100 * 0.29 is 28.999999999999996."""
    model = nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 3))
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.29, seed=0)
    assert oto.construct_subnet().model[0].out_features == 71
