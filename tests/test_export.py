"""Programs made of subnets: they compute what the subnet computes, at other sizes too, or no file is left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once import OTO, Subnet
from only_train_once.errors import ConfigurationError, ExportError
from only_train_once.export import export_model, open_exported
from only_train_once.norms import (
    FullWidthGatedRMSNorm,
    FullWidthGroupNorm,
    FullWidthLayerNorm,
    FullWidthResponseNorm,
    FullWidthRMSNorm,
    FullWidthScaledRMSNorm,
)

from .pruning import choose, randomize, zero
from .zoo import ZOO

SUFFIX = {"torch_export": ".pt2", "onnx": ".onnx", "aot": ".pt2"}


def cut(name: str, wide: bool = False) -> Subnet:
    """A network of the zoo without 40 % of its units."""
    model = ZOO[name].build().eval()
    randomize(model)
    oto = OTO(model, ZOO[name].inputs(), wide=wide)
    zero(model, oto.groups, choose(oto.groups))
    return oto.construct_subnet(verify=False)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["torch_export", "onnx", pytest.param("aot", marks=pytest.mark.slow)])
def test_a_program_is_the_subnet(kind: str, tmp_path: Path) -> None:
    subnet = cut("convnet")
    before = {n: t.clone() for n, t in subnet.model.state_dict().items()}
    exported = subnet.export(kind, tmp_path / f"net{SUFFIX[kind]}")
    assert files(tmp_path) == [f"net{SUFFIX[kind]}"]
    assert exported.dynamic == {"x": (0, 2, 3)}
    assert exported.sizes == (((2, 3, 8, 8),), ((3, 3, 9, 9),))
    assert exported.difference <= exported.tolerance == 1e-4
    assert "dims that may change: x [0, 2, 3]" in str(exported)
    x = torch.randn(5, 3, 9, 8)
    (found,) = open_exported(kind, exported.path)(x)
    with torch.no_grad():
        torch.testing.assert_close(found, subnet.model.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in subnet.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("name", ["convnet", "grouped_query", "layer_norm"])
def test_compiled(name: str) -> None:
    subnet = cut(name, wide=True)
    model, compiled = subnet.model.eval(), torch.compile(subnet.model.eval(), dynamic=True)
    with torch.no_grad():
        for x in (subnet.inputs, torch.cat([subnet.inputs, subnet.inputs[:1]])):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: FullWidthLayerNorm(6, full_width=9), (2, 5, 6)),
    "layer, channels first": (lambda: FullWidthLayerNorm(6, full_width=9, dim=1, offset=1), (2, 6, 5, 4)),
    "layer, two dims": (lambda: FullWidthLayerNorm([6, 5], full_width=9, dim=-2), (2, 6, 5)),
    "RMS": (lambda: FullWidthRMSNorm(6, full_width=9), (2, 5, 6)),
    "RMS, scaled first": (lambda: FullWidthScaledRMSNorm(6, full_width=9, offset=1), (2, 5, 6)),
    "gated RMS": (lambda: FullWidthGatedRMSNorm(6, full_width=9, gate_first=True), (2, 5, 6)),
    "group": (lambda: FullWidthGroupNorm(2, 6, full_width=5), (2, 6, 5, 4)),
    "response": (lambda: _response(), (2, 5, 4, 6)),
}


def _response() -> nn.Module:
    norm = FullWidthResponseNorm()
    norm.full_width, norm.dim, norm.eps = 9, -1, 1e-6
    norm.scale, norm.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    return norm


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_that_remember(name: str, kind: str, tmp_path: Path) -> None:
    build, shape = NORMS[name]
    norm = build()
    randomize(norm)
    exported = export_model(norm, kind, tmp_path / f"norm{SUFFIX[kind]}", inputs=torch.randn(shape))
    (dims,) = exported.dynamic.values()
    assert 0 in dims


class Lies(nn.Module):
    """Computes something else when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 if torch.compiler.is_compiling() else x


class Chooses(nn.Module):
    """Data decides which way is taken."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x * 3


class Folds(nn.Module):
    """Runs on rows of a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 4

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.half).sum(1)


