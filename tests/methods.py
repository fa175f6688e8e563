"""Every method with arguments under which the small networks of ``reference/nets.py`` show what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from only_train_once.groups import PruningGroup
from tests.reference.ada_hspg import PaperAdaHspg
from tests.reference.dhspg import PaperDhspg
from tests.reference.hesso import PaperHesso
from tests.reference.hesso_cric import PaperCric
from tests.reference.hspg import PaperHspg
from tests.reference.paper import Paper

PLAN: dict[str, Any] = {
    "target_group_sparsity": 0.5,
    "start_pruning_step": 4,
    "pruning_steps": 12,
    "pruning_periods": 3,
}
_HSPG = {"method": "hspg", "lmbda": 2.0, "epsilon": 0.5, "warm_up_steps": 4}
_DHSPG = {"method": "dhspg", "lmbda": 3.0, "epsilon": 0.9}
CONFIGS: dict[str, dict[str, Any]] = {
    "hesso": {"method": "hesso"},
    "hspg": _HSPG,
    "hspg, prox": {**_HSPG, "first_stage": "prox", "warm_up_steps": 2},
    "dhspg": _DHSPG,
    "dhspg, tolerance": {**_DHSPG, "tolerance_group_sparsity": 0.2, "finish_steps": 4},
    "ada_hspg": {"method": "ada_hspg", "lmbda": 3.0, "epsilon": 0.3, "delta": 0.1, "finish_steps": 4},
    "hesso_cric": {
        "method": "hesso_cric",
        "start_cric_step": 4,
        "sampling_steps": 3,
        "max_cycle_period": 2,
        "hybrid_training_steps": 4,
    },
}
_PLANNED = {"hesso_cric": {"target_group_sparsity": 0.5}}  # methods with a schedule of their own


# Steps at which a run of `PLAN` may wait for the device: where it scores, and where it looks what is at zero.
BOUNDARIES = {
    "hesso": [4, 8, 12],
    "hspg": [15],
    "hspg, prox": [15],
    "dhspg": [4, 8, 12, 15],
    "dhspg, tolerance": [4, 8, 12],
    "ada_hspg": [4, 8, 12],
    "hesso_cric": [4, 6, 7],
}


def starting(method: str, step: int) -> dict[str, int]:
    """Arguments that make a method begin at a step."""
    starts = ("start_pruning_step", "warm_up_steps", "start_cric_step")
    return {n: step for n in starts if n in config(method)}


def config(method: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `attach` for a row of `CONFIGS`."""
    return {**_PLANNED.get(method, PLAN), **CONFIGS[method], **changes}


# -- slow versions: strength of the penalty -> arguments of `attach`, and the slow version of the same run ------------

LONG: dict[str, Any] = {"target_group_sparsity": 0.5, "start_pruning_step": 20, "pruning_steps": 102}
Slow = Callable[[Optimizer, Sequence[PruningGroup], dict[str, Tensor]], Paper]


def _hesso(strength: float) -> tuple[dict[str, Any], Slow]:
    return {"method": "hesso", **LONG, "pruning_periods": 4}, lambda *run: PaperHesso(*run, 0.5, 20, 102, 4)


def _hspg(strength: float, first_stage: str) -> tuple[dict[str, Any], Slow]:
    arguments = {"lmbda": strength, "epsilon": 0.5}

    def slow(*run: Any) -> Paper:
        paper = PaperHspg(*run, 0.5, **arguments, warm_up=5, start=20, steps=102, finish=12)
        paper.first_stage = first_stage
        return paper

    more = {"warm_up_steps": 5, "finish_steps": 12, "first_stage": first_stage}
    return {"method": "hspg", **arguments, **LONG, **more}, slow


def _dhspg(strength: float, direction: str) -> tuple[dict[str, Any], Slow]:
    arguments = {"lmbda": strength, "epsilon": 0.9}
    more = {"lmbda_amplify": 3.0, "hat_lmbda_coeff": 100.0, "direction": direction, "finish_steps": 12}

    def slow(*run: Any) -> Paper:
        return PaperDhspg(
            *run, 0.5, **arguments, warm_up=20, start=20, steps=102, finish=12,
            amplify=3.0, hat=100.0, direction=direction, window=10,
        )  # fmt: skip

    return {"method": "dhspg", **arguments, **LONG, **more}, slow


def _ada_hspg(strength: float) -> tuple[dict[str, Any], Slow]:
    arguments = {"lmbda": strength, "epsilon": 0.7, "mu": 2.0, "delta": 0.2}
    more = {"pruning_periods": 10, "finish_steps": 12}

    def slow(*run: Any) -> Paper:
        return PaperAdaHspg(*run, 0.5, **arguments, warm_up=20, start=20, steps=102, finish=12, periods=10, window=10)

    return {"method": "ada_hspg", **arguments, **LONG, **more}, slow


def _cric(strength: float, tolerance: int) -> tuple[dict[str, Any], Slow]:
    arguments = {"start_cric_step": 20, "sampling_steps": 7, "max_cycle_period": 5, "hybrid_training_steps": 40}

    def slow(base: Optimizer, groups: Sequence[PruningGroup], parameters: dict[str, Tensor]) -> Paper:
        return PaperCric(base, groups, parameters, 0.5, start=20, sampling=7, cycles=5, tolerance=tolerance, ramp=40)

    return {"method": "hesso_cric", "target_group_sparsity": 0.5, "tolerance": tolerance, **arguments}, slow


SLOW: dict[str, Callable[[float], tuple[dict[str, Any], Slow]]] = {
    "hesso": _hesso,
    "hspg": partial(_hspg, first_stage="subgradient"),
    "hspg, prox": partial(_hspg, first_stage="prox"),
    "dhspg": partial(_dhspg, direction="step"),
    "dhspg, gradient": partial(_dhspg, direction="gradient"),
    "ada_hspg": _ada_hspg,
    "hesso_cric": partial(_cric, tolerance=0),
    "hesso_cric, tolerance": partial(_cric, tolerance=2),
}
