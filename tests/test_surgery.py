"""Surgery on small networks with groups written by hand: the subnet computes what the full network computes."""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from only_train_once.errors import CheckpointError, ConfigurationError, SurgeryError
from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role
from only_train_once.inputs import in_float64
from only_train_once.norms import FullWidthGroupNorm, FullWidthLayerNorm, FullWidthRMSNorm, FullWidthScaledRMSNorm
from only_train_once.record import NORM_KINDS, SurgeryRecord, from_runs, to_runs
from only_train_once.surgery import _NORM_CHANGES, apply_record, construct_subnet, plan, zero_units

Z, FOL, C, ATT, NORM = Role.ZERO, Role.FOLLOW, Role.CONSUMER, Role.ATTRIBUTE, Role.NORM


def group(name: str, *slices: tuple[str, int, Role, Any, int], kind: Kind = Kind.CHANNEL) -> PruningGroup:
    """A group from (tensor, dim, role, index per unit, length); an int index means one position per unit."""
    made = []
    for param, dim, role, index, length in slices:
        array = np.arange(index) if isinstance(index, int) else np.asarray(index)
        made.append(ParamSlice(param, dim, array.reshape(len(array), -1).astype(np.int64), role, length))
    return PruningGroup(name, kind, tuple(made))


def simple(name: str, n: int, *where: tuple[str, int, Role]) -> PruningGroup:
    """Units that are one position in every slice."""
    return group(name, *((param, dim, role, n, n) for param, dim, role in where))


def zero(model: nn.Module, groups: Sequence[PruningGroup], removed: dict[str, list[int]]) -> None:
    """Set the zero slices of the removed units to 0."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for g in groups:
            for s in g.with_role(Z):
                positions = torch.from_numpy(s.index[removed.get(g.name, [])].ravel())
                tensors[s.param].index_fill_(s.dim, positions, 0)


class LlamaNorm(nn.Module):
    """As language models write it: float32 by name, eps under a name of its own."""

    def __init__(self, n: int, offset: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n) - offset)
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaNorm(LlamaNorm):
    def __init__(self, n: int) -> None:
        super().__init__(n, offset=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype) * (
            1 + self.weight
        )


class ScaleFirst(LlamaNorm):
    def __init__(self, n: int) -> None:
        super().__init__(n, offset=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.weight)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class ChannelFirst(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class OtherNorm(nn.Module):
    """Divides by the largest value: nothing that can remember a width."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (1 + x.abs().sum(-1, keepdim=True).sqrt() * x.shape[-1])


