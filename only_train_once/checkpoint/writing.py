"""Writing a subnet: every file complete under its name or not there."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, SurgeryError
from ..record import SurgeryRecord
from ..surgery import apply_record, named_tensors, ties
from . import builders, extra_state, tensor_files
from .loading import resize_computed_buffers
from .manifest import RECORD_FILE, TensorEntry, folder, read_manifest, text_of
from .tensor_files import INDEX_FILE

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"


def save(
    model: nn.Module,
    record: SurgeryRecord,
    report: Mapping[str, Any],
    out_dir: str | Path,
    *,
    max_shard_size: int | str = SHARD_SIZE,
    builder: Mapping[str, Any] | bool | None = None,
) -> Path:
    """Write a subnet and how it came about into a folder (made if missing); returns the folder.

    Each file is complete under its name or not there: all are written beside, then moved. What the folder held
    before stays until all are complete.

    Args:
        max_shard_size: of a tensor file, in bytes or as in ``"5GB"``; a model that takes more gets several.
        builder: how the full model is made, see ``builders``; ``load`` then needs no constructor. None finds it out for
            models of transformers and timm, False leaves it out.

    Raises:
        CheckpointError: the model holds something that neither file can (meta tensors, extra state that is no JSON),
            ``builder`` makes another model, or the folder cannot be written.
    """
    directory = folder(out_dir)
    largest = tensor_files.bytes_of(max_shard_size)
    states, extra = extra_state.collect(model)
    named = named_tensors(model)
    _, aliases = ties(named)
    if taken := sorted(extra.keys() & named.keys()):
        raise CheckpointError(f"{taken[0]!r} is a tensor's name, and that of extra state: it cannot be saved")
    tensors = {first: named[first] for first in aliases} | extra
    files = tensor_files.split(tensors, largest)
    data: dict[str, Any] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "versions": dict(record.versions),
        "builder": _described(model, record, builder),
        "tensors": {first: TensorEntry.of(named[first], others).to_dict() for first, others in aliases.items()},
        "extra_tensors": {
            n: {"shape": list(t.shape), "dtype": tensor_files.dtype_name(t.dtype)} for n, t in extra.items()
        },
        "extra_state": states,
        "record": record.to_dict(),
        "report": dict(report),
    }
    before = _files_of(directory)
    texts = {INDEX_FILE: tensor_files.index_text(files, tensors)} if len(files) > 1 else {}
    with _beside(directory, (*files, *texts, RECORD_FILE)) as paths:
        digests = {
            file: tensor_files.write(paths[file], {name: tensors[name] for name in names})
            for file, names in files.items()
        }
        for file, text in (*texts.items(), (RECORD_FILE, text_of({**data, "tensor_files": digests}))):
            paths[file].write_text(text, encoding="utf-8")
    for stale in before - {*files, *texts}:
        with suppress(OSError):
            (directory / stale).unlink()
    return directory


def _files_of(directory: Path) -> set[str]:
    """The tensor files, and the index, of a subnet that the folder holds already."""
    try:
        files = read_manifest(directory).files
    except CheckpointError:
        return set()
    return {*files, *([INDEX_FILE] if len(files) > 1 else [])}


def _described(model: nn.Module, record: SurgeryRecord, builder: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    """How the full model is made, after making it so; or why that is not known."""
    if builder is False:
        return {}
    try:
        if isinstance(builder, Mapping):
            # What is compared is what a file would say.
            description: dict[str, Any] = json.loads(json.dumps({"arguments": {}, **builder}))
        else:
            description = builders.describe(model, record)
        made = builders.make(description, len(named_tensors(model)), RECORD_FILE)
        shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
        resize_computed_buffers(made, record, shapes)
        found = builders.difference(model, apply_record(record, made))
    except (CheckpointError, SurgeryError, builders.Unknown, TypeError, ValueError, RecursionError) as error:
        found = str(error)
    if found is None:
        return description
    if builder is not None:
        raise CheckpointError(f"builder={builder!r:.200} does not make the model that is saved: {found}")
    logger.info("the saved subnet does not say how the model is made: %s", found)
    return {"unknown": found}


@contextmanager
def _beside(directory: Path, names: tuple[str, ...]) -> Iterator[dict[str, Path]]:
    """Files to write, moved to their names when the block ends well and deleted when not."""
    paths = {name: directory / f".{name}.{os.getpid()}" for name in names}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield paths
        for name, path in paths.items():
            os.replace(path, directory / name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory} cannot be written: {type(error).__name__}: {error}; give another folder"
        ) from error
    finally:
        # In a folder that could not be made there is nothing to delete.
        for path in paths.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def save_reference_format(model: nn.Module, path: str | Path) -> None:
    """The whole module as a pickle, for scripts that call ``torch.load(path, weights_only=False)``.

    Raises:
        CheckpointError: the module cannot be pickled (a class inside of a function, a parametrized weight), or the
            file cannot be written. Nothing is left behind then.
    """
    target = folder(path)
    with _beside(target.parent, (target.name,)) as paths:
        try:
            torch.save(model, paths[target.name])
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be written to {path} as a whole module: {error}. Use subnet.save(dir), "
                "which needs no pickle."
            ) from error
