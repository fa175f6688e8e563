"""One table of formulas: it agrees with torch's counter operator by operator, and where it does not, with the hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from only_train_once import find_groups, trace
from only_train_once.budgets import CostModel
from only_train_once.flops import count_flops
from only_train_once.inputs import call_model, observing

from .zoo import ZOO


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def by_torch(model: nn.Module, inputs: Any) -> dict[str, int]:
    """FLOPs by operator, as torch counts them."""
    # Its tracker of modules wants gradients.
    with observing(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    return {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}


@dataclass(frozen=True)
class Differs:
    """Where torch's counter is not right.

    Attributes:
        function, inputs: a call of the operator.
        operator: as it is counted.
        hand: FLOPs, two per multiply-accumulate, written out.
        torch: what torch counts.
    """

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    operator: str
    hand: int
    torch: int = 0


def whole(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, dtype=torch.int8)


def ends(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def either(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 1e9, lambda x: x @ x @ x, lambda x: x @ x, (x,))


R = torch.randn
LSTM = nn.LSTM(5, 7, 2)
_CPU = "aten._scaled_dot_product_flash_attention_for_cpu"

DIFFERS: dict[str, Differs] = {
    "attention on the CPU": Differs(
        attention, (R(2, 3, 5, 8), R(2, 3, 6, 8), R(2, 3, 6, 8)), _CPU, 2 * 2 * 3 * 5 * 6 * (8 + 8)
    ),
    "causal attention, all of it": Differs(
        lambda q, k, v: attention(q, k, v, is_causal=True),
        (R(2, 3, 5, 8), R(2, 3, 5, 8), R(2, 3, 5, 8)), _CPU, 2 * 2 * 3 * 5 * 5 * (8 + 8),
    ),
    "grouped queries": Differs(
        lambda q, k, v: attention(q, k, v, enable_gqa=True),
        (R(2, 6, 5, 8), R(2, 3, 5, 8), R(2, 3, 5, 8)), _CPU, 2 * 2 * 6 * 5 * 5 * (8 + 8),
    ),
    "LSTM": Differs(LSTM, (R(4, 3, 5),), "aten.mkldnn_rnn_layer", 2 * 4 * 3 * 4 * 7 * ((5 + 7) + (7 + 7))),
    "one matrix per expert": Differs(
        lambda a, b, offs: torch._grouped_mm(a, b, offs=offs),
        (R(8, 16).bfloat16(), R(2, 16, 24).bfloat16(), ends(3, 8)), "aten._grouped_mm", 2 * 8 * 16 * 24,
    ),
    "bilinear": Differs(F.bilinear, (R(2, 3), R(2, 4), R(5, 3, 4)), "aten._trilinear", 2 * 2 * 3 * 4 * 5),
    "time first": Differs(
        lambda x, w, b: torch.conv_tbc(x, w, b, 1), (R(7, 2, 3), R(3, 3, 4), R(4)), "aten.conv_tbc",
        2 * 7 * 2 * 3 * 4 * 3,
    ),
    "whole numbers": Differs(torch._int_mm, (whole(32, 16), whole(16, 8)), "aten._int_mm", 2 * 32 * 16 * 8),
    "with activation": Differs(
        torch._addmm_activation, (R(5), R(3, 4), R(4, 5)), "aten._addmm_activation", 2 * 3 * 4 * 5
    ),
    "batch that is added up": Differs(
        torch.addbmm, (R(3, 5), R(2, 3, 4), R(2, 4, 5)), "aten.addbmm", 2 * 2 * 3 * 4 * 5
    ),
    "matrix times vector": Differs(torch.mv, (R(3, 4), R(4)), "aten.mv", 2 * 3 * 4),
    "and something added": Differs(torch.addmv, (R(3), R(3, 4), R(4)), "aten.addmv", 2 * 3 * 4),
    "vector times vector": Differs(torch.dot, (R(4), R(4)), "aten.dot", 2 * 4),
    "one conjugated": Differs(torch.vdot, (R(4), R(4)), "aten.vdot", 2 * 4),
    "outer product, added": Differs(torch.addr, (R(3, 4), R(3), R(4)), "aten.addr", 2 * 3 * 4),
    "complex numbers": Differs(  # (a + bi)(c + di): four products and two sums, and two sums to accumulate
        torch.mm, (R(3, 4, dtype=torch.complex64), R(4, 5, dtype=torch.complex64)), "aten.mm", 8 * 3 * 4 * 5,
        2 * 3 * 4 * 5,
    ),
    "the branch that was taken": Differs(either, (R(4, 4),), "aten.matmul", 2 * 4 * 4 * 4, 2 * 2 * 4 * 4 * 4),
}  # fmt: skip

AGREES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "convolution in groups": (lambda x, w: F.conv2d(x, w, groups=4), (R(2, 4, 5, 5), R(8, 1, 3, 3)), 2 * 2 * 9 * 8 * 9),
    "depthwise": (lambda x, w: F.conv1d(x, w, groups=6), (R(2, 6, 9), R(6, 1, 3)), 2 * 2 * 7 * 6 * 3),
    "transposed, in groups": (
        lambda x, w: F.conv_transpose2d(x, w, groups=2, stride=2), (R(1, 4, 5, 5), R(4, 3, 2, 2)), 2 * 25 * 4 * 3 * 4
    ),
    "dilated": (lambda x, w: F.conv2d(x, w, dilation=2), (R(1, 2, 7, 7), R(3, 2, 3, 3)), 2 * 9 * 3 * 2 * 9),
    "GRU cell": (nn.GRUCell(3, 4), (R(2, 3),), 2 * 2 * 3 * 4 * (3 + 4)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (R(2, 3, 4), R(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "one example": (lambda x, w: F.conv2d(x, w), (R(3, 5, 6), R(4, 3, 2, 2)), 2 * 4 * 5 * 4 * 3 * 4),
    "one matrix for a batch": (torch.matmul, (R(2, 3, 4), R(4, 5)), 2 * 2 * 3 * 4 * 5),
    "batches that repeat": (torch.matmul, (R(2, 1, 3, 4), R(7, 4, 5)), 2 * 2 * 7 * 3 * 4 * 5),
    "layer": (F.linear, (R(2, 3, 4), R(5, 4), R(5)), 2 * 2 * 3 * 4 * 5),
}  # fmt: skip
BY_HAND = {**AGREES, **{name: (case.function, case.inputs, case.hand) for name, case in DIFFERS.items()}}

# Operators of the zoo that torch's counter does not know; each is in the table above.
UNKNOWN_TO_TORCH = {_CPU, "aten.mkldnn_rnn_layer", "aten._grouped_mm", "aten.mv", "aten.dot", "aten.vdot"}
COMPLEX = {"s4d", "lru", "fourier_operator", "block_filter", "global_filter", "fnet", "fast_convolution", "hyena"}


@pytest.mark.parametrize("name", DIFFERS)
def test_by_hand_where_torch_is_not_right(name: str) -> None:
    case = DIFFERS[name]
    model = Calls(case.function)
    count = count_flops(model, case.inputs)
    assert dict(count.by_operator) == {case.operator: case.hand}
    assert sum(by_torch(model, case.inputs).values()) == case.torch, "torch has changed: see if it is right now"


@pytest.mark.parametrize("name", AGREES)
def test_by_hand_where_torch_is_right(name: str) -> None:
    function, inputs, hand = AGREES[name]
    model = Calls(function)
    assert count_flops(model, inputs).total == sum(by_torch(model, inputs).values()) == hand


@pytest.mark.parametrize("name", BY_HAND)
def test_whole_and_in_parts(name: str) -> None:
    """Under inference mode, and inside of functions that are operators, compositions of operators are seen whole."""
    function, inputs, _ = BY_HAND[name]
    parts = count_flops(Calls(function), inputs)
    with torch.inference_mode():
        whole = count_flops(Calls(function), inputs)
    assert parts.total == whole.total


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch says what it does
@pytest.mark.parametrize("name", ZOO)
def test_agrees_with_torch(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    ours = {op: n for op, n in count_flops(model, inputs).by_operator.items() if op not in UNKNOWN_TO_TORCH}
    theirs = by_torch(model, inputs)
    if name in COMPLEX:
        assert ours.keys() == theirs.keys()
        assert all(theirs[op] <= ours[op] <= 4 * theirs[op] for op in ours)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", BY_HAND)
def test_the_graph_says_the_same(name: str) -> None:
    """The zoo's networks are in test_budgets.py, whole and cut."""
    function, inputs, hand = BY_HAND[name]
    model = Calls(function)
    assert CostModel(find_groups(trace(model, inputs)), dict(model.named_parameters())).costs().flops == hand
