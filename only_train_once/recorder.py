"""`Recorder`: a dispatch mode that writes down every ATen call of a model, and can run them again.

It holds what was recorded so far, over one pass or several: `trace.py` decides which passes there are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from .errors import TraceError
from .graph import Branch, EqualParts, Graph, Guard, ModuleCall, Node, Ref, SizeUse, Value, ValueKind
from .higher_order import run_inside
from .inputs import Inputs, cuda_devices, output_tensors, seed_generators, tensors_of
from .sizes import SizeLog, plain

logger = logging.getLogger(__name__)

_SCALAR_READS = frozenset({"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal"})
_FRAMES = 6  # innermost lines by which a decision is told from others
_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parent)


def _lines() -> str:
    """The lines of Python that run, without those of torch and of this package, the innermost first."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < _FRAMES:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN)):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


class State(NamedTuple):
    """How much was recorded at some time."""

    nodes: int
    calls: int
    outputs: tuple[int, ...]


class Recorder(TorchDispatchMode):
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
        self.modules = dict(model.named_modules())
        self.paths = {id(m): path for path, m in self.modules.items()}
        self.names: dict[int, tuple[ValueKind, str]] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for kind, named in (
            (ValueKind.PARAMETER, model.named_parameters(remove_duplicate=False)),
            (ValueKind.BUFFER, model.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in named:
                _, first = self.names.setdefault(id(tensor), (kind, name))
                self.aliases[first] = (*self.aliases.get(first, ()), name)
        self.devices = cuda_devices(model)
        self.example: int | None = None  # nodes of the first pass
        self.training: int | None = None  # first node of a pass in training mode
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
        if storage is not None:  # memory is used again and again: those that had it before are gone
            sharing = [held for held in self.by_storage.get(storage, ()) if held() is not None]
            self.by_storage[storage] = [*sharing, self.known[id(tensor)][0]]

    # -- calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # compiled functions run eagerly while tracing, so there is nothing to guard every call against

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

        ref_args = replace_leaves(args, Tensor, reference)
        ref_kwargs = replace_leaves(kwargs, Tensor, reference) if kwargs else kwargs
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
        updates = self._versions(written, outputs) if written else ()
        node = Node(len(self.nodes), func, ref_args, ref_kwargs, tuple(inputs), tuple(outputs), self.stack[-1], updates)
        self.nodes.append(node)
        if self.constant.issuperset(inputs) and torch.Tag.nondeterministic_seeded not in func.tags:
            self.constant.update(o for o in outputs if o is not None)
        elif node.name in _SCALAR_READS:
            lines = _lines() if isinstance(result, bool) else ""
            if lines not in self.settled:
                self.branches.append(Branch(node.index, self.stack[-1], lines))
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
                entered.append(tuple(map(self.value_of, tensors_in(args))))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self.paths and len(self.stack) > 1:
                path = self.stack.pop()
                outs = tuple(map(self.value_of, tensors_in(output)))
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
        self.example = len(self.nodes) if self.example is None else self.example
        self.provenance = log is not None
        self.guards = tuple(dict.fromkeys(Guard(left, right, "") for left, right in (log.guards if log else ())))

    def state(self) -> State:
        """Where the record stands, for `forget`."""
        return State(len(self.nodes), len(self.calls), self.outputs)

    def forget(self, state: State) -> None:
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

        def held(ref: Ref) -> Tensor:
            return env[ref.index]

        for node in reversed(self.nodes):
            for index in (*node.inputs, *node.outputs, *(old for _, old in node.updates)):
                if index is not None and index not in seen:
                    seen.add(index)
                    last.setdefault(node.index, []).append(index)
        with torch.random.fork_rng(devices=self.devices), torch.no_grad():
            seed_generators(self.devices)
            for node in self.nodes:
                args = replace_leaves(node.args, Ref, held)
                result = node.op(*args, **replace_leaves(node.kwargs, Ref, held)) if node.kwargs else node.op(*args)
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
        modules = self.modules
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
            example=self.example,
            training=self.training,
            provenance=self.provenance,
        )


def _int_attributes(module: nn.Module) -> dict[str, int]:
    """``{"heads": 4, "sizes[0]": 8}``: ints, and ints inside of tuples and lists."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = plain(value)
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}[{i}]": plain(v) for i, v in enumerate(value) if isinstance(v, int)}
    return found


def replace_leaves(value: Any, cls: type, function: Callable[[Any], Any]) -> Any:
    """The arguments of an operator (they nest in tuples, lists and dictionaries only) with some leaves replaced."""
    if isinstance(value, cls):
        return function(value)
    kind = type(value)
    if kind is tuple or kind is list:  # numbers, most of what they hold, are told apart here, without a call
        return kind([x if type(x) in _NUMBERS else replace_leaves(x, cls, function) for x in value])
    if kind is dict:
        return {key: replace_leaves(item, cls, function) for key, item in value.items()}
    return value


_NUMBERS = frozenset({int, float, bool, type(None)})  # and no subclasses, such as `SizeInt`


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) is tuple and all(isinstance(item, Tensor) for item in value):
        yield from value
    else:
        yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _flat_results(result: Any) -> list[Any]:
    if isinstance(result, Tensor):
        return [result]
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