class Residual(nn.Module):
    """A stream of width n through a norm; the stream itself loses channels."""

    def __init__(self, norm: nn.Module, n: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(5, n)
        self.norm = norm
        self.up = nn.Linear(n, 6)
        self.down = nn.Linear(6, n)
        self.head = nn.Linear(n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(self.norm(x))


def residual_group(model: Residual, n: int = 8) -> PruningGroup:
    own = [(f"norm.{name}", 0, Z) for name, _ in model.norm.named_parameters()]
    # A layer norm without a weight gives a removed channel -mean / std, so what reads it has to be zero as well.
    reads = C if own or isinstance(model.norm, nn.RMSNorm) else Z
    stream = (("embed.weight", 0, Z), ("embed.bias", 0, Z), ("down.weight", 0, Z), ("down.bias", 0, Z))
    return simple("stream", n, *stream, ("up.weight", 1, reads), ("head.weight", 1, reads), *own, ("norm", -1, NORM))


class Images(nn.Module):
    """conv - bn - conv - flatten - linear, with a residual stream over depthwise convolution and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.point = nn.Conv2d(8, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.fc = nn.Linear(6 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.act(self.depth(x))
        return self.fc(F.relu(self.transposed(self.point(x))).flatten(1))


def image_groups() -> list[PruningGroup]:
    bn = [("bn.weight", 0, Z), ("bn.bias", 0, Z), ("bn.running_mean", 0, FOL), ("bn.running_var", 0, FOL)]
    depth = [("depth.weight", 0, FOL), ("depth.bias", 0, Z), ("depth.groups", 0, ATT), ("act.weight", 0, FOL)]
    stem = [("stem.weight", 0, Z), ("stem.bias", 0, Z)]
    return [
        simple("stem", 8, *stem, *bn, *depth, ("point.weight", 1, C)),
        simple("point", 4, ("point.weight", 0, Z), ("point.bias", 0, Z), ("transposed.weight", 0, C)),
        group(
            "transposed",
            ("transposed.weight", 1, Z, 6, 6),
            ("transposed.bias", 0, Z, 6, 6),
            ("fc.weight", 1, C, np.arange(6 * 64).reshape(6, 64), 6 * 64),
        ),
    ]


class Attention(nn.Module):
    """Fused projection, head count in an int and in a tuple, scale in a float."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.sizes = (12, 12, 12)
        self.scale = 3**-0.5
        self.qkv = nn.Linear(8, 36)
        self.proj = nn.Linear(12, 8)
        self.register_buffer("mask", torch.arange(4.0).reshape(1, 4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (p.reshape(b, t, self.num_heads, -1).transpose(1, 2) for p in parts)
        weights = (q @ k.transpose(-1, -2) * self.scale + self.mask).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, -1))


def attention_groups() -> list[PruningGroup]:
    rows = np.arange(12).reshape(4, 3)
    both = np.concatenate([rows, rows + 12], axis=1)
    slices: list[tuple[str, int, Role, Any, int]] = []
    for name in ("qkv.weight", "qkv.bias"):
        slices += [(name, 0, Z, rows + 24, 36), (name, 0, FOL, both, 36)]
    slices += [("proj.weight", 1, C, rows, 12), ("num_heads", 0, ATT, 4, 4), ("mask", 1, FOL, 4, 4)]
    slices += [(f"sizes[{i}]", 0, ATT, rows, 12) for i in range(3)]
    return [group("heads", *slices, kind=Kind.HEAD)]


class Tied(nn.Module):
    """Embedding and head are one tensor, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + torch.tanh(self.up(x)))


def tied_groups() -> list[PruningGroup]:
    return [simple("width", 8, ("embed.weight", 1, Z), ("up.weight", 0, Z), ("up.bias", 0, Z), ("up.weight", 1, C))]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def mlp_groups() -> list[PruningGroup]:
    return [
        simple("a", 8, ("0.weight", 0, Z), ("0.bias", 0, Z), ("2.weight", 1, C)),
        simple("b", 7, ("2.weight", 0, Z), ("2.bias", 0, Z), ("4.weight", 1, C)),
    ]


def weight_normed() -> nn.Module:
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model


def weight_normed_groups() -> list[PruningGroup]:
    inside = "0.parametrizations.weight.original"
    return [
        simple("a", 8, (f"{inside}0", 0, Z), (f"{inside}1", 0, FOL), ("0.bias", 0, Z), ("2.weight", 1, C)),
        mlp_groups()[1],
    ]


class Grouped(nn.Module):
    """Group norm of 2 norm groups of 4 channels."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8, affine=affine)
        self.out = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)))


def grouped_groups(index: Any, affine: bool = True) -> list[PruningGroup]:
    own: list[tuple[str, int, Role]] = [("norm.weight", 0, Z), ("norm.bias", 0, Z)] if affine else []
    where = [("conv.weight", 0, Z), ("conv.bias", 0, Z), *own, ("norm", 1, NORM), ("out.weight", 1, C if affine else Z)]
    return [group("conv", *((p, d, r, index, 8) for p, d, r in where))]


class ImageNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = ChannelFirst(8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)))


def stream(norm: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], Callable[[], list[PruningGroup]]]:
    return lambda: Residual(norm()), lambda: [residual_group(Residual(norm()))]


@dataclass(frozen=True)
class Case:
    """One structure: how to build it, its groups, what to remove, and an input."""

    build: Callable[[], nn.Module]
    groups: Callable[[], list[PruningGroup]]
    removed: dict[str, list[int]]
    inputs: Callable[[], Tensor]


def _row(n: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, n, dtype=torch.float64)


