"""`save` and `load` a subnet: ``model.safetensors`` for the tensors, ``subnet.json`` for everything else.

[Note: what a file may do]
Loading runs nothing that is in the files: the module comes from the caller's own constructor, the surgery record
cuts its tensors and lowers its own ``int`` attributes, the tensors are read with safetensors. Every entry is checked
before it is used, against the freshly built model and against checksums, so a damaged or foreign file ends in a
`CheckpointError` that names the file and the mismatch.

All buffers are saved, also those that ``state_dict`` leaves out: what is loaded is what was saved, and a model
built on the meta device, which has no values at all, can be completed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .copying import copy_module
from .errors import CheckpointError, ConfigurationError, SurgeryError
from .record import SurgeryRecord
from .surgery import apply_record, layout_of, named_tensors, replace_tensors, ties

logger = logging.getLogger(__name__)

TENSOR_FILE = "model.safetensors"
RECORD_FILE = "subnet.json"
FORMAT = 1
_KIND = "only_train_once.subnet"
_LAYOUTS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_LAYOUT_DIMS = {"channels_last": 4, "channels_last_3d": 5}


def save(model: nn.Module, record: SurgeryRecord, report: Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write a subnet and how it came about into a folder (made if missing); returns the folder.

    Each file is complete under its name or not there: both are written beside, then moved. What the folder held
    before stays until both are complete.

    Raises:
        CheckpointError: the model holds something that neither file can (meta tensors, a module's extra state), or
            the folder cannot be written.
    """
    directory = folder(out_dir)
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{path!r} ({type(module).__name__}) keeps extra state, which is not saved here")
    named = named_tensors(model)
    _, aliases = ties(named)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, others in aliases.items():
        tensor = named[name]
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name!r} is on the meta device, it has no values to save")
        # A copy of its own: safetensors takes neither views into one storage nor strides.
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "requires_grad": tensor.requires_grad,
            "memory_format": next(name for name, layout in _LAYOUTS.items() if layout is layout_of(tensor)),
            "aliases": list(others),
        }
    with _beside(directory / TENSOR_FILE) as tensor_file, _beside(directory / RECORD_FILE) as record_file:
        save_file(tensors, tensor_file, metadata={"format": "pt"})
        record_file.write_text(_record_text(model, record, report, entries, _sha256(tensor_file)), encoding="utf-8")
    return directory


