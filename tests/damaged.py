"""Damaged, foreign and forged folders of saved subnets, and a watch over what loading them does.

A mutation takes the files of a sound folder, as bytes by name, and changes them. Some are plain damage, which the
checksums see. Others make the checksums right again, as somebody would who means harm: then every further check has to
hold. What loads after plain damage has to be the model that was saved, bit by bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import struct
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

from only_train_once import inflate
from only_train_once.checkpoint import RECORD_FILE, TENSOR_FILE, json_digest, load, save
from only_train_once.cli import read_report
from only_train_once.errors import CheckpointError
from only_train_once.groups import find_groups
from only_train_once.report import build_report
from only_train_once.surgery import construct_subnet, named_tensors
from only_train_once.trace import trace

from .pruning import choose, randomize, zero
from .zoo import ZOO

Files = dict[str, Any]  # name -> bytes, or a target for a link, or a kind of thing that is no file
Make = Callable[[], nn.Module]

OUTSIDE = "outside.safetensors"  # a sound tensor file beside the folder, for names that lead there


class Counting(nn.Module):
    """Extra state, a tied weight, a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.down.weight = nn.Parameter(self.up.weight.detach().t().clone())
        self.tied = self.down
        self.register_buffer("shift", torch.arange(6.0), persistent=False)
        self.seen: Any = {"steps": 3, "scales": [torch.ones(2), 0.5]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.up(x + self.shift).relu())

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    return transformers.BertModel(config)


@dataclass(frozen=True)
class Sound:
    """A sound folder.

    Attributes:
        make: constructor; None where the folder says how the model is made.
        bits: of all tensors of the subnet.
    """

    files: Files
    make: Make | None
    bits: str


def sound_folders(where: Path) -> dict[str, Sound]:
    """One folder for every kind of content."""
    torch.manual_seed(0)
    words = {"input_ids": torch.arange(1, 15).reshape(2, 7)}
    cases: dict[str, tuple[Make, Any, dict[str, Any], bool]] = {
        "one file": (ZOO["mlp"].build, ZOO["mlp"].inputs(), {}, False),
        "several files": (ZOO["residual"].build, ZOO["residual"].inputs(), {"max_shard_size": 2000}, False),
        "norms": (ZOO["rms_norm"].build, ZOO["rms_norm"].inputs(), {}, False),
        "heads": (ZOO["grouped_query"].build, ZOO["grouped_query"].inputs(), {}, False),
        "extra state": (Counting, torch.randn(3, 6), {"max_shard_size": 200}, False),
        "of transformers": (bert, words, {}, True),
        "of timm": (lambda: timm.create_model("test_mambaout"), torch.randn(2, 3, 64, 64), {}, True),
    }
    found = {}
    for name, (make, inputs, options, described) in cases.items():
        model = make().eval()
        randomize(model)
        groups = find_groups(trace(model, inputs), wide=True)
        zero(model, groups, choose(groups))
        subnet, record = construct_subnet(model, groups)
        report = build_report(model, subnet, groups, {g: record.removed_units(g).tolist() for g in record.removed})
        folder = save(subnet, record, report.to_dict(), where / name, **options)
        files: Files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found[name] = Sound(files, None if described else make, bits(subnet))
    (where / OUTSIDE).write_bytes(found["one file"].files[TENSOR_FILE])
    return found


def bits(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        plain = tensor.detach().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.requires_grad}".encode("utf-8", "replace"))
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


# -- mutations of bytes ----------------------------------------------------------------------------------------------

FOREIGN = (
    b"",
    b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    b"PK\x03\x04" + b"\0" * 64,
    b"GGUF\x03\0\0\0" + b"\xff" * 32,
    b"\x89HDF\r\n\x1a\n" + b"\0" * 64,
    b"\x7fELF" + b"\0" * 64,
    b'{"model_type": "llama"}',
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"null",
    b"\xff\xfe" + "{}".encode("utf-16-le"),
    b"9" * 100_000,
)