_STREAM = {"stream": [0, 3, 4]}
_IMAGE = {"stem": [1, 2, 7], "point": [0], "transposed": [2, 5]}
_PAIRS = [[0, 4], [1, 5], [2, 6], [3, 7]]
CASES = {
    "mlp": Case(mlp, mlp_groups, {"a": [0, 3], "b": [6]}, _row()),
    "images": Case(Images, image_groups, _IMAGE, lambda: torch.randn(2, 3, 4, 4, dtype=torch.float64)),
    "attention": Case(
        Attention, attention_groups, {"heads": [0, 2]}, lambda: torch.randn(2, 5, 8, dtype=torch.float64)
    ),
    "tied": Case(Tied, tied_groups, {"width": [1, 2]}, lambda: torch.randint(0, 11, (2, 6))),
    "weight norm": Case(weight_normed, weight_normed_groups, {"a": [0, 7], "b": [1]}, _row()),
    "layer norm": Case(*stream(lambda: nn.LayerNorm(8)), _STREAM, _row()),
    "layer norm, no weight": Case(*stream(lambda: nn.LayerNorm(8, elementwise_affine=False)), _STREAM, _row()),
    "layer norm, no bias": Case(*stream(lambda: nn.LayerNorm(8, bias=False)), _STREAM, _row()),
    "rms norm": Case(*stream(lambda: nn.RMSNorm(8, eps=1e-2)), _STREAM, _row()),
    "rms norm, no eps": Case(*stream(lambda: nn.RMSNorm(8)), _STREAM, _row()),
    "rms norm, no weight": Case(*stream(lambda: nn.RMSNorm(8, elementwise_affine=False)), _STREAM, _row()),
    "llama norm": Case(*stream(lambda: LlamaNorm(8)), _STREAM, _row()),
    "rms norm, scaled first": Case(*stream(lambda: ScaleFirst(8)), _STREAM, _row()),
    "gemma norm": Case(*stream(lambda: GemmaNorm(8)), _STREAM, _row()),
    "channel-first layer norm": Case(
        ImageNorm,
        lambda: [
            simple(
                "conv",
                8,
                *[("conv.weight", 0, Z), ("conv.bias", 0, Z), ("norm.weight", 0, Z), ("norm.bias", 0, Z)],
                *[("norm", 1, NORM), ("out.weight", 1, C)],
            )
        ],
        {"conv": [0, 5, 6]},
        lambda: torch.randn(2, 3, 5, 5, dtype=torch.float64),
    ),
    "group norm": Case(
        Grouped, lambda: grouped_groups(_PAIRS), {"conv": [1]}, lambda: torch.randn(2, 3, 7, dtype=torch.float64)
    ),
    "group norm, no weight": Case(
        lambda: Grouped(affine=False),
        lambda: grouped_groups(_PAIRS, affine=False),
        {"conv": [1, 3]},
        lambda: torch.randn(2, 3, 7, dtype=torch.float64),
    ),
    "whole norm groups": Case(
        Grouped,
        lambda: grouped_groups([[0, 1, 2, 3], [4, 5, 6, 7]]),
        {"conv": [0]},
        lambda: torch.randn(2, 3, 7, dtype=torch.float64),
    ),
}


def randomize(model: nn.Module) -> nn.Module:
    """Float64 weights and statistics away from their initial ones and zeros."""
    model = model.double()
    with torch.no_grad():
        for t in model.parameters():
            t.add_(torch.randn_like(t) * 0.3)
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(torch.rand_like(b))
    return model


def made(name: str, *, full_zero: bool = True) -> tuple[nn.Module, list[PruningGroup], Case]:
    case = CASES[name]
    torch.manual_seed(0)
    model, groups = randomize(case.build()).eval(), case.groups()
    if full_zero:
        zero(model, groups, case.removed)
    return model, groups, case


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / a.abs().max())


def compared(full: nn.Module, subnet: nn.Module, x: Tensor) -> float:
    """Relative difference with nothing computed in less than float64."""
    with torch.no_grad(), in_float64():
        return relative(full(x), subnet(x))


@pytest.mark.parametrize("name", CASES)
def test_the_subnet_computes_what_the_full_network_computes(name: str) -> None:
    model, groups, case = made(name)
    x = case.inputs()
    subnet, record = construct_subnet(model, groups)
    assert {n: from_runs(r).tolist() for n, r in record.removed.items()} == case.removed
    assert sum(p.numel() for p in subnet.parameters()) < sum(p.numel() for p in model.parameters())
    assert compared(model, subnet, x) <= 1e-12
    assert compared(model.train(), subnet.train(), x) <= 1e-12


