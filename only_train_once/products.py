"""Which operators multiply, and what: the one table of formulas, for counting as a model runs and from its graph.

One multiply-accumulate is two FLOPs, one of complex numbers eight (four products, four sums). Additions of biases,
normalizations, activations and pooling are not counted (they are a few percent of a network, and counting conventions
for them differ).

A formula names products of dims. A dim is given by the places where its size can be read, an operand and one of its
dims: the graph knows of one place that units leave there and of another perhaps not. A call is whatever
says what an operator was called with: of tensors (`flops.py`), or of nodes of a graph (`workload.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

Place = tuple[Any, int]  # operand, dim
Product = tuple[Sequence[Place], ...]  # dims, each by its places


class Call(Protocol):
    """A call of an operator."""

    @property
    def args(self) -> Sequence[Any]:
        """Positional arguments; which of them are operands, `is_operand` says."""

    @property
    def made(self) -> Any:
        """Its first result, an operand, or None if nobody reads it."""

    def argument(self, name: str) -> Any:
        """The argument of that schema name, however it was passed; None where the operator has none."""

    def is_operand(self, value: Any) -> bool:
        """Whether an argument is a tensor."""

    def shape(self, operand: Any) -> Sequence[int]:
        """Sizes of an operand."""

    def is_complex(self, operand: Any) -> bool:
        """Whether an operand's entries are complex numbers."""


Formula = Callable[[Call], Iterable[Product]]
FORMULAS: dict[str, Formula] = {}  # "aten.mm" -> the products it computes


def flops_each(call: Call, product: Product) -> int:
    """FLOPs of one multiply-accumulate of a product."""
    return 8 if all(call.is_complex(places[0][0]) for places in product) else 2


