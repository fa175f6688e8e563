"""Saved subnets: loading gives the same bits back, in another process too, and damage has a name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import only_train_once
from only_train_once import checkpoint
from only_train_once.checkpoint import RECORD_FILE, TENSOR_FILE, json_digest, load, read_record, save
from only_train_once.checkpoint.tensor_files import sha256
from only_train_once.errors import CheckpointError
from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role, find_groups
from only_train_once.record import SurgeryRecord
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace

BUILT_ON: list[str] = []


class Net(nn.Module):
    """Tied embedding, buffers of both kinds, a norm, an attribute, a frozen parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)
        self.register_buffer("scale", torch.ones(3))
        BUILT_ON.append(self.up.weight.device.type)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + torch.tanh(self.up(self.norm(x + 0 * self.shift))).reshape(*x.shape[:2], self.width)
        x = self.head(x) * self.scale[0]
        return self.conv(x[:, None])


class ReadsValues(Net):
    """A constructor that the meta device cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [r.item() for r in torch.linspace(0, 1, 3)]


class HidesTensors(Net):
    """A constructor that runs there and leaves a tensor without values behind."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = {"a": [torch.ones(3)]}

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.hidden["a"][0][0]


def groups() -> list[PruningGroup]:
    one = np.arange(8)[:, None]
    where = (
        ("embed.weight", 1, Role.ZERO),
        ("norm.weight", 0, Role.ZERO),
        ("norm.bias", 0, Role.ZERO),
        ("norm", -1, Role.NORM),
        ("up.weight", 0, Role.ZERO),
        ("up.bias", 0, Role.ZERO),
        ("up.weight", 1, Role.CONSUMER),
        ("shift", 0, Role.FOLLOW),
        ("width", 0, Role.ATTRIBUTE),
    )
    return [PruningGroup("width", Kind.WIDTH, tuple(ParamSlice(p, d, one, r, 8) for p, d, r in where))]


TOKENS = torch.arange(10).reshape(2, 5)


def subnet_of(build: Callable[[], nn.Module] = Net) -> tuple[Any, SurgeryRecord]:
    torch.manual_seed(0)
    model: Any = build()
    model.norm.weight.requires_grad_(False)
    model.scale.add_(0.5)
    model.shift.add_(0.25)
    model.to(memory_format=torch.channels_last)
    return construct_subnet(model, groups(), {"width": [1, 4, 5]})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    model, record = subnet_of()
    return save(model, record, {"note": "a report"}, tmp_path / "deep" / "slim"), model.eval()


@pytest.mark.parametrize("build", [Net, ReadsValues, HidesTensors])
def test_what_is_loaded_is_what_was_saved(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, record = subnet_of(build)
    model.train()
    save(model, record, {}, tmp_path)
    BUILT_ON.clear()
    loaded: Any = load(tmp_path, build)
    assert (["meta"] if build is Net else ["meta", "cpu"]) == BUILT_ON
    assert model.training
    assert not loaded.training
    assert type(loaded) is build
    ours = dict((*model.named_parameters(), *model.named_buffers()))
    theirs = dict((*loaded.named_parameters(), *loaded.named_buffers()))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.requires_grad == theirs[name].requires_grad
        assert value.stride() == theirs[name].stride()
        assert type(value) is type(theirs[name])
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.up.out_features == loaded.width == 5
    assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))


def test_load_into_a_given_model(saved: tuple[Path, nn.Module]) -> None:
    full = Net()
    before = {n: t.clone() for n, t in full.state_dict().items()}
    assert torch.equal(load(saved[0], full)(TOKENS), saved[1](TOKENS))
    assert all(torch.equal(before[n], t) for n, t in full.state_dict().items())


