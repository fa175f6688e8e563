"""`trace(model, inputs)`: run the model once, for real, and write down what happened.

The only file that knows how a model is captured. A dispatch mode sees every ATen call of one eager forward
pass without gradients, so Python control flow, aliasing and in-place operators are followed as they happen. A
function mode above it sees the same calls while their size arguments still remember where they came from
(`sizes.py`). A copy of the model is run, never the model itself. The graph is then replayed with nothing
removed and has to reproduce the output bit for bit.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from .errors import ConfigurationError, TraceError
from .graph import Branch, EqualParts, Expr, Graph, Guard, ModuleCall, Node, Ref, SizeUse, Value, ValueKind
from .higher_order import run_inside
from .inputs import (
    Inputs,
    call_model,
    clone_inputs,
    copy_module,
    fresh_inputs,
    named_outputs,
    no_fast_paths,
    tensors_of,
)
from .sizes import SizeInt, SizeLog, expr_of, plain

logger = logging.getLogger(__name__)

_SCALAR_READS = frozenset({"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal"})
# int attributes that shape no tensor dim; leaving them alone saves time in every convolution
_NUMBERS = frozenset({"number", "Scalar", "Tensor", "Optional[number]", "Optional[Scalar]"})
_OTHER_INPUTS = 64  # passes at most over other data; one that touches no further parameter is dropped
_FRUITLESS = 8  # so many of those in a row are enough
_FRAMES = 6  # innermost lines by which a decision is told from others
_TORCH = str(Path(torch.__file__).parent)
_OTHER_OUTCOMES = 24  # passes at most in which a decision on data comes out the other way
_NOT_SIZES = frozenset({"stride", "padding", "dilation", "kernel_size", "output_padding", "training", "padding_idx"})
# Recorded as one call: their parts are a score of operators per time step, and other ones on every device.
_WHOLE: dict[Any, Any] = {
    getattr(torch, name): getattr(torch.ops.aten, name)
    for name in (
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
        "_pad_packed_sequence",
    )
}  # fmt: skip


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
    recorder, log = _record(model, inputs, provenance=provenance, checksums=False)
    untrusted: dict[int, str] = {}
    if not any(t.is_meta for t in recorder.leaves.values()) and not recorder.replays():
        # Something the operators do not show changed the result. Run again with a checksum per node to find where.
        logger.warning("replaying the captured graph does not reproduce the model's output; locating the difference")
        recorder, log = _record(model, inputs, provenance=provenance, checksums=True)
        untrusted = recorder.divergence()
    if recorder.hidden():
        _record_other_inputs(recorder, log, inputs)
    if recorder.hidden():
        _record_other_outcomes(recorder, log, inputs)
    if recorder.unused():
        _record_training(recorder, log, inputs)
    return recorder.graph(untrusted)


def _record_other_inputs(recorder: _Recorder, log: SizeLog | None, inputs: Inputs) -> None:
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


def _record_other_outcomes(recorder: _Recorder, log: SizeLog | None, inputs: Inputs) -> None:
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


def _record_training(recorder: _Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    """Parameters that evaluation does not touch (auxiliary heads) may run in training: follow that path too."""
    recorder.model.train()
    state = recorder.state()
    try:
        _run(recorder, log, clone_inputs(inputs))
    except TraceError as error:
        logger.info("the model does not run in training mode (%s); only evaluation is analysed", error)
        recorder.forget(state)


def _record(model: nn.Module, inputs: Inputs, *, provenance: bool, checksums: bool) -> tuple[_Recorder, SizeLog | None]:
    """Run a copy of the model in evaluation mode."""
    model = copy_module(model, TraceError)
    model.eval()
    recorder = _Recorder(model, checksums=checksums)
    log = SizeLog() if provenance else None
    if log is not None:
        _instrument(model, log)
    _run(recorder, log, clone_inputs(inputs))
    return recorder, log


def _run(recorder: _Recorder, log: SizeLog | None, inputs: Inputs) -> None:
    model = recorder.model
    recorder.start(inputs)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
            _seed(_cuda_devices(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(no_fast_paths())
            stack.enter_context(recorder.module_hooks())
            if log is not None:
                log.enabled = True
            stack.enter_context(_inline_python_functions())
            stack.enter_context(_FunctionRecorder(recorder, log))
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


def _lines() -> str:
    """The lines of Python that run, without those of torch and of this file, the innermost first."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < _FRAMES:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(_TORCH):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


