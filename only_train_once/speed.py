"""How fast a subnet is next to the model it was cut from: in eager mode, compiled, in ONNX Runtime; and why not faster.

[Note: what explains a layer]
Layers are timed one by one with hooks, in eager mode, each without the modules inside it. One is named when it kept
more of its time than of its FLOPs (or of its bytes, where it multiplies nothing), and took a share of the whole that
matters. The reasons are tried in this order: it takes hardly longer than calling a layer that computes
nothing; its widths fill no whole vectors; it does so few FLOPs per byte that memory decides; it multiplies nothing.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .copying import copy_module
from .errors import ConfigurationError
from .export import export_model, open_exported
from .flops import count_flops
from .inputs import Inputs, call_model, map_inputs, tensors_of
from .report import Latency, SlowLayer, in_turns

logger = logging.getLogger(__name__)

BACKENDS = ("eager", "compiled", "onnxruntime")


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        latency: a row per backend, batch size and number of threads.
        slow_layers: see [Note: what explains a layer].
        notes: what could not be measured, and why.
    """

    latency: tuple[Latency, ...]
    slow_layers: tuple[SlowLayer, ...] = ()
    notes: tuple[str, ...] = ()


def measure_speed(
    full: nn.Module,
    subnet: nn.Module,
    inputs: Inputs,
    *,
    backends: Sequence[str] = BACKENDS,
    batch_sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    rounds: int = 20,
    explain: bool = True,
) -> Speed:
    """Latency and peak memory of both models, measured in turns on the device they are on.

    Memory of eager mode is that of tensors alive at once; of ONNX Runtime what its process grows by; of compiled models
    on the CPU nobody can tell.

    Args:
        inputs: example inputs; other batch sizes repeat their entries along the first dims.
        backends: of ``"eager"``, ``"compiled"`` (``torch.compile``), ``"onnxruntime"`` (on the CPU).
        batch_sizes: None for that of the inputs.
        threads: numbers of threads on the CPU; None for the present one.
        rounds: of both models, per row.
        explain: also time layer by layer, at the first number of threads and the largest batch.
    """
    _check(backends, batch_sizes, threads, rounds)
    models = (copy_module(full).eval(), copy_module(subnet).eval())
    sizes = [_batch_of(inputs)] if batch_sizes is None else list(batch_sizes)
    counts = [torch.get_num_threads()] if threads is None else list(threads)
    batches = {size: _with_batch(models, inputs, size) for size in sizes}
    rows: list[Latency] = []
    notes: list[str] = []
    slow: tuple[SlowLayer, ...] = ()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers, about themselves
        for backend in backends:
            try:
                prepare = _PREPARE[backend](models, inputs, Path(folder))
                for size, batch in batches.items():
                    for count in counts:
                        with _threads(count):
                            runs = [made(batch) for made in prepare]
                            row = in_turns(
                                runs[0].call, runs[1].call, f"{backend}, batch {size}, {count} threads", rounds
                            )
                        rows.append(replace(row, memory_before=runs[0].peak(), memory_after=runs[1].peak()))
            except Exception as error:  # whatever a compiler or an exporter says
                first = str(error).strip().splitlines()[0] if str(error).strip() else ""
                notes.append(f"{backend} was not measured: {type(error).__name__}: {first}")
                logger.warning(notes[-1])
        if explain:
            with _threads(counts[0]):
                slow = slow_layers(*models, batches[max(sizes)], rounds=rounds)
    return Speed(tuple(rows), slow, tuple(notes))


def _check(backends: Any, batch_sizes: Any, threads: Any, rounds: Any) -> None:
    unknown = [b for b in backends if b not in BACKENDS]
    if unknown or isinstance(backends, str) or not backends:
        raise ConfigurationError(f"backends is {backends!r}: a list of {', '.join(map(repr, BACKENDS))}")
    for name, numbers in (("batch_sizes", batch_sizes), ("threads", threads)):
        whole = numbers is None or (
            isinstance(numbers, Sequence) and numbers and all(type(n) is int and n >= 1 for n in numbers)
        )
        if not whole:
            raise ConfigurationError(f"{name} is {numbers!r}: a list of whole numbers, at least 1")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2:
        raise ConfigurationError(f"rounds={rounds!r}: at least 2 are needed for a spread")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch_of(inputs: Inputs) -> int:
    return next((t.shape[0] for t in tensors_of(inputs) if t.dim()), 1)