def test_load_in_a_fresh_process(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util, torch\n"
        f"sys.path.insert(0, {str(Path(only_train_once.__file__).parents[1])!r})\n"
        f"spec = importlib.util.spec_from_file_location('nets', {__file__!r})\n"
        "nets = importlib.util.module_from_spec(spec); spec.loader.exec_module(nets)\n"
        f"model = nets.load({str(saved[0])!r}, nets.Net)\n"
        f"torch.save(model(nets.TOKENS), {str(tmp_path / 'y.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), saved[1](TOKENS))


def test_saving_again_replaces_and_leaves_nothing_else(saved: tuple[Path, nn.Module]) -> None:
    model, record = subnet_of()
    with torch.no_grad():
        model.scale.mul_(2)
    save(model, record, {}, saved[0])
    assert sorted(p.name for p in saved[0].iterdir()) == [TENSOR_FILE, RECORD_FILE]
    assert torch.equal(load(saved[0], Net)(TOKENS), model.eval()(TOKENS))


def test_the_report_is_kept(saved: tuple[Path, nn.Module]) -> None:
    data = read_record(saved[0])
    assert data["report"] == {"note": "a report"}
    assert data["class"].endswith("Net")
    assert set(data["versions"]) == {"only_train_once", "torch"}


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'weight' is on the meta device"):
        save(nn.Linear(2, 2, device="meta"), SurgeryRecord(), {}, tmp_path)
    with pytest.raises(CheckpointError, match="report of the subnet is no JSON"):
        save(nn.Linear(2, 2), SurgeryRecord(), {"a": object()}, tmp_path)


def test_views_into_one_storage(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.arange(6.0)
            self.register_buffer("low", both[:4])
            self.register_buffer("high", both[2:])

    model: Any = Views()
    save(model, SurgeryRecord(), {}, tmp_path)
    loaded: Any = load(tmp_path, Views)
    assert torch.equal(loaded.high, model.high)


Damage = Callable[[Path], None]


def edit(change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> Damage:
    """Change the JSON; with ``sign`` its checksum is made right again, as whoever forges a file would."""

    def damage(folder: Path) -> None:
        path = folder / RECORD_FILE
        data = json.loads(path.read_text())
        change(data)
        if sign:
            data["sha256"] = json_digest(data)
        path.write_text(json.dumps(data))

    return damage


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """Change the tensors and put the right checksum of their file into the JSON."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSOR_FILE)
        change(tensors)
        save_file(tensors, folder / TENSOR_FILE)
        digest = sha256(folder / TENSOR_FILE)
        edit(lambda d: d["tensor_files"].update({TENSOR_FILE: digest}))(folder)

    return damage


def resign_bytes(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / TENSOR_FILE).write_bytes(content)
        digest = sha256(folder / TENSOR_FILE)
        edit(lambda d: d["tensor_files"].update({TENSOR_FILE: digest}))(folder)

    return damage


def flip(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def in_record(path: list[str], value: Any) -> Damage:
    def change(data: dict[str, Any]) -> None:
        at: Any = data["record"]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return edit(change)


def nothing(data: bytes) -> bytes:
    return b""


KEPT = ["tensors", "embed.weight", "kept", "1"]
DAMAGE: dict[str, tuple[Damage, str]] = {
    "no json": (lambda f: (f / RECORD_FILE).unlink(), "does not exist"),
    "no tensors": (lambda f: (f / TENSOR_FILE).unlink(), "does not exist, though"),
    "empty tensors": (edit_bytes(TENSOR_FILE, nothing), "is damaged or belongs to another"),
    "truncated tensors": (edit_bytes(TENSOR_FILE, lambda b: b[:-7]), "is damaged or belongs to another"),
    "bit in the header": (edit_bytes(TENSOR_FILE, lambda b: flip(b, 9)), "is damaged or belongs to another"),
    "bit in the data": (edit_bytes(TENSOR_FILE, lambda b: flip(b, -3)), "is damaged or belongs to another"),
    "tensors are no safetensors": (resign_bytes(b"PK\x03\x04 something else"), "is no safetensors file"),
    "header of absurd size": (resign_bytes(b"\xff" * 8 + b"{}"), "is no safetensors file"),
    "empty json": (edit_bytes(RECORD_FILE, nothing), "is no JSON"),
    "truncated json": (edit_bytes(RECORD_FILE, lambda b: b[: len(b) // 2]), "is no JSON"),
    "binary json": (edit_bytes(RECORD_FILE, lambda b: b"\xff\xfe" + b), "cannot be read"),
    "deep json": (edit_bytes(RECORD_FILE, lambda b: b"[" * 200_000), "is no JSON"),
    "digit in the json": (
        edit_bytes(RECORD_FILE, lambda b: b.replace(b'"width": 5', b'"width": 4')),
        "does not match its checksum",
    ),
    "foreign json": (edit_bytes(RECORD_FILE, lambda b: b'{"model_type": "llama"}'), "is foreign: its kind is None"),
    "a json list": (edit_bytes(RECORD_FILE, lambda b: b"[1]"), "is foreign"),
    "newer format": (edit(lambda d: d.update(format=99)), "has format 99, this library reads up to 2"),
    "older format": (edit(lambda d: d.update(format=1)), "has format 1, this library reads 2"),
    "strange format": (edit(lambda d: d.update(format="1")), "format is '1'"),
    "unsigned edit": (edit(lambda d: d["report"].update(x=1), sign=False), "does not match its checksum"),
    "newer record": (in_record(["format"], 99), "record has format 99"),
    "no record": (edit(lambda d: d.pop("record")), "record is a NoneType"),
    "positions out of range": (in_record(KEPT, [[0, 9]]), "out of range, the size is 8"),
    "positions overlap": (in_record(KEPT, [[0, 3], [2, 5]]), "overlaps"),
    "other positions": (
        in_record(KEPT, [[0, 3]]),
        "leaves .11, 3. of .embed.weight., but it is saved with shape .11, 5.",
    ),
    "absurd shape": (in_record(["tensors", "embed.weight", "shape"], [11, 2**48]), "does not fit the model"),
    "shape of no tensor": (in_record(["tensors", "embed.weight", "shape"], [11, 2**52]), "is that of no tensor"),
    "absurd positions": (in_record(KEPT, [[0, 2**62]]), "expected an integer from 0"),
    "unknown tensor": (
        in_record(["tensors", "x"], {"shape": [2], "kept": {}, "aliases": []}),
        "leaves .2. of .x., but it is not saved",
    ),
    "unknown attribute": (in_record(["attributes", "depth"], [3, 2]), "'depth'.*expected an int"),
    "attribute grows": (in_record(["attributes", "width"], [8, 80]), "from 1 to 8"),
    "attribute of another model": (in_record(["attributes", "width"], [9, 5]), "changes 'width' from 9"),
    "no table": (edit(lambda d: d.pop("tensors")), "has no table of tensors"),
    "bad table": (edit(lambda d: d["tensors"]["scale"].update(shape=[-1])), "entry of the tensor 'scale' is damaged"),
    "listed twice": (edit(lambda d: d["tensors"]["scale"].update(aliases=["shift"])), "a tensor is listed twice"),
    "table of another model": (edit(lambda d: d["tensors"]["scale"].update(shape=[4])), "holds 'scale' as float32"),
    "another dtype": (edit_tensors(lambda t: t.update(scale=torch.ones(3).half())), "holds 'scale' as float16"),
    "another shape": (edit_tensors(lambda t: t.update(scale=torch.ones(4))), "as float32.4."),
    "a tensor too few": (edit_tensors(lambda t: t.pop("scale")), "missing .'scale'."),
    "a tensor too many": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "unexpected .'x'."),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_has_a_name(name: str, saved: tuple[Path, nn.Module]) -> None:
    damage, match = DAMAGE[name]
    load(saved[0], Net)
    before = {p.name: p.read_bytes() for p in saved[0].iterdir()}
    damage(saved[0])
    assert before != {p.name: p.read_bytes() for p in saved[0].iterdir()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load(saved[0], Net)
    assert str(saved[0]) in str(caught.value)


@pytest.mark.parametrize("at", range(0, 4000, 211))
def test_any_flipped_byte_is_noticed(at: int, saved: tuple[Path, nn.Module]) -> None:
    for name in (TENSOR_FILE, RECORD_FILE):
        path = saved[0] / name
        whole = path.read_bytes()
        path.write_bytes(flip(whole, at))
        with pytest.raises(CheckpointError):
            load(saved[0], Net)
        path.write_bytes(whole)
    load(saved[0], Net)


class MoreLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Net(9), r"does not fit the model.*'embed.weight' of shape \[11, 8\].*\[11, 9\]"),
        (lambda: nn.Linear(2, 2), "saved from .*Net, built torch.nn.modules.linear.Linear"),
        (MoreLayers, "the model has .'extra.bias', 'extra.weight'., which are not saved"),
        (lambda: "a model", "build returned a str"),
    ],
)
def test_another_model(build: Any, match: str, saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(saved[0], build)


def test_reference_format(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = tmp_path / "new" / "model.pt"
    checkpoint.save_reference_format(model, path)
    x = torch.randn(2, 3)
    assert torch.equal(torch.load(path, weights_only=False)(x), model(x))


class _Computed(nn.Module):
    """Makes a table for the length that it meets, as models with relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))
        return self.fc2(self.fc1(x + self.table).relu())


def test_a_buffer_that_running_the_model_has_resized_is_loaded(tmp_path: Path) -> None:
    from .pruning import choose, zero  # not above: a test runs this file on its own

    model, x = _Computed(), torch.randn(3, 6)
    model(x)
    groups = find_groups(trace(model, x))
    zero(model, groups, choose(groups))
    subnet, record = construct_subnet(model, groups)
    save(subnet, record, {}, tmp_path)
    loaded = load(tmp_path, build=_Computed)
    assert torch.equal(loaded(x), subnet(x))
