"""Every rule against its operator: the operator is the ground truth.

Each row of the table puts an operator between producers and consumers that can be pruned. Every unit that the
analysis offers is removed alone, and random sets of units together; the subnet has to compute what the full network
computes with these units at zero. A wrong rule fails there. The number in a row is the least number of units the
analysis has to offer: a rule that freezes without need fails there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from only_train_once.errors import RuleError
from only_train_once.graph import Node
from only_train_once.groups import GroupList, find_groups
from only_train_once.inputs import call_model, output_tensors
from only_train_once.rules import Context, registered, rule
from only_train_once.rules.pointwise import is_pointwise
from only_train_once.rules.registry import _RULES
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace

from .pruning import randomize, zero
from .zoo.convolutions import GRN

TOLERANCE = 1e-10

Units = dict[str, NDArray[np.int64]]


class Net(nn.Module):
    """A forward function with the layers, parameters, buffers and numbers it uses."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Row:
    """An operator between layers.

    Attributes:
        build: makes the network.
        inputs: makes its inputs, float64 where they are floating point.
        units: least number of prunable units with ``wide=True``; 0 means that nothing may be prunable.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    units: int


# ---------------------------------------------------------------- comparing


def fresh(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Other numbers of the same shapes; integers and masks stay."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x for x in inputs
    )


def difference(model: nn.Module, inputs: tuple[Tensor, ...], groups: GroupList, units: Units) -> float:
    """Largest difference between the network with ``units`` at zero and the subnet without them, relative to 1."""
    full = copy.deepcopy(model)
    zero(full, groups, units)
    subnet, _ = construct_subnet(full, groups, units)
    worst = 0.0
    with torch.no_grad():
        expected = list(output_tensors(call_model(full, inputs)))
        found = list(output_tensors(call_model(subnet, inputs)))
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape, f"shape {tuple(a.shape)} became {tuple(b.shape)}"
        if a.is_floating_point() or a.is_complex():
            assert a.isfinite().all(), "the row itself gives NaN or infinity, which would hide a difference"
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1.0)))
        else:
            assert torch.equal(a, b)
    return worst


def subsets(groups: GroupList, alone: bool, count: int, seed: int = 0) -> Iterator[Units]:
    """Every unit alone; random sets over all groups; everything but one unit per group."""
    if alone:
        for group in groups.prunable:
            for unit in range(group.size):
                yield {group.name: np.array([unit])}
    random = np.random.default_rng(seed)
    for _ in range(count):
        chosen: Units = {}
        for group in groups.prunable:
            size = int(random.integers(0, group.size))
            chosen[group.name] = np.sort(random.permutation(group.size)[:size]).astype(np.int64)
        yield chosen
    if groups.prunable:
        stays = {g.name: int(random.integers(g.size)) for g in groups.prunable}
        yield {g.name: np.setdiff1d(np.arange(g.size), [stays[g.name]]) for g in groups.prunable}


def prepared(row: Row) -> tuple[nn.Module, tuple[Tensor, ...], GroupList]:
    model, inputs = row.build().double().eval(), row.inputs()
    randomize(model)
    return model, inputs, find_groups(trace(model, inputs), wide=True)


# ---------------------------------------------------------------- rows


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def flat(function: Callable[..., Any], units: int, width: int = 8, after: int = 8, **parts: Any) -> Row:
    """linear 5 -> width, the operator, linear after -> 3, on (3, 5)."""
    return Row(
        lambda: Net(
            lambda m, x: m.o(function(m, m.a(x))),
            a=nn.Linear(5, width),
            o=nn.Linear(after, 3),
            **{k: v() if callable(v) else v for k, v in parts.items()},
        ),
        floats((3, 5)),
        units,
    )


def seq(function: Callable[..., Any], units: int, width: int = 8, after: int = 8, length: int = 4, **parts: Any) -> Row:
    """The same on tokens (2, length, 5)."""
    return Row(flat(function, units, width, after, **parts).build, floats((2, length, 5)), units)


def image(function: Callable[..., Any], units: int, width: int = 8, after: int = 8, size: int = 6, **parts: Any) -> Row:
    """convolution 3 -> width, the operator, convolution after -> 2, on (2, 3, size, size)."""
    return Row(
        lambda: Net(
            lambda m, x: m.o(function(m, m.a(x))),
            a=nn.Conv2d(3, width, 3, padding=1),
            o=nn.Conv2d(after, 2, 1),
            **{k: v() if callable(v) else v for k, v in parts.items()},
        ),
        floats((2, 3, size, size)),
        units,
    )


def conv(
    layer: Callable[[], nn.Module], units: int, space: int = 2, width: int = 8, act: Callable[[Tensor], Tensor] = F.relu
) -> Row:
    """1x1 convolution 3 -> width, activation, the layer, activation, 1x1 convolution to 2, in 1 to 3 dims."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]

    def build() -> nn.Module:
        made = layer()
        return Net(
            lambda m, x: m.o(F.relu(m.b(act(m.a(x))))), a=kind(3, width, 1), b=made, o=kind(made.out_channels, 2, 1)
        )

    return Row(build, floats((2, 3, *[4] * space)), units)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def two(
    function: Callable[..., Any], units: int, shape: tuple[int, ...] = (2, 4, 5), after: int = 8, **parts: Any
) -> Row:
    """Two linear layers 5 -> 8 on the same input, an operator of both, linear after -> 3."""
    return Row(
        lambda: Net(
            lambda m, x: m.o(function(m, m.a(x), m.b(x))),
            a=nn.Linear(5, 8),
            b=nn.Linear(5, 8),
            o=nn.Linear(after, 3),
            **{k: v() if callable(v) else v for k, v in parts.items()},
        ),
        floats(shape),
        units,
    )


def attention(core: Callable[..., Tensor], units: int, kv: int = 3, free: bool = False, rotate: bool = False) -> Row:
    """Three query heads of 4 over ``kv`` key-value heads, the head-dim an attribute or (``free``) left to be found."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, m.heads, -1) if free else m.q(x).view(b, n, -1, m.head_dim)
        k, v = (layer(x).view(b, n, m.kv, -1) if free else layer(x).view(b, n, -1, m.head_dim) for layer in (m.k, m.v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return m.o(core(m, q, k, v).transpose(1, 2).reshape(b, n, -1))

    def build() -> nn.Module:
        heads = 3 if kv in (1, 3) else 4
        return Net(
            forward,
            q=nn.Linear(5, heads * 4),
            k=nn.Linear(5, kv * 4),
            v=nn.Linear(5, kv * 4),
            o=nn.Linear(heads * 4, 3),
            heads=heads,
            kv=kv,
            head_dim=4,
        )

    return Row(build, floats((2, 5, 5)), units)


def by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def sdpa(**kwargs: Any) -> Callable[..., Tensor]:
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def in_place(function: Callable[[Any, Tensor], Any]) -> Callable[..., Tensor]:
    """The operator changes a copy of its input."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = x * 1.5
        function(m, x)
        return x

    return run


CONTRACTION = {
    "linear": flat(lambda m, x: x, 8),
    "linear_tokens": seq(lambda m, x: x, 8),
    "linear_no_bias": flat(lambda m, x: m.b(x), 16, b=lambda: nn.Linear(8, 8, bias=False)),
    "linear_vector": Row(
        lambda: Net(lambda m, x: m.o(F.relu(m.a(x))), a=nn.Linear(5, 8), o=nn.Linear(8, 3)), floats((5,)), 8
    ),
    "mm": flat(lambda m, x: x @ m.w, 16, w=parameter(8, 8)),
    "mm_transposed": flat(lambda m, x: torch.mm(m.w.t(), x.t()).t(), 16, w=parameter(8, 8)),
    "mv": flat(lambda m, x: torch.mv(x, m.w)[:, None], 8, after=1, w=parameter(8)),
    "dot": Row(
        lambda: Net(
            lambda m, x: m.o(torch.dot(m.a(x), m.w)[None]), a=nn.Linear(5, 8), w=parameter(8)(), o=nn.Linear(1, 2)
        ),
        floats((5,)),
        8,
    ),
    "vdot": Row(
        lambda: Net(
            lambda m, x: m.o(torch.vdot(m.a(x), m.w)[None]), a=nn.Linear(5, 8), w=parameter(8)(), o=nn.Linear(1, 2)
        ),
        floats((5,)),
        8,
    ),
    "addmm": flat(lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3), 16, w=parameter(8, 8), b=parameter(8)),
    # a bias that is one number for all channels cannot be zero for one of them: the readers have to be
    "addmm_scalar_bias": flat(lambda m, x: torch.addmm(m.b, x, m.w), 16, w=parameter(8, 8), b=parameter(1)),
    "sparse_mm": flat(lambda m, x: torch.sparse.mm(m.s, x), 8, s=lambda: torch.eye(3).to_sparse()),
    "sparse_addmm": flat(
        lambda m, x: torch.sparse.addmm(m.b(x), m.s, x, beta=2.0),
        8,
        b=lambda: nn.Linear(8, 8),
        s=lambda: torch.eye(3).to_sparse(),
    ),
    "sparse_operator": flat(lambda m, x: m.s @ x, 8, s=lambda: torch.eye(3).to_sparse()),
    "addmv": flat(lambda m, x: torch.addmv(m.b, x, m.w)[:, None], 8, after=1, w=parameter(8), b=parameter(3)),
    "bmm": two(lambda m, x, y: torch.bmm(x, y.transpose(1, 2)), 8, after=4),
    "bmm_values": two(lambda m, x, y: torch.bmm(torch.bmm(x, x.transpose(1, 2)), y), 16),
    "baddbmm": two(lambda m, x, y: torch.baddbmm(x, m.w.expand(2, 4, 4), y), 8, w=parameter(4, 4)),
    "addbmm": two(lambda m, x, y: torch.addbmm(x[0], x, y.transpose(1, 2).matmul(m.w)), 0, w=parameter(4, 8)),
    "matmul_broadcast": seq(lambda m, x: torch.matmul(x[:, None], m.w).sum(1), 16, w=parameter(2, 8, 8)),
    "einsum": seq(lambda m, x: torch.einsum("bnd,de->bne", x, m.w), 16, w=parameter(8, 8)),
    "einsum_heads": Row(  # weights with a head axis of their own
        lambda: Net(
            lambda m, x: torch.einsum("bnhd,hde->bne", torch.einsum("bne,ehd->bnhd", x, m.v), m.w),
            v=parameter(5, 3, 4)(),
            w=parameter(3, 4, 2)(),
        ),
        floats((2, 6, 5)),
        7,
    ),
    "cdist": two(lambda m, x, y: torch.cdist(x, y), 8, after=4),
    "cdist_one": two(lambda m, x, y: torch.cdist(x, y, p=1.0), 8, after=4),
    "bilinear_has_no_rule": two(lambda m, x, y: m.c(x, y), 0, after=4, c=lambda: nn.Bilinear(8, 8, 4)),
}