def truncated(files: Files, r: random.Random) -> None:
    name = _some(files, r)
    files[name] = files[name][: r.randrange(len(files[name]))]


def extended(files: Files, r: random.Random) -> None:
    files[_some(files, r)] += r.randbytes(r.choice((1, 8, 4096)))


def bit_flipped(files: Files, r: random.Random) -> None:
    name = _some(files, r)
    data = bytearray(files[name])
    for _ in range(r.choice((1, 1, 1, 2, 20))):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    files[name] = bytes(data)


def block_lost(files: Files, r: random.Random) -> None:
    name = _some(files, r)
    data = files[name]
    start = r.randrange(len(data))
    stop = min(len(data), start + r.choice((1, 8, 512)))
    middle = r.choice((b"", b"\0" * (stop - start), data[start:stop] * 2))
    files[name] = data[:start] + middle + data[stop:]


def foreign(files: Files, r: random.Random) -> None:
    files[_some(files, r)] = r.choice(FOREIGN)


def random_bytes(files: Files, r: random.Random) -> None:
    files[_some(files, r)] = r.randbytes(r.randrange(300))


def file_missing(files: Files, r: random.Random) -> None:
    del files[_some(files, r)]


def files_exchanged(files: Files, r: random.Random) -> None:
    one, two = _some(files, r), _some(files, r)
    files[one], files[two] = files[two], files[one]


def no_plain_file(files: Files, r: random.Random) -> None:
    """A link to nothing, to itself, to a device without end, to a folder; a pipe; a folder."""
    name = _some(files, r)
    files[name] = ("link", r.choice(("nothing", name, "/dev/zero", "/dev/urandom", "/proc/self/mem", "..", ".")))
    if r.random() < 0.3:
        files[name] = r.choice((("pipe", ""), ("folder", "")))


# -- mutations of the record -----------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**16, 2**24 - 1, 2**24 + 1, 2**31, 2**32, 2**40, 2**53, 2**63, -(2**63),
    2**64, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "weight", "..", "../../etc/passwd",
    f"../{OUTSIDE}", "/etc/passwd", "/dev/zero", "\0", "\ud800", "\u202e", "é" * 300, "x" * 100_000, "__class__",
    "__import__('os').system('id')", "os.system", "a.b.c", "forward", "training", "grad", "data", "_parameters",
    "hf-hub:someone/something", "posix\nsystem", [], {}, [[]], [0], [1, 0], [[0, 1]], [[0, 2**53]], [[5, 2]], [-1],
    [2**53], [2**53, 0], [2**27, 2**26], {"": ""}, {"0": [[0, 1]]}, {"__class__": "x"}, {"tensor": "x"}, [None] * 50,
    "deep", "long",
)  # fmt: skip
KEYS = ("", "x", "0", "7", "-1", "..", f"../{OUTSIDE}", "__class__", "\ud800", "a\0b", "training", "a" * 5000, "é")


def value_replaced(data: Any, r: random.Random) -> None:
    holder, key = _place(data, r)
    holder[key] = _hostile(r, holder[key])


def values_replaced(data: Any, r: random.Random) -> None:
    for _ in range(r.randrange(2, 6)):
        value_replaced(data, r)


def entry_missing(data: Any, r: random.Random) -> None:
    holder, key = _place(data, r)
    del holder[key]


def entry_added(data: Any, r: random.Random) -> None:
    holder, _ = _place(data, r)
    if isinstance(holder, list):
        holder.insert(r.randrange(len(holder) + 1), _hostile(r, 0))
    else:
        holder[r.choice(KEYS)] = _hostile(r, 0)


def key_renamed(data: Any, r: random.Random) -> None:
    holder, key = _place(data, r)
    if isinstance(holder, dict):
        holder[r.choice((*KEYS, *holder, key + "x", key[:-1]))] = holder.pop(key)


