"""Files of a saved subnet beyond the plain case: several tensor files, kinds of tensors, extra state, devices."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from only_train_once import OTO, load
from only_train_once.checkpoint import INDEX_FILE, RECORD_FILE, TENSOR_FILE, read_manifest, save
from only_train_once.checkpoint.tensor_files import bytes_of, file_names
from only_train_once.errors import CheckpointError, ConfigurationError
from only_train_once.record import SurgeryRecord

from .test_checkpoint import TOKENS, Net, subnet_of

NOTHING = SurgeryRecord()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, nn.Module]:
    model, record = subnet_of()
    return save(model, record, {}, tmp_path / "slim", max_shard_size=150), model.eval()


def test_several_files_and_the_index(several: tuple[Path, nn.Module]) -> None:
    folder, model = several
    files = file_names(3)
    assert names(folder) == sorted([*files, INDEX_FILE, RECORD_FILE])
    assert sorted(read_manifest(folder).files) == files
    index = json.loads((folder / INDEX_FILE).read_text())
    held = {name: file for file in files for name in load_file(folder / file)}
    assert index["weight_map"] == held
    tensors = {n: t for file in files for n, t in load_file(folder / file).items()}
    sizes = {file: sum(t.nbytes for t in load_file(folder / file).values()) for file in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 150 or len(load_file(folder / file)) == 1 for file, size in sizes.items())
    assert "head.weight" not in tensors, "a tied weight is there once"
    loaded: Any = load(folder, Net)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize(("first", "second"), [(150, "5GB"), (150, 300), ("5GB", 150)])
def test_saving_again_leaves_nothing_of_before(first: Any, second: Any, tmp_path: Path) -> None:
    model, record = subnet_of()
    (tmp_path / "model-00001-of-00009.safetensors").write_text("not ours")
    save(model, record, {}, tmp_path, max_shard_size=first)
    save(model, record, {}, tmp_path, max_shard_size=second)
    files = [*read_manifest(tmp_path).files]
    index = [INDEX_FILE] if len(files) > 1 else []
    assert names(tmp_path) == sorted([*files, *index, RECORD_FILE, "model-00001-of-00009.safetensors"])
    assert torch.equal(load(tmp_path, Net)(TOKENS), model.eval()(TOKENS))


@pytest.mark.parametrize("file", file_names(3))
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "does not exist, though"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged or belongs to another"),
        (lambda path: path.write_bytes((path.parent / RECORD_FILE).read_bytes()), "is damaged or belongs to another"),
    ],
)
def test_damage_of_one_of_several(
    file: str, damage: Callable[[Path], Any], match: str, several: tuple[Path, nn.Module]
) -> None:
    damage(several[0] / file)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(several[0], Net)
    assert file in str(caught.value)


def test_a_failed_save_leaves_what_was_there(several: tuple[Path, nn.Module]) -> None:
    folder, model = several
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken: Any = Net()
    broken.conv.to("meta")
    with pytest.raises(CheckpointError, match=r"'conv.weight' is on the meta device"):
        save(broken, NOTHING, {}, folder, max_shard_size=150)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(load(folder, Net)(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("2 MiB", 2 << 20), ("0.5kb", 500), ("7", 7), (9, 9)],
)
def test_sizes(size: Any, expected: int) -> None:
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, None, "", "GB", "5 parsecs", 1.5, "0B"])
def test_what_is_no_size(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_shard_size is"):
        save(nn.Linear(1, 1), NOTHING, {}, tmp_path, max_shard_size=size)
    assert not names(tmp_path)


class Holds(nn.Module):
    """A tensor of a kind, as a parameter and as a buffer."""

    def __init__(self, tensor: Tensor, fill: bool) -> None:
        super().__init__()
        made = tensor.clone() if fill else torch.zeros_like(tensor)
        trains = tensor.is_floating_point() or tensor.is_complex()
        self.own = nn.Parameter(made, requires_grad=trains)
        self.register_buffer("kept", made.detach().clone(), persistent=False)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


KINDS: dict[str, Tensor] = {
    "bfloat16": _random(3, 4).bfloat16(),
    "float16": _random(3).half(),
    "float64": _random(2, 2).double(),
    "float8_e4m3fn": _random(3, 4).to(torch.float8_e4m3fn),
    "float8_e5m2": _random(5).to(torch.float8_e5m2),
    "float8_e4m3fnuz": _random(5).to(torch.float8_e4m3fnuz),
    "float8_e5m2fnuz": _random(5).to(torch.float8_e5m2fnuz),
    "complex64": torch.complex(_random(3, 2), _random(3, 2)),
    "a conjugate": torch.complex(_random(3, 2), _random(3, 2)).conj(),
    "bool": _random(7) > 0,
    "uint16": torch.arange(65530, 65536).to(torch.uint16),
    "int64": torch.tensor([2**62, -1]),
    "int8": torch.arange(-3, 3, dtype=torch.int8),
    "of no dims": torch.tensor(1.5),
    "of no dims, bfloat16": torch.tensor(1.5).bfloat16(),
    "empty": torch.zeros(0, 4),
    "empty and large": torch.zeros(0, 4096, 7),
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    "transposed": _random(3, 4).t(),
    "expanded": _random(3, 1).expand(3, 4),
    "channels last": _random(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last 3d": _random(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
}


def bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return bytes((torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain).view(torch.uint8).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(kind: str, tmp_path: Path) -> None:
    model = Holds(KINDS[kind], fill=True)
    save(model, NOTHING, {}, tmp_path)
    loaded = load(tmp_path, lambda: Holds(KINDS[kind], fill=False))
    for name in ("own", "kept"):
        ours, theirs = getattr(model, name), getattr(loaded, name)
        assert bits(ours) == bits(theirs)
        assert (ours.dtype, ours.shape, ours.requires_grad) == (theirs.dtype, theirs.shape, theirs.requires_grad)
        if "channels" in kind:
            assert ours.stride() == theirs.stride()
    # and for those who read the file with its own library
    assert bits(load_file(tmp_path / TENSOR_FILE)["own"]) == bits(model.own)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()], ids=["complex128", "sparse"]
)
def test_tensors_that_the_files_have_no_room_for(tensor: Tensor, tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("odd", tensor)
    with pytest.raises(CheckpointError, match=r"'odd' is a .* has no room"):
        save(model, NOTHING, {}, tmp_path)


class Copies(TorchDispatchMode):
    """Bytes of copies of tensors that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func.overloadpacket.__name__ in ("clone", "_to_copy", "copy", "contiguous"):
            self.alive += out.nbytes
            self.peak = max(self.peak, self.alive)
            weakref.finalize(out.untyped_storage(), self.leave, out.nbytes)
        return out

    def leave(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("transposed", [False, True])
def test_saving_copies_one_tensor_at_a_time(transposed: bool, tmp_path: Path) -> None:
    """And only one whose strides are not those of the file."""
    model = nn.ModuleList(nn.Linear(64, 32, bias=False) for _ in range(20))
    for layer in model if transposed else ():
        layer.weight = nn.Parameter(torch.randn(64, 32).t())
    with Copies() as copies:
        save(model, NOTHING, {}, tmp_path)
    assert copies.peak == (64 * 32 * 4 if transposed else 0)


def test_where_the_tensors_go(several: tuple[Path, nn.Module]) -> None:
    loaded = load(several[0], Net, device="meta")
    shapes = {name: t.shape for name, t in several[1].state_dict().items()}
    assert {name: t.shape for name, t in loaded.state_dict().items()} == shapes
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"meta"}
    assert {t.device.type for t in load(several[0], Net, device=torch.device("cpu")).parameters()} == {"cpu"}
    with pytest.raises(ConfigurationError, match="device is 'nowhere'"):
        load(several[0], Net, device="nowhere")