def _record_text(
    model: nn.Module, record: SurgeryRecord, report: Mapping[str, Any], entries: Mapping[str, Any], digest: str
) -> str:
    data = {
        "kind": _KIND,
        "format": FORMAT,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "versions": dict(record.versions),
        "tensor_file": {"name": TENSOR_FILE, "sha256": digest},
        "tensors": entries,
        "record": record.to_dict(),
        "report": dict(report),
    }
    try:
        data["sha256"] = json_digest(data)
        return json.dumps(data, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the report of the subnet is no JSON: {error}") from error


def folder(path: object) -> Path:
    """``path`` as a path; refuses what is none, such as a number or None."""
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(f"out_dir is {path!r}: give a folder's path, a str or a pathlib.Path")
    return Path(path)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A file to write, moved to ``target`` when the block ends well and deleted when not."""
    path = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield path
        os.replace(path, target)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{target} cannot be written: {type(error).__name__}: {error}; give another folder"
        ) from error
    finally:
        # In a folder that could not be made there is nothing to delete.
        with suppress(OSError):
            path.unlink(missing_ok=True)


def load(out_dir: str | Path, build: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """The subnet that ``save`` wrote, on the CPU and in evaluation mode.

    Args:
        out_dir: the folder.
        build: the original constructor, without arguments, or a full model (which stays as it is). A constructor
            is called on the meta device first, which costs neither time nor memory, and for real where it does not
            support that.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, newer than this library, or of another model; or
            ``build`` fails.
    """
    directory = folder(out_dir)
    if not callable(build):
        raise ConfigurationError(
            f"build is {build!r}: give the original constructor, something to call without arguments, or a full model"
        )
    path = directory / RECORD_FILE
    data = read_record(directory)
    entries = _entries(data.get("tensors"), path)
    try:
        record = SurgeryRecord.from_dict(data.get("record"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tensors = _read_tensors(directory, data, entries)
    with torch.inference_mode(False):  # or the parameters could never be trained
        return _restore(_build(build, path, data, record, entries), tensors, entries)


def _restore(model: nn.Module, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> nn.Module:
    """Put the saved tensors into the module."""
    requires_grad = {n: e["requires_grad"] for first, e in entries.items() for n in (first, *e["aliases"])}
    new: dict[tuple[str, ...], Tensor] = {}
    for name, entry in entries.items():
        names = (name, *entry["aliases"])
        new[names] = tensors[name].clone(memory_format=_LAYOUTS[entry["memory_format"]])
    replace_tensors(model, new)
    for name, held in model.named_parameters():
        held.requires_grad_(requires_grad[name])
    return model.eval()


def save_reference_format(model: nn.Module, path: str | Path) -> None:
    """The whole module as a pickle, for scripts that call ``torch.load(path, weights_only=False)``.

    Raises:
        CheckpointError: the module cannot be pickled (a class inside of a function, a parametrized weight), or the
            file cannot be written. Nothing is left behind then.
    """
    with _beside(folder(path)) as target:
        try:
            torch.save(model, target)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be written to {path} as a whole module: {error}. Use subnet.save(dir), "
                "which needs no pickle."
            ) from error


def read_record(out_dir: str | Path) -> dict[str, Any]:
    """What ``subnet.json`` holds, after checking that it is whole and ours; tensors are not opened."""
    path = folder(out_dir) / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {out_dir} holds no saved subnet") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        data = json.loads(text, parse_constant=_keep_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path} is foreign: its kind is {found!r}, expected {_KIND!r}")
    version = data.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: format is {version!r}, expected a positive integer")
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this library reads up to {FORMAT}: update it")
    if data.get("sha256") != json_digest(data):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; save the subnet again")
    return data


def json_digest(data: Mapping[str, Any]) -> str:
    """Checksum of everything in ``subnet.json`` but the checksum."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _keep_constant(name: str) -> float:
    return float(name.replace("Infinity", "inf"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _entries(value: object, path: Path) -> dict[str, dict[str, Any]]:
    """The table of tensors, every field of the right type."""

    def sound(entry: object) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("shape"), list)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entry["shape"])
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("requires_grad"), bool)
            and entry.get("memory_format") in list(_LAYOUTS)
            and _LAYOUT_DIMS.get(entry["memory_format"]) in (None, len(entry["shape"]))
            and isinstance(entry.get("aliases"), list)
            and all(isinstance(name, str) for name in entry["aliases"])
        )

    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has no table of tensors: damaged or foreign")
    for name, entry in value.items():
        if not sound(entry):
            raise CheckpointError(f"{path}: the entry of the tensor {name!r} is damaged: {str(entry)[:200]}")
    return value