def values_exchanged(data: Any, r: random.Random) -> None:
    (one, a), (two, b) = _place(data, r), _place(data, r)
    one[a], two[b] = copy.deepcopy(two[b]), copy.deepcopy(one[a])


def number_off(data: Any, r: random.Random) -> None:
    """A number that is nearly right, anywhere."""
    places = [(h, k) for h, k in _places(data) if type(h[k]) in (int, float)]
    for holder, key in r.sample(places, min(len(places), r.choice((1, 1, 1, 3)))):
        holder[key] = r.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, holder[key] << 40
                                if isinstance(holder[key], int) else 0.0))  # fmt: skip


def version_skewed(data: Any, r: random.Random) -> None:
    version = r.choice((0, 2, 99, -1, 2**70, "1", 1.0, None, [1], True))
    (data if r.random() < 0.5 else data["record"])["format"] = version


def runs_past_the_end(data: Any, r: random.Random) -> None:
    """The record keeps what the tensor does not have, with all shapes telling the same story."""
    names = list(data["record"]["tensors"])
    if not names:
        return
    name = r.choice(names)
    cut = data["record"]["tensors"][name]
    dim = r.choice(list(cut["kept"]))
    size = r.choice((2**20, 2**31, 2**40, 2**52))
    change = r.randrange(4)
    if change == 0:
        cut["kept"][dim][-1][1] += size
    elif change == 1:
        cut["shape"][int(dim)] += size
        cut["kept"][dim][-1][1] += size
    elif change == 2:
        cut["shape"][int(dim)] += size
        cut["kept"][dim] = [[0, size]]
        if name in data["tensors"]:
            data["tensors"][name]["shape"][int(dim)] = size
    else:
        cut["follow"] = {dim: [[0, size]]}
        group = r.choice(list(data["record"]["sizes"]))
        data["record"]["sizes"][group] = size
        data["record"]["removed"][group] = [[0, size]]


def surgery_forged(data: Any, r: random.Random) -> None:
    """Attributes and norms of the record that name anything that a model has."""
    record = data["record"]
    paths = [name.rpartition(".")[0] for name in data["tensors"]] + ["", "x", "0", "\ud800", "forward"]
    path, leaf = r.choice(paths), r.choice(("weight", "bias", "in_features", "out_features", "num_heads", "training",
                                            "forward", "eps", "_version", "_parameters", "\u00e9"))  # fmt: skip
    if r.random() < 0.4:
        known = r.choice((1, 6, 8, 10, 16, 2**40))
        name = f"{path}.{leaf}" if path else leaf
        record["attributes"][r.choice((name, f"{name}[0]", f"{name}._version", f"{path}.forward.x"))] = [known, 1]
        return
    kinds = ("layer", "rms", "gated rms", "rms of gated", "scaled rms", "rescale", "group", "whole groups", "response")
    small = (1, 2, 3, 8, 2**40)
    record["norms"][path] = {
        "kind": r.choice(kinds),
        "width": r.choice(small),
        "full_width": r.choice(small),
        "dim": r.choice((-1, 1, 0, 8)),
        "shape": [r.choice(small)],
        "num_groups": r.choice((None, 1, 2**40)),
        "offset": r.choice((0, 1)),
        "eps_name": r.choice((None, leaf)),
        "eps": r.choice((None, 1e-5)),
    }


def description_forged(data: Any, r: random.Random) -> None:
    """Numbers and names in how the model is made."""
    builder = data["builder"]
    if "arguments" not in builder:
        data["builder"] = {"library": "timm", "name": "test_resnet", "arguments": {}}
        builder = data["builder"]
    places = list(_places(builder))
    for _ in range(r.choice((1, 1, 2, 4))):
        holder, key = r.choice(places)
        if not (isinstance(holder, list) or key in holder):
            continue
        if isinstance(key, int) and key >= len(holder):
            continue
        holder[key] = _hostile(r, holder[key])
    if r.random() < 0.3:
        arguments = builder.get("arguments")
        target = arguments.get("config", arguments) if isinstance(arguments, dict) else None
        if isinstance(target, dict):
            key = r.choice(("num_hidden_layers", "num_classes", "depths", "pretrained", "auto_map", "num_labels",
                            "attn_implementation", "hidden_size", "dtype", "torch_dtype", "vocab_size", "in_chans",
                            "checkpoint_path", "id2label", "model_type", "to_dict", "hidden_act"))  # fmt: skip
            target[key] = _hostile(r, 0)


