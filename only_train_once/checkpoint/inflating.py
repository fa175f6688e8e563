"""`inflate`: from a subnet back to the full-size model, zeros where units left.

The full model is built as for loading. What is left goes to the positions it came from, weights that were rescaled
to count the full width are scaled back, and classes and attributes are those that the constructor gives. Slices that
had to be zero for their unit to contribute nothing are zero. Those that only left with it (running statistics, query
rows, the direction of a weight norm) are not known any more and mean nothing; they get numbers that nothing can be
broken by, such as a running variance of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigurationError, SurgeryError
from ..inputs import Inputs
from ..record import SurgeryRecord, TensorCut, from_runs
from ..surgery import check_fits, compute_weight, layout_of, named_tensors, replace_tensors, rescaled, ties
from ..verify import verify_subnet
from . import builders, extra_state, tensor_files
from .loading import Build, check_build, check_device, full_model, load, made_by, read_tensors, resize_computed_buffers
from .manifest import RECORD_FILE, folder, read_manifest

_LARGER = 1000  # a full model of more than so many times the bytes of its subnet is no such model


_BITS = {
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


class HasRecord(Protocol):
    """A `Subnet`, or anything else with a model and what was cut out of it."""

    model: nn.Module
    record: SurgeryRecord


def inflate(
    source: HasRecord | str | Path,
    build: Build | None = None,
    *,
    inputs: Inputs | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The full-size model that computes what the subnet computes, in evaluation mode.

    ``construct_subnet`` of the result, with ``record.removed``, gives the subnet again.

    Args:
        source: a subnet, or the folder of a saved one.
        build: the original constructor, without arguments, or a full model (which stays as it is); None where it is
            known how the model is made, see `load`.
        inputs: compare the two on inputs like these, in float64.
        device: where to put the tensors; the CPU if None.

    Raises:
        CheckpointError: as for `load`.
        VerificationError: they do not compute the same.
    """
    check_build(build)
    where = check_device(device)
    saved = _on_disk(source) if isinstance(source, (str, Path)) else _in_memory(source)
    with torch.inference_mode(False):
        full = saved.build(build)
        _grow(full, saved, where)
    full.eval()
    if inputs is not None:
        subnet = load(source, build, device=where) if isinstance(source, (str, Path)) else source.model
        verify_subnet(full, subnet, inputs)
    return full


@dataclass(frozen=True)
class _Saved:
    """A subnet, wherever it is: what was cut, its tensors by all their names, and how to get the full model."""

    name: str
    record: SurgeryRecord
    shapes: Mapping[str, tuple[int, ...]]
    bytes: int
    tensors: Callable[[torch.device], Iterator[tuple[tuple[str, ...], Tensor]]]
    build: Callable[[Build | None], nn.Module]
    trained: Mapping[str, bool]
    finish: Callable[[nn.Module], None]


def _on_disk(source: str | Path) -> _Saved:
    manifest = read_manifest(source)
    files = tensor_files.check(folder(source), manifest.files, manifest.expected, RECORD_FILE)
    extra: dict[str, Tensor] = {}

    def tensors(device: torch.device) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        for file, held in files.items():
            yield from read_tensors(folder(source) / file, held, manifest, device, extra).items()

    return _Saved(
        str(manifest.path),
        manifest.record,
        {n: entry.shape for first, entry in manifest.tensors.items() for n in (first, *entry.aliases)},
        sum((folder(source) / file).stat().st_size for file in files),
        tensors,
        lambda build: full_model(build, manifest),
        {n: entry.requires_grad for first, entry in manifest.tensors.items() for n in (first, *entry.aliases)},
        lambda full: extra_state.restore(full, manifest.extra_state, extra, manifest.path),
    )


def _in_memory(source: Any) -> _Saved:
    model, record = getattr(source, "model", None), getattr(source, "record", None)
    if not isinstance(model, nn.Module) or not isinstance(record, SurgeryRecord):
        raise ConfigurationError(f"source is a {type(source).__name__}: give a Subnet, or the folder of a saved one")
    named = named_tensors(model)
    _, aliases = ties(named)
    states, extra = extra_state.collect(model)

    def tensors(device: torch.device) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        for first, others in aliases.items():
            # A copy, which keeps its strides.
            yield (first, *others), named[first].detach().to(device=device, copy=True)

    def build(given: Build | None) -> nn.Module:
        if given is not None:
            return made_by(given, "the subnet")
        try:
            return builders.make(builders.describe(model, record), len(named), "the subnet")
        except builders.Unknown as error:
            raise CheckpointError(f"how the full model is made is not known ({error}): give build=") from error

    return _Saved(
        "the record",
        record,
        {name: tuple(t.shape) for name, t in named.items()},
        sum(named[first].numel() * named[first].element_size() for first in aliases),
        tensors,
        build,
        {name: t.requires_grad for name, t in named.items()},
        lambda full: extra_state.restore(full, states, extra, Path("the subnet")),
    )


