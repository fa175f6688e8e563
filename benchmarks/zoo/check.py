"""`check`: everything the zoo asks of one network, as one flat record."""

from __future__ import annotations

import copy
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from only_train_once.checkpoint import load, save
from only_train_once.errors import VerificationError
from only_train_once.explain import coverage, what_stays
from only_train_once.groups import GroupList, find_groups
from only_train_once.inputs import Inputs, call_model, output_tensors
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import Verification, verify_subnet
from tests.pruning import choose, randomize, zero

from .network import Network

EXACT = 1e-9


def check(build: Callable[[], Network], repeats: int = 3) -> dict[str, Any]:
    """Analyse a network, cut 40 % of the units of every group by default and with wide=True, compare, train, save.

    Returns:
        JSON fields. ``default`` and ``wide`` hold what `_cut` says; what fails raises, so that no field can be
        missing because something went wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say about themselves
        network = build()
        model, inputs = network.model.eval(), network.inputs(0)
        randomize(model)
        times = timing(model, inputs, repeats)
        graph = trace(model, inputs)
        unknown = sorted(
            {
                m[1]
                for g in find_groups(graph)
                if not g.prunable and (m := re.search(r"no rule for this operator at (\S+)", g.reason or ""))
            }
        )
        record: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "operators": len(graph.nodes),
            **times,
            "instrumented": graph.provenance,
            "untrusted": len(graph.untrusted),
            "without_rule": unknown,
            "note": network.note,
        }
        state = copy.deepcopy(model.state_dict())
        groups = {wide: find_groups(graph, wide=wide) for wide in (False, True)}
        record["default"] = _cut(model, groups[False], network, build)
        if str(groups[True].prunable) == str(groups[False].prunable):
            record["wide"] = record["default"]  # nothing more is offered: the cut would be the same
        else:
            model.load_state_dict(state)
            record["wide"] = _cut(model, groups[True], network, build)
    return record


def cost(build: Callable[[], Network], repeats: int = 5) -> dict[str, Any]:
    """Only what the analysis of a network costs, as JSON fields."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = build()
        model, inputs = network.model.eval(), network.inputs(0)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "operators": len(trace(model, inputs).nodes),
            **timing(model, inputs, repeats),
        }


def timing(model: nn.Module, inputs: Inputs, repeats: int) -> dict[str, float]:
    """Processor seconds of one eager forward and of a whole analysis, in turns; long ones are run once."""
    forward, analysis = [], []
    with torch.no_grad():
        call_model(model, inputs)
        for _ in range(repeats):
            forward.append(_seconds(lambda: call_model(model, inputs)))
            analysis.append(_seconds(lambda: find_groups(trace(model, inputs))))
            if analysis[0] > 2:  # long enough to be told from noise
                break
    return {
        "forward_s": round(statistics.median(forward), 4),
        "analysis_s": round(statistics.median(analysis), 4),
        "ratio": round(statistics.median(a / f for a, f in zip(analysis, forward, strict=True)), 2),
    }


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()  # of the processor: others on the machine do not count
    function()
    return time.process_time() - start


def _cut(model: nn.Module, groups: GroupList, network: Network, build: Callable[[], Network]) -> dict[str, Any]:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fields: dict[str, Any] = {
        "groups": len(groups.prunable),
        "units": sum(g.size for g in groups.prunable),
        "coverage": round(coverage(groups, shapes), 4),
        "stays": {s.reason: round(s.share, 3) for s in what_stays(groups, shapes)[:4] if s.share >= 0.005},
    }
    if not groups.prunable:
        return fields
    fresh = network.inputs(1)
    before = _first_output(model, fresh)
    zero(model, groups, choose(groups))
    after = _first_output(model, fresh)
    subnet, record = construct_subnet(model, groups)
    result = _compared(model, subnet, fresh)
    fields |= {
        "kept": round(sum(p.numel() for p in subnet.parameters()) / sum(p.numel() for p in model.parameters()), 4),
        "difference": result.max_relative_difference,
        "dtype": str(result.dtype).removeprefix("torch."),
        "modes": len(result.modes),
        "rounding": result.rounding,
        "finite": bool(torch.isfinite(after).any()),
        "changed": not torch.equal(before, after),  # else nothing that was removed mattered, and the check is void
        "same_class": type(subnet) is type(model),
        "trains": _trains(subnet, fresh),
        "loads": _loads(subnet, record, fresh, build),
    }
    return fields


def _compared(model: nn.Module, subnet: nn.Module, inputs: Inputs) -> Verification:
    try:
        return verify_subnet(model, subnet, inputs, tolerance=EXACT, samples=1)
    except VerificationError:  # how far off it is goes into the record
        return verify_subnet(model, subnet, inputs, tolerance=float("inf"), samples=1)


def _first_output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.cat(
            [t.flatten().double() for t in output_tensors(call_model(model, inputs)) if t.is_floating_point()]
        )


def _trains(subnet: nn.Module, inputs: Inputs) -> bool:
    """Whether a step of SGD moves the parameters."""
    trained = copy.deepcopy(subnet).train()
    try:
        outputs = list(output_tensors(call_model(trained, inputs)))
    except Exception:  # training mode may want targets
        outputs = list(output_tensors(call_model(trained.eval(), inputs)))
    differentiable = [t.float().square().mean() for t in outputs if t.is_floating_point() and t.requires_grad]
    if not differentiable:
        return False
    torch.stack(differentiable).sum().backward()
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.parameters())


def _loads(subnet: nn.Module, record: Any, inputs: Inputs, build: Callable[[], Network]) -> bool:
    """Whether the saved subnet comes back with bit-equal outputs."""
    with tempfile.TemporaryDirectory() as folder:
        save(subnet, record, {}, folder)
        loaded = load(folder, build=lambda: build().model)
    one, two = _first_output(subnet.eval(), inputs), _first_output(loaded.eval(), inputs)
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(two))
