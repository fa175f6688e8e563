"""A module as a program: torch.export, ONNX, AOTInductor; kept only once it has computed what the module computes.

[Note: dynamic sizes]
Every dim of every input starts as one that may change, and ``torch.export`` finds out which of them the module's code
and weights fix. Those that are left are tried: at another size the module itself has to run, and the program, written
to a file and read back, has to give the same. A size at which it does not is fixed at the example's, and a note says
which and why. What cannot be exported with all of them is tried with the first dim of every input, then with none.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .copying import copy_module
from .errors import ConfigurationError, ExportError
from .inputs import Inputs, call_model, clone_inputs, dtype_of, fresh_inputs, named_outputs, observing, tensors_of
from .verify import TOLERANCE, peak, relative_difference

logger = logging.getLogger(__name__)

Run = Callable[[Inputs], list[Tensor]]
_Dim = tuple[int, int]  # which input tensor, which of its dims


@dataclass(frozen=True)
class Exported:
    """A program in a file that was compared with the module it was made from.

    Attributes:
        kind: ``"torch_export"``, ``"onnx"`` or ``"aot"``.
        path: of the file.
        dynamic: input -> its dims whose size may change.
        difference: largest relative difference between module and program.
        tolerance: what it was held against.
        sizes: shapes of the inputs it was compared on, one entry per comparison.
        notes: which sizes were fixed, and why.
    """

    kind: str
    path: Path
    dynamic: Mapping[str, tuple[int, ...]]
    difference: float
    tolerance: float
    sizes: tuple[tuple[tuple[int, ...], ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        free = ", ".join(f"{name} {list(dims)}" for name, dims in self.dynamic.items() if dims) or "none"
        head = (
            f"{self.kind} in {self.path}: relative difference {self.difference:.1e} (tolerance {self.tolerance:.0e}) "
            f"at {len(self.sizes)} sizes; dims that may change: {free}"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def export_model(
    model: nn.Module, kind: str, path: str | Path, *, inputs: Inputs, dynamic: bool | str = True
) -> Exported:
    """Write a module in evaluation mode as a program and compare the two; the module stays as it is.

    Args:
        model: any module that runs on ``inputs``.
        kind: ``"torch_export"`` (read by ``torch.export.load``), ``"onnx"``, or ``"aot"``: compiled to machine code
            for the device the module is on, read by ``torch._inductor.aoti_load_package``.
        path: of the file; ends in ``.pt2``, or ``.onnx``.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments); no dim that shall change has size 1.
        dynamic: True lets all sizes change that can, see [Note: dynamic sizes]; ``"batch"`` the first dim of every
            input; False none.

    Raises:
        ExportError: a package or a compiler is missing, the module cannot be exported, or the program computes
            something else. No file is left behind, and one that was there stays.
    """
    target = _checked_path(model, kind, path, dynamic)
    form = FORMATS[kind]
    form.check()
    copied = copy_module(model, ExportError)
    with observing(copied), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        example = _with_a_batch(copied, inputs) if dynamic else inputs
        tiers = _TIERS[dynamic]
        notes: list[str] = []
        for tier in tiers:
            try:
                exported = _made(copied, form, target, example if tier else inputs, tier)
            except _Unfit as failure:
                reason = str(failure)
                cause = failure.__cause__
                logger.info("%s with %s: %s", kind, _WORDS[tier], reason)
                notes.append(f"not with {_WORDS[tier]}: {reason}")
                continue
            return Exported(**{**exported, "notes": (*notes, *exported["notes"])})
    raise ExportError(
        f"{type(model).__name__} cannot be exported as {kind}: {reason.rstrip('.')}. {form.way_out}"
    ) from cause


def open_exported(kind: str, path: str | Path) -> Run:
    """The program in a file, as a function from inputs (in the order and under the names of the example) to tensors."""
    return FORMATS[kind].open(Path(path))


_ONE = "fixed at 1, which the example has and every size broadcasts with: give an example with 2 or more"


class _Unfit(Exception):
    """This way does not work; another may."""


_WORDS = {"all": "sizes that may change", "batch": "first dims that may change", "": "fixed sizes"}
_TIERS: dict[bool | str, tuple[str, ...]] = {
    True: ("all", "batch", ""),
    "batch": ("batch", ""),
    False: ("",),
}


def _checked_path(model: Any, kind: Any, path: Any, dynamic: Any) -> Path:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    if kind not in FORMATS:
        raise ConfigurationError(f"{kind!r} is no format: {', '.join(map(repr, FORMATS))}")
    if not isinstance(dynamic, (bool, str)) or dynamic not in _TIERS:
        raise ConfigurationError(f"dynamic is {dynamic!r}: True, False or 'batch'")
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(f"path is {path!r}: a file's path is needed")
    target, suffix = Path(path), FORMATS[kind].suffix
    if target.suffix != suffix:
        raise ConfigurationError(f"path is {str(path)!r}: a file of the format {kind!r} ends in {suffix}")
    if target.is_dir():
        raise ConfigurationError(f"{path} is a folder: give a file's path")
    return target


# ---------------------------------------------------------------- capturing


@dataclass(frozen=True)
class _Captured:
    """A captured program and what is known of its input sizes.

    Attributes:
        names: of the tensors among the inputs.
        dims: their sizes, each a number or an expression over symbols.
        sizes: symbol -> its size in the example.
        fixed: which dims are fixed, and where in the code.
    """

    program: torch.export.ExportedProgram
    names: tuple[str, ...]
    dims: tuple[tuple[Any, ...], ...]
    sizes: Mapping[Any, int]
    fixed: Mapping[_Dim, str]

    def inputs_at(self, inputs: Inputs, sizes: Mapping[Any, int], seed: int) -> Inputs:
        """Fresh inputs with other sizes for some symbols: entries are repeated, or left out."""
        now = {**self.sizes, **sizes}
        shapes = [[d if isinstance(d, int) else int(d.subs(now)) for d in dims] for dims in self.dims]
        resized = iter(zip(tensors_of(inputs), shapes, strict=True))

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensor, shape = next(resized)
            for dim, size in enumerate(shape):
                if size != tensor.shape[dim]:
                    tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
            return tensor

        return fresh_inputs(_mapped(other, inputs), seed)

    def within(self, symbol: Any, size: int) -> bool:
        bounds = self.program.range_constraints.get(symbol)
        return size >= 2 and (bounds is None or bool(bounds.lower <= size <= bounds.upper))


def _mapped(function: Callable[[Any], Any], inputs: Inputs) -> Any:
    """``function`` on the leaves in the order of `tensors_of`."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return pytree.tree_map(function, plain)