CONVOLUTION = {
    "conv1d": conv(lambda: nn.Conv1d(8, 6, 3, padding=1), 14, space=1),
    "conv2d": conv(lambda: nn.Conv2d(8, 6, 3, padding=1), 14),
    "conv2d_no_bias": conv(lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=1, bias=False), 14),
    "conv3d": conv(lambda: nn.Conv3d(8, 6, 3, padding=1), 14, space=3),
    "conv_unbatched": Row(
        lambda: Net(lambda m, x: m.o(F.relu(m.a(x))), a=nn.Conv2d(3, 8, 3), o=nn.Conv2d(8, 2, 1)), floats((3, 6, 6)), 8
    ),
    # a group of 4, one of the 2 inputs of every group, one of the 2 outputs of every group
    "grouped1d": conv(lambda: nn.Conv1d(8, 8, 3, groups=4, padding=1), 8, space=1),
    "grouped2d": conv(lambda: nn.Conv2d(8, 8, 3, groups=4, padding=1), 8),
    "grouped2d_no_bias": conv(lambda: nn.Conv2d(8, 4, 3, groups=2, bias=False), 2 + 4 + 2),
    "grouped3d": conv(lambda: nn.Conv3d(8, 8, 1, groups=4), 8, space=3),
    "grouped_unequal": conv(lambda: nn.Conv2d(8, 12, 1, groups=4), 4 + 2 + 3),
    "depthwise": conv(lambda: nn.Conv2d(8, 8, 3, groups=8), 8),
    "depthwise1d": conv(lambda: nn.Conv1d(8, 8, 3, groups=8), 8, space=1),
    "depthwise_sigmoid": conv(lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), 8, act=torch.sigmoid),
    "multiplier": conv(lambda: nn.Conv2d(8, 16, 3, groups=8), 8 + 2),
    "transposed1d": conv(lambda: nn.ConvTranspose1d(8, 6, 3), 14, space=1),
    "transposed2d": conv(lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), 14),
    "transposed3d": conv(lambda: nn.ConvTranspose3d(8, 6, 2), 14, space=3),
    "transposed_grouped": conv(lambda: nn.ConvTranspose2d(8, 12, 2, groups=4), 4 + 2 + 3),
    "transposed_grouped_no_bias": conv(lambda: nn.ConvTranspose2d(8, 4, 2, groups=2, bias=False), 2 + 4 + 2),
    "transposed_depthwise": conv(lambda: nn.ConvTranspose2d(8, 8, 2, groups=8), 8),
    # the 3 groups of the second convolution do not line up with the 4 of the first: the groups have to stay,
    # but so has everything inside (12 = 4 * 3 = 3 * 4); the first one's inputs are its own
    "grouped_misaligned": Row(
        lambda: Net(
            lambda m, x: m.o(m.c(F.relu(m.b(F.relu(m.a(x)))))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 12, 1, groups=4),
            c=nn.Conv2d(12, 6, 1, groups=3),
            o=nn.Conv2d(6, 2, 1),
        ),
        floats((2, 3, 4, 4)),
        2 + 2,
    ),
    # 8 = 4 * 2 = 2 * 4 could be read as 2 * 2 * 2, which the solver does not do: what is inside of the first one's
    # groups on its input side is left, and the outputs of the second
    "grouped_nested": Row(
        lambda: Net(
            lambda m, x: m.o(m.c(F.relu(m.b(F.relu(m.a(x)))))),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 8, 1, groups=4),
            c=nn.Conv2d(8, 6, 1, groups=2),
            o=nn.Conv2d(6, 2, 1),
        ),
        floats((2, 3, 4, 4)),
        2 + 3,
    ),
    "weight_shared": Row(
        lambda: Net(
            lambda m, x: m.o(m.b(F.relu(m.b(m.a(x))))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), o=nn.Conv2d(8, 2, 1)
        ),
        floats((2, 3, 4, 4)),
        8,
    ),
    # the statistics of a standardized weight run over its input channels: 6 outputs are free, the 8 inputs are not
    "weight_standardized": image(
        lambda m, x: F.conv2d(
            x, F.batch_norm(m.w.reshape(1, m.w.shape[0], -1), None, None, training=True, eps=1e-4).reshape(m.w.shape)
        ),
        6,
        after=6,
        w=parameter(6, 8, 1, 1),
    ),
}

CONVOLUTION |= {
    # the count of groups comes from a shape, an attribute of another name, a literal
    "groups_of_shape": image(lambda m, x: F.conv2d(x, m.w, groups=x.shape[1]), 8, w=lambda: torch.randn(8, 1, 3, 3)),
    "groups_of_attribute": image(lambda m, x: F.conv2d(x, m.w, None, 1, 1, 1, m.c), 8, w=parameter(8, 1, 3, 3), c=8),
    "groups_half_of_shape": image(
        lambda m, x: F.conv2d(x, m.w, groups=x.shape[1] // 2), 4 + 2, w=parameter(8, 2, 3, 3)
    ),
    "groups_literal": image(lambda m, x: F.conv2d(x, m.w, groups=8), 0, w=parameter(8, 1, 3, 3)),
}

NORM = {
    "batch_norm1d": flat(lambda m, x: F.relu(m.n(x)), 8, n=lambda: nn.BatchNorm1d(8)),
    "batch_norm_tokens": seq(lambda m, x: m.n(x.transpose(1, 2)).transpose(1, 2), 8, n=lambda: nn.BatchNorm1d(8)),
    "batch_norm2d": image(lambda m, x: m.n(x), 8, n=lambda: nn.BatchNorm2d(8)),
    "batch_norm3d": Row(
        lambda: Net(lambda m, x: m.o(m.n(m.a(x))), a=nn.Conv3d(3, 8, 1), n=nn.BatchNorm3d(8), o=nn.Conv3d(8, 2, 1)),
        floats((2, 3, 4, 4, 4)),
        8,
    ),
    "batch_norm_plain": image(lambda m, x: m.n(x), 8, n=lambda: nn.BatchNorm2d(8, affine=False)),
    "batch_norm_no_statistics": image(lambda m, x: m.n(x), 8, n=lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    "batch_norm_over_tokens": seq(lambda m, x: m.n(x), 8, n=lambda: nn.BatchNorm1d(4)),
    "layer_norm": flat(lambda m, x: m.n(x), 8, n=lambda: nn.LayerNorm(8)),
    "layer_norm_no_bias": seq(lambda m, x: m.n(x), 8, n=lambda: nn.LayerNorm(8, bias=False)),
    "layer_norm_plain": seq(lambda m, x: m.n(x), 8, n=lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "layer_norm_over_tokens": seq(lambda m, x: m.n(x.transpose(1, 2)).transpose(1, 2), 8, n=lambda: nn.LayerNorm(4)),
    "layer_norm_two_dims": seq(lambda m, x: m.n(x), 0, n=lambda: nn.LayerNorm([4, 8])),
    # the function alone has no module that could remember the full width
    "layer_norm_function": seq(lambda m, x: F.layer_norm(x, (x.shape[-1],)), 0),
    "layer_norm_after_sigmoid": seq(lambda m, x: m.n(x.sigmoid()), 0, n=lambda: nn.LayerNorm(8)),
    "rms_norm": seq(lambda m, x: m.n(x), 8, n=lambda: nn.RMSNorm(8)),
    "rms_norm_eps": flat(lambda m, x: m.n(x), 8, n=lambda: nn.RMSNorm(8, eps=1e-2)),
    "rms_norm_plain": seq(lambda m, x: m.n(x), 8, n=lambda: nn.RMSNorm(8, eps=1e-3, elementwise_affine=False)),
    "group_norm": image(lambda m, x: m.n(x), 4 + 2, n=lambda: nn.GroupNorm(4, 8)),
    "group_norm_one": image(lambda m, x: m.n(x), 8, n=lambda: nn.GroupNorm(1, 8)),
    "group_norm_all": image(lambda m, x: m.n(x), 8, n=lambda: nn.GroupNorm(8, 8)),
    "group_norm_plain": image(lambda m, x: m.n(x), 4 + 2, n=lambda: nn.GroupNorm(4, 8, affine=False)),
    "group_norm_flat": flat(lambda m, x: m.n(x), 4 + 2, n=lambda: nn.GroupNorm(4, 8)),
    "instance_norm": image(lambda m, x: m.n(x), 8, n=lambda: nn.InstanceNorm2d(8)),
    "instance_norm_affine": image(lambda m, x: m.n(x), 8, n=lambda: nn.InstanceNorm2d(8, affine=True)),
    "instance_norm_running": image(
        lambda m, x: m.n(x), 8, n=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    ),
    "instance_norm1d": seq(lambda m, x: m.n(x.transpose(1, 2)).transpose(1, 2), 8, n=lambda: nn.InstanceNorm1d(8)),
    "weight_norm": Row(
        lambda: Net(
            lambda m, x: m.o(F.relu(m.a(x))),
            a=nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)),
            o=nn.Linear(8, 3),
        ),
        floats((3, 5)),
        8,
    ),
    # along the dims that the norm of a weight runs over, a column at zero adds nothing
    "weight_norm_reader": Row(
        lambda: Net(
            lambda m, x: m.o(F.relu(m.a(x))),
            a=nn.Linear(5, 8),
            o=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)),
        ),
        floats((3, 5)),
        8,
    ),
    "weight_norm_kernel": conv(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3), dim=2), 14, space=1),
    "weight_norm_inputs": conv(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3), dim=1), 14),
    "weight_norm_transposed": conv(lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 6, 3)), 14, 1),
    "spectral_norm": conv(lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 6, 3)), 14),
    # v over its own norm, without an epsilon: the gain alone may be zero
    "weight_norm_by_hand": flat(
        lambda m, x: F.linear(x, m.v * (m.g / m.v.norm(dim=1, keepdim=True))),
        16,
        v=parameter(8, 8),
        g=parameter(8, 1),
    ),
    "weight_over_norm": flat(lambda m, x: F.linear(x, m.v / m.v.norm(dim=1, keepdim=True)), 16, v=parameter(8, 8)),
    "global_response": image(lambda m, x: m.g(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, g=lambda: GRN(8)),
    "global_response_outside_of_a_module": image(
        lambda m, x: x * (x.norm(dim=(2, 3), keepdim=True) / (x.norm(dim=(2, 3), keepdim=True).mean(1, True) + 1e-6)), 0
    ),
    "normalize": flat(lambda m, x: F.normalize(x, dim=-1), 8),
    "normalize_tokens": seq(lambda m, x: F.normalize(x, dim=1), 8),
    "cosine_similarity": two(lambda m, x, y: F.cosine_similarity(x, y, dim=-1)[..., None], 8, after=1),
    "local_response_has_a_window": image(lambda m, x: F.local_response_norm(x, 3), 0),
}