def _multiplies(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula for ATen operators, all overloads."""

    def register(formula: Formula) -> Formula:
        for name in (f"aten.{name}" for name in names):
            if name in FORMULAS:
                raise ValueError(f"two FLOP formulas for {name}")
            FORMULAS[name] = formula
        return formula

    return register


def _operands(call: Call, first: int = 0) -> list[Any]:
    return [arg for arg in call.args[first:] if call.is_operand(arg)]


def _dims(call: Call, operand: Any, first: int = 0, last: int | None = None) -> list[list[Place]]:
    """Dims of an operand, one by one."""
    return [[(operand, d)] for d in range(len(call.shape(operand)))[first:last]]


def _longest(call: Call, places: list[Place]) -> list[Place]:
    """Where one operand is longer than another, that one repeats."""
    return sorted(places, key=lambda place: -call.shape(place[0])[place[1]])


def _product(call: Call, a: Any, b: Any) -> Product:
    """(..., m, k) times (..., k, n); a vector is (k)"""
    of_a, of_b = len(call.shape(a)), len(call.shape(b))
    batch = [
        _longest(call, [(t, rank - back) for t, rank in ((a, of_a), (b, of_b)) if rank >= back])
        for back in range(max(of_a, of_b), 2, -1)
    ]
    rows = [[(a, of_a - 2)]] if of_a > 1 else []
    columns = [[(b, of_b - 1)]] if of_b > 1 else []
    return (*batch, *rows, [(a, of_a - 1), (b, max(of_b - 2, 0))], *columns)


@_multiplies("mm", "_int_mm", "_scaled_mm", "bmm", "matmul", "mv", "dot", "vdot")
def _matrices(call: Call) -> Iterable[Product]:
    yield _product(call, *_operands(call)[:2])


@_multiplies("addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv")
def _added_matrices(call: Call) -> Iterable[Product]:
    yield _product(call, *_operands(call, 1)[:2])


@_multiplies("_grouped_mm", "_scaled_grouped_mm")
def _grouped_matrices(call: Call) -> Iterable[Product]:
    """Every row meets the matrix of its group alone; where both have three dims, it is a batch of products."""
    a, b = _operands(call)[:2]
    of_a, of_b = len(call.shape(a)), len(call.shape(b))
    batch = [[(a, 0), (b, 0)]] if of_a == of_b == 3 else []
    yield (*batch, [(a, of_a - 2)], [(a, of_a - 1), (b, of_b - 2)], [(b, of_b - 1)])


@_multiplies("addr")
def _outer(call: Call) -> Iterable[Product]:
    a, b = _operands(call, 1)[:2]
    yield ([(a, 0)], [(b, 0)])


@_multiplies("linear")
def _linear(call: Call) -> Iterable[Product]:
    x, weight = _operands(call)[:2]
    yield (*_dims(call, x, 0, -1), *_dims(call, weight))


@_multiplies(
    *("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"),
    *("conv1d", "conv2d", "conv3d"),
)
def _convolution(call: Call) -> Iterable[Product]:
    """Every weight meets every position of the result once, and of the input where it is transposed.

    ``weight`` is (out, in / groups, *kernel), so convolution groups are in its size already; transposed it is
    (in, out / groups, *kernel).
    """
    x, weight = _operands(call)[:2]
    at = x if call.argument("transposed") or call.made is None else call.made
    batch = _dims(call, at, 0, len(call.shape(at)) - len(call.shape(weight)) + 1)
    yield (*batch, *_dims(call, at, len(batch) + 1), *_dims(call, weight))


@_multiplies("conv_tbc")
def _convolution_over_time(call: Call) -> Iterable[Product]:
    """x (time, batch, in), weight (kernel, in, out); the result (time, batch, out) is not as long as x."""
    x, weight = _operands(call)[:2]
    at = x if call.made is None else call.made
    yield (*_dims(call, at, 0, 2), *_dims(call, weight))


@_multiplies(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
)
def _attention(call: Call) -> Iterable[Product]:
    """Scores, and their product with the values; all of them, also where a mask hides some."""
    q, k, v = _operands(call)[:3]
    of_q, of_k, of_v = (len(call.shape(t)) for t in (q, k, v))
    batch = [[(q, d), *([(call.made, d)] if call.made is not None else [])] for d in range(of_q - 2)]
    rows = [*batch, [(q, of_q - 2)], [(k, of_k - 2)]]
    yield (*rows, [(q, of_q - 1), (k, of_k - 1)])
    yield (*rows, [(v, of_v - 1)])


@_multiplies("_trilinear")
def _trilinear(call: Call) -> Iterable[Product]:
    """``nn.Bilinear``: contract over everything that the three operands span together."""
    places: dict[int, list[Place]] = {}
    for operand, expand in zip(_operands(call)[:3], ("expand1", "expand2", "expand3"), strict=True):
        inserted = call.argument(expand)
        own = [d for d in range(len(call.shape(operand)) + len(inserted)) if d not in inserted]
        for dim, d in enumerate(own):
            places.setdefault(d, []).append((operand, dim))
    yield tuple(_longest(call, p) for p in places.values())


@_multiplies("mkldnn_rnn_layer")
def _recurrent_layer(call: Call) -> Iterable[Product]:
    """One layer and direction; x (time, batch, width), the input-hidden and the hidden-hidden weight."""
    x, *weights = _operands(call)[:3]
    yield from ((*_dims(call, x, 0, 2), *_dims(call, w)) for w in weights)


@_multiplies("_cudnn_rnn", "miopen_rnn", "lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Iterable[Product]:
    """All layers and directions; x (time, batch, width), or packed (rows, width); only the matrices multiply."""
    x = call.args[0]
    lists = [a for a in call.args if isinstance(a, (list, tuple)) and a and all(map(call.is_operand, a))]
    weights = lists[-1]  # states come first, where they are a list
    yield from ((*_dims(call, x, 0, -1), *_dims(call, w)) for w in weights if len(call.shape(w)) == 2)


@_multiplies("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(call: Call) -> Iterable[Product]:
    x = call.args[0]
    yield from ((*_dims(call, x, 0, -1), *_dims(call, call.argument(name))) for name in ("w_ih", "w_hh"))


__all__ = ["FORMULAS", "Call", "Formula", "Place", "Product", "flops_each"]
