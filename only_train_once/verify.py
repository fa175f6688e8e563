"""`verify_subnet`: does the subnet compute what the full network computes with the removed units at zero?

[Note: the comparison]
Both networks are copied to float64 and run on fresh inputs: shaped like the example, with other values. What a
forward casts to float32 by name is kept in float64 as well (`inputs.in_float64`). In float64 a correct cut differs by
rounding only, some 1e-15, and a wrong one by much more than the tolerance, so nothing has to be judged. The networks
are compared in evaluation mode, and in training mode where the full network is deterministic there. The subnet
also runs once in its own dtype, whose kernels may refuse sizes that those of float64 take.

Batch statistics over a handful of values can amplify rounding by many orders of magnitude. Where a difference in
training mode exceeds the tolerance, the full network is therefore compared with itself, its weights changed by a
rounding error: a difference of that order says nothing about the cut. What has no such excuse fails.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .copying import copy_module
from .errors import ConfigurationError, TraceError, VerificationError
from .inputs import (
    Inputs,
    call_model,
    cast_inputs,
    clone_inputs,
    cuda_devices,
    fresh_inputs,
    in_float64,
    named_outputs,
    no_fast_paths,
    seed_generators,
    validate_inputs,
)

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# An output this much smaller than the largest one is judged by that scale: its own could be rounding noise.
_FLOOR = 1e-6
_ROUNDINGS = 100.0  # a cut sums in another order: this many times the effect of one relative rounding of the weights
_EXCUSED = 1e-5  # more than this is no rounding in float64, whatever the network amplifies

_Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """What was compared, and the result.

    Attributes:
        max_relative_difference: largest |full - subnet| of an output over the largest |full| of that output.
        tolerance: what it was held against.
        dtype: what both networks ran in.
        modes: ``("eval",)`` or ``("eval", "train")``.
        samples: inputs per mode.
        fresh: whether the inputs had other values than the example.
        deterministic: whether the full network gives the same result twice in training mode; if not, only
            evaluation mode was compared.
        outputs: names of the outputs compared.
        skipped: outputs whose shapes differ, left out because the caller said so.
        rounding: largest difference in training mode that rounding explains, 0 where none had to be explained; it is
            not in ``max_relative_difference``.
    """

    max_relative_difference: float
    tolerance: float
    dtype: torch.dtype
    modes: tuple[str, ...]
    samples: int
    fresh: bool
    deterministic: bool
    outputs: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    rounding: float = 0.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "fresh" if self.fresh else "example"
        modes = " and ".join(self.modes)
        note = "" if self.deterministic else "; training mode is random or does not run, not compared"
        if self.dtype is not torch.float64:
            note += "; float64 does not run"
        if self.rounding:
            note += f"; training mode amplifies rounding to {self.rounding:.0e}"
        if self.skipped:
            note += f"; other shapes, not compared: {', '.join(self.skipped)}"
        return (
            f"relative difference {self.max_relative_difference:.1e} (tolerance {self.tolerance:.0e}) in {dtype}, "
            f"{modes} mode, {self.samples} {kind} inputs, {len(self.outputs)} outputs{note}"
        )


def verify_subnet(
    full: nn.Module,
    subnet: nn.Module,
    inputs: Inputs,
    *,
    tolerance: float | None = None,
    samples: int = 2,
    seed: int = 0,
    ignore_shape_mismatch: bool = False,
) -> Verification:
    """Compare the subnet with the full network, see [Note: the comparison]. Neither is touched.

    Args:
        full: the network with the removed units at zero.
        inputs: example inputs: a tensor, a tuple (positional) or a dict (keyword arguments).
        tolerance: largest relative difference allowed; None takes 1e-9 in float64.
        samples: fresh inputs to compare on.
        ignore_shape_mismatch: leave out outputs whose shape surgery changed (a hidden state that was asked for)
            instead of failing.

    Raises:
        VerificationError: they differ; names the output, the value and the tolerance.
        TraceError: the full network does not run on the inputs.
    """
    _check_arguments(full, subnet, inputs, samples, seed, tolerance)
    with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(full)), no_fast_paths():
        bench = _set_up(full, subnet, inputs, samples, seed)
        allowed = TOLERANCE[bench.dtype] if tolerance is None else tolerance
        worst, names, skipped, rounding = _compare(bench, "eval", allowed, ignore_shape_mismatch)
        if bench.dtype is not _own_dtype(full):
            _check_runs(full, subnet, inputs)
        modes: tuple[str, ...] = ("eval",)
        deterministic = _trains_alike(bench)
        if deterministic:
            modes = ("eval", "train")
            trained, _, _, rounding = _compare(bench, "train", allowed, ignore_shape_mismatch)
            worst = max(worst, trained)
    return Verification(
        worst, allowed, bench.dtype, modes, len(bench.inputs), bench.fresh, deterministic, names, skipped, rounding
    )


def _check_arguments(full: Any, subnet: Any, inputs: Any, samples: Any, seed: Any, tolerance: Any) -> None:
    for name, model in (("full", full), ("subnet", subnet)):
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"{name} is a {type(model).__name__}, expected a torch.nn.Module")
    validate_inputs(inputs)
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{name} is {value!r}, expected a whole number, at least {least}")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        raise ConfigurationError(f"tolerance is {tolerance!r}, expected a number that is not negative, or None")


@dataclass
class _Bench:
    """Both networks and the inputs, ready to run in ``dtype``."""

    full: nn.Module
    subnet: nn.Module
    inputs: list[Inputs]
    dtype: torch.dtype
    fresh: bool
    seed: int

    def run(self, model: nn.Module, inputs: Inputs, mode: str, seed: int) -> _Outputs:
        model.train(mode == "train")
        seed_generators(cuda_devices(model), seed)
        with in_float64() if self.dtype is torch.float64 else nullcontext():
            return dict(_flatten(call_model(model, clone_inputs(inputs))))


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _set_up(full: nn.Module, subnet: nn.Module, inputs: Inputs, samples: int, seed: int) -> _Bench:
    """Float64 on fresh inputs if the full network runs so; else its own dtype, else the example itself."""
    own = _own_dtype(full)
    failure: Exception | None = None
    drawn = [fresh_inputs(inputs, seed + i) for i in range(samples)]
    for fresh, candidates in ((True, drawn), (False, [inputs])):
        for dtype in dict.fromkeys((torch.float64, own)):
            if dtype not in TOLERANCE:
                continue
            cast = [cast_inputs(x, dtype) for x in candidates] if dtype is torch.float64 else candidates
            bench = _Bench(copy_module(full), copy_module(subnet), cast, dtype, fresh, seed)
            if dtype is torch.float64:
                bench.full, bench.subnet = bench.full.double(), bench.subnet.double()
            try:
                for x in cast:
                    bench.run(bench.full, x, "eval", seed)
            except Exception as error:  # whatever a forward raises, another dtype or the example may do
                failure = error
                logger.info("%s does not run in %s: %s", type(full).__name__, dtype, error)
                continue
            return bench
    raise TraceError(
        f"{type(full).__name__} does not run on its example inputs: {failure}. Give what its forward takes: a tensor, "
        "a tuple of positional arguments or a dict of keyword arguments."
    ) from failure


def _check_runs(full: nn.Module, subnet: nn.Module, inputs: Inputs) -> None:
    """The subnet runs as it is where the full network does: kernels may want what those of float64 do not."""
    own = _own_dtype(subnet)
    cast = inputs if own is _own_dtype(full) else cast_inputs(inputs, own)
    try:
        call_model(copy_module(subnet).eval(), clone_inputs(cast))
    except Exception as error:
        try:
            call_model(copy_module(full).eval(), clone_inputs(inputs))
        except Exception:
            return
        raise VerificationError(f"the subnet does not run in its own dtype: {type(error).__name__}: {error}") from error


def _trains_alike(bench: _Bench) -> bool:
    """Whether the full network gives the same result in training mode under two seeds."""
    try:
        one, two = (bench.run(copy_module(bench.full), bench.inputs[0], "train", bench.seed + i) for i in (1, 2))
    except Exception as error:  # many networks want targets, or more than one example, to train
        logger.info("%s does not run in training mode: %s", type(bench.full).__name__, error)
        return False
    return one.keys() == two.keys() and all(
        one[n].shape == two[n].shape and torch.equal(torch.nan_to_num(one[n]), torch.nan_to_num(two[n])) for n in one
    )


def _compare(
    bench: _Bench, mode: str, tolerance: float, ignore_shapes: bool
) -> tuple[float, tuple[str, ...], tuple[str, ...], float]:
    """Largest relative difference, outputs compared, outputs left out, what rounding explains; raises beyond that."""
    worst = rounding = 0.0
    names: dict[str, None] = {}
    skipped: dict[str, None] = {}
    for number, x in enumerate(bench.inputs):
        at = f"in {mode} mode on input {number}"
        expected = bench.run(bench.full, x, mode, bench.seed)
        try:
            found = bench.run(bench.subnet, x, mode, bench.seed)
        except Exception as error:
            raise VerificationError(f"the subnet does not run {at}: {type(error).__name__}: {error}") from error
        if expected.keys() != found.keys():
            raise VerificationError(
                f"the subnet returns the outputs {list(found)} {at}, the full network {list(expected)}"
            )
        scale = max((peak(t) for t in expected.values()), default=0.0)
        for name, full in expected.items():
            if full.shape != found[name].shape:
                if not ignore_shapes:
                    raise VerificationError(
                        f"{name} has shape {list(found[name].shape)} in the subnet and {list(full.shape)} in the full "
                        f"network {at}; freeze its width, or pass ignore_shape_mismatch=True if it does not matter"
                    )
                skipped[name] = None
                continue
            difference = relative_difference(full, found[name], scale)
            names[name] = None
            if mode == "train" and tolerance < difference <= _EXCUSED and difference <= _amplified(bench, x, name):
                rounding = max(rounding, difference)
                continue
            if not difference <= tolerance:
                raise VerificationError(
                    f"{name} of the subnet differs {at}: relative difference {difference:.3g} in "
                    f"{str(bench.dtype).removeprefix('torch.')}, tolerance {tolerance:.0e}"
                )
            worst = max(worst, difference)
        if not any(bool(torch.isfinite(full).any()) for name, full in expected.items() if name in names):
            # Nothing that could be wrong is no proof that all is well.
            facts = [f"{name} {list(t.shape)}" + ("" if t.numel() else " is empty") for name, t in expected.items()]
            raise VerificationError(
                f"nothing to compare {at}: no floating-point output of {type(bench.full).__name__} has a finite value "
                f"({'; '.join(facts) or 'it returns none'}). Look for NaN or infinite weights and buffers, or give "
                "inputs with a batch of at least 2"
            )
    return worst, tuple(names), tuple(skipped), rounding


def _amplified(bench: _Bench, x: Inputs, name: str) -> float:
    """What rounding may change an output by in training mode: the full network against itself, its weights rounded."""
    generator = torch.Generator().manual_seed(bench.seed)
    exact = bench.run(copy_module(bench.full), x, "train", bench.seed)
    rounded = copy_module(bench.full)
    for parameter in rounded.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
        if parameter.is_floating_point():
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * noise.to(parameter.device, parameter.dtype))
    found = bench.run(rounded, x, "train", bench.seed)
    return _ROUNDINGS * relative_difference(exact[name], found[name], max(peak(t) for t in exact.values()))


def peak(value: Tensor) -> float:
    finite = value[torch.isfinite(value)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def relative_difference(full: Tensor, found: Tensor, scale: float) -> float:
    """max |full - found| / max |full|; infinite where one is NaN or infinite and the other is not the same."""
    finite = torch.isfinite(full)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    if not torch.equal(full[~finite].nan_to_num(nan=0.0), found[~finite].nan_to_num(nan=0.0)):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    gap = float((full[finite] - found[finite]).abs().max())
    if gap == 0.0:
        return 0.0
    unit = max(peak(full), _FLOOR * scale)
    return gap / unit if unit else math.inf


def _flatten(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors of an output with names."""
    for name, tensor in named_outputs(output):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if real.is_floating_point():
            yield name, real.detach()