@pytest.mark.parametrize("name", [n for n in CASES if "norm" in n and n not in ("weight norm", "whole norm groups")])
def test_without_the_full_width_the_norms_are_wrong(name: str) -> None:
    """The exactness above is the norms' doing: the same cut with a norm that forgot the full width is far off."""
    model, groups, case = made(name)
    x = case.inputs()
    subnet, record = construct_subnet(model, groups)
    norm: Any = subnet.norm
    if hasattr(norm, "full_width"):
        norm.full_width = norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else 5
    else:
        assert next(iter(record.norms.values())).kind == "rescale"
        norm.weight.data.mul_((5 / 8) ** 0.5)
    with torch.no_grad():
        assert relative(model(x), subnet(x)) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_given_model_is_untouched(name: str) -> None:
    model, groups, _ = made(name)
    model.train()
    next(iter(model.children())).eval()
    handle = model.register_forward_hook(lambda *_: None)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {n: (t, t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    state = {k: v for k, v in vars(model).items() if isinstance(v, (int, float, tuple))}
    rng = torch.get_rng_state()
    subnet, _ = construct_subnet(model, groups)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == before.keys()
    for n, (same, value) in before.items():
        assert after[n] is same
        assert torch.equal(same, value)
    assert [m.training for m in model.modules()] == modes == [m.training for m in subnet.modules()]
    assert [type(m) for m in model.modules()] == classes
    assert state == {k: v for k, v in vars(model).items() if isinstance(v, (int, float, tuple))}
    assert list(model._forward_hooks) == [handle.id] == list(subnet._forward_hooks)
    assert next(model.parameters()).grad is not None
    assert all(p.grad is None for p in subnet.parameters())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("name", CASES)
def test_the_subnet_is_an_ordinary_module(name: str) -> None:
    """Same class; trains a step, copies, pickles and exports."""
    model, groups, case = made(name)
    subnet, _ = construct_subnet(model, groups)
    assert type(subnet) is type(model)
    x = case.inputs()
    with torch.no_grad():
        expected = subnet(x)
        assert torch.equal(copy.deepcopy(subnet)(x), expected)
        exported = torch.export.export(subnet, (x,)).module()
        assert relative(expected, exported(x)) <= 1e-12
        if name != "weight norm":  # torch refuses to pickle parametrized modules
            file = io.BytesIO()
            torch.save(subnet, file)
            file.seek(0)
            assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    subnet.train()
    optimizer = torch.optim.SGD(subnet.parameters(), lr=0.1)
    subnet(x).square().mean().backward()
    assert all(p.grad is not None for p in subnet.parameters())
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(subnet.eval()(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_record_through_json_does_the_same_surgery(name: str) -> None:
    """On a fresh full model, and on the meta device in shapes."""
    model, groups, case = made(name)
    subnet, record = construct_subnet(model, groups)
    again = SurgeryRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    x = case.inputs()
    with torch.no_grad():
        assert torch.equal(apply_record(again, copy.deepcopy(model))(x), subnet(x))
    with torch.device("meta"):
        shapes = apply_record(again, case.build())
    assert {n: t.shape for n, t in shapes.named_parameters()} == {n: t.shape for n, t in subnet.named_parameters()}
    assert {n: t.shape for n, t in shapes.named_buffers()} == {n: t.shape for n, t in subnet.named_buffers()}
    assert str(record)


def test_float32_norms_are_exact_in_float64_too() -> None:
    """A rescaled float32 weight would be off by its rounding; such a norm remembers its width instead."""
    for norm in (LlamaNorm, GemmaNorm):
        torch.manual_seed(0)
        model = Residual(norm(8)).float()
        nn.init.normal_(model.norm.weight)
        groups = [residual_group(model)]
        zero(model, groups, _STREAM)
        subnet, record = construct_subnet(model, groups)
        assert record.norms["norm"].kind == "rms"
        assert record.norms["norm"].offset == (norm is GemmaNorm)
        folded, folded_record = construct_subnet(model, groups, fold_norms=True)
        assert folded_record.norms["norm"].kind == "rescale"
        assert type(folded.norm) is norm
        x = torch.randn(4, 5)
        with torch.no_grad():
            assert relative(model(x), folded(x)) < 1e-5
        with torch.no_grad(), in_float64():
            a, b, c = (m.double()(x.double()) for m in (model, subnet, folded))
        assert relative(a, b) < 1e-13
        assert 1e-10 < relative(a, c) < 1e-6


def test_which_norm_a_subnet_gets() -> None:
    kinds = {name: made(name) for name in CASES}
    found = {}
    for name, (model, groups, _) in kinds.items():
        subnet, _ = construct_subnet(model, groups)
        found[name] = type(subnet.norm) if hasattr(subnet, "norm") else None
    assert found["layer norm"] is FullWidthLayerNorm
    assert found["channel-first layer norm"] is FullWidthLayerNorm
    assert found["rms norm"] is nn.RMSNorm
    assert found["rms norm, no eps"] is found["rms norm, no weight"] is FullWidthRMSNorm
    assert found["llama norm"] is LlamaNorm
    assert found["gemma norm"] is GemmaNorm
    assert found["rms norm, scaled first"] is FullWidthScaledRMSNorm
    assert found["group norm"] is FullWidthGroupNorm
    assert found["whole norm groups"] is nn.GroupNorm


@pytest.mark.parametrize(
    "name",
    [
        "layer norm",
        "rms norm, no weight",
        "rms norm, scaled first",
        "llama norm",
        "group norm",
    ],
)
def test_a_subnet_can_be_cut_again(name: str) -> None:
    """The full width stays the first one."""
    model, groups, case = made(name)
    first, _ = construct_subnet(model, groups)
    stage: Any = first
    if name == "group norm":
        left = [group("conv", *((s.param, s.dim, s.role, [[0, 3], [1, 4], [2, 5]], 6) for s in groups[0].slices))]
        again = {"conv": [0]}
    else:
        left = [group("stream", *((s.param, s.dim, s.role, 5, 5) for s in groups[0].slices))]
        again = {"stream": [1, 2]}
    zero(stage, left, again)
    second, _ = construct_subnet(stage, left)
    x = case.inputs()
    assert compared(stage, second, x) <= 1e-12
    if name != "llama norm":
        assert second.norm.full_width == (4 if name == "group norm" else 8)  # type: ignore[union-attr]


def test_a_cut_norm_takes_nothing_beside_its_input() -> None:
    """The class it replaces may take more (a mask): left away, all is well; given, a wrong answer would come out."""
    norm, x = FullWidthLayerNorm(5, 8), torch.randn(4, 5)
    assert torch.equal(norm(x, None), norm(x))
    assert torch.equal(norm(x, mask=None), norm(x))
    with pytest.raises(TypeError, match="takes its input only"):
        norm(x, mask=x)


def test_norms_in_half_precision_follow_torch() -> None:
    """With nothing removed they are torch's own norms, in every dtype."""
    torch.manual_seed(0)
    pairs: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
        (FullWidthLayerNorm(16, 16), nn.LayerNorm(16), (4, 16)),
        (FullWidthLayerNorm((3, 16), 16), nn.LayerNorm((3, 16)), (4, 3, 16)),
        (FullWidthRMSNorm(16, 16), nn.RMSNorm(16), (4, 16)),
        (FullWidthRMSNorm(16, 16, eps=1e-3), nn.RMSNorm(16, eps=1e-3), (4, 16)),
        (FullWidthGroupNorm(4, 16, 4), nn.GroupNorm(4, 16), (2, 16, 3)),
    ]
    for ours, theirs, shape in pairs:
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            for scale in (1.0, 1e-4):
                x = (torch.randn(shape) * scale).to(dtype)
                a, b = ours.to(dtype)(x), theirs.to(dtype)(x)
                assert a.dtype == b.dtype
                assert relative(b.double(), a.double()) <= tolerance, (ours, dtype, scale)


def test_a_layer_norm_lays_its_result_out_as_torch_does() -> None:
    x = torch.randn(2, 16, 5).transpose(1, 2)
    assert nn.LayerNorm(16)(x).stride() == FullWidthLayerNorm(16, 20)(x).stride()
    assert nn.LayerNorm((5, 16))(x).stride() == FullWidthLayerNorm((5, 16), 20)(x).stride()


def test_attributes_are_read_back_from_the_tensors() -> None:
    model, groups, _ = made("images")
    subnet: Any = construct_subnet(model, groups)[0]
    assert (subnet.stem.in_channels, subnet.stem.out_channels) == (3, 5)
    assert (subnet.depth.in_channels, subnet.depth.out_channels, subnet.depth.groups) == (5, 5, 5)
    assert subnet.bn.num_features == subnet.act.num_parameters == 5
    assert (subnet.transposed.in_channels, subnet.transposed.out_channels) == (3, 4)
    assert (subnet.fc.in_features, subnet.fc.out_features) == (256, 3)
    attention: Any = construct_subnet(*made("attention")[:2])[0]
    assert attention.num_heads == 2
    assert attention.sizes == (6, 6, 6)
    assert isinstance(attention.sizes, tuple)
    assert attention.scale == 3**-0.5
    assert attention.mask.flatten().tolist() == [1.0, 3.0]
    assert "mask" not in attention.state_dict()
    tied: Any = construct_subnet(*made("tied")[:2])[0]
    assert (tied.embed.num_embeddings, tied.embed.embedding_dim) == (11, 6)
    norm: Any = construct_subnet(*made("layer norm, no weight")[:2])[0]
    assert norm.norm.normalized_shape == (5,)


def test_tied_tensors_stay_one_object() -> None:
    model, groups, _ = made("tied")
    subnet: Any = construct_subnet(model, groups)[0]
    assert subnet.head.weight is subnet.embed.weight
    assert len(list(subnet.parameters())) == len(list(model.parameters()))


def test_what_tensors_keep() -> None:
    """Gradient flag, dtype, memory format, the user's marks, and other references to a cut tensor."""
    model: Any = Images().to(memory_format=torch.channels_last)
    model.stem.weight.requires_grad_(False)
    model.stem.weight.no_decay = True
    model.point.half()
    model.same = [1]
    model.bn.statistics = model.bn.running_mean
    subnet: Any = construct_subnet(model, image_groups(), _IMAGE)[0]
    assert not subnet.stem.weight.requires_grad
    assert subnet.point.weight.requires_grad
    assert subnet.stem.weight.no_decay
    assert subnet.point.weight.dtype == torch.float16
    assert subnet.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert subnet.fc.weight.is_contiguous()
    assert subnet.bn.statistics is subnet.bn.running_mean
    assert isinstance(subnet.stem.weight, nn.Parameter)
    assert not isinstance(subnet.bn.running_mean, nn.Parameter)


def test_hook_style_weight_norm() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)).double()
    model(torch.randn(2, 5, dtype=torch.float64))  # leaves a computed weight with its graph behind
    where = (("0.weight_g", 0, Z), ("0.weight_v", 0, FOL), ("0.bias", 0, Z), ("2.weight", 1, C))
    groups = [simple("a", 8, *where)]
    zero(model, groups, {"a": [2, 3]})
    subnet: Any = construct_subnet(model, groups)[0]
    x = torch.randn(4, 5, dtype=torch.float64)
    assert relative(model(x), subnet(x)) <= 1e-12
    assert subnet[0].out_features == 6


def test_recurrent_weights_and_transformers_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.reshape(self.nx, self.nf)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Conv1D(6, 5)
            self.rnn = nn.GRU(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.a(x))[0]

    model = Net().double()
    groups = [simple("a", 6, ("a.weight", 1, Z), ("rnn.weight_ih_l0", 1, C))]
    zero(model, groups, {"a": [1, 4]})
    subnet: Any = construct_subnet(model, groups)[0]
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert relative(model(x), subnet(x)) <= 1e-12
    assert (subnet.a.nx, subnet.a.nf, subnet.rnn.input_size, subnet.rnn.hidden_size) == (5, 4, 4, 4)


def test_overlapping_groups_on_one_dim() -> None:
    """Heads and head-dims cut the same rows; what stays is what neither removed."""
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 3)).double()
    rows = np.arange(12).reshape(4, 3)
    groups = [
        group(name, ("0.weight", 0, Z, i, 12), ("0.bias", 0, Z, i, 12), ("1.weight", 1, C, i, 12))
        for name, i in (("heads", rows), ("dims", rows.T))
    ]
    removed = {"heads": [0, 2], "dims": [1]}
    zero(model, groups, removed)
    subnet: Any = construct_subnet(model, groups)[0]
    assert subnet[0].out_features == 4
    x = torch.randn(2, 5, dtype=torch.float64)
    assert relative(model(x), subnet(x)) <= 1e-12