class _State(NamedTuple):
    """How much was recorded at some time."""

    nodes: int
    calls: int
    outputs: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    """Writes down every ATen call.

    Tensors are known by identity and held weakly, so that a capture needs no more memory than the forward pass.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, *, checksums: bool) -> None:
        super().__init__()
        self.model = model
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.known: dict[int, tuple[TensorWeakRef, int]] = {}  # id(tensor) -> the tensor, its newest value
        self.by_storage: dict[int, list[TensorWeakRef]] = {}  # tensors that share memory
        self.leaves: dict[int, Tensor] = {}  # value index -> tensor that no call made
        self.checks: list[tuple[float, ...]] | None = [] if checksums else None
        self.stack: list[str] = [""]
        self.calls: list[ModuleCall] = []
        self.branches: list[Branch] = []
        self.constant: set[int] = set()  # values that are the same whatever the data are (``torch.ones(n)``)
        self.settled: set[str] = set()  # lines of which both outcomes are known
        self.turned: frozenset[str] = frozenset()  # lines whose decisions come out the other way
        self.turned_at = -1  # node of the last such decision
        self.uses: list[SizeUse] = []
        self.equal_parts: list[EqualParts] = []
        self.counts: dict[int, SizeUse] = {}
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.names: dict[int, tuple[ValueKind, str]] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for kind, named in (
            (ValueKind.PARAMETER, model.named_parameters(remove_duplicate=False)),
            (ValueKind.BUFFER, model.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in named:
                _, first = self.names.setdefault(id(tensor), (kind, name))
                self.aliases[first] = (*self.aliases.get(first, ()), name)
        self.inputs: list[int] = []
        self.outputs: tuple[int, ...] = ()
        self.output_tensors: list[Tensor] = []
        self.guards: tuple[Guard, ...] = ()
        self.provenance = False
        self.inside = False  # of a call that is being recorded: what it is made of is not

    def start(self, inputs: Inputs) -> None:
        """Begin a pass over the model."""
        self.stack = [""]
        self.inputs += [self.value_of(t, ValueKind.INPUT, f"input{i}") for i, t in enumerate(tensors_of(inputs))]

    # -- values

    def value_of(self, tensor: Tensor, kind: ValueKind = ValueKind.CONSTANT, name: str = "") -> int:
        """The value a tensor holds now; a tensor never seen before is a leaf."""
        index = self._index_of(tensor)
        if index is None:
            if id(tensor) in self.names:
                kind, name = self.names[id(tensor)]
            index = self._new_value(tensor, kind, name)
            self.leaves[index] = tensor
            self._keep(tensor)
        return index

    def _index_of(self, tensor: Tensor) -> int | None:
        held, index = self.known.get(id(tensor), (None, None))
        return index if held is not None and held() is tensor else None  # else the id was another's, now gone

    def _new_value(self, tensor: Tensor, kind: ValueKind, name: str = "") -> int:
        index = len(self.values)
        strides = tensor.stride() if tensor.layout is torch.strided else ()
        self.values.append(Value(index, tuple(tensor.shape), tensor.dtype, kind, name, tuple(strides)))
        self.known[id(tensor)] = (TensorWeakRef(tensor), index)
        return index

    def _keep(self, tensor: Tensor) -> None:
        storage = _storage_key(tensor)
        if storage is not None:
            self.by_storage.setdefault(storage, []).append(self.known[id(tensor)][0])

    # -- calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            return run_inside(self, func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if self.inside else self.record(func, args, kwargs or {})

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator and write it down."""
        given: list[Tensor] = []
        inputs: list[int] = []

        def reference(tensor: Tensor) -> Ref:
            given.append(tensor)
            inputs.append(self.value_of(tensor))
            return Ref(inputs[-1])

        ref_args, ref_kwargs = _replace(args, Tensor, reference), _replace(kwargs, Tensor, reference)
        self.inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside = False
        written = _written(func, args, kwargs)
        outputs: list[int | None] = []
        given_ids = {id(tensor) for tensor in given}
        written_ids = {id(t) for t in written}
        for out in _flat_results(result):
            if not isinstance(out, Tensor):
                outputs.append(None)
            elif id(out) in written_ids:
                outputs.append(self._new_value(out, ValueKind.RESULT))
                written_ids.discard(id(out))
            elif id(out) in given_ids:  # an operator that returns its argument
                outputs.append(self._index_of(out))
            else:
                outputs.append(self._new_value(out, ValueKind.RESULT))
                self._keep(out)
        updates = self._versions(written, outputs)
        self.nodes.append(
            Node(len(self.nodes), func, ref_args, ref_kwargs, tuple(inputs), tuple(outputs), self.stack[-1], updates)
        )
        if self.constant.issuperset(inputs) and torch.Tag.nondeterministic_seeded not in func.tags:
            self.constant.update(o for o in outputs if o is not None)
        elif self.nodes[-1].name in _SCALAR_READS:
            lines = _lines() if isinstance(result, bool) else ""
            if lines not in self.settled:
                self.branches.append(Branch(self.nodes[-1].index, self.stack[-1], lines))
            if lines in self.turned:
                result, self.turned_at = not result, len(self.nodes)
        if self.checks is not None:
            self.checks.append(_checksum(result))
        return result

    def _versions(self, written: Sequence[Tensor], outputs: Sequence[int | None]) -> tuple[tuple[int, int], ...]:
        """New versions for every other tensor that shares the memory a call wrote to."""
        updates: list[tuple[int, int]] = []
        fresh = set(outputs)
        for tensor in written:
            storage = _storage_key(tensor)
            sharing = [tensor] if storage is None else [held() for held in self.by_storage.get(storage, ())]
            for other in sharing:
                old = self._index_of(other) if other is not None else None
                if old is not None and old not in fresh:
                    new = self._new_value(other, ValueKind.RESULT)
                    fresh.add(new)
                    updates.append((new, old))
        return tuple(updates)

    # -- modules

    @contextmanager
    def module_hooks(self) -> Iterator[None]:
        """Follow which module runs, through hooks that see every module."""
        entered: list[tuple[int, ...]] = []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(module) in self.paths:
                self.stack.append(self.paths[id(module)])
                entered.append(tuple(self.value_of(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self.paths and len(self.stack) > 1:
                path = self.stack.pop()
                outs = tuple(self.value_of(t) for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
                self.calls.append(ModuleCall(path, entered.pop(), outs))

        hooks = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # -- results

    def finish(self, output: Any, log: SizeLog | None) -> None:
        """Note the outputs and what the model's code relied on."""
        self.output_tensors = list(output_tensors(output))
        if not self.output_tensors:
            raise TraceError(f"{type(self.model).__name__} returned no tensor but {type(output).__name__}")
        self.outputs = tuple(dict.fromkeys((*self.outputs, *(self.value_of(t) for t in self.output_tensors))))
        self.provenance = log is not None
        self.guards = tuple(dict.fromkeys(Guard(left, right, "") for left, right in (log.guards if log else ())))

    def state(self) -> _State:
        """Where the record stands, for `forget`."""
        return _State(len(self.nodes), len(self.calls), self.outputs)

    def forget(self, state: _State) -> None:
        """Drop all since then: a pass that failed half way says nothing, one that showed nothing new costs time."""
        nodes = state.nodes
        del self.nodes[nodes:]
        del self.calls[state.calls :]
        self.outputs = state.outputs
        known = {o for node in self.nodes for o in node.outputs} | set(self.leaves)
        known |= {new for node in self.nodes for new, _ in node.updates}
        self.uses = [u for u in self.uses if u.value in known]
        self.equal_parts = [p for p in self.equal_parts if p.value in known]
        self.branches = [b for b in self.branches if b.node < nodes]

    def unused(self) -> tuple[str, ...]:
        """Parameters that no call read."""
        read = {self.values[index].name for node in self.nodes for index in node.inputs}
        return tuple(sorted({name for kind, name in self.names.values() if kind is ValueKind.PARAMETER} - read))

    def hidden(self) -> bool:
        """Whether parameters lie unused below a module where data decided what runs."""
        places = {f"{b.module}." if b.module else "" for b in self.branches}
        return bool(places) and any(name.startswith(tuple(places)) for name in self.unused())

    def decisions(self) -> list[str]:
        """Where decisions between True and False were taken above parameters that lie unused."""
        unused = self.unused()
        return sorted(
            {
                b.lines
                for b in self.branches
                if b.lines and any(name.startswith(f"{b.module}." if b.module else "") for name in unused)
            }
        )

    @contextmanager
    def turn(self, lines: frozenset[str]) -> Iterator[None]:
        """Inside, what is decided at these lines comes out the other way."""
        self.turned, self.turned_at = lines, -1
        try:
            yield
        finally:
            self.turned = frozenset()

    def settle(self, lines: set[str]) -> None:
        """What is decided at these lines is no branch any more: all that it can run was followed."""
        self.settled |= lines
        self.branches = [b for b in self.branches if b.lines not in self.settled]

    def failed_at_turn(self) -> bool:
        """Whether nothing ran after the last turned decision: it was a check that raises."""
        return self.turned_at == len(self.nodes)

    def _replay(self) -> Iterator[tuple[Node, Any, dict[int, Tensor]]]:
        env = dict(self.leaves)
        last: dict[int, list[int]] = {}  # node -> values that no later node needs
        seen = set(self.outputs)
        for node in reversed(self.nodes):
            for index in (*node.inputs, *node.outputs, *(old for _, old in node.updates)):
                if index is not None and index not in seen:
                    seen.add(index)
                    last.setdefault(node.index, []).append(index)
        with torch.random.fork_rng(devices=_cuda_devices(self.model)), torch.no_grad():
            _seed(_cuda_devices(self.model))
            for node in self.nodes:
                args, kwargs = (_replace(given, Ref, lambda r: env[r.index]) for given in (node.args, node.kwargs))
                result = node.op(*args, **kwargs)
                for index, out in zip(node.outputs, _flat_results(result), strict=True):
                    if index is not None:
                        env[index] = out
                for new, old in node.updates:
                    env[new] = env[old]
                yield node, result, env
                for index in last.get(node.index, ()):
                    env.pop(index, None)

    def replays(self) -> bool:
        """Whether running the nodes again gives the same output, bit for bit."""
        if self._writes_leaf():
            return True  # the first run changed its own leaves; running again would start elsewhere
        env: dict[int, Tensor] = {}
        try:
            for _, _, env in self._replay():  # noqa: B007
                pass
        except Exception as error:
            logger.warning("the captured graph cannot be run again: %s", error)
            return False
        outputs = [self.value_of(t) for t in self.output_tensors]
        return all(_same(env.get(i, t), t) for i, t in zip(outputs, self.output_tensors, strict=True))

    def _writes_leaf(self) -> bool:
        storages = {_storage_key(t) for t in self.leaves.values()}
        return any(
            _storage_key(self.leaves[index]) in storages
            for node in self.nodes
            for _, index in node.updates
            if index in self.leaves
        )

    def divergence(self) -> dict[int, str]:
        """Values that a replay does not reproduce, and everything behind the first of them."""
        assert self.checks is not None
        bad: dict[int, str] = {}
        try:
            for node, result, _ in self._replay():
                if _checksum(result) != self.checks[node.index]:
                    path = node.module or "the model"
                    for index in node.outputs:
                        if index is not None:
                            bad[index] = f"{node.name} in {path} gives another result when it runs again"
        except Exception as error:
            bad[self.outputs[0]] = f"the captured graph cannot be run again: {error}"
        if not bad:
            bad[self.outputs[0]] = "the output is not made by the operators that were seen"
        return bad

    def graph(self, untrusted: Mapping[int, str] | None = None) -> Graph:
        """The finished graph."""
        tensors = {v.name: v.index for v in self.values if v.kind in (ValueKind.PARAMETER, ValueKind.BUFFER)}
        modules = dict(self.model.named_modules())
        return Graph(
            nodes=tuple(self.nodes),
            values=tuple(self.values),
            inputs=tuple(self.inputs),
            outputs=self.outputs,
            tensors=tensors,
            aliases=self.aliases,
            classes={path: type(m).__name__ for path, m in modules.items()},
            attributes={path: _int_attributes(m) for path, m in modules.items()},
            bases={path: tuple(c.__name__ for c in type(m).__mro__) for path, m in modules.items()},
            uses=tuple(dict.fromkeys(self.uses)),
            equal_parts=tuple(dict.fromkeys(self.equal_parts)),
            counts=self.counts,
            guards=self.guards,
            calls=tuple(self.calls),
            branches=tuple(self.branches),
            untrusted=dict(untrusted or {}),
            unused=self.unused(),
            provenance=self.provenance,
        )


# ---------------------------------------------------------------- sizes, above the dispatcher


class _FunctionRecorder(TorchFunctionMode):
    """Sees calls while their ints are still `SizeInt`, and lets ``x.shape`` return such ints.

    Without a log nothing is instrumented, and every size that code names counts as a literal.
    """

    def __init__(self, recorder: _Recorder, log: SizeLog | None) -> None:
        super().__init__()
        self.recorder = recorder
        self.log = log

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = len(self.recorder.nodes)
        if func in _WHOLE and not kwargs:
            return self.recorder.record(_overload(_WHOLE[func], args), _replace(args, SizeInt, int), {})
        result = func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs, result)
        if self.log is not None:
            self._escapes(args, kwargs, first)
        if len(self.recorder.nodes) > first + 1 and func not in _FITS:
            self._hidden(func, args, kwargs, first)
        return result

    def _escapes(self, args: Any, kwargs: Any, first: int) -> None:
        """A size that a call computes with as a number (``x / x.shape[1]``) has to stay what it is."""
        given = [*args, *kwargs.values()]
        sizes = [size for size in given if isinstance(size, SizeInt)]
        for node in self.recorder.nodes[first:] if sizes else ():
            for position, argument in enumerate(node.op._schema.arguments):
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                if type(value) in (int, SizeInt) and str(argument.type) in _NUMBERS:
                    for size in sizes:
                        if int.__eq__(size, value):
                            size.escapes()

    def _hidden(self, func: Any, args: Any, kwargs: Any, first: int) -> None:
        """What a function that calls several operators does with sizes that it read itself, unseen.

        It may repeat something as often as another tensor is long, or divide by a count.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = {plain(leaf) for leaf in leaves if isinstance(leaf, int)}
        counts: set[int] = set()
        for node in self.recorder.nodes[first:]:
            if node.name == "aten.expand":
                made, old = node.outputs[0], self.recorder.values[node.inputs[0]].shape
                assert made is not None
                new = self.recorder.values[made].shape
                offset = len(new) - len(old)
                for dim in range(len(new)):
                    if (dim < offset or old[dim - offset] != new[dim]) and new[dim] not in known:
                        const = Expr("const", (new[dim],))
                        self.recorder.uses.append(SizeUse(made, dim, new[dim], const, self._where(func)))
                        counts.add(new[dim])
            elif node.name in ("aten.div", "aten.mul") and _is_count(node.args[1], leaves):
                counts |= {size for tensor in given for size in tensor.shape}
        for tensor in given:
            for dim, size in enumerate(tensor.shape):
                if size in counts:
                    self._use(tensor, dim, size, Expr("const", (size,)), func)

    # Handlers return what the caller gets.

    def shape(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        if self.log is None:
            return result
        tensor = args[0]
        value = self.recorder.value_of(tensor)
        if isinstance(result, int):  # size(dim)
            dim = (args[1] if len(args) > 1 else kwargs["dim"]) % tensor.dim()
            return SizeInt(result, Expr("dim", (value, plain(dim))), self.log)
        return torch.Size([SizeInt(n, Expr("dim", (value, d)), self.log) for d, n in enumerate(result)])

    def numel(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The product of all sizes."""
        if self.log is None:
            return result
        value = self.recorder.value_of(args[0])
        sizes = [SizeInt(n, Expr("dim", (value, d)), self.log) for d, n in enumerate(tuple(args[0].shape))]
        return math.prod(sizes, start=SizeInt(1, Expr("const", (1,)), self.log))

    def length(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """``len(x)`` is a plain int whatever is returned here: the dim stays."""
        if self.log is not None and args[0].dim():
            SizeInt(result, Expr("dim", (self.recorder.value_of(args[0]), 0)), self.log).escapes()
        return result

    def data(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Sizes that become the entries of a tensor."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, SizeInt):
                leaf.escapes()
        return result

    def sizes(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The sizes name the dims of the result: view, reshape, expand, zeros, ..."""
        first = 1 if args and isinstance(args[0], Tensor) else 0
        given = args[first:] or (kwargs.get("size") or kwargs.get("shape") or (),)
        if given and isinstance(given[0], (tuple, list)):
            given = tuple(given[0])
        if (
            isinstance(result, Tensor)
            and all(isinstance(s, (int, Tensor)) for s in given)
            and len(given) == result.dim()
        ):
            for dim, size in enumerate(given):
                size = result.shape[dim] if isinstance(size, Tensor) else size  # data made it: a literal
                if size != -1:
                    self._use(result, dim, result.shape[dim], expr_of(size), func)
        return result

    def filled(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Sizes, and then the number that is everywhere."""
        given = [*args, *(kwargs[name] for name in ("size", "fill_value") if name in kwargs)]
        *before, size, number = given
        self.data(func, (number,), {}, result)
        return self.sizes(func, (*before, size), {}, result)

    def like(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The sizes are those of another tensor: expand_as, view_as, reshape_as."""
        other = args[1] if len(args) > 1 else kwargs["other"]
        if isinstance(result, Tensor):
            value = self.recorder.value_of(other)
            for dim in range(result.dim()):
                self._use(result, dim, result.shape[dim], Expr("dim", (value, dim)), func)
        return result

    def broadcast(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Every dim that a tensor repeats has the size of the same dim of another."""
        given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        for made in result:
            for dim in range(-made.dim(), 0):
                wide = [t for t in given if t.dim() >= -dim and t.shape[dim] == made.shape[dim]]
                if wide:
                    expr = Expr("dim", (self.recorder.value_of(wide[0]), wide[0].dim() + dim))
                    self._use(made, made.dim() + dim, made.shape[dim], expr, func)
        return result

    def unflatten(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        bound = dict(zip(("self", "dim", "sizes"), args, strict=False)) | kwargs
        start = bound["dim"] % bound["self"].dim() if isinstance(bound["dim"], int) else 0
        sizes = bound["sizes"]
        sizes = sizes if isinstance(sizes, (tuple, list)) else (sizes, *args[3:])
        for offset, size in enumerate(sizes):
            if size != -1:
                self._use(result, start + offset, result.shape[start + offset], expr_of(size), func)
        return result

    def arange(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Numbers up to a size, or from one size to another; of other steps and of numbers by name the sizes stay."""
        start, end = (0, *args) if len(args) == 1 else (*args, None, None)[:2]
        if isinstance(start, (int, float)) and int(start) == start and isinstance(end, int) and len(args) <= 2:
            expr = expr_of(end) if start == 0 else Expr("-", (expr_of(end), expr_of(start)))
            self._use(result, 0, result.shape[0], expr, func)
        else:
            self.data(func, args, kwargs, result)
        return result

    def split(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        bound = dict(zip(("self", "size", "dim"), args, strict=False)) | kwargs
        tensor = bound.get("self", bound.get("tensor", bound.get("input")))
        size = bound.get("size", bound.get("split_size_or_sections", bound.get("split_size", bound.get("split_sizes"))))
        dim = bound.get("dim", 0) % tensor.dim()
        if isinstance(size, int):
            self._parts(tensor, dim, size, func)
            self._use(tensor, dim, min(plain(size), tensor.shape[dim]), expr_of(size), func)
            return result
        position, expr = 0, Expr("const", (0,))
        for made, part in zip(result, size, strict=False):
            self._use(made, dim, made.shape[dim], expr_of(part), func)
        for part in size[:-1]:
            position, expr = position + plain(part), _plus(expr, expr_of(part))
            self._use(tensor, dim, position, expr, func)
        self._use(tensor, dim, tensor.shape[dim], _plus(expr, expr_of(size[-1])), func)
        return result

    def chunk(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        bound = dict(zip(("self", "chunks", "dim"), args, strict=False)) | kwargs
        tensor = bound.get("self", bound.get("input"))
        dim = bound.get("dim", 0) % tensor.dim()
        if len(result) > 1:
            self._parts(tensor, dim, result[0].shape[dim], func)
        return result

    def narrow(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        bound = dict(zip(("self", "dim", "start", "length"), args, strict=False)) | kwargs
        tensor = bound.get("self", bound.get("input"))
        if isinstance(bound["start"], int):
            dim = bound["dim"] % tensor.dim()
            start, length = bound["start"], bound["length"]
            self._use(tensor, dim, plain(start), expr_of(start), func)
            self._use(tensor, dim, plain(start) + plain(length), _plus(expr_of(start), expr_of(length)), func)
        return result

    def getitem(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        tensor, index = args[0], args[1]
        items = index if isinstance(index, tuple) else (index,)
        consumed = sum(_dims_consumed(item) for item in items)
        dim = 0
        for item in items:
            if item is Ellipsis:
                dim += tensor.dim() - consumed
                continue
            if isinstance(item, slice) and isinstance(item.step, SizeInt):
                item.step.escapes()
            if isinstance(item, slice) and item.step in (None, 1):
                length = tensor.shape[dim]
                for bound in (item.start, item.stop):
                    if isinstance(bound, int) and bound != 0 and -length <= bound < length:
                        position = plain(bound) if bound >= 0 else length + plain(bound)
                        expr = expr_of(bound)
                        if bound < 0:
                            expr = _plus(Expr("dim", (self.recorder.value_of(tensor), dim)), expr)
                        self._use(tensor, dim, position, expr, func)
            dim += _dims_consumed(item)
        return result

    def layer_norm(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        bound = dict(zip(("input", "normalized_shape"), args, strict=False)) | kwargs
        tensor, shape = bound["input"], bound["normalized_shape"]
        for offset, size in enumerate(shape):
            dim = tensor.dim() - len(shape) + offset
            self._use(tensor, dim, tensor.shape[dim], expr_of(size), func)
        return result

    def groups(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The count of groups of a convolution, or of a group norm."""
        name, place = ("num_groups", 1) if func is torch.group_norm else ("groups", 6)
        given = args[place] if len(args) > place else kwargs.get(name, 1)
        if isinstance(result, Tensor):
            value = self.recorder.value_of(result)
            self.recorder.counts[value] = SizeUse(value, 1, plain(given), expr_of(given), self._where(func))
        return result

    def attention(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Without a given scale the softmax is scaled by the size of the head-dim, which then has to stay."""
        if kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            size = query.shape[-1]
            self._use(query, query.dim() - 1, size, Expr("const", (size,)), func)
        return result

    def _use(self, tensor: Tensor, dim: int, position: int, expr: Expr, func: Any) -> None:
        self.recorder.uses.append(
            SizeUse(self.recorder.value_of(tensor), dim, plain(position), expr, self._where(func))
        )

    def _parts(self, tensor: Tensor, dim: int, size: int, func: Any) -> None:
        self.recorder.equal_parts.append(
            EqualParts(self.recorder.value_of(tensor), dim, plain(size), self._where(func))
        )

    def _where(self, func: Any) -> str:
        return f"{getattr(func, '__name__', func)} in {self.recorder.stack[-1] or 'the model'}"


def _handlers() -> dict[Any, Callable[..., Any]]:
    """Which function names sizes, and how. One row per function that takes them."""
    mode = _FunctionRecorder
    t = torch.Tensor
    table: dict[Callable[..., Any], Sequence[Any]] = {
        mode.shape: (t.shape.__get__, t.size),  # type: ignore[attr-defined]
        mode.numel: (t.numel, torch.numel, t.nelement),
        mode.length: (t.__len__,),
        mode.data: (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, t.new_tensor),
        mode.sizes: (
            t.view, t.reshape, torch.reshape, t.expand, torch.broadcast_to, t.broadcast_to, torch.zeros, torch.ones,
            torch.empty, torch.rand, torch.randn, t.new_zeros, t.new_ones, t.new_empty, t.sum_to_size,
        ),
        mode.filled: (torch.full, t.new_full),
        mode.like: (t.expand_as, t.view_as, t.reshape_as),
        mode.broadcast: (torch.broadcast_tensors, torch.functional.broadcast_tensors, torch._VF.broadcast_tensors),  # type: ignore[attr-defined]
        mode.unflatten: (t.unflatten, torch.unflatten),
        mode.arange: (torch.arange,),
        mode.split: (
            t.split, torch.split, t.split_with_sizes, torch.split_with_sizes, torch.functional.split,
        ),
        mode.chunk: (t.chunk, torch.chunk),
        mode.narrow: (t.narrow, torch.narrow),
        mode.getitem: (t.__getitem__,),
        mode.layer_norm: (torch.layer_norm, torch.rms_norm),
        mode.groups: (
            torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
            torch.conv_transpose3d, torch.group_norm,
        ),
        mode.attention: (torch.nn.functional.scaled_dot_product_attention,),
    }  # fmt: skip
    return {func: handler for handler, funcs in table.items() for func in funcs}


_HANDLERS = _handlers()


# These repeat their operands only to fit each other, and take part in products that tie the dims anyway.
_FITS = frozenset(
    {
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.einsum,
        torch.functional.einsum, torch._VF.einsum, torch.bmm, torch.nn.functional.linear,  # type: ignore[attr-defined]
        torch.nn.functional.bilinear, torch.tensordot, torch.functional.tensordot, torch.take_along_dim,
        torch.Tensor.take_along_dim, torch.trapezoid, torch.trapz,
    }
)  # fmt: skip


def _is_count(value: Any, given: Sequence[Any]) -> bool:
    """Whether an operand is a whole number above 1 that the caller did not give."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 2 or value != plain(value):
        return False
    return not any(type(leaf) in (int, float) and leaf == value for leaf in given)


def _plus(left: Expr, right: Expr) -> Expr:
    return right if left == Expr("const", (0,)) else Expr("+", (left, right))


def _dims_consumed(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _instrument(model: nn.Module, log: SizeLog) -> None:
    """Replace the int attributes of every module by ints that know their name."""
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name.startswith("_") or name in _NOT_SIZES:
                continue
            if type(value) is int:
                vars(module)[name] = SizeInt(value, Expr("attr", (path, name, None)), log)
            elif type(value) in (tuple, list) and 0 < len(value) <= 8 and all(type(v) is int for v in value):
                vars(module)[name] = type(value)(
                    [SizeInt(v, Expr("attr", (path, name, i)), log) for i, v in enumerate(value)]
                )


@contextmanager
def _inline_python_functions() -> Iterator[None]:
    """Let the function mode see into functions written in Python (``F.multi_head_attention_forward``).

    They hand themselves whole to an active mode, which would hide the calls they make. They ask through three
    functions that their modules import by name; while tracing these say that nothing overrides anything.
    """
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    saved: list[tuple[Any, str, Any]] = []
    for module in (torch.nn.functional, torch.functional):
        for name in names:
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, lambda *args, **kwargs: False)
    try:
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)


# ---------------------------------------------------------------- small helpers


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, see `named_outputs`."""
    return (tensor for _, tensor in named_outputs(output))


def _int_attributes(module: nn.Module) -> dict[str, int]:
    """``{"heads": 4, "sizes[0]": 8}``: ints, and ints inside of tuples and lists."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = plain(value)
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}[{i}]": plain(v) for i, v in enumerate(value) if isinstance(v, int)}
    return found


def _replace(value: Any, cls: type, function: Callable[[Any], Any]) -> Any:
    """The arguments of an operator (they nest in tuples, lists and dictionaries only) with some leaves replaced."""
    if isinstance(value, cls):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([_replace(item, cls, function) for item in value])
    if type(value) is dict:
        return {key: _replace(item, cls, function) for key, item in value.items()}
    return value


def _overload(packet: Any, args: tuple[Any, ...]) -> Any:
    """The overload of an operator of `_WHOLE`: a layer has two, and takes a packed sequence as data and sizes."""
    if "default" in packet.overloads():
        return packet.default
    return packet.data if isinstance(args[3], (tuple, list)) else packet.input


def _flat_results(result: Any) -> list[Any]:
    if isinstance(result, (list, tuple)):
        return [item for part in result for item in (part if isinstance(part, (list, tuple)) else (part,))]
    return [result]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensor arguments that the operator's schema says it writes to."""
    if not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return written


def _storage_key(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _checksum(result: Any) -> tuple[float, ...]:
    """A number per result that two equal results share."""
    sums = []
    for out in _flat_results(result):
        if isinstance(out, Tensor) and out.numel() and not out.is_meta:
            flat = torch.nan_to_num(out.detach().to(torch.float64).flatten())
            sums.append(float((flat * torch.arange(1, flat.numel() + 1, dtype=torch.float64)).sum()))
    return tuple(sums)


def _seed(devices: Sequence[int]) -> None:
    """``torch.manual_seed(0)`` for the CPU and these devices; for all of them it takes as long as a small model."""
    torch.default_generator.manual_seed(0)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(0)


def _cuda_devices(model: nn.Module) -> list[int]:
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    return [d.index or 0 for d in devices]


def _describe(inputs: Any) -> str:
    shapes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_of(inputs)]
    return f"[{', '.join(shapes)}]"