def _called_with(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))


def _captured(model: nn.Module, inputs: Inputs, tier: str, fixed: Mapping[_Dim, str]) -> _Captured:
    """``torch.export`` with the dims that the tier lets change, but for some that are fixed."""
    number = iter(range(len(tensors_of(inputs))))

    def may_change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        place = next(number)
        last = {"all": leaf.dim(), "batch": 1, "": 0}[tier]
        free = {d for d in range(min(last, leaf.dim())) if (place, d) not in fixed}
        auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
        return {d: auto if d in free else static for d in range(leaf.dim())}

    args, kwargs = _called_with(inputs)
    shapes = _mapped(may_change, args or kwargs)
    try:
        with _quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise _Unfit(f"torch.export: {_first_lines(error)}") from error
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(values.get(name), Tensor)]
    dims = tuple(tuple(map(_size, values[name].shape)) for name in names)
    sizes = {}
    for tensor, shape in zip(tensors_of(inputs), dims, strict=True):
        sizes.update({d: n for d, n in zip(shape, tensor.shape, strict=True) if getattr(d, "is_Symbol", False)})
    where = dict(fixed)
    for place, shape in enumerate(dims):
        for dim, size in enumerate(shape):
            if isinstance(size, int) and (place, dim) not in fixed and (tier == "all" or (tier and dim == 0)):
                where[place, dim] = _ONE if size == 1 else f"fixed at {size} by the module's code or weights"
    return _Captured(program, tuple(names), dims, sizes, where)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print graphs and log warnings about themselves; what matters comes as an exception."""
    loggers = [
        logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(("torch", "onnx"))
    ]
    enabled = [each for each in loggers if not each.disabled]
    try:
        for each in enabled:
            each.disabled = True
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for each in enabled:
            each.disabled = False


def _size(dim: Any) -> Any:
    """A number, or an expression over symbols."""
    expression = None if isinstance(dim, int) else dim.node.expr
    return int(dim) if expression is None or expression.is_number else expression


def _first_lines(error: BaseException) -> str:
    """What an exporter says, without its advice to itself; what it says of another error, that one says better."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _with_a_batch(model: nn.Module, inputs: Inputs) -> Inputs:
    """The example twice, where it is a batch of one and the module takes two: a size of 1 could be any dim."""
    tensors = [t for t in tensors_of(inputs) if t.dim()]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return inputs
    twice: Inputs = _mapped(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, inputs)
    return inputs if _fails(model, twice) else twice