class Counts(nn.Linear):
    """Extra state of everything that is taken."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: Any = None

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        if state == "refused":
            raise RuntimeError("not this")
        self.seen = state


def counting(state: Any) -> nn.Module:
    model = nn.Sequential(nn.ReLU(), Counts(), Counts())
    model[1].seen = state
    return model


def test_extra_state(tmp_path: Path) -> None:
    state = {"steps": 3, "rate": 0.1, "names": ["a", None, True], "scales": [torch.tensor([1.0, 2.0]), {"deep": "x"}]}
    save(counting(state), NOTHING, {}, tmp_path, max_shard_size=16)
    loaded: Any = load(tmp_path, lambda: counting(None))
    found = loaded[1].seen
    assert torch.equal(found["scales"].pop(0), torch.tensor([1.0, 2.0]))
    assert found == {"steps": 3, "rate": 0.1, "names": ["a", None, True], "scales": [{"deep": "x"}]}
    assert loaded[2].seen is None
    with pytest.raises(CheckpointError, match=r"extra state of \['1', '2'\], and the modules that keep some are \[\]"):
        load(tmp_path, lambda: nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)))
    save(counting("refused"), NOTHING, {}, tmp_path)
    with pytest.raises(CheckpointError, match=r"'1' .Counts. does not take the extra state"):
        load(tmp_path, lambda: counting(None))


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (object(), "object"),
        (b"pickle", "bytes"),
        ({"a": (1, 2)}, "tuple"),
        ({1: 2}, "dict"),
        ([torch.zeros(3, dtype=torch.uint8)], "tensor of bytes"),
        ({"tensor": "a"}, "dict"),
    ],
)
def test_extra_state_that_is_refused(state: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"'1' .Counts. keeps extra state that is not saved here: .*{found}"):
        save(counting(state), NOTHING, {}, tmp_path)
    assert not names(tmp_path)


def test_the_facade_saves_in_several_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    oto = OTO(model, torch.randn(2, 4))
    oto.random_set_zero_groups(0.5, seed=0)
    subnet = oto.construct_subnet()
    subnet.save(tmp_path, max_shard_size="200B")
    files = [tmp_path / file for file in read_manifest(tmp_path).files]
    assert len(files) > 1
    assert subnet.report.bytes_on_disk == sum(path.stat().st_size for path in files)