ATTENTION = {
    "softmax_tokens": seq(lambda m, x: x.softmax(1), 8),
    "softmax_channels": seq(lambda m, x: x.softmax(-1), 0),
    "log_softmax_tokens": seq(lambda m, x: x.log_softmax(1), 8),
    # 3 heads; the head-dim is one attribute for queries, keys and values: 4 positions that leave together
    "by_hand": attention(by_hand, 3 + 4),
    # heads named, positions not: queries with keys, values with the output, each on their own
    "by_hand_free": attention(by_hand, 3 + 4 + 4, free=True),
    # the kernel takes the scale from the head-dim of the queries and keys: only values and output may shrink
    "fused": attention(sdpa(), 3),
    "fused_free": attention(sdpa(), 3 + 4, free=True),
    "fused_scale": attention(sdpa(scale=0.3), 3 + 4),
    "fused_scale_free": attention(sdpa(scale=0.3), 3 + 4 + 4, free=True),
    "fused_causal": attention(sdpa(scale=0.3, is_causal=True), 3 + 4),
    "fused_bool_mask": attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.3
        ),
        3 + 4,
    ),
    "fused_float_mask": attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.linspace(0, 1, 25, dtype=q.dtype).view(5, 5)
        ),
        3 + 4,
        free=True,
    ),
    # 2 key-value heads with their 2 query heads each; the j-th query head of both would not be zero by its values
    "grouped_query": attention(sdpa(scale=0.3, enable_gqa=True), 2 + 4, kv=2),
    "grouped_query_repeat": attention(
        lambda m, q, k, v: by_hand(m, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), 2 + 4, kv=2
    ),
    "grouped_query_expand": attention(
        lambda m, q, k, v: by_hand(m, q.unflatten(1, (-1, 2)), k.unsqueeze(2), v.unsqueeze(2)).flatten(1, 2),
        2 + 4,
        kv=2,
    ),
    # one key-value head that all query heads share has to stay; they may leave
    "multi_query": attention(
        lambda m, q, k, v: by_hand(m, q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1)), 4, kv=1
    ),
    # a removed position would be 1 in queries and keys, and one attribute counts it for values too: heads are left
    "linear_attention": attention(lambda m, q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).transpose(-2, -1) @ v), 3),
    "linear_attention_free": attention(
        lambda m, q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).transpose(-2, -1) @ v), 3 + 4, free=True
    ),
}