def test_zero_units() -> None:
    model = mlp()
    groups = mlp_groups()
    frozen = PruningGroup("c", Kind.CHANNEL, (groups[0].slices[0],), prunable=False, reason="read by an output")
    assert [len(u) for u in zero_units(model, groups).values()] == [0, 0]
    zero(model, groups, {"a": [1, 6]})
    found = zero_units(model, [*groups, frozen])
    assert {n: u.tolist() for n, u in found.items()} == {"a": [1, 6], "b": []}
    model[0].bias.data[1] = 1e-30  # type: ignore[union-attr]
    assert zero_units(model, groups)["a"].tolist() == [6]
    model[0].weight.data[6, 0] = float("nan")  # type: ignore[index, union-attr]
    assert zero_units(model, groups)["a"].tolist() == []


def test_nothing_removed_is_the_same_model() -> None:
    model = mlp()
    subnet, record = construct_subnet(model, mlp_groups())
    assert str(record) == "nothing removed"
    x = torch.randn(3, 5)
    assert torch.equal(model(x), subnet(x))


def test_one_unit_stays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        subnet: Any = construct_subnet(mlp(), mlp_groups(), {"a": range(8)})[0]
    assert subnet[0].out_features == 1
    assert "unit 0 stays" in caplog.text
    part = [group("part", ("0.weight", 0, Z, 3, 8), ("0.bias", 0, Z, 3, 8), ("2.weight", 1, C, 3, 8))]
    subnet = construct_subnet(mlp(), part, {"part": [0, 1, 2]})[0]
    assert subnet[0].out_features == 6  # of the group's three units, though the dim has more


