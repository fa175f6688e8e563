"""`trace(model, inputs)`: run the model once, for real, and write down what happened.

Together with `recorder.py` and `size_reader.py` all that knows how a model is captured. A dispatch mode sees every ATen
call of one eager forward pass without gradients, so Python control flow, aliasing and in-place operators are followed
as they happen. A function mode above it sees the same calls while their size arguments still remember where they came
from. A copy of the model is run, never the model itself. The graph is then replayed with nothing removed and has to
reproduce the output bit for bit. Where data decided what ran, further passes follow what else can run.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .collector import few_collections
from .copying import borrowed
from .errors import ConfigurationError, TraceError
from .graph import Graph
from .inputs import Inputs, call_model, clone_inputs, fresh_inputs, no_fast_paths, seed_generators, tensors_of
from .recorder import Recorder
from .sharding import is_dtensor
from .size_reader import SizeReader, inline_python_functions, instrument
from .sizes import SizeLog

logger = logging.getLogger(__name__)

_OTHER_INPUTS = 64  # passes at most over other data; one that touches no further parameter is dropped
_FRUITLESS = 8  # so many of those in a row are enough
_OTHER_OUTCOMES = 24  # passes at most in which a decision on data comes out the other way


@few_collections()
def trace(model: nn.Module, inputs: Inputs, *, provenance: bool = True) -> Graph:
    """Capture one forward pass of ``model`` on ``inputs``.

    Args:
        model: any module that runs on the inputs; it is copied, and neither it nor the inputs change.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments. Use a batch of at least 2.
        provenance: track where sizes come from. When the model does not run with instrumented sizes it is
            traced without, and every size in its code counts as a literal.

    Raises:
        TraceError: the model cannot be copied or does not run.
        ConfigurationError: the inputs are missing or hold no tensor.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{getattr(model, 'original_name', type(model).__name__)} is a ScriptModule, which cannot be cut: give the "
            "module it was scripted or traced from"
        )
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ConfigurationError(
                f"the parameter {name!r} is spread over processes: analyse the model before fully_shard or "
                f"parallelize_module, on the meta device if it fits nowhere"
            )
        if parameter.layout is not torch.strided or parameter.is_quantized or parameter.is_nested:
            kind = "quantized" if parameter.is_quantized else "nested" if parameter.is_nested else str(parameter.layout)
            raise TraceError(
                f"the parameter {name!r} is {kind.removeprefix('torch.')}, and only a dense tensor can be cut: give a "
                f"model whose {name} is dense, or keep it as a buffer, which is not pruned"
            )
    tensors_of(inputs)  # validates before anything is copied
    if provenance:
        try:
            return _trace_checked(model, inputs, provenance=True)
        except TraceError as error:
            logger.info("tracing with instrumented sizes failed (%s); tracing without", error)
            try:
                return _trace_checked(model, inputs, provenance=False)
            except TraceError:
                raise error from None
    return _trace_checked(model, inputs, provenance=False)


def _trace_checked(model: nn.Module, inputs: Any, *, provenance: bool) -> Graph:
    with ExitStack() as stack:
        copied = stack.enter_context(borrowed(model, TraceError))
        recorder, log = _record(copied, inputs, provenance=provenance, checksums=False)
        untrusted: dict[int, str] = {}
        if not any(t.is_meta for t in recorder.leaves.values()) and not recorder.replays():
            # Something the operators do not show changed the result. Run again with a checksum per node to find where.
            logger.warning("replaying the graph does not reproduce the model's output; locating the difference")
            copied = stack.enter_context(borrowed(model, TraceError))
            recorder, log = _record(copied, inputs, provenance=provenance, checksums=True)
            untrusted = recorder.divergence()
        if recorder.hidden():
            _record_other_inputs(recorder, log, inputs)
        if recorder.hidden():
            _record_other_outcomes(recorder, log, inputs)
        if recorder.unused():
            _record_training(recorder, log, inputs)
        return recorder.graph(untrusted)