# -- mutations of the tensor files -----------------------------------------------------------------------------------


def header_forged(header: Any, r: random.Random) -> None:
    value_replaced(header, r)


def header_numbers(header: Any, r: random.Random) -> None:
    number_off(header, r)


def header_of_another_dtype(header: Any, r: random.Random) -> None:
    name = r.choice([name for name in header if name != "__metadata__"])
    header[name]["dtype"] = r.choice(
        ("F16", "BF16", "I32", "U32", "F64", "F8_E4M3", "BOOL", "C64", "F4", "f32", "PICKLE")
    )


def header_of_absurd_shape(header: Any, r: random.Random) -> None:
    name = r.choice([name for name in header if name != "__metadata__"])
    header[name]["shape"] = r.choice(
        ([2**40], [2**31, 2**31, 4], [0, 2**62], [2**63], [1] * 5000, [-1], [2**64 - 1, 2])
    )
    if r.random() < 0.5:
        start = header[name]["data_offsets"][0]
        header[name]["data_offsets"] = [start, start + r.choice((2**40, 2**62, 2**64 - 1))]


def header_renamed(header: Any, r: random.Random) -> None:
    name = r.choice([name for name in header if name != "__metadata__"])
    header[r.choice(KEYS)] = header.pop(name)


def _with_header(change: Callable[[Any, random.Random], None]) -> Callable[[Files, random.Random], None]:
    """Change the header of a tensor file; sometimes the record tells the same story; all checksums are right."""

    def mutate(files: Files, r: random.Random) -> None:
        name = r.choice([name for name in files if name.endswith(".safetensors")])
        data = files[name]
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header, r)
        text = _dumped(header)
        claimed = len(text) if r.random() < 0.8 else r.choice((0, 1, size, 2**31, 2**40, 2**63, 2**64 - 1))
        files[name] = struct.pack("<Q", claimed) + text + data[8 + size :]
        record = json.loads(files[RECORD_FILE])
        if r.random() < 0.5:
            for key, entry in header.items():
                if key in record["tensors"] and isinstance(entry, dict):
                    kinds = {"F16": "float16", "BF16": "bfloat16", "I32": "int32", "F64": "float64", "F32": "float32"}
                    record["tensors"][key]["shape"] = entry.get("shape")
                    record["tensors"][key]["dtype"] = kinds.get(str(entry.get("dtype")), "float32")
        _sign(files, record)

    return mutate


def header_keys_twice(files: Files, r: random.Random) -> None:
    name = r.choice([name for name in files if name.endswith(".safetensors")])
    data = files[name]
    (size,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + size].rstrip()
    header = json.loads(text)
    key = r.choice([key for key in header if key != "__metadata__"])
    text = text[:-1] + b"," + json.dumps({key: header[key]}).encode()[1:-1] + b"}"
    files[name] = struct.pack("<Q", len(text)) + text + data[8 + size :]
    _sign(files, json.loads(files[RECORD_FILE]))


def data_truncated_and_signed(files: Files, r: random.Random) -> None:
    name = r.choice([name for name in files if name.endswith(".safetensors")])
    cut = r.randrange(len(files[name]))
    files[name] = r.choice((files[name][:cut], files[name][:cut] + b"\0" * 2**16, r.choice(FOREIGN)))
    _sign(files, json.loads(files[RECORD_FILE]))