def test_no_dim_becomes_empty(caplog: pytest.LogCaptureFixture) -> None:
    """Two groups that would empty a dim together."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    groups = [
        group(name, ("0.weight", 0, Z, i, 4), ("0.bias", 0, Z, i, 4), ("1.weight", 1, C, i, 4))
        for name, i in (("low", [0, 1, 2]), ("high", [2, 3, 0]))
    ]
    with caplog.at_level(logging.WARNING):
        subnet: Any = construct_subnet(model, groups, {"low": [0, 1], "high": [0, 1]})[0]
    assert subnet[0].out_features == 1
    assert "would be empty" in caplog.text


def _bad(param: str, dim: int, role: Role, index: Any, length: int) -> list[PruningGroup]:
    return [group("g", (param, dim, role, index, length))]


@pytest.mark.parametrize(
    ("groups", "removed", "error", "match"),
    [
        (mlp_groups(), {"x": [0]}, ConfigurationError, "'x', which does not exist"),
        (mlp_groups(), {"a": [8]}, ConfigurationError, "unit 8, the group has the units 0 to 7"),
        (mlp_groups(), {"a": [-1]}, ConfigurationError, "unit -1"),
        (_bad("9.weight", 0, Z, 8, 8), {}, SurgeryError, "'9.weight', which the model does not have"),
        (_bad("0.weight", 0, Z, 7, 7), {}, SurgeryError, r"7 positions in dim 0 of '0.weight'.*\[8, 5\]"),
        (_bad("0.weight", 0, Z, [0, 9], 8), {}, SurgeryError, r"outside of range\(8\)"),
        (_bad("0.heads", 0, ATT, 4, 4), {}, SurgeryError, "'0.heads'.*None, expected an int"),
        (_bad("0.out_features", 0, ATT, 4, 4), {}, SurgeryError, "to be 4, the model has 8"),
        (_bad("7", -1, NORM, 4, 4), {}, SurgeryError, "no norm '7'"),
    ],
)
def test_groups_that_do_not_fit(
    groups: list[PruningGroup], removed: dict[str, list[int]], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        construct_subnet(mlp(), groups, removed)


def test_a_frozen_group_is_refused() -> None:
    a = mlp_groups()[0]
    frozen = PruningGroup("a", a.kind, a.slices, prunable=False, reason="reaches an output")
    with pytest.raises(SurgeryError, match="frozen \\(reaches an output\\)"):
        construct_subnet(mlp(), [frozen], {"a": [0]})


def test_a_norm_that_cannot_be_told_is_refused() -> None:
    model = Residual(OtherNorm(8)).double()
    with pytest.raises(SurgeryError, match=r"norm 'norm' \(OtherNorm\) with 7 of 8"):
        plan(model, [residual_group(model)], {"stream": [0]})


def test_a_norm_with_an_eps_out_of_reach_is_refused() -> None:
    """A wrong eps shows only on small inputs; nothing is rescaled on the word of an attribute's name."""

    class Fixed(LlamaNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-10)

    model = Residual(Fixed(8)).double()
    model.norm.variance_epsilon = 1e-10
    assert plan(model, [residual_group(model)], {"stream": [0]}).norms["norm"].kind == "rms"
    model.norm.variance_epsilon = 2e-10
    with pytest.raises(SurgeryError, match="'norm'"):
        plan(model, [residual_group(model)], {"stream": [0]})