class Fixed(nn.Module):
    """Takes one size of batch."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two, please")
        return x * 2


class Needs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs().cumsum(0).sort(0).values + torch.linalg.eigvals(x @ x.mT).real


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_a_program_that_differs_is_not_kept(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{SUFFIX[kind]}"
    path.write_text("what was here before")
    message = rf"(?s)Lies cannot be exported as {kind}: output from .* differs on inputs of \[2, 3\]: relative .* 1e-04"
    with pytest.raises(ExportError, match=message):
        export_model(Lies(), kind, path, inputs=torch.ones(2, 3))
    assert files(tmp_path) == [path.name]
    assert path.read_text() == "what was here before"


def test_why_a_module_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Chooses cannot.*data-dependent.*torch\.where or torch\.cond"):
        export_model(Chooses(), "torch_export", tmp_path / "net.pt2", inputs=torch.ones(2, 3))
    with pytest.raises(ExportError, match=r"Needs cannot.*Try 'torch_export'"):
        export_model(Needs(), "onnx", tmp_path / "net.onnx", inputs=torch.randn(3, 3))
    assert files(tmp_path) == []


def test_sizes_that_cannot_change_are_named(tmp_path: Path) -> None:
    exported = export_model(Fixed(), "torch_export", tmp_path / "a.pt2", inputs=torch.randn(2, 3))
    assert exported.dynamic == {"x": (1,)}
    assert exported.notes == ("x dim 0: fixed at 2 by the module's code or weights",)
    exported = export_model(Folds(), "torch_export", tmp_path / "b.pt2", inputs=torch.randn(3, 8))
    assert exported.dynamic == {"x": (0, 1)}
    assert exported.sizes[1] == ((6, 16),)  # the module does not run on rows of 9 or 7
    (found,) = open_exported("torch_export", exported.path)(torch.ones(5, 12))
    assert torch.equal(found, torch.full((5, 4), 3.0))


@pytest.mark.parametrize(("dynamic", "dims"), [(True, (0, 1)), ("batch", (0,)), (False, ())])
def test_which_sizes_may_change(dynamic: Any, dims: tuple[int, ...], tmp_path: Path) -> None:
    exported = export_model(nn.ReLU(), "torch_export", tmp_path / "a.pt2", inputs=torch.randn(2, 3), dynamic=dynamic)
    assert exported.dynamic == {"input": dims}
    run = open_exported("torch_export", exported.path)
    for dim, shape in enumerate([(4, 3), (2, 5)]):
        if dim in dims:
            assert run(torch.ones(shape))[0].shape == shape
        else:
            with pytest.raises(AssertionError, match="Guard failed"):
                run(torch.ones(shape))


def test_a_batch_of_one_stands_for_any(tmp_path: Path) -> None:
    exported = export_model(nn.Linear(3, 4), "torch_export", tmp_path / "a.pt2", inputs=torch.randn(1, 3))
    assert exported.dynamic == {"input": (0,)}
    run = open_exported("torch_export", exported.path)
    assert [len(run(torch.ones(n, 3))[0]) for n in (1, 2, 7)] == [1, 2, 7]


def test_inputs_by_name_and_several_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *, mask: Tensor, scale: float) -> dict[str, Any]:
            return {"logits": (x * mask * scale, x.argmax(-1)), "any": mask.any(-1)}

    inputs = {"x": torch.randn(2, 3), "scale": 2.0, "mask": torch.ones(2, 3, dtype=torch.bool)}
    for kind in ("torch_export", "onnx"):
        exported = export_model(Two(), kind, tmp_path / f"a{SUFFIX[kind]}", inputs=inputs)
        assert set(exported.dynamic.values()) == {(0, 1)}
        x, mask = torch.randn(4, 5), torch.rand(4, 5) > 0.5
        found = open_exported(kind, exported.path)({"x": x, "scale": 2.0, "mask": mask})
        torch.testing.assert_close(found, [x * mask * 2, x.argmax(-1), mask.any(-1)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
def test_tolerance_by_dtype(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    subnet = cut("mlp")
    subnet.model.to(dtype)
    assert subnet.export("torch_export", tmp_path / "a.pt2").tolerance == tolerance


def test_modes_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[1].eval()
    export_model(model, "torch_export", tmp_path / "a.pt2", inputs=torch.randn(3, 3))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(p.requires_grad for p in model.parameters())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "tflite"}, "'tflite' is no format: 'torch_export', 'onnx', 'aot'"),
    "suffix": ({"path": "net.bin"}, r"path is '.*net\.bin': a file of the format 'torch_export' ends in \.pt2"),
    "dynamic": ({"dynamic": "rows"}, "dynamic is 'rows': True, False or 'batch'"),
    "model": ({"model": torch.relu}, "a torch.nn.Module is needed"),
    "inputs": ({"inputs": None}, "example inputs are None"),
    "path": ({"path": None}, "path is None: a file's path is needed"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"model": nn.ReLU(), "kind": "torch_export", "path": "net.pt2", "inputs": torch.ones(2, 2), **arguments}
    given["path"] = given["path"] and str(tmp_path / given["path"])
    with pytest.raises(ConfigurationError, match=message):
        export_model(given.pop("model"), given.pop("kind"), given.pop("path"), **given)
    assert files(tmp_path) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"{package} is missing .*pip install only_train_once\[onnx\]"):
        export_model(nn.ReLU(), "onnx", tmp_path / "net.onnx", inputs=torch.ones(2, 2))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    import torch._inductor.config as config

    # not monkeypatch: undone by deletion, an entry of torch's settings stays hidden for the rest of the process
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ExportError, match=r"needs a C\+\+ compiler.*variable CXX"),
    ):
        export_model(nn.ReLU(), "aot", tmp_path / "net.pt2", inputs=torch.ones(2, 2))
    assert files(tmp_path) == []


def test_a_subnet_knows_its_inputs(tmp_path: Path) -> None:
    subnet = cut("mlp")
    bare = Subnet(subnet.model, subnet.report, subnet.record)
    with pytest.raises(ConfigurationError, match="no example inputs: give inputs="):
        bare.export("torch_export", tmp_path / "a.pt2")
    assert bare.export("torch_export", tmp_path / "a.pt2", inputs=torch.randn(2, 6)).dynamic == {"x": (0,)}
