"""Operators that take functions are seen from the inside. Torch trains some of them on few devices or with warnings, so
that these networks are no part of the zoo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

from only_train_once.flops import count_flops
from only_train_once.groups import find_groups
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet

from .pruning import choose, randomize, zero


class FlexAttention(nn.Module):
    """Attention with a bias that a function gives, one slope per head."""

    def __init__(self, heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.stem, self.qkv = nn.Linear(5, 10), nn.Linear(10, 3 * heads * head_dim)
        self.proj, self.head = nn.Linear(heads * head_dim, 10), nn.Linear(10, 3)
        self.slope = nn.Parameter(torch.rand(heads))

    def biased(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + self.slope[head] * (key - query)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, score_mod=self.biased, scale=self.scale)
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, -1)))


class Scanned(nn.Module):
    """The recurrence is a function of state and step."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gates, self.head = nn.Linear(5, 2 * width), nn.Linear(width, 3)

    @staticmethod
    def step(state: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        new, gate = inputs
        state = torch.sigmoid(gate) * state + torch.tanh(new)
        return state, state.clone()

    def forward(self, x: Tensor) -> Tensor:
        new, gate = self.gates(x).transpose(0, 1).chunk(2, dim=-1)
        _, y = scan(self.step, torch.zeros_like(new[0]), (new, gate))
        return self.head(y.transpose(0, 1))


class Chosen(nn.Module):
    """Data chooses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cond(x.isfinite().all(), self.a, self.b, (self.stem(x),))))


class Signs(nn.Module):
    """Data chooses one of two functions without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cond(x.isfinite().all(), torch.cos, torch.sin, (self.stem(x),)))


class Repeated(nn.Module):
    """A loop runs until a counter says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = (torch.zeros((), dtype=torch.int64), self.stem(x))
        _, y = while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, torch.tanh(self.layer(y))), start)
        return self.head(y)


# network, prunable units, part of a reason
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "flex_attention": (FlexAttention, 10, "its entries are chosen by data at aten.index"),
    "scan": (Scanned, 8, ""),
    "cond": (Signs, 8, ""),
    "cond_layers": (Chosen, 14, ""),
    "while_loop": (Repeated, 8, ""),
}


@pytest.mark.parametrize(("build", "units", "reason"), NETWORKS.values(), ids=NETWORKS)
def test_what_functions_do_is_analysed(build: Callable[[], nn.Module], units: int, reason: str) -> None:
    model, x = build(), torch.randn(2, 4, 5)
    randomize(model)
    groups = find_groups(trace(model, x))
    assert sum(group.size for group in groups.prunable) == units, groups
    assert any(reason in str(group.reason) for group in groups)
    zero(model, groups, choose(groups))
    subnet: Any = construct_subnet(model, groups)[0]
    assert verify_subnet(model, subnet, x, tolerance=1e-9).max_relative_difference <= 1e-9
    if units:
        assert count_flops(subnet, x).total < count_flops(model, x).total