SHAPE = {
    "flatten": Row(
        lambda: Net(lambda m, x: m.o(F.relu(m.a(x)).flatten(1)), a=nn.Conv2d(3, 8, 1), o=nn.Linear(32, 3)),
        floats((2, 3, 2, 2)),
        8,
    ),
    "flatten_channels_last": Row(
        lambda: Net(lambda m, x: m.o(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 8, 1), o=nn.Linear(32, 3)),
        floats((2, 3, 2, 2)),
        8,
    ),
    "view_batch": seq(lambda m, x: x.view(-1, x.shape[-1]).view(x.shape), 8),
    # the attribute counts 4 and the rest is found: 4 rows and 2 columns of the grid
    "view_split_swap": flat(lambda m, x: x.view(3, m.h, -1).transpose(1, 2).reshape(3, -1), 4 + 2, h=4),
    # both numbers are attributes
    "view_split_both": flat(lambda m, x: x.view(-1, m.h, m.d).tanh().transpose(1, 2).flatten(1), 4 + 2, h=4, d=2),
    # a literal 4 stays true only while 4 rows stay
    "view_split_literal": flat(lambda m, x: x.view(3, 4, -1).transpose(1, 2).reshape(3, -1), 2),
    "view_split_literals": flat(lambda m, x: x.view(3, 4, 2).transpose(1, 2).reshape(3, -1), 0),
    "view_three": flat(
        lambda m, x: x.view(3, m.p, m.q, -1).permute(0, 3, 1, 2).reshape(3, -1), 2 + 3 + 2, width=12, after=12, p=2, q=3
    ),
    "unflatten": flat(lambda m, x: x.unflatten(-1, (m.h, -1)).sum(1), 4 + 2, after=2, h=4),
    "reshape_merge_tokens": seq(lambda m, x: x.reshape(2, -1), 8, after=32),
    "permute": image(lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 8),
    "transpose": seq(lambda m, x: x.transpose(1, 2).mT, 8),
    "movedim": image(lambda m, x: x.movedim(1, -1).swapaxes(1, 3), 8),
    # two channels have to be left, because a single one would be squeezed away
    "squeeze": flat(lambda m, x: x[:, None, :, None].squeeze().squeeze(), 6),
    "squeeze_dim": flat(lambda m, x: x[:, None, :, None].squeeze(1).squeeze(-1), 8),
    "squeeze_nothing": flat(lambda m, x: x.squeeze(1), 6),
    "expand_sum": seq(lambda m, x: x.norm(dim=-1, keepdim=True).expand(x.shape).sum(-1, keepdim=True), 0, after=1),
    "expand_width": seq(lambda m, x: x.norm(dim=-1, keepdim=True).expand(-1, -1, x.shape[-1]) + x, 8),
    "expand_times": seq(lambda m, x: x[:, :, None].expand(-1, -1, 3, -1).flatten(2), 8, after=24),
    "expand_other": two(lambda m, x, y: x.mean(-1, keepdim=True).expand(y.shape) * y, 8),
    # one attribute counts the heads of a layer and cuts the input, which stays as it is
    "attribute_counts_the_input": Row(
        lambda: Net(
            lambda m, x: m.o(m.a(x).view(3, m.h, -1).sum(1)) + x.view(3, m.h, -1).sum(1).cos().sum(1, keepdim=True),
            a=nn.Linear(8, 8),
            o=nn.Linear(2, 3),
            h=4,
        ),
        floats((3, 8)),
        2,
    ),
    "expand_as": seq(lambda m, x: x.norm(dim=-1, keepdim=True).expand_as(x), 8),
    "expand_as_flat": seq(lambda m, x: x.norm(dim=-1, keepdim=True).expand_as(x).flatten(1), 8, after=32),
    "expand_shape": seq(lambda m, x: x.norm(dim=-1, keepdim=True).expand(x.shape), 8),
    "broadcast_tensors": seq(lambda m, x: torch.broadcast_tensors(x.norm(dim=-1, keepdim=True), x)[0], 8),
    "view_as": two(lambda m, x, y: (x.view(2, 32) * 2).view_as(y), 0),
    "view_as_split": two(lambda m, x, y: x.view_as(y.unflatten(-1, (m.h, -1))).transpose(2, 3).flatten(2) * y, 0, h=4),
    "reshape_as": two(lambda m, x, y: x.flatten(1).reshape_as(y), 8),
    "diff": flat(lambda m, x: x.diff(dim=1), 0, after=7),
    "setitem_literal": seq(in_place(lambda m, x: x.__setitem__((..., slice(0, 3)), 1.0)), 0),
    "setitem_half": seq(in_place(lambda m, x: x.__setitem__((..., slice(x.shape[-1] // 2, None)), 1.0)), 0),
    "expand": flat(lambda m, x: x[:, None].expand(-1, 4, -1).sum(1), 8),
    "expand_along_channels": seq(lambda m, x: x * x.mean(1, keepdim=True).expand(-1, 4, -1), 8),
    "expand_gate": seq(lambda m, x: x * x.norm(dim=-1, keepdim=True).expand(-1, -1, x.shape[-1]), 8),
    "expand_gate_as": seq(lambda m, x: x * x.norm(dim=-1, keepdim=True).expand_as(x), 8),
    "repeat": flat(lambda m, x: x.repeat(1, 2), 8, after=16),
    "repeat_tokens": seq(lambda m, x: x.repeat(1, 3, 1), 8),
    "tile": flat(lambda m, x: x.tile(2), 8, after=16),
    "repeat_interleave": flat(lambda m, x: x.repeat_interleave(3, dim=1), 8, after=24),
    "repeat_interleave_negative": seq(lambda m, x: x.repeat_interleave(2, dim=-1), 8, after=16),
    # what lies before a literal bound has to stay, what lies behind it need not
    "slice_literal": flat(lambda m, x: torch.cat([x[:, 3:], x[:, :3]], 1), 5),
    "slice_halves": flat(lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], 4, after=4),
    "slice_attribute": flat(lambda m, x: x[:, : m.h] * 2 + x[:, m.h :], 4, after=4, h=4),
    "slice_last": flat(lambda m, x: x[:, :-3].sum(1, keepdim=True) + x[:, -3:], 5, after=3),
    "slice_step": flat(lambda m, x: x[:, ::2], 4, after=4),
    "slice_step_both": flat(lambda m, x: x[:, ::2] * x[:, 1::2].sigmoid(), 4, after=4),
    "slice_step_uneven": flat(lambda m, x: x[:, ::3], 0, after=3),
    "slice_step_part": flat(lambda m, x: x[:, 0:6:2], 0, after=3),
    "slice_step_late": flat(lambda m, x: x[:, 2::2], 0, after=3),
    "slice_step_attribute": flat(
        lambda m, x: torch.cat([m.b(x).view(3, m.n, -1).sum(2), x[:, :: m.n]], 1),
        2,
        after=6,
        n=4,
        b=lambda: nn.Linear(8, 8),
    ),
    "slice_beyond": flat(lambda m, x: x[:, :100], 8),
    "slice_tokens": seq(lambda m, x: x[:, 1:3], 8),
    "narrow": flat(lambda m, x: torch.cat([x.narrow(1, 3, 5), x.narrow(1, 0, 3)], 1), 0),
    "narrow_attribute": flat(lambda m, x: x.narrow(1, 0, m.h) + x.narrow(1, m.h, m.h), 4, after=4, h=4),
    "select": seq(lambda m, x: x[:, 0], 8),
    # `w[0]` is asked for its sizes alone
    "select_unread": flat(lambda m, x: F.linear(x, m.w) * m.w[0].numel(), 8, w=parameter(8, 8)),
    "select_unread_out_of_range": flat(lambda m, x: F.linear(x, m.w) * (m.w[7].dim() + 1), 8, w=parameter(8, 8)),
    "select_channel": seq(lambda m, x: x[..., 2:3] + x.select(-1, 1)[..., None], 0, after=1),
    "unbind": seq(lambda m, x: sum(x.unbind(1)), 8),
    "unbind_channels": seq(lambda m, x: torch.stack(x.unbind(-1), -1), 0),
    "unbind_qkv": flat(lambda m, x: torch.prod(torch.stack(x.view(3, 3, -1).unbind(1)), 0), 4, width=12, after=4),
    "chunk": flat(lambda m, x: torch.mul(*x.chunk(2, dim=1)), 4, after=4),
    "chunk_three": flat(lambda m, x: torch.cat(x.chunk(3, dim=1)[::-1], 1), 3, width=9, after=9),
    "chunk_uneven": flat(lambda m, x: torch.cat(x.chunk(3, dim=1)[::-1], 1), 0),
    "chunk_tokens": seq(lambda m, x: torch.cat(x.chunk(2, dim=1)[::-1], 1), 8),
    "split": flat(lambda m, x: torch.mul(*x.split(m.h, dim=1)), 4, after=4, h=4),
    "split_literal": flat(lambda m, x: torch.mul(*x.split(4, dim=1)), 0, after=4),
    "split_half": flat(lambda m, x: torch.mul(*x.split(x.shape[1] // 2, 1)), 4, after=4),
    # only the first of several sizes is bound to its attribute; the sums behind it would not hold
    "split_sizes": flat(lambda m, x: torch.cat(x.split([m.p, m.q], 1)[::-1], 1), 3 + 5, p=3, q=5),
    "split_sizes_list": flat(lambda m, x: torch.cat(x.split(m.sizes, dim=-1)[::-1], 1), 3 + 5, sizes=[3, 5]),
    "split_sizes_tokens": seq(lambda m, x: torch.cat(x.split([1, 3], 1)[::-1], 1), 8),
    "tensor_split": flat(lambda m, x: torch.cat(x.tensor_split(2, 1)[::-1], 1), 0),
    "tensor_split_gate": flat(lambda m, x: torch.mul(*x.tensor_split(2, 1)), 0, after=4),
    "tensor_split_at": flat(lambda m, x: torch.cat(x.tensor_split([3], 1)[::-1], 1), 0),
    "hsplit": flat(lambda m, x: torch.cat(torch.hsplit(x, 2)[::-1], 1), 0),
    "hsplit_at": flat(lambda m, x: torch.cat(torch.hsplit(x, [3])[::-1], 1), 0),
    "unsafe_chunk": flat(lambda m, x: torch.cat(torch.unsafe_chunk(x, 2, 1)[::-1], 1), 0),
    "cat": two(lambda m, x, y: torch.cat([x, y], -1), 16, after=16),
    "cat_tokens": two(lambda m, x, y: torch.cat([x, y], 1), 8),
    "cat_input": Row(
        lambda: Net(lambda m, x: m.o(torch.cat([x, m.a(x), x], 1)), a=nn.Linear(5, 8), o=nn.Linear(18, 3)),
        floats((3, 5)),
        8,
    ),
    "cat_twice": flat(lambda m, x: torch.cat([x, x.sigmoid()], 1), 8, after=16),
    "hstack": two(lambda m, x, y: torch.hstack([x, y]), 16, shape=(3, 5), after=16),
    "stack": two(lambda m, x, y: torch.stack([x, y], 1).sum(1), 8),
    "stack_max": two(lambda m, x, y: torch.stack([x, y], -1).amax(-1), 8),
    "stack_flatten": two(lambda m, x, y: torch.stack([x, y], -1).flatten(-2), 8, after=16),
    "pad_channels": flat(lambda m, x: F.pad(x, (2, 1)), 8, after=11),
    "pad_channels_value": flat(lambda m, x: F.pad(x, (2, 1), value=1.0), 8, after=11),
    "pad_image_channels": image(lambda m, x: F.pad(x, (1, 1, 0, 0, 0, 3)), 8, after=11),
    "pad_space_value": image(lambda m, x: F.pad(x, (1, 1), value=2.0), 8),
    "pad_crop": flat(lambda m, x: F.pad(x, (-2, 0)), 0, after=6),
    "pad_reflect": image(lambda m, x: F.pad(x, (1, 1, 2, 1), mode="reflect"), 8),
    "pad_replicate": image(lambda m, x: F.pad(x, (1, 1, 2, 1), mode="replicate"), 8),
    # circular padding writes into memory whose size comes from nowhere the trace can see
    "pad_circular": image(lambda m, x: F.pad(x, (1, 1, 2, 1), mode="circular"), 0),
    "pad_reflect_channels": seq(lambda m, x: F.pad(x, (1, 1), mode="reflect"), 0, after=10),
    "flip": flat(lambda m, x: x.flip(1), 8),
    "flip_all": seq(lambda m, x: x.flip([0, -1]), 8),
    "roll_space": image(lambda m, x: x.roll((1, 2), (2, 3)), 8),
    "roll_channels": flat(lambda m, x: x.roll(2, 1), 0),
    "roll_flat": flat(lambda m, x: x.roll(2), 0),
    "tril": Row(
        lambda: Net(
            lambda m, x: m.o(m.a(x).transpose(1, 2).view(2, -1, 2, 2).tril().flatten(2).mT),
            a=nn.Linear(5, 8),
            o=nn.Linear(8, 3),
        ),
        floats((2, 4, 5)),
        8,
    ),
    "tril_channels": seq(lambda m, x: x.tril(), 0),
    "windows": seq(lambda m, x: x.unfold(1, 2, 1).sum(-1), 8),
    "windows_channels": seq(lambda m, x: x.unfold(2, 2, 1).sum(-1), 0, after=7),
    "unfold": Row(
        lambda: Net(lambda m, x: m.o(F.unfold(m.a(x), 2).transpose(1, 2)), a=nn.Conv2d(3, 8, 1), o=nn.Linear(32, 3)),
        floats((2, 3, 4, 4)),
        8,
    ),
    "fold": image(lambda m, x: F.fold(F.unfold(x, 2, stride=2) * 2, (6, 6), 2, stride=2), 8),
    "pixel_shuffle": image(lambda m, x: F.pixel_shuffle(x, 2), 4, width=16, after=4),
    "pixel_unshuffle": image(lambda m, x: F.pixel_unshuffle(x, 2), 8, after=32),
    "pixel_shuffle_back": image(lambda m, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), 8),
    # 2 groups of 4 are dealt like cards: the same position of both groups leaves
    "channel_shuffle": image(lambda m, x: m.s(x), 4, s=lambda: nn.ChannelShuffle(2)),
    "channel_shuffle_by_hand": image(
        lambda m, x: x.view(2, m.k, -1, 6, 6).transpose(1, 2).reshape(2, -1, 6, 6), 2 + 4, k=2
    ),
    # the code says that there are as many channels after the shuffle as before, not that they keep their places
    "channel_shuffle_sized": image(
        lambda m, x: x.view(2, 2, x.shape[1] // 2, 6, 6).transpose(1, 2).reshape(2, x.shape[1], 6, 6), 4
    ),
    # 2 groups of 8 are dealt, and read in groups again: groups, positions by twos, and the outputs of every group
    "channel_shuffle_then_groups": image(
        lambda m, x: m.b(m.s(x)),
        2 + 4 + 4,
        width=16,
        s=lambda: nn.ChannelShuffle(2),
        b=lambda: nn.Conv2d(16, 8, 1, groups=2),
    ),
    "repeated_then_heads": flat(lambda m, x: x.repeat_interleave(3, 1).view(3, m.h, -1).sum(1), 4, after=12, h=2),
    # heads are put beside the images, and taken back into the channels without saying how many there were
    # the count of heads is named nowhere but times that of images
    "heads_times_batch": seq(
        lambda m, x: x.transpose(1, 2).reshape(x.shape[0] * m.h, -1, 4).tanh().view(2, -1, 4).transpose(1, 2),
        4 + 2,
        h=4,
    ),
    "heads_beside_batch": seq(
        lambda m, x: (
            m.b(x).view(2, 4, m.h, -1).flatten(2).transpose(1, 2).reshape(2 * m.h, -1, 4).view(2, -1, 4).transpose(1, 2)
        ),
        8 + 4 + 2,
        h=4,
        b=lambda: nn.Linear(8, 8),
    ),
    "glu": flat(lambda m, x: F.glu(x), 4, after=4),
    "glu_channels": image(lambda m, x: F.glu(x, 1), 4, after=4),
    "glu_tokens": seq(lambda m, x: F.glu(x, 1), 8),
    "diagonal": Row(
        lambda: Net(
            lambda m, x: m.o(m.a(x).diagonal(dim1=1, dim2=2).transpose(1, 2)), a=nn.Linear(5, 8), o=nn.Linear(8, 3)
        ),
        floats((2, 4, 4, 5)),
        8,
    ),
    "complex_pairs": flat(  # pairs rotate together
        lambda m, x: torch.view_as_real(torch.view_as_complex(x.view(3, -1, 2)) * 1j).flatten(1), 4
    ),
    "contiguous": image(lambda m, x: x.contiguous(memory_format=torch.channels_last).clone().detach(), 8),
    "as_strided": flat(lambda m, x: torch.as_strided(x, x.shape, x.stride()), 8),
    "as_strided_windows": flat(lambda m, x: torch.as_strided(x, (3, 4), (8, 2)), 0, after=4),
    "view_dtype": flat(lambda m, x: x.view(torch.int64).view(torch.float64), 8),
    "block_of_zeros": flat(lambda m, x: torch.cat([x, torch.zeros(3, 4, dtype=x.dtype)], 1), 8, after=12),
    "rotate_half": flat(lambda m, x: x * 2 + torch.cat([-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1), 4),
}

REDUCTION = {
    "sum_channels": flat(lambda m, x: x.sum(-1, keepdim=True), 8, after=1),
    "sum_tokens": seq(lambda m, x: x.sum(1), 8),
    "sum_after_sigmoid": flat(lambda m, x: x.sigmoid().sum(-1, keepdim=True), 0, after=1),
    "nansum": flat(lambda m, x: x.nansum(-1, keepdim=True), 8, after=1),
    "norm_channels": flat(lambda m, x: x.norm(dim=-1, keepdim=True), 8, after=1),
    "norm_one": flat(lambda m, x: torch.linalg.vector_norm(x, 1, -1, keepdim=True), 8, after=1),
    "norm_largest": flat(lambda m, x: torch.linalg.vector_norm(x, math.inf, -1, keepdim=True), 8, after=1),
    "norm_zero_counts": flat(lambda m, x: torch.linalg.vector_norm(x, 0, -1, keepdim=True), 0, after=1),
    "norm_smallest": flat(lambda m, x: torch.linalg.vector_norm(x, -math.inf, -1, keepdim=True), 0, after=1),
    "norm_tokens": seq(lambda m, x: x.norm(dim=1), 8),
    "mean_tokens": seq(lambda m, x: x.mean(1), 8),
    "mean_space": image(lambda m, x: x.mean((2, 3), keepdim=True), 8),
    "mean_channels": flat(lambda m, x: x.mean(-1, keepdim=True), 0, after=1),
    "mean_everything": flat(lambda m, x: x * x.mean(), 0),
    "max_tokens": seq(lambda m, x: x.max(1).values, 8),
    "amax_space": image(lambda m, x: x.amax((2, 3), keepdim=True), 8),
    # a grouped convolution asks for zeros, and the largest of zeros is zero
    "amax_grouped": image(
        lambda m, x: m.g(x.amax((2, 3), keepdim=True)), 2 + 4 + 4, g=lambda: nn.Conv2d(8, 8, 1, groups=2)
    ),
    "max_channels": flat(lambda m, x: x.max(-1, keepdim=True).values, 0, after=1),
    "max_of_two": two(lambda m, x, y: torch.max(x, y), 8),
    "argmax_tokens": Row(
        lambda: Net(lambda m, x: m.o(m.a(x).argmax(1).to(x.dtype)), a=nn.Linear(5, 8), o=nn.Linear(8, 3)),
        floats((2, 4, 5)),
        8,
    ),
    "min_tokens": seq(lambda m, x: x.min(1).values, 8),
    "min_index": seq(lambda m, x: x.min(1).indices.to(x.dtype), 8),
    "prod_tokens": seq(lambda m, x: x.prod(1), 8),
    "std_tokens": seq(lambda m, x: x.std(1), 8),
    "var_mean_tokens": seq(lambda m, x: torch.add(*torch.var_mean(x, 1)), 8),
    "var_channels": seq(lambda m, x: x.var(-1, keepdim=True), 0, after=1),
    "logsumexp_tokens": seq(lambda m, x: x.logsumexp(1), 8),
    "logsumexp_channels": seq(lambda m, x: x.logsumexp(-1, keepdim=True), 0, after=1),
    "median_tokens": seq(lambda m, x: x.median(1).values, 8),
    "count_nonzero": seq(lambda m, x: (x > 0).count_nonzero(1).to(x.dtype), 8),
    "any_tokens": seq(lambda m, x: (x > 0).any(1).to(x.dtype), 8),
    "cumsum_tokens": seq(lambda m, x: x.cumsum(1), 8),
    "cumsum_channels": seq(lambda m, x: x.cumsum(-1), 8),
    "cumprod_tokens": seq(lambda m, x: x.cumprod(1), 8),
    "logcumsumexp_tokens": seq(lambda m, x: x.logcumsumexp(1), 8),
    "cummax_tokens": seq(lambda m, x: x.cummax(1).values, 8),
    "cummax_index": seq(lambda m, x: x.cummax(1).indices.to(x.dtype), 8),
    "sort_tokens": seq(lambda m, x: x.sort(1).values, 8),
    "sort_index": seq(lambda m, x: x.sort(1).indices.to(x.dtype), 8),
    "argsort_tokens": seq(lambda m, x: x.argsort(1).to(x.dtype), 8),
    "sort_channels": seq(lambda m, x: x.sort(-1).values, 0),
    "topk_tokens": seq(lambda m, x: x.topk(2, 1).values, 8),
    "topk_index": seq(lambda m, x: x.topk(2, 1).indices.to(x.dtype), 8),
    "topk_channels": seq(lambda m, x: x.topk(2, -1).values, 0, after=2),
}

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_index": lambda x: F.max_pool2d(x, 2, return_indices=True)[1].to(x.dtype),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "lp_pool": lambda x: F.lp_pool2d(x, 2.0, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool_3": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool_index": lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1].to(x.dtype),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest_exact": lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(4, 9), mode="bilinear"),
    "bilinear_antialias": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=True),
    "bicubic_antialias": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", antialias=True),
    "area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
}
_LINE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
    "linear1d": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "nearest1d": lambda x: F.interpolate(x, scale_factor=2.0),
}
_VOLUME: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 2),
    "trilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"),
    "nearest3d": lambda x: F.interpolate(x, scale_factor=2.0),
    "replicate3d": lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"),
}


def volume(function: Callable[[Tensor], Tensor]) -> Row:
    return Row(
        lambda: Net(lambda m, x: m.o(function(m.a(x))), a=nn.Conv3d(3, 8, 1), o=nn.Conv3d(8, 2, 1)),
        floats((2, 3, 4, 4, 4)),
        8,
    )


def over(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of images or lines as one of (net, x)."""
    return lambda m, x: function(x)


def over_tokens(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: function(x.transpose(1, 2)).transpose(1, 2)


SPATIAL = {
    **{name: image(over(f), 8) for name, f in _POOLS.items()},
    **{name: seq(over_tokens(f), 8) for name, f in _LINE.items()},
    **{name: volume(f) for name, f in _VOLUME.items()},
    # channels taken for space: they are pooled
    "avg_pool1d_channels": seq(lambda m, x: F.avg_pool1d(x, 2), 0, after=4),
    # indices of one tensor place the values of another: their channels leave together
    "max_unpool": image(lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8),
    "max_unpool_other": Row(
        lambda: Net(
            lambda m, x: m.o(
                F.max_unpool2d(m.b(F.max_pool2d(x, 2)), F.max_pool2d(m.a(x), 2, return_indices=True)[1], 2)
            ),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(3, 8, 1),
            o=nn.Conv2d(8, 2, 1),
        ),
        floats((2, 3, 4, 4)),
        8,
    ),
    "max_unpool3d": Row(
        lambda: Net(
            lambda m, x: m.o(F.max_unpool3d(*F.max_pool3d(m.a(x), 2, return_indices=True), 2)),
            a=nn.Conv3d(3, 8, 1),
            o=nn.Conv3d(8, 2, 1),
        ),
        floats((2, 3, 4, 4, 4)),
        8,
    ),
    "fractional_pool_is_random": image(lambda m, x: F.fractional_max_pool2d(x, 2, output_size=3), 0),
    "grid_sample": image(
        lambda m, x: F.grid_sample(x, m.grid.to(x.dtype), align_corners=False),
        8,
        grid=lambda: torch.rand(2, 3, 5, 2) * 2 - 1,
    ),
    "affine_grid": image(
        lambda m, x: F.grid_sample(
            x, F.affine_grid(m.theta.to(x.dtype), [2, 1, 6, 6], align_corners=False), align_corners=False
        ),
        8,
        theta=lambda: torch.randn(2, 2, 3),
    ),
    "deform_by_itself": Row(  # the channels that steer are positions
        lambda: Net(
            lambda m, x: m.o(F.grid_sample(m.a(x), m.b(x).permute(0, 2, 3, 1).tanh(), align_corners=True)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(3, 2, 1),
            o=nn.Conv2d(8, 2, 1),
        ),
        floats((2, 3, 4, 4)),
        8,
    ),
}

_ROWS_AT = torch.tensor([2, 0, 1])
_ROWS_OF_4 = torch.tensor([0, 0, 1, 3])[None, :, None]


def ids() -> tuple[Tensor, ...]:
    return (torch.tensor([[1, 4, 2], [0, 9, 4]]),)


LOOKUP = {
    "embedding": Row(
        lambda: Net(lambda m, x: m.o(m.e(x)), e=nn.Embedding(10, 8, padding_idx=0), o=nn.Linear(8, 3)), ids, 8
    ),
    "embedding_tied": Row(
        lambda: Net(lambda m, x: m.f(m.e(x)) @ m.e.weight.t(), e=nn.Embedding(10, 8), f=nn.Linear(8, 8)), ids, 8
    ),
    "one_hot": Row(
        lambda: Net(lambda m, x: m.b(F.relu(m.a(F.one_hot(x, 10).double()))), a=nn.Linear(10, 8), b=nn.Linear(8, 3)),
        ids,
        8,
    ),
    "embedding_bag_has_no_rule": Row(
        lambda: Net(lambda m, x: m.o(m.e(x)), e=nn.EmbeddingBag(10, 8), o=nn.Linear(8, 3)), ids, 0
    ),
    "index_tokens": seq(lambda m, x: x[:, _ROWS_AT], 8),
    "index_pairs": seq(lambda m, x: x[torch.tensor([0, 1, 1]), _ROWS_AT], 8),
    "index_apart": image(lambda m, x: x[torch.tensor([0, 1]), :, torch.tensor([1, 2])][..., None], 8),
    "index_channels": seq(lambda m, x: x[..., [2, 0]], 0, after=2),
    "index_mask": seq(lambda m, x: x[m.keep], 8, keep=lambda: torch.tensor([[True, True, False, True]] * 2)),
    "index_select": seq(lambda m, x: x.index_select(1, _ROWS_AT), 8),
    "index_select_channels": seq(lambda m, x: x.index_select(-1, _ROWS_AT), 0, after=3),
    "gather_tokens": seq(lambda m, x: x.gather(1, _ROWS_AT[None, :, None].expand(2, -1, x.shape[-1])), 8),
    "gather_literal": seq(lambda m, x: x.gather(1, _ROWS_AT[None, :, None].expand(2, 3, 8)), 0),
    "gather_channels": seq(lambda m, x: x.gather(2, _ROWS_AT.expand(2, 4, 3)), 0, after=3),
    "take_along_dim": seq(lambda m, x: x.take_along_dim(_ROWS_AT[None, :, None], 1), 8),
    "by_argmax": seq(lambda m, x: x.gather(1, x.argmax(1, keepdim=True)), 8),
    "scatter_tokens": seq(lambda m, x: x.scatter(1, torch.zeros(2, 1, 8, dtype=torch.int64), 1.0), 0),
    "scatter_add": seq(lambda m, x: torch.zeros_like(x).scatter_add(1, torch.zeros(2, 4, 8, dtype=torch.int64), x), 0),
    "scatter_add_expanded": seq(
        lambda m, x: torch.zeros_like(x).scatter_add(1, _ROWS_OF_4.expand(2, 4, x.shape[2]), x), 8
    ),
    "scatter_expanded": seq(
        lambda m, x: m.b(x).scatter(1, _ROWS_OF_4.expand(2, 4, x.shape[2]), x), 8, b=lambda: nn.Linear(8, 8)
    ),
    "scatter_part": seq(
        lambda m, x: m.b(x).scatter(1, _ROWS_OF_4.expand(2, 4, x.shape[2])[..., :6], x), 0, b=lambda: nn.Linear(8, 8)
    ),
    "scatter_number": seq(lambda m, x: x.scatter(1, _ROWS_OF_4.expand(2, 4, x.shape[2]), 2.0), 8),
    "scatter_channels": seq(lambda m, x: x.scatter(2, torch.tensor([0, 3]).expand(2, x.shape[1], 2), 0.0), 0),
    "scatter_reduce": seq(
        lambda m, x: m.b(x).scatter_reduce(1, _ROWS_OF_4.expand(2, 4, x.shape[2]), x, "amax"),
        8,
        b=lambda: nn.Linear(8, 8),
    ),
    "index_add": seq(lambda m, x: torch.zeros_like(x).index_add(1, torch.tensor([0, 0, 1, 2]), x), 8),
    "index_add_both": seq(
        lambda m, x: m.b(x).index_add(1, torch.tensor([0, 0, 1, 2]), x, alpha=0.5), 8, b=lambda: nn.Linear(8, 8)
    ),
    "index_add_channels": seq(
        lambda m, x: x.index_add(2, torch.tensor([0, 0, 1]), m.b(x)), 0, b=lambda: nn.Linear(8, 3)
    ),
    "index_copy": seq(lambda m, x: m.b(x).index_copy(1, _ROWS_AT, x[:, :3]), 8, b=lambda: nn.Linear(8, 8)),
    "index_fill": seq(lambda m, x: x.index_fill(1, _ROWS_AT, 2.0), 8),
    "index_put": seq(lambda m, x: in_place(lambda m, y: y.__setitem__((slice(None), _ROWS_AT), 1.0))(m, x), 8),
    "index_put_values": seq(
        lambda m, x: in_place(lambda m, y: y.__setitem__((slice(None), _ROWS_AT), m.b(x)[:, 1:]))(m, m.c(x)),
        8,
        b=lambda: nn.Linear(8, 8),
        c=lambda: nn.Linear(8, 8),
    ),
    "index_put_row": seq(
        lambda m, x: in_place(lambda m, y: y.__setitem__((slice(None), _ROWS_AT), m.row))(m, x), 8, row=parameter(8)
    ),
    "index_put_apart": image(
        lambda m, x: in_place(
            lambda m, y: y.__setitem__((torch.tensor([0, 1]), slice(None), torch.tensor([1, 2])), m.b(x)[:, :, 0])
        )(m, x),
        8,
        b=lambda: nn.Conv2d(8, 8, 1),
    ),
    "index_put_channels": seq(lambda m, x: in_place(lambda m, y: y.__setitem__((..., [0, 2]), 1.0))(m, x), 0),
    "index_put_accumulate": seq(
        lambda m, x: torch.zeros_like(x).index_put((torch.tensor([0, 1, 1]), _ROWS_AT), x[1, :3], accumulate=True), 8
    ),
    "masked_rows": seq(
        lambda m, x: in_place(lambda m, y: y.__setitem__(m.keep, m.row))(m, x),
        8,
        row=parameter(8),
        keep=lambda: torch.tensor([[True, True, False, True]] * 2),
    ),
}

_MASK = torch.tensor([True, False, True, False])[:, None]

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.5),
    "threshold_zero": lambda x: F.threshold(x, 0.1, 0.0),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "cos": torch.cos,
    "sin": torch.sin,
    "square": torch.square,
    "cube": lambda x: x**3,
    "power_zero": lambda x: x**0,
    "base": lambda x: 2.0**x,
    "abs": torch.abs,
    "sqrt": lambda x: x.abs().sqrt(),
    "log1p": lambda x: x.abs().log1p(),
    "rsqrt": lambda x: (x * x + 1e-2).rsqrt(),
    "reciprocal": lambda x: 1 / (x * x + 1),
    "neg": torch.neg,
    "sign": torch.sign,
    "round": torch.round,
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_above_zero": lambda x: x.clamp(min=0.2),
    "add_one": lambda x: x + 1,
    "rsub": lambda x: 1 - x,
    "scale": lambda x: 3 * x / 7,
    "remainder": lambda x: x % 0.7,
    "floor_divide": lambda x: x // 0.3,
    "compare": lambda x: (x > 0).to(x.dtype),
    "compare_equal": lambda x: (x >= 0).to(x.dtype),
    "not": lambda x: (~(x > 0)).to(x.dtype),
    "to_float": lambda x: x.float().double(),
    "to_int": lambda x: x.int().double(),
    "where_input": lambda x: torch.where(x > 0, x, x * 0.1),
    "where_constant": lambda x: torch.where(x > 0, x, 5.0),
    "where_constant_zero": lambda x: torch.where(x > 0.5, 5.0, 0.0).double(),
    "where_tokens": lambda x: torch.where(_MASK, x, 5.0),
    "where_tokens_other": lambda x: torch.where(_MASK, x, x.cos()),
    "where_tokens_first": lambda x: torch.where(_MASK, x.cos(), x),
    "masked_fill": lambda x: x.masked_fill(_MASK, 0.0),
    "masked_fill_value": lambda x: x.masked_fill(_MASK, 5.0),
    "masked_fill_behind_sigmoid": lambda x: x.sigmoid().masked_fill(_MASK, 0.0),
    "masked_fill_all_sigmoid": lambda x: x.sigmoid().masked_fill(torch.ones(4, 1, dtype=torch.bool), 0.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "nan_to_num": torch.nan_to_num,
    "atan2": lambda x: torch.atan2(x, torch.ones_like(x)),
    "lerp": lambda x: torch.lerp(x, x.cos(), 0.3),
    "lerp_zero": lambda x: torch.lerp(x, x.sin(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x.exp(), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.exp()),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "ones_like": lambda x: x + torch.ones_like(x),
    "full_like": lambda x: x * torch.full_like(x, 2.0),
    "polar": lambda x: torch.polar(x.abs(), x).imag,
    "complex": lambda x: torch.complex(x, x.cos()).imag,
    "complex_product": lambda x: (torch.complex(x, x.cos()) * torch.complex(x, x)).real,
    "complex_abs": lambda x: torch.complex(x, x.sin()).abs(),
    "conj": lambda x: torch.complex(x, x).conj().imag.contiguous(),
    "silu_gate": lambda x: x * F.silu(x.cos()),
    "divide": lambda x: x / (1 + x.exp()),
    # at 0 there is no number, or no slope: the layer keeps its values, and what reads them is zero
    "divide_by_itself": lambda x: x.sin() / x,
    "power_half": lambda x: x.abs() ** 0.5,
    "log": lambda x: x.abs().log(),
    "over_its_length": lambda x: x / x.norm(dim=1, keepdim=True),
    "frexp": lambda x: torch.frexp(x)[1].double() + torch.frexp(x)[0],
    "ones_of_shape": lambda x: x * torch.ones(x.shape[-1], dtype=x.dtype),
    "arange_of_shape": lambda x: x + torch.zeros(x.shape, dtype=x.dtype),
    "logit": lambda x: torch.logit(x, eps=0.1),
    "xlogy": lambda x: torch.xlogy(x, x.abs() + 1),
    "hypot": lambda x: torch.hypot(x, x),
    "fmod": lambda x: torch.fmod(x, 0.4),
    "maximum": lambda x: torch.maximum(x, x.cos()),
    "minimum": lambda x: torch.minimum(x, x.exp()),
    "heaviside": lambda x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x),
    "masked_by_itself": lambda x: x.masked_fill(x > 0.3, 2.0),
    "rrelu": lambda x: F.rrelu(x),
    "sinc": torch.sinc,
    "logical": lambda x: torch.logical_and(x > -1, x < 1).double(),
    "isfinite": lambda x: x.isfinite().double(),
    "bitwise": lambda x: ((x > 0) | (x < -1)).double(),
    "shift": lambda x: (x.int() << 1).double(),
    "trunc": torch.trunc,
}

POINTWISE = {
    **{name: seq(over(function), 8) for name, function in _UNARY.items()},
    "add": two(lambda m, x, y: x + y, 8),
    "multiply": two(lambda m, x, y: x * y.sigmoid(), 8),
    "divide_by_other": two(lambda m, x, y: x / (y.exp() + 1), 8),
    "power_of_other": two(lambda m, x, y: (x.abs() + 0.5) ** y.tanh(), 8),
    "where_of_two": two(
        lambda m, x, y: torch.where(m.at, x, y.cos()), 8, at=lambda: torch.tensor([[True], [False], [True], [True]])
    ),
    "angle_of_minus_zero": two(lambda m, x, y: torch.atan2(x, -y), 8),  # atan2(0, -0) is pi
    "where_of_data": two(lambda m, x, y: torch.where(x > y, x, y), 8),
    "outer_sum": two(lambda m, x, y: (x[:, :, None] + y[:, None]).relu().sum(2), 8),
    # a constant table meets the channels: they cannot leave
    "constant_table": seq(lambda m, x: x + torch.linspace(0, 1, 8, dtype=x.dtype), 0),
    "buffer_table": seq(lambda m, x: x + m.t, 8, t=lambda: torch.randn(4, 8)),
    # a table that code makes as wide as the channels has other numbers for others of them
    "table_of_width": seq(lambda m, x: x + torch.arange(0.0, x.shape[-1], dtype=x.dtype), 0),
    "table_of_half_width": seq(
        lambda m, x: torch.cat([x, torch.arange(x.shape[-1], 12, dtype=x.dtype).expand(2, 4, -1)], -1), 0, after=12
    ),
    "table_of_steps": seq(lambda m, x: x + torch.arange(0, 2 * x.shape[-1], 2, dtype=x.dtype), 0),
    "table_by_name": seq(lambda m, x: x + torch.arange(end=x.shape[-1], dtype=x.dtype), 0),
    "full_of_width": seq(lambda m, x: x + torch.full((4, x.shape[-1]), 2.0, dtype=x.dtype), 8),
    "full_of_width_by_method": seq(lambda m, x: x * x.new_full((x.size(-1),), 2.0), 8),
    "parameter_table": seq(lambda m, x: x + m.t, 8, t=parameter(1, 4, 8)),
    "bias_number": seq(lambda m, x: x + m.t, 8, t=parameter(1)),
    "layer_scale": seq(lambda m, x: x.cos() * m.t, 8, t=parameter(8)),
    "prelu": image(lambda m, x: m.p(x), 8, p=lambda: nn.PReLU(8)),
    "prelu_one": image(lambda m, x: m.p(x), 8, p=nn.PReLU),
    "squeeze_excite": image(
        lambda m, x: x * m.g(x.mean((2, 3), keepdim=True)).sigmoid(), 8, g=lambda: nn.Conv2d(8, 8, 1)
    ),
    # one channel steers all others and is left out of them
    "spatial_gate": image(lambda m, x: x * m.g(x).sigmoid(), 8, g=lambda: nn.Conv2d(8, 1, 1)),
}


def written(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, x.shape[-1], dtype=x.dtype)
    y[:, :2] = x[:, 2:]
    y[:, 2:] = x[:, :2].cos()
    return y


def rotary_complex(m: Any, x: Tensor) -> Tensor:
    """Heads of pairs times unit numbers, as the first language models with rotary positions did it."""
    b, n, _ = x.shape
    pairs = torch.view_as_complex(x.view(b, n, m.heads, -1, 2))
    angle = torch.arange(n, dtype=x.dtype)[:, None] * m.frequencies
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).flatten(2)


IN_PLACE = {
    "relu_": seq(in_place(lambda m, x: x.relu_()), 8),
    "add_number_": seq(in_place(lambda m, x: x.add_(1.0)), 8),
    "sigmoid_": seq(in_place(lambda m, x: x.sigmoid_()), 8),
    "add_": two(lambda m, x, y: x.mul(1).add_(y).mul_(y.cos()), 8),
    "view_transposed": seq(in_place(lambda m, x: x.transpose(1, 2).cos_()), 8),
    "view_token": seq(in_place(lambda m, x: x[:, 0].add_(1.0)), 8),
    "view_token_zero": seq(in_place(lambda m, x: x[:, 0].zero_()), 8),
    "view_halves": seq(in_place(lambda m, x: x.chunk(2, -1)[0].cos_()), 4),
    "view_merged": seq(in_place(lambda m, x: x.view(-1, x.shape[-1]).cos_()), 8),
    # the memory is changed through another way of reading it: heads and positions, or tokens and channels in one
    "view_heads": seq(in_place(lambda m, x: x.view(2, 4, m.h, -1).cos_()), 4 + 2, h=4),
    "view_heads_add": seq(in_place(lambda m, x: x.view(2, 4, m.h, -1).add_(1.0)), 4 + 2, h=4),
    "view_flat": seq(in_place(lambda m, x: x.flatten(1).cos_()), 8),
    "view_image": image(in_place(lambda m, x: x.flatten(1).add_(1.0)), 8),
    "base_of_view": Row(
        lambda: Net(
            lambda m, x: (lambda y: (lambda v: (y.add_(1.0), m.o(v.flatten(2)))[1])(y.view(2, 4, m.h, -1)))(
                m.a(x) * 1.0
            ),
            a=nn.Linear(5, 8),
            o=nn.Linear(8, 3),
            h=4,
        ),
        floats((2, 4, 5)),
        4 + 2,
    ),
    "copy_": two(lambda m, x, y: in_place(lambda m, z: z.copy_(y.cos()))(m, x), 8),
    "copy_into_part": two(lambda m, x, y: in_place(lambda m, z: z[:, :2].copy_(y[:, 2:].sigmoid()))(m, x), 8),
    "fill_": seq(in_place(lambda m, x: x[:, 1].fill_(2.0)), 8),
    "fill_zero_": seq(in_place(lambda m, x: x[:, 1].fill_(0.0)), 8),
    "masked_fill_": seq(in_place(lambda m, x: x.masked_fill_(_MASK, 3.0)), 8),
    "clamp_": seq(in_place(lambda m, x: x.clamp_(min=0.3)), 8),
    "written": seq(written, 8),
    "written_channels": seq(in_place(lambda m, x: x[..., : x.shape[-1] // 2].copy_(x[..., x.shape[-1] // 2 :])), 4),
    "out_argument": seq(lambda m, x: torch.exp(x, out=torch.empty_like(x)), 8),
    # the 2 rotations of every head are a table of the code: heads leave, pairs may as well
    "rotary_complex": seq(rotary_complex, 2 + 2, heads=2, frequencies=lambda: torch.tensor([1.0, 0.1])),
}


def started(layer: Callable[[], nn.Module], start: Callable[[Tensor], Any], units: int) -> Row:
    """A recurrent layer 5 -> 6 on (2, 4, 5) whose state, made of a linear layer, is not zero when it starts."""
    return Row(
        lambda: Net(
            lambda m, x: m.o(m.r(x, start(m.h(x[:, 0])[None]))[0]),
            r=layer(),
            h=nn.Linear(5, 6),
            o=nn.Linear(6, 3),
        ),
        floats((2, 4, 5)),
        units,
    )


def packed(m: Any, x: Tensor) -> Tensor:
    """Sequences of 4 and of 2 steps, filled up with ones."""
    lengths = torch.tensor([4, 2])
    y = m.r(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0]
    return nn.utils.rnn.pad_packed_sequence(y, batch_first=True, padding_value=m.filled)[0]


RECURRENT = {
    "lstm": seq(lambda m, x: m.r(x)[0], 16, r=lambda: nn.LSTM(8, 8, batch_first=True)),
    "lstm_layers": seq(lambda m, x: m.r(x)[0], 12, r=lambda: nn.LSTM(8, 4, 2, bidirectional=True, bias=False)),
    "lstm_projection": seq(lambda m, x: m.r(x)[0], 16, r=lambda: nn.LSTM(8, 9, 2, proj_size=8)),
    "lstm_cell_state": seq(lambda m, x: m.r(x)[1][1][0], 16, r=lambda: nn.LSTM(8, 8)),
    "gru": seq(lambda m, x: m.r(x)[0], 12, r=lambda: nn.GRU(8, 4, 3, bidirectional=True)),
    "rnn_tanh": seq(lambda m, x: m.r(x)[0], 16, r=lambda: nn.RNN(8, 8, 2, bias=False)),
    "rnn_relu": seq(lambda m, x: m.r(x)[1][-1], 16, r=lambda: nn.RNN(8, 8, 2, nonlinearity="relu")),
    # a state that starts at 0 at removed units, and one that does not: there all columns that read it have to be 0
    "gru_started": started(lambda: nn.GRU(5, 6, batch_first=True), lambda h: h, 6),
    "gru_started_at_half": started(lambda: nn.GRU(5, 6, batch_first=True), torch.sigmoid, 6),
    "lstm_started_at_half": started(lambda: nn.LSTM(5, 6, batch_first=True), lambda h: (h.sigmoid(), h), 6),
    "lstm_kept_at_half": started(lambda: nn.LSTM(5, 6, batch_first=True), lambda h: (h, h.sigmoid()), 6),
    "rnn_started_at_half": started(lambda: nn.RNN(5, 6, batch_first=True), torch.sigmoid, 6),
    "lstm_cell": seq(lambda m, x: m.r(x[:, 0])[0], 16, r=lambda: nn.LSTMCell(8, 8)),
    "gru_cell": seq(lambda m, x: m.r(x[:, 0], x[:, 1]), 8, r=lambda: nn.GRUCell(8, 8, bias=False)),
    "rnn_cell": seq(lambda m, x: m.r(x[:, 0], x[:, 1].cos()), 8, r=lambda: nn.RNNCell(8, 8)),
    "packed": seq(packed, 16, r=lambda: nn.LSTM(8, 8), filled=0.0),
    "packed_and_filled": seq(packed, 16, r=lambda: nn.GRU(8, 8), filled=1.0),
}

FOURIER = {
    "over_time": seq(lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.f, n=4, dim=1), 8, f=parameter(3, 8)),
    "over_channels": seq(lambda m, x: torch.fft.fft(x, dim=-1).real, 0),
    "over_space": image(lambda m, x: torch.fft.ifft2(torch.fft.fft2(x)).real, 8),
    "over_both": seq(lambda m, x: torch.fft.fftn(x, dim=(1, 2)).real, 0),
    "padded": seq(lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1), n=8, dim=1)[:, : x.shape[1]], 8),
    "magnitude": seq(lambda m, x: torch.fft.rfft(x, dim=1).abs(), 8),
    "shifted": seq(lambda m, x: torch.fft.fftshift(torch.fft.fft(x, dim=1), dim=1).imag, 8),
    "complex_weights": seq(
        lambda m, x: torch.fft.irfft(torch.einsum("bni,nio->bno", torch.fft.rfft(x, dim=1), m.w), n=4, dim=1),
        8 + 6,
        after=6,
        w=lambda: nn.Parameter(torch.randn(3, 8, 6, dtype=torch.complex128)),
    ),
}

FAMILIES: dict[str, dict[str, Row]] = {
    "contraction": CONTRACTION,
    "convolution": CONVOLUTION,
    "norm": NORM,
    "attention": ATTENTION,
    "shape": SHAPE,
    "reduction": REDUCTION,
    "spatial": SPATIAL,
    "lookup": LOOKUP,
    "pointwise": POINTWISE,
    "in_place": IN_PLACE,
    "recurrent": RECURRENT,
    "fourier": FOURIER,
}
ROWS = [pytest.param(row, id=f"{family}-{name}") for family, rows in FAMILIES.items() for name, row in rows.items()]


@pytest.mark.parametrize("row", ROWS)
def test_the_operator_agrees(row: Row) -> None:
    model, inputs, groups = prepared(row)
    offered = sum(g.size for g in groups.prunable)
    assert offered >= row.units, f"only {offered} units offered, expected {row.units}\n{groups}"
    assert row.units or not offered, f"expected everything frozen\n{groups}"
    others = fresh(inputs, seed=1)
    for units in subsets(groups, alone=True, count=4):
        found = difference(model, others, groups, units)
        assert found <= TOLERANCE, f"off by {found:.1e} without {units}\n{groups}"


# ---------------------------------------------------------------- the registry


def test_every_name_is_an_operator_of_torch() -> None:
    """A rule for a misspelt operator would never run."""
    missing = []
    for name in _RULES:
        namespace, _, operator = name.partition(".")
        packet = getattr(torch.ops, namespace)
        if not hasattr(packet, operator) and not hasattr(packet, f"{operator}_"):
            missing.append(name)
    assert not missing, f"{missing} are no operators of torch {torch.__version__}"


def test_every_rule_names_what_it_is_given() -> None:
    assert registered("aten.mm") is not None
    assert registered("aten.no_such_operator") is None
    assert is_pointwise(torch.ops.aten.add.Tensor)
    assert not is_pointwise(torch.ops.aten.mm.default)


def test_a_second_rule_is_refused_and_names_the_first() -> None:
    before = dict(_RULES)
    with pytest.raises(RuleError, match=r"aten\.mm has a rule already: only_train_once\.rules\.contraction\.matmul"):

        @rule("aten.mm")
        def again(c: Context, node: Node) -> None:
            raise AssertionError

    assert before == _RULES


@pytest.mark.parametrize("name", ["mm", "torch.ops.aten.mm", ""])
def test_a_name_that_is_no_operator_is_refused(name: str) -> None:
    with pytest.raises(RuleError, match=r"names no operator; write namespace\.name, for example 'aten\.mm'"):
        rule(name)(lambda c, node: None)


@torch.library.custom_op("oto_test::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    """Half of every number: an operator nobody knows."""
    return x * 0.5


def test_a_rule_of_the_user_makes_a_frozen_axis_prunable() -> None:
    row = flat(lambda m, x: halve(x), 8)
    _, _, groups = prepared(row)
    assert not groups.prunable
    assert any("no rule for this operator at oto_test.halve" in (g.reason or "") for g in groups)
    try:

        @rule("oto_test.halve")
        def rule_of_halve(c: Context, node: Node) -> None:
            c.set(node, c.dims(c.tensors(node)[0]))

        test_the_operator_agrees(row)
    finally:
        _RULES.pop("oto_test.halve", None)
    assert not prepared(row)[2].prunable


def test_a_wrong_rule_is_found() -> None:
    """The comparison can fail: a rule that calls half a cosine zero is caught."""

    @torch.library.custom_op("oto_test::half_cosine", mutates_args=())
    def half_cosine(x: Tensor) -> Tensor:
        return x.cos() * 0.5

    row = flat(lambda m, x: half_cosine(x), 8)
    try:

        @rule("oto_test.half_cosine")
        def wrong(c: Context, node: Node) -> None:
            c.set(node, c.dims(c.tensors(node)[0]))

        with pytest.raises(AssertionError, match="off by"):
            test_the_operator_agrees(row)
    finally:
        _RULES.pop("oto_test.half_cosine", None)


def test_a_rule_that_fails_freezes_what_it_touches(caplog: pytest.LogCaptureFixture) -> None:
    @torch.library.custom_op("oto_test::third", mutates_args=())
    def third(x: Tensor) -> Tensor:
        return x / 3

    row = flat(lambda m, x: third(x), 0)
    try:

        @rule("oto_test.third")
        def failing(c: Context, node: Node) -> None:
            raise IndexError("no such dim")

        _, _, groups = prepared(row)
    finally:
        _RULES.pop("oto_test.third", None)
    assert "the rule for oto_test.third in the model" in caplog.text
    text = "the rule for this operator failed (IndexError) at oto_test.third"
    assert any(text in (g.reason or "") for g in groups if not g.prunable), groups


def test_the_model_is_left_alone() -> None:
    model, inputs, groups = prepared(IN_PLACE["written"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for units in subsets(groups, alone=False, count=2):
        difference(model, inputs, groups, units)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
