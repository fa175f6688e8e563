"""``subnet.json``: everything about a saved subnet but its tensors, read with trust in nothing.

[Note: what a file may do]
Loading runs nothing that is in the files: the module comes from the caller's own constructor or from a library that
`builders` lists, the surgery record cuts its tensors and lowers its own ``int`` attributes, the tensors are read with
safetensors. Every entry is checked before it is used, against checksums, against the headers of the tensor files and
against the freshly built model, so a damaged or foreign file ends in a `CheckpointError` that names the file and the
mismatch. What is allocated follows the bytes that the files really have, not the numbers that they claim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError
from ..record import SurgeryRecord
from ..surgery import layout_of
from .tensor_files import dtype_name, file_names, is_sound_shape

RECORD_FILE = "subnet.json"
FORMAT = 2  # 1 had a single file of tensors
KIND = "only_train_once.subnet"
LAYOUTS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_LAYOUT_DIMS = {"channels_last": 4, "channels_last_3d": 5}
_LARGEST = 1 << 28  # bytes of subnet.json; a record of 10 million runs of units takes half of it


@dataclass(frozen=True)
class Manifest:
    """What a ``subnet.json`` says, every field checked for itself.

    Attributes:
        path: of the file.
        kind: qualified name of the model's class when it was saved.
        files: tensor file -> SHA-256.
        tensors: first name -> how the parameter or buffer is put back.
        extra: tensor of a module's extra state -> shape and dtype.
        extra_state: module path -> extra state, tensors by name, see `extra_state`.
        record: the surgery.
        builder: how the model is made, see `builders`.
        report: of the subnet, unchecked.
    """

    path: Path
    kind: str
    files: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    extra: Mapping[str, tuple[tuple[int, ...], str]]
    extra_state: Mapping[str, Any]
    record: SurgeryRecord
    builder: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor in the files."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.tensors.items()} | dict(self.extra)


@dataclass(frozen=True)
class TensorEntry:
    """How a saved parameter or buffer is put back; ``aliases`` are the other names of a tied one."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    memory_format: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, tensor: Tensor, aliases: tuple[str, ...]) -> TensorEntry:
        layout = next(name for name, layout in LAYOUTS.items() if layout is layout_of(tensor))
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad, layout, aliases)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"shape": list(self.shape), "aliases": list(self.aliases)}


def folder(path: object) -> Path:
    """``path`` as a path; refuses what is none, such as a number or None."""
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(f"out_dir is {path!r}: give a folder's path, a str or a pathlib.Path")
    return Path(path)


