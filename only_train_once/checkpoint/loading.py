"""`load`: the original constructor, then the recorded surgery, then the saved tensors.

All that the files say is checked before the model is built, see [Note: what a file may do] in ``manifest.py``. The
tensors come last, file by file, each straight to the device where it is wanted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..copying import copy_module
from ..errors import CheckpointError, ConfigurationError, SurgeryError
from ..record import SurgeryRecord
from ..surgery import apply_record, named_tensors, replace_tensors
from . import builders, extra_state, tensor_files
from .manifest import LAYOUTS, RECORD_FILE, Manifest, folder, read_manifest

logger = logging.getLogger(__name__)

Build = Callable[[], nn.Module] | nn.Module


def load(out_dir: str | Path, build: Build | None = None, *, device: str | torch.device | None = None) -> nn.Module:
    """The subnet that ``save`` wrote, in evaluation mode, with the dtypes that it had.

    Args:
        out_dir: the folder.
        build: the original constructor, without arguments, or a full model (which stays as it is). A constructor
            is called on the meta device first, which costs neither time nor memory, and for real where it does not
            support that. None where the folder says how the model is made: models of transformers and timm, and
            what was saved with ``builder=``.
        device: where to put the tensors; the CPU if None.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, newer than this library, or of another model; or
            ``build`` fails, or is needed.
    """
    directory = folder(out_dir)
    check_build(build)
    where = check_device(device)
    manifest = read_manifest(directory)
    files = tensor_files.check(directory, manifest.files, manifest.expected, RECORD_FILE)
    with torch.inference_mode(False):  # or the parameters could never be trained
        model = operated(full_model(build, manifest), manifest)
        extra: dict[str, Tensor] = {}
        for file, names in files.items():
            _put(model, read_tensors(directory / file, names, manifest, where, extra))
        extra_state.restore(model, manifest.extra_state, extra, manifest.path)
        requires_grad = {
            name: entry.requires_grad for first, entry in manifest.tensors.items() for name in (first, *entry.aliases)
        }
        for name, held in model.named_parameters():
            held.requires_grad_(requires_grad[name])
        return model.eval()


def check_build(build: object) -> None:
    if build is not None and not callable(build):
        raise ConfigurationError(
            f"build is {build!r}: give the original constructor, something to call without arguments, or a full model"
        )


def check_device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"device is {device!r}: give one as torch.device takes it ({error})") from error


def read_tensors(
    path: Path, held: Iterable[str], manifest: Manifest, device: torch.device, extra: dict[str, Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """What a file holds, by all the names of each tensor; tensors of extra state go into ``extra``."""
    layouts = {
        name: LAYOUTS[manifest.tensors[name].memory_format] if name in manifest.tensors else torch.contiguous_format
        for name in held
    }
    new: dict[tuple[str, ...], Tensor] = {}
    for name, tensor in tensor_files.read(path, layouts, device):
        if name in manifest.tensors:
            names = (name, *manifest.tensors[name].aliases)
            new[names] = tensor
        else:
            extra[name] = tensor
    return new


def _put(model: nn.Module, new: Mapping[tuple[str, ...], Tensor]) -> None:
    """Put saved tensors into the module, without gradients for now: a parameter of integers can have none."""
    named = named_tensors(model)
    for tensor in {id(t): t for names in new for t in (named[name] for name in names)}.values():
        if tensor.is_leaf:
            tensor.requires_grad_(False)
    replace_tensors(model, new)


def full_model(build: Build | None, manifest: Manifest) -> nn.Module:
    """The full module, its tensors without the right values yet."""
    if build is None:
        return builders.make(manifest.builder, len(manifest.tensors), str(manifest.path))
    return made_by(build, str(manifest.path))


def made_by(build: Build, path: str) -> nn.Module:
    """What a constructor makes, on the meta device where it can, or a copy of a model."""
    if isinstance(build, nn.Module):
        return copy_module(build)
    try:
        with torch.device("meta"):
            model = build()
        stray = builders.stray_meta_tensor(model)
    except Exception as error:  # a constructor that reads values cannot run on the meta device
        logger.info("building on the meta device failed (%s), building for real", error)
        stray = "the constructor"
    if stray is not None:
        logger.info("%s needs values, building for real", stray)
        try:
            model = build()
        except Exception as error:
            raise CheckpointError(
                f"{path} was not loaded: build raised {type(error).__name__}: {error}; give the original constructor, "
                "something to call without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"build returned a {type(model).__name__}, expected the full model, an nn.Module")
    return model


def operated(model: nn.Module, manifest: Manifest) -> nn.Module:
    """The model itself after the recorded surgery, which has to end in the tensors that were saved."""
    path, record = manifest.path, manifest.record
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    note = "" if name == manifest.kind else f" (saved from {manifest.kind}, built {name})"
    if manifest.kind.rpartition(".")[2] != type(model).__name__:
        # Same tensors do not mean same forward; but classes are renamed, too.
        logger.warning("%s: the model may compute something else%s", path, note)
    shapes = {n: entry.shape for first, entry in manifest.tensors.items() for n in (first, *entry.aliases)}
    resize_computed_buffers(model, record, shapes)
    try:
        apply_record(record, model)
    except SurgeryError as error:
        raise CheckpointError(f"{path} does not fit the model{note}: {error}") from error
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        # What a record of another model asks of a module, it may not have.
        raise CheckpointError(f"{path} does not fit the model{note}: {type(error).__name__}: {error}") from error
    named = named_tensors(model)
    missing, unknown = sorted(named.keys() - shapes.keys()), sorted(shapes.keys() - named.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not fit the model{note}: the model has {missing[:5]}, which are not saved, and lacks "
            f"{unknown[:5]}, which are"
        )
    for each, shape in shapes.items():
        if tuple(named[each].shape) != shape:
            raise CheckpointError(
                f"{path} does not fit the model{note}: {each!r} is saved with shape {list(shape)}, the model after "
                f"surgery has {list(named[each].shape)}"
            )
    return model


def resize_computed_buffers(model: nn.Module, record: SurgeryRecord, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give non-persistent buffers the shape that they had when the subnet was saved.

    Modules compute such buffers when they run (a table of relative positions for the length they meet), so a
    freshly built one may have another shape. Only the shape matters here: the saved values replace them.
    """
    new: dict[tuple[str, ...], Tensor] = {}
    for path, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            name, held = f"{path}.{leaf}" if path else leaf, getattr(module, leaf)
            if name not in shapes or held is None:
                continue
            cut = record.tensors.get(name)
            full = shapes[name] if cut is None else cut.shape
            if tuple(held.shape) != full:
                new[(name,)] = torch.empty(full, dtype=held.dtype, device="meta")
    replace_tensors(model, new)