def _fails(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        call_model(model, clone_inputs(inputs))
    except Exception as error:  # whatever a forward raises
        return error
    return None


# ---------------------------------------------------------------- making and comparing


def _made(model: nn.Module, form: Format, target: Path, inputs: Inputs, tier: str) -> dict[str, Any]:
    """Capture, write, read back, compare, keep."""
    captured, trials = _captured_and_tried(model, inputs, tier)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        written = Path(scratch) / target.name
        try:
            with _quiet():
                form.write(captured, written)
                run = form.open(written)
        except Exception as error:
            raise _Unfit(f"{form.writer}: {_first_lines(error)}") from error
        tolerance = TOLERANCE.get(dtype_of(model) or torch.float32, TOLERANCE[torch.float32])
        worst = max(_compared(model, form, run, x, tolerance) for x in trials)
        notes = [f"{captured.names[place]} dim {dim}: {why}" for (place, dim), why in captured.fixed.items()]
        notes += _alone(model, form, run, captured, inputs, tolerance)
        del run
        for file in sorted(Path(scratch).iterdir()):
            file.replace(target.parent / file.name)
    dynamic = {
        name: tuple(d for d, size in enumerate(shape) if not isinstance(size, int))
        for name, shape in zip(captured.names, captured.dims, strict=True)
    }
    sizes = tuple(tuple(tuple(t.shape) for t in tensors_of(x)) for x in trials)
    return dict(
        kind=form.kind, path=target, dynamic=dynamic, difference=worst, tolerance=tolerance, sizes=sizes, notes=notes
    )


def _captured_and_tried(model: nn.Module, inputs: Inputs, tier: str) -> tuple[_Captured, list[Inputs]]:
    """A program whose free sizes can all be checked, and the inputs to check it on."""
    fixed: dict[_Dim, str] = {}
    while True:
        captured = _captured(model, inputs, tier, fixed)
        changed, refused = _other_sizes(model, inputs, captured)
        if not refused:
            break
        for symbol, reason in refused.items():
            for place, shape in enumerate(captured.dims):
                fixed.update({(place, d): reason for d, size in enumerate(shape) if symbol in _symbols(size)})
    trials = [captured.inputs_at(inputs, {}, 1)]
    if changed:
        together = captured.inputs_at(inputs, changed, 2)
        one_by_one = [captured.inputs_at(inputs, {symbol: size}, 3) for symbol, size in changed.items()]
        trials += one_by_one if _fails(model, together) else [together]
    return captured, trials


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _other_sizes(model: nn.Module, inputs: Inputs, captured: _Captured) -> tuple[dict[Any, int], dict[Any, str]]:
    """Other sizes of the symbols at which the module runs; and why it runs at none, for those."""
    now = captured.sizes
    for changed in ({s: size(n) for s, n in now.items()} for size in _OTHER_SIZES):
        fits = all(captured.within(s, n) for s, n in changed.items())
        if fits and _fails(model, captured.inputs_at(inputs, changed, 2)) is None:
            return changed, {}
    found: dict[Any, int] = {}
    refused: dict[Any, str] = {}
    for symbol in now:
        if symbol not in found:
            alike = [s for s in now if now[s] == now[symbol]]  # sizes of two inputs that have to be the same
            changed, reason = _size_of(model, inputs, captured, symbol, alike)
            found.update(changed)
            if not changed:
                refused[symbol] = f"fixed at {now[symbol]}: {reason}"
    return found, refused


_OTHER_SIZES: tuple[Callable[[int], int], ...] = (lambda n: n + 1, lambda n: n - 1, lambda n: 2 * n)


def _size_of(
    model: nn.Module, inputs: Inputs, captured: _Captured, symbol: Any, alike: Sequence[Any]
) -> tuple[dict[Any, int], str]:
    """Another size of one symbol, alone or with those of the same size; else nothing, and a reason."""
    reason = "no other size is in the range that torch.export found"
    for size in (other(captured.sizes[symbol]) for other in _OTHER_SIZES):
        for symbols in ([symbol], alike):
            if all(captured.within(s, size) for s in symbols):
                changed = dict.fromkeys(symbols, size)
                error = _fails(model, captured.inputs_at(inputs, changed, 2))
                if error is None:
                    return changed, ""
                reason = f"the module itself does not run at {size}, {_first_lines(error)}"
    return {}, reason


def _alone(
    model: nn.Module, form: Format, run: Run, captured: _Captured, inputs: Inputs, tolerance: float
) -> Iterator[str]:
    """A note where a batch of one, which no example of two can stand for, does not work."""
    first = {shape[0] for shape in captured.dims if shape and getattr(shape[0], "is_Symbol", False)}
    if not first:
        return
    single = captured.inputs_at(inputs, dict.fromkeys(first, 1), 4)
    if _fails(model, single) is None:
        try:
            _compared(model, form, run, single, tolerance)
        except _Unfit as failure:
            yield f"first dims of size 1 are not taken: {failure}"


def _compared(model: nn.Module, form: Format, run: Run, inputs: Inputs, tolerance: float) -> float:
    """Largest relative difference of an output; raises where it is above the tolerance."""
    shapes = ", ".join(str(list(t.shape)) for t in tensors_of(inputs))
    torch.manual_seed(0)
    expected = dict(named_outputs(call_model(model, clone_inputs(inputs))))
    torch.manual_seed(0)
    try:
        with _quiet():
            found = run(clone_inputs(inputs))
    except Exception as error:
        raise _Unfit(f"{form.tool} does not run on inputs of {shapes}: {_first_lines(error)}") from error
    if len(found) != len(expected):
        raise _Unfit(f"{form.tool} returns {len(found)} tensors, the module {len(expected)}: {', '.join(expected)}")
    scale = max((peak(t.detach()) for t in expected.values() if t.is_floating_point()), default=0.0)
    worst = 0.0
    for (name, want), got in zip(expected.items(), found, strict=True):
        got = got.to(want.device)
        if want.shape != got.shape or want.dtype is not got.dtype:
            raise _Unfit(
                f"{name} is {list(got.shape)} {got.dtype} from {form.tool} and {list(want.shape)} {want.dtype} from "
                f"the module, on inputs of {shapes}"
            )
        want = torch.view_as_real(want) if want.is_complex() else want
        got = torch.view_as_real(got) if got.is_complex() else got
        if not want.is_floating_point():
            wrong = int((want != got).sum())
            if wrong:
                raise _Unfit(f"{name} from {form.tool} differs in {wrong} of {want.numel()} entries, on {shapes}")
            continue
        difference = relative_difference(want.detach(), got.detach(), scale)
        if not difference <= tolerance:
            raise _Unfit(
                f"{name} from {form.tool} differs on inputs of {shapes}: relative difference {difference:.3g}, "
                f"tolerance {tolerance:.0e} in {str(want.dtype).removeprefix('torch.')}"
            )
        worst = max(worst, difference)
    return worst


# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class Format:
    """How a captured program is written and read back.

    Attributes:
        kind: its name here.
        tool: who runs it.
        writer: who writes it.
        suffix: of its files.
        check: raises where a package or a compiler is missing.
        write: a captured program into a file.
        open: the file as a function.
        way_out: what to try when a module cannot be exported.
    """

    kind: str
    tool: str
    writer: str
    suffix: str
    check: Callable[[], None]
    write: Callable[[_Captured, Path], None]
    open: Callable[[Path], Run]
    way_out: str


def _need(extra: str, *packages: str) -> Callable[[], None]:
    def check() -> None:
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ExportError(
                    f"the package {package} is missing ({error}): pip install only_train_once[{extra}]"
                ) from error

    return check


def _compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ExportError(
            f"AOTInductor needs a C++ compiler, and found none ({_first_lines(error)}): install g++ or clang++, or "
            "name one in the environment variable CXX"
        ) from error


def _run_module(module: Callable[..., Any]) -> Run:
    return lambda inputs: [t for _, t in named_outputs(call_model(module, inputs))]  # type: ignore[arg-type]


def _write_program(captured: _Captured, path: Path) -> None:
    torch.export.save(captured.program, path)


def _open_program(path: Path) -> Run:
    return _run_module(torch.export.load(path).module())


def _write_onnx(captured: _Captured, path: Path) -> None:
    import onnx

    program = torch.onnx.export(captured.program, (), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    onnx.checker.check_model(str(path))


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [t.detach().cpu().numpy() for t in tensors_of(inputs)]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _write_aot(captured: _Captured, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(captured.program, package_path=str(path))


def _open_aot(path: Path) -> Run:
    return _run_module(torch._inductor.aoti_load_package(str(path)))


FORMATS: dict[str, Format] = {
    f.kind: f
    for f in (
        Format(
            "torch_export", "torch.export", "torch.export", ".pt2", lambda: None, _write_program, _open_program,
            "Where data decides what runs, write it with torch.where or torch.cond",
        ),
        Format(
            "onnx", "ONNX Runtime", "torch.onnx", ".onnx", _need("onnx", "onnx", "onnxscript", "onnxruntime"),
            _write_onnx, _open_onnx, "Try 'torch_export': it takes operators that ONNX lacks",
        ),
        Format(
            "aot", "AOTInductor", "AOTInductor", ".pt2", _compiler, _write_aot, _open_aot,
            "Try 'torch_export' first: what it cannot capture, nothing compiles",
        ),
    )
}  # fmt: skip

__all__: Sequence[str] = ["FORMATS", "Exported", "Format", "export_model", "open_exported"]