def test_norm_groups_of_unequal_size_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"'norm' would keep \[3, 4\]"):
        plan(Grouped(), grouped_groups(8), {"conv": [0]})


def test_multihead_attention_heads_are_refused() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 4)})
    rows = np.arange(8).reshape(4, 2)
    groups = [
        group(
            "heads",
            ("attn.in_proj_weight", 0, Z, np.concatenate([rows, rows + 8, rows + 16], 1), 24),
            ("attn.out_proj.weight", 1, C, rows, 8),
            ("attn.num_heads", 0, ATT, 4, 4),
        )
    ]
    with pytest.raises(SurgeryError, match="uses one embed_dim"):
        construct_subnet(model, groups, {"heads": [0]})


def test_a_record_refuses_another_model() -> None:
    _, record = construct_subnet(mlp(), mlp_groups(), {"a": [0]})
    other = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(SurgeryError, match=r"'0.weight' of shape \[8, 5\].*\[9, 5\]"):
        apply_record(record, other)
    assert other[0].weight.shape == (9, 5)  # nothing was changed before the check
    with pytest.raises(SurgeryError, match="does not have"):
        apply_record(record, nn.Linear(5, 8))
    _, record = construct_subnet(Tied(), tied_groups(), {"width": [0]})
    untied: Any = Tied()
    untied.head = nn.Linear(9, 11, bias=False)
    with pytest.raises(SurgeryError, match=r"'head.weight' of shape"):
        apply_record(record, untied)
    _, record = construct_subnet(Attention(), attention_groups(), {"heads": [0]})
    changed = Attention()
    changed.num_heads = 2
    with pytest.raises(SurgeryError, match=r"'num_heads' from 4 to 3.*has 2"):
        apply_record(record, changed)