def file_names_forged(files: Files, r: random.Random) -> None:
    """Tensor files outside of the folder, absolute, too many, none; the target exists and its checksum is right."""
    record = json.loads(files[RECORD_FILE])
    known = record["tensor_files"]
    first = next(iter(known))
    outside = hashlib.sha256(files.get(TENSOR_FILE, b"")).hexdigest()
    name = r.choice((f"../{OUTSIDE}", "/dev/zero", "/etc/passwd", f"./{first}", f"x/../{first}", "", "\0",
                     first.upper(), "model-00001-of-00002.safetensors", "model-1-of-1.safetensors",
                     "model-00001-of-99999.safetensors", "subnet.json", "..", "pytorch_model.bin"))  # fmt: skip
    change = r.randrange(4)
    if change == 0:
        known[name] = known.pop(first)
    elif change == 1:
        record["tensor_files"] = {name: outside}
    elif change == 2:
        known[name] = outside
    else:
        record["tensor_files"] = {f"model-{i:05d}-of-00003.safetensors": known[first] for i in (1, 2, 3)}
    files[RECORD_FILE] = _dumped(_signed(record))


def keys_twice(files: Files, r: random.Random) -> None:
    text = files[RECORD_FILE].rstrip()
    key, value = r.choice(
        (("format", 2), ("kind", "x"), ("record", {}), ("sha256", ""), ("tensors", {}), ("builder", {}))
    )
    files[RECORD_FILE] = text[:-1] + b"," + json.dumps({key: value}).encode()[1:-1] + b"}"


def _with_record(change: Callable[[Any, random.Random], None], *, sign: bool) -> Callable[[Files, random.Random], None]:
    def mutate(files: Files, r: random.Random) -> None:
        record = json.loads(files[RECORD_FILE])
        change(record, r)
        files[RECORD_FILE] = _dumped(_signed(record) if sign else record)

    return mutate


PLAIN: dict[str, Callable[[Files, random.Random], None]] = {
    f.__name__: f
    for f in (
        truncated, extended, bit_flipped, block_lost, foreign, random_bytes, file_missing, files_exchanged,
        no_plain_file, keys_twice,
    )
} | {
    f"{f.__name__}, unsigned": _with_record(f, sign=False)
    for f in (value_replaced, entry_missing, entry_added, key_renamed, number_off, version_skewed)
}  # fmt: skip
SIGNED: dict[str, Callable[[Files, random.Random], None]] = (
    {
        f.__name__: _with_record(f, sign=True)
        for f in (
            value_replaced, values_replaced, entry_missing, entry_added, key_renamed, values_exchanged, number_off,
            version_skewed, runs_past_the_end, surgery_forged, description_forged,
        )
    }
    | {
        f.__name__: _with_header(f)
        for f in (header_forged, header_numbers, header_of_another_dtype, header_of_absurd_shape, header_renamed)
    }
    | {f.__name__: f for f in (header_keys_twice, data_truncated_and_signed, file_names_forged)}
)  # fmt: skip


def _some(files: Files, r: random.Random) -> str:
    return r.choice(sorted(files))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of every object and list, as (holder, key)."""
    stack = [data]
    while stack:
        holder = stack.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            yield holder, key
            if isinstance(value, (dict, list)) and value:
                stack.append(value)


def _place(data: Any, r: random.Random) -> tuple[Any, Any]:
    """A random entry, found by walking down, so that what is high up is met as often as what is deep."""
    holder = data
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = r.choice(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and r.random() < 0.85:
            holder = holder[key]
        else:
            return holder, key


def _hostile(r: random.Random, old: Any) -> Any:
    value = copy.deepcopy(r.choice((*HOSTILE, [old], {"x": old}, [old] * 3)))
    if value == "deep":
        value = []
        for _ in range(r.choice((50, 400, 900, 3000))):
            value = [value]
    elif value == "long":
        value = list(range(20_000))
    return value


def _dumped(data: Any) -> bytes:
    """JSON also of what is nested more deeply than Python writes."""
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)
        return json.dumps(data).encode()
    finally:
        sys.setrecursionlimit(limit)


def _signed(record: Any) -> Any:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)
        record["sha256"] = json_digest(record)
    finally:
        sys.setrecursionlimit(limit)
    return record


def _sign(files: Files, record: Any) -> None:
    """Put the right checksums of the tensor files into the record, and of the record itself."""
    record["tensor_files"] = {
        name: hashlib.sha256(files[name]).hexdigest() for name in record["tensor_files"] if name in files
    }
    files[RECORD_FILE] = _dumped(_signed(record))


# -- the watch -------------------------------------------------------------------------------------------------------

_RUNS = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "pickle.", "socket.",
    "ctypes.", "urllib.", "http.", "ftplib.", "smtplib.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link",
    "os.symlink", "os.chmod", "os.chown", "os.truncate", "shutil.", "tempfile.", "webbrowser.", "os.putenv", "signal.",
)  # fmt: skip
_INSTALLED = tuple({*sysconfig.get_paths().values(), str(Path(__file__).parents[1]), sys.base_prefix})


def _importing() -> bool:
    """Whether an installed module is being imported, which makes named tuples from text; "import" events say which."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


