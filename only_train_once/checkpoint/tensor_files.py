"""The tensors of a saved subnet: one safetensors file, or several with the usual index beside them.

Names and contents are those that Hugging Face's libraries read. Writing takes the memory of one tensor, reading that
of what is read: a tensor goes from its file straight to where it is wanted. `check` looks at names, checksums and
headers before any tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError

TENSOR_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{prefix}IB": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)
}
_BLOCK = 1 << 20


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(size: int | str) -> int:
    """``"5GB"`` (decimal), ``"500MiB"`` (binary) or a number of bytes.

    Example::

        >>> bytes_of("1.5KB"), bytes_of("2KiB"), bytes_of(10)
        (1500, 2048, 10)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    number: float | None = None
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif match is not None and match[2].upper() in _UNITS:
        number = float(match[1]) * _UNITS[match[2].upper()]
    if number is None or number < 1:
        raise ConfigurationError(f"max_shard_size is {size!r}: a number of bytes, or as in '5GB' or '500MiB'")
    return int(number)


def split(tensors: Mapping[str, Tensor], largest: int) -> dict[str, list[str]]:
    """File -> names of its tensors, in order; no file exceeds ``largest`` bytes, unless by a single tensor."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if parts[-1] and size + own > largest:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return dict(zip(file_names(len(parts)), parts, strict=True))


def file_names(count: int) -> list[str]:
    """What ``count`` files are called."""
    if count == 1:
        return [TENSOR_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(files: Mapping[str, Collection[str]], tensors: Mapping[str, Tensor]) -> str:
    """The index that other libraries look up files by; nothing here reads it."""
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    where = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, tensor by tensor; returns its SHA-256.

    Raises:
        CheckpointError: a tensor that the format has no room for, or the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name!r} is on the meta device, it has no values to save")
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided or name == "__metadata__":
            raise CheckpointError(
                f"{name!r} is a {dtype_name(tensor.dtype)} tensor of layout {tensor.layout}, for which a safetensors "
                f"file has no room: dense ones of {', '.join(map(dtype_name, _CODES))} are written"
            )
    # Wide numbers first, so that all are aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def add(block: Any) -> None:
            file.write(block)
            digest.update(block)

        add(len(text).to_bytes(8, "little"))
        add(text)
        for name in order:
            add(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    if not tensor.numel():
        return b""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if plain.is_complex():
        plain = torch.view_as_real(plain).reshape(-1)
    return plain.view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check(
    directory: Path, digests: Mapping[str, str], expected: Mapping[str, tuple[tuple[int, ...], str]], owner: str
) -> dict[str, list[str]]:
    """File -> names of its tensors, after making sure that the files are those that were written.

    Args:
        digests: file -> SHA-256.
        expected: tensor -> shape and dtype.
        owner: the file that says so, for messages.

    Raises:
        CheckpointError: a file is absent, damaged, foreign, or has other tensors than expected.
    """
    found: dict[str, list[str]] = {}
    for file, digest in digests.items():
        path = directory / file
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, though {owner} is there: copy the whole folder")
        try:
            actual = sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if actual != digest:
            raise CheckpointError(
                f"{path} is damaged or belongs to another {owner}: its SHA-256 is {actual}, expected {digest}"
            )
        with _opened(path) as reader:
            found[file] = list(reader.keys())
            for name in found[file]:
                part = reader.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                shape, kind = tuple(part.get_shape()), "unknown" if dtype is None else dtype_name(dtype)
                if name in expected and (shape, kind) != expected[name]:
                    raise CheckpointError(
                        f"{path} holds {name!r} as {kind}{list(shape)}, {owner} says "
                        f"{expected[name][1]}{list(expected[name][0])}"
                    )
    held = [name for names in found.values() for name in names]
    missing, unexpected = sorted(expected.keys() - set(held)), sorted(set(held) - expected.keys())
    if missing or unexpected or len(held) != len(set(held)):
        where = directory / next(iter(digests)) if len(digests) == 1 else f"the tensor files of {directory}"
        twice = sorted({name for name in held if held.count(name) > 1}) if len(held) != len(set(held)) else []
        raise CheckpointError(
            f"{where} hold{'s' if len(digests) == 1 else ''} other tensors than expected: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}, twice {twice[:5]}"
        )
    return found


def read(
    path: Path, layouts: Mapping[str, torch.memory_format], device: torch.device | None
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a file that was checked, one after the other, each in memory of its own."""
    with _opened(path) as reader:
        for name, layout in layouts.items():
            # What the reader gives is a view of the file.
            yield name, reader.get_tensor(name).to(device=device, memory_format=layout, copy=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, OSError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def is_sound_shape(shape: object) -> bool:
    """A list of sizes that a tensor can have: an empty one makes no room for absurd sizes."""
    whole = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n <= 2**53 for n in shape)
    if not whole:
        return False
    assert isinstance(shape, list)
    empty = 0 in shape
    return math.prod(max(n, 1) for n in shape) <= (2**24 if empty else 2**53)