def test_runs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        positions = np.flatnonzero(generator.random(20) < 0.5)
        runs = to_runs(positions)
        assert from_runs(runs).tolist() == positions.tolist()
        assert all(a < b for a, b in runs)
        assert all(left[1] < right[0] for left, right in itertools.pairwise(runs))


def test_a_record_from_json_is_checked() -> None:
    good = construct_subnet(*made("llama norm")[:2])[1].to_dict()
    attention = construct_subnet(*made("attention")[:2])[1].to_dict()
    first = next(iter(good["tensors"]))

    def broken(base: dict[str, Any], path: Sequence[Any], value: Any) -> dict[str, Any]:
        data = copy.deepcopy(base)
        at: Any = data
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return data

    table: list[tuple[dict[str, Any], Sequence[Any], Any, str]] = [
        (good, ["format"], 99, "format 99"),
        (good, ["tensors"], [], "is a list, expected a dict"),
        (good, ["tensors", first, "kept", "0"], [[0, 9]], "out of range, the size is 8"),
        (good, ["tensors", first, "kept", "0"], [[0, 3], [2, 4]], "overlaps"),
        (good, ["tensors", first, "kept", "0"], [[3, 4], [0, 1]], "overlaps the one before it, is unsorted"),
        (good, ["tensors", first, "kept", "0"], [], "is empty"),
        (good, ["tensors", first, "kept", "0"], [[0]], r"expected \[start, stop\]"),
        (good, ["tensors", first, "kept", "7"], [[0, 1]], "has dims 0 to"),
        (good, ["tensors", first, "shape"], [2**60, 5], "expected an integer from 0 to"),
        (good, ["tensors", first, "shape"], [True, 5], "expected an integer"),
        (good, ["norms", "norm", "kind"], "magic", "expected one of"),
        (good, ["norms", "norm", "eps"], float("nan"), "finite"),
        (good, ["norms", "norm", "eps_name"], "__class__", "expected an attribute's name"),
        (good, ["norms", "norm", "width"], 0, "from 1 to"),
        (good, ["norms", "norm", "more"], 0, "missing or unknown"),
        (good, ["sizes"], {}, "does not know the group"),
        (attention, ["attributes", "num_heads"], [4, 9], "from 1 to 4"),
        (attention, ["attributes", "num_heads"], [4], "expected .before, after."),
        (attention, ["attributes", "qkv.__class__.x"], [4, 2], "no path of a public attribute"),
    ]
    assert SurgeryRecord.from_dict(good) is not None
    for base, path, value, match in table:
        with pytest.raises(CheckpointError, match=match):
            SurgeryRecord.from_dict(broken(base, path, value))


def test_the_record_knows_every_kind_of_norm_change() -> None:
    assert set(NORM_KINDS) == set(_NORM_CHANGES)