def _read_tensors(directory: Path, data: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / TENSOR_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, though {RECORD_FILE} is there: copy the whole folder")
    described = data.get("tensor_file")
    expected = described.get("sha256") if isinstance(described, dict) else None
    digest = _sha256(path)
    if digest != expected:
        raise CheckpointError(
            f"{path} is damaged or belongs to another {RECORD_FILE}: its SHA-256 is {digest}, expected {expected}"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    _same_names(path, "holds", set(tensors), set(entries))
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if list(tensor.shape) != entries[name]["shape"] or dtype != entries[name]["dtype"]:
            raise CheckpointError(
                f"{path} holds {name!r} as {dtype}{list(tensor.shape)}, {RECORD_FILE} says "
                f"{entries[name]['dtype']}{entries[name]['shape']}"
            )
    return tensors


def _same_names(path: Path, verb: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path} {verb} other tensors than expected: missing {sorted(expected - found)[:5]}, "
            f"unexpected {sorted(found - expected)[:5]}"
        )


def _build(
    build: Callable[[], nn.Module] | nn.Module,
    path: Path,
    data: Mapping[str, Any],
    record: SurgeryRecord,
    entries: Mapping[str, Any],
) -> nn.Module:
    """The module with the recorded surgery, its tensors without the right values yet."""
    if isinstance(build, nn.Module):
        return _operate(copy_module(build), path, data, record, entries)
    try:
        with torch.device("meta"):
            model = build()
        stray = _stray_meta_tensor(model)
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
    return _operate(model, path, data, record, entries)


def _operate(
    model: nn.Module, path: Path, data: Mapping[str, Any], record: SurgeryRecord, entries: Mapping[str, Any]
) -> nn.Module:
    saved = data.get("class")
    built = f"{type(model).__module__}.{type(model).__qualname__}"
    note = "" if built == saved else f" (saved from {saved}, built {built})"
    if str(saved).rpartition(".")[2] != type(model).__name__:
        # Same tensors do not mean same forward; but classes are renamed, too.
        logger.warning("%s: the model may compute something else%s", path, note)
    _resize_computed_buffers(model, record, entries)
    try:
        apply_record(record, model)
    except SurgeryError as error:
        raise CheckpointError(f"{path} does not fit the model{note}: {error}") from error
    named = named_tensors(model)
    saved_names = [name for first, entry in entries.items() for name in (first, *entry["aliases"])]
    if len(saved_names) != len(set(saved_names)):
        raise CheckpointError(f"{path}: a tensor is listed twice")
    missing, unknown = sorted(set(named) - set(saved_names)), sorted(set(saved_names) - set(named))
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not fit the model{note}: the model has {missing[:5]}, which are not saved, and lacks "
            f"{unknown[:5]}, which are"
        )
    for first, entry in entries.items():
        for name in (first, *entry["aliases"]):
            if list(named[name].shape) != entry["shape"]:
                raise CheckpointError(
                    f"{path} does not fit the model{note}: {name!r} is saved with shape {entry['shape']}, the model "
                    f"after surgery has {list(named[name].shape)}"
                )
    return model


def _resize_computed_buffers(model: nn.Module, record: SurgeryRecord, entries: Mapping[str, Any]) -> None:
    """Give non-persistent buffers the shape that they had when the subnet was saved.

    Modules compute such buffers when they run (a table of relative positions for the length they meet), so a
    freshly built one may have another shape. Only the shape matters here: the saved values replace them.
    """
    new: dict[tuple[str, ...], Tensor] = {}
    for path, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            name, held = f"{path}.{leaf}" if path else leaf, getattr(module, leaf)
            if name not in entries or held is None:
                continue
            cut = record.tensors.get(name)
            full = tuple(entries[name]["shape"]) if cut is None else cut.shape
            if tuple(held.shape) != full:
                names = (name, *entries[name]["aliases"])
                new[names] = torch.empty(full, dtype=held.dtype, device="meta")
    replace_tensors(model, new)


def _stray_meta_tensor(model: nn.Module) -> str | None:
    """Where a module keeps a tensor without values that is neither parameter nor buffer; None if nowhere."""
    known = {id(t) for t in named_tensors(model).values()}
    seen: set[int] = set()
    machinery = {"_parameters", "_buffers", "_modules"}
    for path, module in model.named_modules():
        stack = [value for key, value in vars(module).items() if key not in machinery]
        while stack:
            value = stack.pop()
            if id(value) in seen or isinstance(value, (nn.Module, ModuleType)):
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if value.device.type == "meta" and id(value) not in known:
                    return f"a tensor attribute of {path or type(model).__name__}"
            elif isinstance(value, Mapping):
                stack.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                stack.extend(value)
            else:
                stack.extend(getattr(value, "__dict__", {}).values() if not isinstance(value, type) else ())
                stack.extend(c.cell_contents for c in getattr(value, "__closure__", None) or () if _filled(c))
    return None


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