def text_of(data: dict[str, Any]) -> str:
    """``subnet.json`` with its kind, its format and the checksum of it all."""
    data = {"kind": KIND, "format": FORMAT, **data}
    try:
        data["sha256"] = json_digest(data)
        text = json.dumps(data, indent=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the report of the subnet is no JSON: {error}") from error
    if len(text) > _LARGEST:
        raise CheckpointError(f"{RECORD_FILE} would take {len(text)} bytes, more than {_LARGEST} are not read back")
    return text


def json_digest(data: Mapping[str, Any]) -> str:
    """Checksum of everything in ``subnet.json`` but the checksum."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_record(out_dir: str | Path) -> dict[str, Any]:
    """What ``subnet.json`` holds, after checking that it is whole and ours; tensors are not opened."""
    path = folder(out_dir) / RECORD_FILE
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        size = path.stat().st_size
        if size > _LARGEST:
            raise OSError(f"it has {size} bytes, {_LARGEST} at most are expected")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {out_dir} holds no saved subnet") from error
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        data = json.loads(text, parse_constant=_keep_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path} is foreign: its kind is {found!r:.80}, expected {KIND!r}")
    version = data.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: format is {version!r:.80}, expected a positive integer")
    if version < FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, this library reads {FORMAT}: construct the subnet and save it again"
        )
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version!r:.80}, this library reads up to {FORMAT}: update it")
    try:
        digest = json_digest(data)
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged, it is nested too deeply") from error
    if data.get("sha256") != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; save the subnet again")
    return data


def read_manifest(out_dir: str | Path) -> Manifest:
    """``subnet.json`` with all its entries checked; tensors are not opened.

    Raises:
        CheckpointError: it is missing, damaged, foreign or newer than this library.
    """
    data = read_record(out_dir)
    path = folder(out_dir) / RECORD_FILE
    try:
        record = SurgeryRecord.from_dict(data.get("record"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    manifest = Manifest(
        path,
        _typed(data.get("class"), str, path, "class"),
        _files(data.get("tensor_files"), path),
        _tensors(data.get("tensors"), path),
        _extra(data.get("extra_tensors", {}), path),
        _typed(data.get("extra_state", {}), dict, path, "extra_state"),
        record,
        _typed(data.get("builder", {}), dict, path, "builder"),
        _typed(data.get("report"), dict, path, "report"),
    )
    _fit_together(manifest)
    return manifest


def _keep_constant(name: str) -> float:
    return float(name.replace("Infinity", "inf"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two readers one would take the first, the other the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _typed(value: Any, kind: type, path: Path, name: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _files(value: object, path: Path) -> dict[str, str]:
    """The tensor files; their names are known beforehand, so they lie in the folder."""
    files = _typed(value, dict, path, "tensor_files")
    if not files or sorted(files) != file_names(len(files)):
        expected = "model.safetensors, or model-00001-of-0000N.safetensors and those that follow"
        raise CheckpointError(f"{path}: tensor_files are {str(list(files))[:200]}, expected {expected}")
    for name, digest in files.items():
        _typed(digest, str, path, f"tensor_files[{name!r}]")
    return dict(sorted(files.items()))


def _tensors(value: object, path: Path) -> dict[str, TensorEntry]:
    """The table of tensors, every field of the right type."""

    def sound(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and is_sound_shape(entry.get("shape"))
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("requires_grad"), bool)
            and (not entry["requires_grad"] or entry["dtype"].startswith(("float", "bfloat", "complex")))
            and isinstance(entry.get("memory_format"), str)
            and entry["memory_format"] in LAYOUTS
            and _LAYOUT_DIMS.get(entry["memory_format"]) in (None, len(entry["shape"]))
            and isinstance(entry.get("aliases"), list)
            and all(isinstance(name, str) for name in entry["aliases"])
        )

    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has no table of tensors: damaged or foreign")
    tensors = {}
    for name, entry in value.items():
        if not sound(entry):
            raise CheckpointError(f"{path}: the entry of the tensor {name!r} is damaged: {str(entry)[:200]}")
        tensors[name] = TensorEntry(
            tuple(entry["shape"]),
            entry["dtype"],
            entry["requires_grad"],
            entry["memory_format"],
            tuple(entry["aliases"]),
        )
    return tensors


def _extra(value: object, path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    extra = {}
    for name, entry in _typed(value, dict, path, "extra_tensors").items():
        if not (isinstance(entry, dict) and is_sound_shape(entry.get("shape")) and isinstance(entry.get("dtype"), str)):
            raise CheckpointError(f"{path}: the entry of the extra tensor {name!r} is damaged: {str(entry)[:200]}")
        extra[name] = (tuple(entry["shape"]), entry["dtype"])
    return extra


def _fit_together(manifest: Manifest) -> None:
    """The table of tensors names each once, and the record ends in the shapes that it has."""
    names = [name for first, entry in manifest.tensors.items() for name in (first, *entry.aliases)]
    if len({*names, *manifest.extra}) != len(names) + len(manifest.extra):
        raise CheckpointError(f"{manifest.path}: a tensor is listed twice")
    shapes = {name: entry.shape for first, entry in manifest.tensors.items() for name in (first, *entry.aliases)}
    for first, cut in manifest.record.tensors.items():
        for name in (first, *cut.aliases):
            if shapes.get(name) != cut.new_shape:
                saved = f"it is saved with shape {list(shapes[name])}" if name in shapes else "it is not saved"
                raise CheckpointError(
                    f"{manifest.path} is damaged: its record leaves {list(cut.new_shape)} of {name!r}, but {saved}"
                )