@dataclass
class Watch:
    """What Python's audit events say happened while the watch was on; one for the whole process, hooks stay."""

    seen: list[str] = field(default_factory=list)
    folder: str | None = None

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        folder, self.folder = self.folder, None  # what the hook itself does is not watched
        try:
            if event in ("exec", "compile"):
                source = args[0].co_filename if event == "exec" and hasattr(args[0], "co_filename") else str(args[-1])
                known = source.startswith(("<frozen", *_INSTALLED)) or (source == "<string>" and _importing())
            elif event == "open":
                path, flags = str(args[0]), args[2] if isinstance(args[2], int) else 0
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
                known = not writes and path.startswith((folder, *_INSTALLED))
            elif event == "import":
                top = str(args[0]).partition(".")[0]
                known = top in sys.modules or top in sys.stdlib_module_names
            else:
                known = not event.startswith(_RUNS)
            if not known:
                self.seen.append(f"{event} {str(args)[:120]}")
        finally:
            self.folder = folder

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = None


_watches: list[Watch] = []


def watch() -> Watch:
    if not _watches:
        _watches.append(Watch())
        sys.addaudithook(_watches[0].hook)
    return _watches[0]


@dataclass
class Outcome:
    """What loading a mutated folder came to: an error's first words, ``"loaded"``, or what is wrong with it."""

    result: str
    wrong: str = ""
    seconds: float = 0.0


def written(folder: Path, files: Files) -> None:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content[0] == "link":
            path.symlink_to(content[1])
        elif content[0] == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


def tried(folder: Path, sound: Sound, signed: bool, read: str = "load") -> Outcome:
    """Load a folder, or read its report, or inflate it, under the watch."""
    guard = watch()
    guard.seen.clear()
    model: nn.Module | None = None
    start = time.perf_counter()
    try:
        with guard.over(folder):
            if read == "load":
                model = load(folder, sound.make)
            elif read == "inflate":
                inflate(folder, sound.make)
            else:
                read_report(folder)
        result, wrong = "loaded", ""
    except CheckpointError as error:
        message = str(error)
        result, wrong = message.replace(str(folder), "FOLDER"), "" if str(folder) in message else f"no path: {message}"
    except BaseException as error:
        result, wrong = "crash", f"{type(error).__name__}: {error!s:.300}"
    seconds = time.perf_counter() - start
    if guard.seen:
        wrong = f"{wrong} did: {guard.seen[:3]}"
    if model is not None and not signed and bits(model) != sound.bits:
        wrong = f"{wrong} loaded another model"
    if model is not None:
        size = sum(t.nbytes for t in {id(t): t for t in named_tensors(model).values()}.values())
        if size > sum(path.stat().st_size for path in folder.glob("*.safetensors")):
            wrong = f"{wrong} loaded {size} bytes"
    return Outcome(result, wrong, seconds)


def quiet() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