def _with_batch(models: Sequence[nn.Module], inputs: Inputs, size: int) -> Inputs:
    """Every tensor whose first dim is the batch, with entries repeated or left out."""
    own = _batch_of(inputs)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != own or size == own:
            return leaf
        return leaf.index_select(0, torch.arange(size, device=leaf.device) % own)

    batch = map_inputs(resized, inputs)
    try:
        with torch.no_grad():
            call_model(models[0], batch)
    except Exception as error:
        raise ConfigurationError(
            f"batch_sizes: the model does not run on {size} examples, made of the first dims of its inputs: {error}"
        ) from error
    return batch


# ---------------------------------------------------------------- backends


@dataclass(frozen=True)
class _Run:
    """One model, ready to be called, and how its memory is measured."""

    call: Callable[[], object]
    peak: Callable[[], int | None]


_Prepared = Callable[[Inputs], _Run]


def _eager(models: Sequence[nn.Module], inputs: Inputs, folder: Path) -> list[_Prepared]:
    def prepared(model: nn.Module) -> _Prepared:
        return lambda batch: _Run(lambda: call_model(model, batch), lambda: peak_memory(model, batch))

    return [prepared(model) for model in models]


def _compiled(models: Sequence[nn.Module], inputs: Inputs, folder: Path) -> list[_Prepared]:
    def prepared(model: nn.Module) -> _Prepared:
        compiled: Any = torch.compile(model, dynamic=False)

        def run(batch: Inputs) -> _Run:
            on_cuda = any(t.is_cuda for t in model.parameters())
            return _Run(
                lambda: call_model(compiled, batch), lambda: _peak_on_cuda(compiled, batch) if on_cuda else None
            )

        return run

    return [prepared(model) for model in models]


def _onnx(models: Sequence[nn.Module], inputs: Inputs, folder: Path) -> list[_Prepared]:
    paths = []
    for number, model in enumerate(models):
        paths.append(export_model(model, "onnx", folder / f"{number}.onnx", inputs=inputs, dynamic="batch").path)

    def prepared(path: Path) -> _Prepared:
        def run(batch: Inputs) -> _Run:
            opened = open_exported("onnx", path)
            return _Run(lambda: opened(batch), lambda: _peak_of_onnx(path, batch))

        return run

    return [prepared(path) for path in paths]


_PREPARE: dict[str, Callable[[Sequence[nn.Module], Inputs, Path], list[_Prepared]]] = {
    "eager": _eager,
    "compiled": _compiled,
    "onnxruntime": _onnx,
}


# ---------------------------------------------------------------- memory


class _Live(TorchDispatchMode):
    """Bytes of tensors that are alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Bytes at the peak of an eager pass in evaluation mode: weights, inputs and activations."""
    if any(t.is_cuda for t in model.parameters()):
        return _peak_on_cuda(model, inputs)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    held |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(inputs)}
    with torch.no_grad(), _Live() as live:
        call_model(model, inputs)
    return sum(held.values()) + live.peak


def _peak_on_cuda(model: Any, inputs: Inputs) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        call_model(model, inputs)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


_GROWTH = """
import re, resource, sys
import numpy, onnxruntime

def used():  # at the peak, in kilobytes; what the other call says begins with the process that started this one
    try:
        return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

arrays = list(numpy.load(sys.argv[2]).values())
before = used()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays)))
print(used() - before)
"""