def _grow(full: nn.Module, saved: _Saved, device: torch.device) -> None:
    """Put what the subnet has into the full model, and neutral numbers where it has nothing."""
    record = saved.record
    resize_computed_buffers(full, record, saved.shapes)
    try:
        check_fits(record, full)
    except SurgeryError as error:
        raise CheckpointError(f"{saved.name} does not fit the model: {error}") from error
    named = named_tensors(full)
    cuts = {name: cut for first, cut in record.tensors.items() for name in (first, *cut.aliases)}
    for name, shape in saved.shapes.items():
        expected = cuts[name].shape if name in cuts else shape
        if name not in named or tuple(named[name].shape) != expected:
            has = f"has it with shape {list(named[name].shape)}" if name in named else "does not have it"
            raise CheckpointError(
                f"{saved.name} does not fit the model: {name!r} had shape {list(expected)} before it was cut, and "
                f"{type(full).__name__} {has}"
            )
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in named.values()}.values())
    if size > _LARGER * saved.bytes + 2**20:
        raise CheckpointError(
            f"{saved.name} does not fit the model: it would take {size} bytes, more than {_LARGER} times what is left"
        )
    for tensor in named.values():
        if tensor.is_leaf:
            tensor.requires_grad_(False)
    # What a norm that remembers its width has no use for, its full self has none for either.
    unknown = {n: torch.zeros_like(named[n], device=device) for n in named.keys() - saved.shapes.keys()}
    replace_tensors(full, {(name,): value for name, value in unknown.items()})
    scales = {
        f"{path}.weight" if path else "weight": (norm.offset, norm.width / norm.full_width)
        for path, norm in record.norms.items()
        if norm.kind == "rescale"
    }
    new: dict[tuple[str, ...], Tensor] = {}
    for names, tensor in saved.tensors(device):
        scale = next((scales[name] for name in names if name in scales), None)
        with torch.no_grad():
            value = tensor if scale is None else rescaled(tensor, *scale).to(tensor.dtype)
            cut = next((cuts[name] for name in names if name in cuts), None)
            new[names] = value if cut is None else grown(value, cut, names[0])
    replace_tensors(full, new)
    for name, held in full.named_parameters():
        held.requires_grad_(saved.trained.get(name, False))
    for module in full.modules():
        compute_weight(module)
    saved.finish(full)


def grown(tensor: Tensor, cut: TensorCut, name: str) -> Tensor:
    """A tensor of the full shape, with neutral numbers where something left."""
    layout = layout_of(tensor)
    whole = torch.zeros(cut.shape, dtype=tensor.dtype, device=tensor.device).contiguous(memory_format=layout)
    bits = _BITS.get(tensor.dtype, tensor.dtype)  # what can only be moved is moved as numbers of the same size
    full = whole.view(bits)
    neutral = torch.tensor(_neutral(name, whole)).to(tensor.dtype).reshape(1).view(bits)[0].item()
    stays = {dim: torch.from_numpy(from_runs(runs)) for dim, runs in cut.kept.items()}
    free = {dim: torch.from_numpy(from_runs(cut.follow.get(dim, ()))) for dim in stays}
    for dim, places in free.items():
        full.index_fill_(dim, places.to(full.device), neutral)
    for dim, places in stays.items():  # zeros where another unit has to be at zero
        rest = np.setdiff1d(np.arange(cut.shape[dim]), np.concatenate([places.numpy(), free[dim].numpy()]))
        full.index_fill_(dim, torch.from_numpy(rest).to(full.device), 0)
    grid = [stays.get(dim, torch.arange(size)) for dim, size in enumerate(cut.shape)]
    indices = [index.view([-1 if d == dim else 1 for d in range(len(grid))]) for dim, index in enumerate(grid)]
    full[tuple(index.to(full.device) for index in indices)] = tensor.view(bits)
    return whole


def _neutral(name: str, full: Tensor) -> float:
    """What nothing can be broken by: neither by dividing by it, nor by a root, nor as a score of attention."""
    if not (full.is_floating_point() or full.is_complex()) or name.endswith("running_mean"):
        return 0.0
    return 1.0 if full.ndim < 2 else full.shape[0] / max(full.numel(), 1)