def _record_other_inputs(recorder: Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    """Data decided which code runs, and parameters lie unused (experts that no token chose): follow other data too.

    Where other inputs show nothing new, the copy gets other weights as well: a router that never chooses an expert on
    these inputs then chooses another way. What the code can do with the values is a question about the code alone.
    """
    fruitless = 0
    for seed in range(_OTHER_INPUTS):
        before, state = recorder.unused(), recorder.state()
        try:
            if fruitless:
                _roll_weights(recorder.model, seed)
            _run(recorder, log, fresh_inputs(inputs, seed))
        except TraceError as error:
            logger.info("the model does not run on other values than its own and the example's (%s)", error)
            recorder.forget(state)
            return
        if recorder.unused() == before:
            recorder.forget(state)
            fruitless += 1
        else:
            fruitless = 0
        if fruitless == _FRUITLESS or not recorder.hidden():
            return


def _roll_weights(model: nn.Module, seed: int) -> None:
    """Move the entries of every parameter along its first dim: other weights, of the same distribution."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = int(torch.randint(max([*parameter.shape[:1], 1]), (), generator=generator))
            if shift == 0:
                continue
            try:
                parameter.copy_(parameter.roll(shift, 0))
            except Exception as error:  # a tensor of a class of its own
                raise TraceError(f"{name} takes no other values: {type(error).__name__}: {error}") from error


def _record_other_outcomes(recorder: Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    """Let decisions between True and False come out the other way, one and two at a time, and follow what runs then.

    A decision stays a branch where a number was read, where the pass fails later than at the decision itself (what
    would have run then is not known), or where there are too many of them. Otherwise all that it can run has run.
    """
    places = recorder.decisions()
    known = {(b.module, b.lines) for b in recorder.branches}
    waiting = [frozenset({a, b}) for i, a in enumerate(places) for b in places[i:]]
    waiting.sort(key=len)
    doubtful: set[str] = set()
    done = 0
    while done < len(waiting):
        if len(waiting) > _OTHER_OUTCOMES:
            return
        turned = waiting[done]
        done += 1
        before, state = recorder.unused(), recorder.state()
        failed = False
        try:
            with recorder.turn(turned):
                _run(recorder, log, clone_inputs(inputs))
        except TraceError as error:
            logger.info("the model does not run when decisions at %s come out otherwise (%s)", sorted(turned), error)
            failed = True
        found = {(b.module, b.lines) for b in recorder.branches if b.node >= state.nodes} - known
        if any(not lines for _, lines in found) or (failed and not recorder.failed_at_turn()):
            doubtful |= turned
        known |= found
        waiting += [turned | {lines} for _, lines in sorted(found) if lines]
        if failed or recorder.unused() == before:
            recorder.forget(state)
        elif not recorder.hidden():
            return
    recorder.settle({lines for _, lines in known if lines} - doubtful)


def _record_training(recorder: Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    """Parameters that evaluation does not touch (auxiliary heads) may run in training: follow that path too."""
    recorder.model.train()
    state = recorder.state()
    recorder.training = state.nodes
    try:
        _run(recorder, log, clone_inputs(inputs))
    except TraceError as error:
        logger.info("the model does not run in training mode (%s); only evaluation is analysed", error)
        recorder.forget(state)


def _record(model: nn.Module, inputs: Inputs, *, provenance: bool, checksums: bool) -> tuple[Recorder, SizeLog | None]:
    """Run a model, which is ours to change, in evaluation mode."""
    model.eval()
    recorder = Recorder(model, checksums=checksums)
    log = SizeLog() if provenance else None
    if log is not None:
        instrument(recorder.modules, log)
    _run(recorder, log, clone_inputs(inputs))
    return recorder, log


def _run(recorder: Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    model = recorder.model
    recorder.start(inputs)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=recorder.devices))
            seed_generators(recorder.devices)
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(no_fast_paths())
            stack.enter_context(recorder.module_hooks())
            if log is not None:
                log.enabled = True
            stack.enter_context(inline_python_functions())
            stack.enter_context(SizeReader(recorder, log))
            stack.enter_context(recorder)
            output = call_model(model, inputs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs {_describe(inputs)}: "
            f"{type(error).__name__}: {error}. dummy_input has to be what the model's forward takes: a tensor, a tuple "
            "of positional arguments or a dict of keyword arguments."
        ) from error
    finally:
        if log is not None:
            log.enabled = False
    recorder.finish(output, log)


def _describe(inputs: Any) -> str:
    shapes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_of(inputs)]
    return f"[{', '.join(shapes)}]"