def _peak_of_onnx(path: Path, inputs: Inputs) -> int | None:
    """What a process grows by that loads the file and runs it once."""
    given = path.with_suffix(".npz")
    np.savez(given, *(t.detach().cpu().numpy() for t in tensors_of(inputs)))
    command = [sys.executable, "-c", _GROWTH, str(path), str(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) * 1024 if done.returncode == 0 else None


# ---------------------------------------------------------------- layers


@dataclass
class _Layer:
    """What hooks see of a module."""

    kind: str
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    widths: tuple[int, ...] = ()


_MARGIN = 1.15  # kept time over kept FLOPs
_SHARE = 0.01  # of the time of the whole
_VECTOR = 8  # float32 numbers in 256 bits
_BALANCE = 8.0  # FLOPs per byte below which processors of today wait for memory
_FEW = 4.0  # so many times an empty call, or less, is mostly the call


def slow_layers(full: nn.Module, subnet: nn.Module, inputs: Inputs, *, rounds: int = 20) -> tuple[SlowLayer, ...]:
    """Layers that kept more of their time than of their FLOPs, slowest first; see [Note: what explains a layer]."""
    models = (full, subnet)
    seen: tuple[dict[str, _Layer], dict[str, _Layer]] = ({}, {})
    with torch.no_grad():
        for model in models:
            call_model(model, inputs)
        for turn in range(rounds):
            for position in (0, 1) if turn % 2 == 0 else (1, 0):
                with _timed(models[position], seen[position]):
                    call_model(models[position], inputs)
    flops = [count_flops(model, inputs).by_module for model in models]
    before, after = ({name: statistics.median(s.seconds) for name, s in each.items()} for each in seen)
    whole, call = sum(after.values()), _seconds_of_a_call(tensors_of(inputs)[0].device)
    found = []
    for name in before.keys() & after.keys():
        f_before, f_after = (each.get(name, 0) for each in flops)
        own = (seen[0][name], seen[1][name])
        kept = f_after / f_before if f_before else own[1].bytes / max(own[0].bytes, 1)
        if after[name] < _SHARE * whole or kept >= 1 or after[name] <= _MARGIN * kept * before[name]:
            continue
        cut = [n for n, full_width in zip(own[1].widths, own[0].widths, strict=False) if n != full_width]
        why = _why(own[1], cut, f_after, after[name], call)
        found.append(SlowLayer(name, own[1].kind, f_before, f_after, before[name], after[name], why))
    return tuple(sorted(found, key=lambda layer: -layer.seconds_after))


def _why(layer: _Layer, cut: Sequence[int], flops: int, seconds: float, call: float) -> str:
    if seconds < _FEW * call:
        return f"launch-bound: it takes {seconds * 1e6:.0f} µs, of which any call of a layer takes {call * 1e6:.0f}"
    per_byte = flops / max(layer.bytes, 1)
    odd = [n for n in cut if n % _VECTOR]
    if flops and per_byte < _BALANCE:
        return f"memory-bound: it does {per_byte:.1f} FLOPs per byte"
    if flops and odd:
        few = min(odd)
        how = "below the width of a vector" if few < _VECTOR else f"no multiple of {_VECTOR}, as vectors want"
        return f"{few} channels are {how} (group_divisible={_VECTOR} or 16)"
    if not flops:
        return f"it multiplies nothing: it moves {layer.bytes / 1e6:.1f} MB, and what is fixed of its cost stays"
    return "its kernel is less efficient at the smaller size"


def _seconds_of_a_call(device: torch.device) -> float:
    """Of a module that computes one number, timed in the same way."""
    empty, x = nn.Softplus().to(device), torch.zeros(1, device=device)
    seen: dict[str, _Layer] = {}
    for _ in range(50):
        with _timed(empty, seen):
            empty(x)
    return statistics.median(seen[""].seconds)


@contextmanager
def _timed(model: nn.Module, seen: dict[str, _Layer]) -> Iterator[None]:
    """Add to ``seen`` what every module takes in one pass, without the modules inside it; bytes once."""
    names = {id(m): name for name, m in model.named_modules()}
    sums: dict[str, float] = {}
    stack: list[list[Any]] = []  # [name, start, seconds of the modules inside]
    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            stack.append([names[id(module)], now(), 0.0])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) not in names:
            return
        name, start, inside = stack.pop()
        taken = now() - start
        sums[name] = sums.get(name, 0.0) + taken - inside
        if stack:
            stack[-1][2] += taken
        if name not in seen:
            own = list(module.parameters(recurse=False))
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in (*own, *tensors))
            widths = next((tuple(p.shape[:2]) for p in own if p.dim() >= 2), ())
            seen[name] = _Layer(type(module).__name__, bytes=moved, widths=widths)

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, seconds in sums.items():
        seen[name].seconds.append(seconds)


__all__ = ["BACKENDS", "Speed", "measure_speed", "peak_memory", "slow_layers"]
