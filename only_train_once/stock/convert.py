"""`stock_model`: a subnet as the ordinary model of its library, with a configuration of smaller widths.

[Note: the way there]
The widths are read from the layers, each field of the configuration from the places its family names. The library
builds the model from the new configuration; the subnet's tensors go in under their names; the result is compared with
the subnet. In between, what the stock code computes from the new widths, where the subnet keeps the old number, is
moved into weights:

    RMS norm       that remembers N of its n channels: w √(N/n), and eps N/n (``docs/how-it-works.md`` derives it)
    one eps        for norms of several widths: RMSNorm(c q; c² eps) = RMSNorm(q; eps), so what feeds the norm takes c
    softmax scale  of the full head-dim: q / stock's scale · the subnet's, in the weights that make q
    embeddings     that are multiplied by √width: into the table, and out of the last norm where the table is tied

All of this happens in float64, where the comparison is sharp; the weights are then rounded to their own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..copying import copy_module
from ..errors import StockError, VerificationError
from ..inputs import Inputs, call_model, cast_inputs, clone_inputs, dtype_of, fresh_inputs, in_float64, named_outputs
from ..norms import (
    FullWidthGatedRMSNorm,
    FullWidthGroupNorm,
    FullWidthLayerNorm,
    FullWidthResponseNorm,
    FullWidthRMSNorm,
    FullWidthScaledRMSNorm,
)
from ..surgery import named_tensors, replace_tensors, ties
from ..verify import verify_subnet
from .families import Family, Scale, Stack

_UNSHARED = (
    FullWidthLayerNorm,
    FullWidthGroupNorm,
    FullWidthResponseNorm,
    FullWidthGatedRMSNorm,
    FullWidthScaledRMSNorm,
)
WAY_OUT = "subnet.save and only_train_once.load keep it as it is"


@dataclass(frozen=True)
class StackPlace:
    """Where the layers of a stack are in a model, and which of them stay.

    Attributes:
        path: of their list, ending in a dot.
        layers: all of them.
        kept: positions of those that stay.
    """

    stack: Stack
    path: str
    layers: Sequence[nn.Module]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Maker:
    """What builds a stock model.

    Attributes:
        name: of the configuration, for messages.
        build: fields -> the model, with any weights.
        full: field -> its value in the full model.
        per_layer: whether the configuration takes ``per_layer_config``.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Any]
    full: Callable[[str], Any]
    per_layer: bool = False


def places(model: nn.Module, family: Family) -> list[StackPlace]:
    """The stacks that the model has; layers that add exactly zero do not stay, except for one."""
    prefix = base_prefix(model)
    out = []
    for stack in family.stacks:
        layers = reach(model, prefix + stack.layers)
        if layers is None:
            continue  # a model with the encoder only
        kept = [i for i, layer in enumerate(layers) if not (stack.adds and adds_nothing(layer, stack))]
        out.append(StackPlace(stack, f"{prefix}{stack.layers}.", layers, tuple(kept or [0])))
    return out


def adds_nothing(layer: nn.Module, stack: Stack) -> bool:
    """Whether all that the layer adds to the stream is exactly zero."""
    return all(not bool(p.any()) for path in stack.adds for p in layer.get_submodule(path).parameters())


def base_prefix(model: nn.Module) -> str:
    """Path of the base model, with a dot behind, or nothing."""
    name = getattr(model, "base_model_prefix", "")
    return f"{name}." if name and isinstance(getattr(model, name, None), nn.Module) else ""


def reach(owner: Any, path: str) -> Any:
    """What stands at a dotted path, None if nothing does."""
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def stock_model(model: nn.Module, inputs: Inputs, family: Family, maker: Maker, *, pad: bool = False) -> Any:
    """The subnet ``model`` as what ``maker`` builds, see [Note: the way there].

    Raises:
        StockError: that is not the same; names the layer and the field.
    """
    _refuse_other_norms(model)
    where = places(model, family)
    norms, eps = _norms(model, family, where)
    stock = _build(family, maker, where, eps, pad)
    renamed = _Names(where)
    with torch.no_grad():
        wide = _tensors(model, stock, renamed, family, pad)
        _compensate(model, stock, renamed, family, where, norms, eps, wide)
        tensors = named_tensors(model)
        narrow = {name: t.to(tensors[renamed(name)].dtype) for name, t in wide.items()}
    put(stock, narrow)
    check(_with_tables(model, stock, renamed, family), stock, wide, inputs)
    return stock.train(model.training)


# ----------------------------------------------------------------------------------------------------------------
# The configuration
# ----------------------------------------------------------------------------------------------------------------


def _read(place: StackPlace, field: str, at: str, dim: int | None, per: str) -> dict[int, int]:
    """Layer -> size, for the layers that stay and have it."""
    sizes = {}
    for i in place.kept:
        value = reach(place.layers[i], at)
        if value is None:
            continue
        size = int(value) if dim is None else int(value.shape[dim])
        if per:
            each = int(reach(place.layers[i], per))
            if size % each:
                raise StockError(f"{place.path}{i}.{at} has {size} positions in heads of {each}: no whole number")
            size //= each
        sizes[i] = size
    return sizes


def _widths(where: Sequence[StackPlace]) -> dict[str, list[tuple[str, int]]]:
    """Field -> (layer's path, value in that layer)."""
    out: dict[str, list[tuple[str, int]]] = {}
    for place in where:
        for width in place.stack.widths:
            sizes = _read(place, width.field, width.at, width.dim, width.per)
            out.setdefault(width.field, []).extend((f"{place.path}{i}", size) for i, size in sizes.items())
    return out


def _build(family: Family, maker: Maker, where: Sequence[StackPlace], eps: float | None, pad: bool) -> Any:
    """The stock model with its own initial weights."""
    read = {field: found for field, found in _widths(where).items() if found}
    values = {field: max(n for _, n in found) for field, found in read.items()}
    values |= {place.stack.count: len(place.kept) for place in where}
    settings: dict[str, Any] = dict(values)
    if eps is not None and family.norm_eps is not None:
        settings[family.norm_eps[0]] = eps
    for name in family.lists:
        entries = maker.full(name)
        if isinstance(entries, (list, tuple)) and len(entries) == len(where[0].layers):
            settings[name] = [entries[i] for i in where[0].kept]
    uneven = [field for field, found in read.items() if len({n for _, n in found}) > 1]
    if uneven and not pad:
        return _per_layer(maker, settings, read, uneven)
    refusal: Exception | None = None
    for candidate in _candidates(settings, maker, family, pad):
        try:
            return maker.build(candidate)
        except Exception as error:  # whatever a configuration or a constructor checks
            refusal = refusal or error
    sizes = ", ".join(f"{field} {value}" for field, value in values.items())
    raise StockError(
        f"{maker.name} refuses {sizes}: {str(refusal).strip()}"
        + ("" if pad else f" Heads can be filled up with zeros to a number that fits (pad=True), or {WAY_OUT}")
    ) from refusal


def _candidates(settings: dict[str, Any], maker: Maker, family: Family, pad: bool) -> Iterator[dict[str, Any]]:
    """The settings, then those with more heads, up to the full model's."""
    yield settings
    heads = [field for field in family.heads if field in settings]
    if not pad or not heads:
        return
    least = settings[heads[0]]
    for n in range(least + 1, maker.full(heads[0]) + 1):
        yield settings | {field: n * (settings[field] // least) for field in heads}


def _per_layer(
    maker: Maker, settings: Mapping[str, Any], read: Mapping[str, Sequence[tuple[str, int]]], uneven: Sequence[str]
) -> Any:
    """With a number per layer, where the configuration and the model's class know one."""
    field = uneven[0]
    (first, size), *rest = read[field]
    other, differs = next((layer, n) for layer, n in rest if n != size)
    message = (
        f"{other} has {field} {differs}, {first} has {size}, and {maker.name} has one number for all layers: train "
        f"with uniform=True, fill the narrower layers up with zeros (pad=True), or {WAY_OUT}"
    )
    if not maker.per_layer:
        raise StockError(message)
    layers: dict[int, dict[str, int]] = {}
    for field in uneven:
        for number, (_, size) in enumerate(read[field]):
            layers.setdefault(number, {})[field] = size
    try:
        return maker.build(dict(settings) | {"per_layer_config": layers})
    except Exception as error:  # most classes read the field from the configuration of the whole model
        raise StockError(message) from error


# ----------------------------------------------------------------------------------------------------------------
# The tensors
# ----------------------------------------------------------------------------------------------------------------


class _Names:
    """Name in the stock model -> name in the subnet: layers that were left out shift those behind them."""

    def __init__(self, where: Sequence[StackPlace]) -> None:
        self.where = where

    def __call__(self, name: str) -> str:
        for place in self.where:
            if name.startswith(place.path):
                number, _, rest = name.removeprefix(place.path).partition(".")
                return f"{place.path}{place.kept[int(number)]}" + (f".{rest}" if rest else "")
        return name

    def left_out(self, name: str) -> bool:
        """Whether something of the subnet belongs to a layer that does not stay."""
        for place in self.where:
            if name.startswith(place.path):
                return int(name.removeprefix(place.path).partition(".")[0]) not in place.kept
        return False


def _tensors(model: nn.Module, stock: nn.Module, renamed: _Names, family: Family, pad: bool) -> dict[str, Tensor]:
    """First name in the stock model -> the subnet's tensor, in float64 if it is a float."""
    have, want = named_tensors(model), named_tensors(stock)
    saved = stock.state_dict()
    missing = [name for name in want if renamed(name) not in have]
    unknown = [name for name in have if not renamed.left_out(name) and name not in {renamed(n) for n in want}]
    if missing or unknown:
        raise StockError(
            f"the stock {type(model).__name__} has {missing[:3]}, which the subnet lacks, and lacks {unknown[:3]}, "
            f"which the subnet has: {WAY_OUT}"
        )
    out = {}
    for name in ties(want)[1]:
        tensor = have[renamed(name)].detach()
        if name not in saved:  # a table that the stock model computes: nothing that is written could change it
            _check_table(name, tensor, want[name], renamed, family)
            continue
        tensor = tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
        out[name] = tensor if tensor.shape == want[name].shape else _fit(name, tensor, want[name], stock, family, pad)
    return out


def _check_table(name: str, tensor: Tensor, expected: Tensor, renamed: _Names, family: Family) -> None:
    if _is_number(name, family) or name.endswith(family.unread):
        return  # weights make up for it, or nothing reads it
    if tensor.shape == expected.shape and torch.equal(tensor, expected.to(tensor.dtype)):
        return
    reason = f"is not what the stock model computes from its configuration: {WAY_OUT}"
    if name.endswith("inv_freq"):
        reason = (
            f"keeps {tensor.numel()} frequencies that are not those of a head_dim of {2 * expected.numel()}; only "
            "every second, every third, ... pair of a head could stay. Keep head_dim whole "
            f"(oto.mark_unprunable_for_stock()), or {WAY_OUT}"
        )
    raise StockError(f"{renamed(name)} {reason}")


def _is_number(name: str, family: Family) -> bool:
    return any(name.endswith(scale.number) for scale in family.scales)


def _with_tables(model: nn.Module, stock: nn.Module, renamed: _Names, family: Family) -> nn.Module:
    """The subnet with the tables of the stock model, which are the same before a cast to half precision rounds them."""
    out, saved = copy_module(model), stock.state_dict()
    have, want = named_tensors(out), named_tensors(stock)
    new: dict[tuple[str, ...], Tensor] = {
        (renamed(name),): table.detach().clone()
        for name, table in want.items()
        if name not in saved and not _is_number(name, family) and table.shape == have[renamed(name)].shape
    }
    replace_tensors(out, new)
    return out


def _fit(name: str, tensor: Tensor, want: Tensor, stock: Any, family: Family, pad: bool) -> Tensor:
    """The tensor filled up with zeros, or the reason why its width has to be another one."""
    short = [d for d in range(tensor.ndim) if tensor.shape[d] != want.shape[d]]
    if not pad or tensor.ndim != want.ndim or any(tensor.shape[d] > want.shape[d] for d in short):
        reason = next((f" ({why})" for ending, why in family.whole.items() if name.endswith(ending)), "")
        raise StockError(
            f"{name} is {list(tensor.shape)}, a {type(stock).__name__} of this configuration has "
            f"{list(want.shape)}{reason}: freeze what its configuration has no field for before training "
            f"(oto.mark_unprunable_for_stock()), fill it up with zeros (pad=True), or {WAY_OUT}"
        )
    for d in short:
        path = name.rpartition(".")[0]
        fused = next((dim for module, dim in family.fused.items() if path.endswith(module)), None)
        blocks = 3 if fused is not None and d == (fused if tensor.ndim > 1 else 0) else 1
        parts = []
        for part in tensor.chunk(blocks, d):
            shape = list(part.shape)
            shape[d] = want.shape[d] // blocks - part.shape[d]
            parts += [part, part.new_zeros(shape)]
        tensor = torch.cat(parts, d)
    return tensor


def put(stock: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the stock model's tensors, the tied ones at all their names."""
    aliases = ties(named_tensors(stock))[1]
    replace_tensors(stock, {(name, *aliases[name]): tensor for name, tensor in tensors.items()})


# ----------------------------------------------------------------------------------------------------------------
# What the stock code computes from the new widths
# ----------------------------------------------------------------------------------------------------------------


def _refuse_other_norms(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _UNSHARED):
            of = type(module).__mro__[1].__name__ if isinstance(module, nn.LayerNorm) else "norm"
            width = math.prod(getattr(module, "normalized_shape", ())) or "fewer"
            raise StockError(
                f"{path} goes on averaging over {module.full_width} channels though {width} are left, and the stock "
                f"{of} averages over what it finds: keep its width whole (oto.mark_unprunable_for_stock(), or an OTO "
                f"without wide=True), or {WAY_OUT}"
            )


@dataclass(frozen=True)
class _Norm:
    """What a norm of the subnet would be in the stock model.

    Attributes:
        factor: of its weight (after adding the offset).
        offset: what the class adds to its weight.
        eps: what it needs.
    """

    factor: float
    offset: int
    eps: float


def _norms(model: nn.Module, family: Family, where: Sequence[StackPlace]) -> tuple[dict[str, _Norm], float | None]:
    """Path -> norm, for the RMS norms that stay, and the eps that those without a weight in front of them need."""
    if family.norm_eps is None:
        return {}, None
    renamed, found = _Names(where), {}
    for path, module in model.named_modules():
        if renamed.left_out(path):
            continue
        if isinstance(module, FullWidthRMSNorm):
            ratio = module.full_width / module.normalized_shape[0]
            found[path] = _Norm(math.sqrt(ratio), module.offset, float(module.eps or 0.0) * ratio)
        elif "Norm" in type(module).__name__ and isinstance(getattr(module, family.norm_eps[1], None), float):
            found[path] = _Norm(1.0, _offset(module), getattr(module, family.norm_eps[1]))
    needed = {path: norm.eps for path, norm in found.items() if not any(path.endswith(f) for f in family.feeds)}
    first = next(iter(needed), None)
    for path, value in needed.items():
        assert first is not None
        if not math.isclose(value, needed[first], rel_tol=1e-12):
            raise StockError(
                f"{path} needs eps {value:.6g}, {first} needs {needed[first]:.6g}, and the configuration has one "
                f"{family.norm_eps[0]}: cut the same width everywhere, or {WAY_OUT}"
            )
    return found, None if first is None else needed[first]


def _compensate(
    model: nn.Module,
    stock: nn.Module,
    renamed: _Names,
    family: Family,
    where: Sequence[StackPlace],
    norms: Mapping[str, _Norm],
    eps: float | None,
    tensors: dict[str, Tensor],
) -> None:
    """Change ``tensors`` so that the stock model computes what the subnet does."""
    names = ties(named_tensors(stock))[0]

    def multiply(path: str, factor: float, offset: int = 0, rows: Callable[[Tensor], Tensor] | None = None) -> None:
        for leaf in ("weight", "bias"):
            name = names.get(f"{path}.{leaf}")
            if name is not None:
                part = tensors[name] if rows is None else rows(tensors[name])
                part.copy_((part + offset) * factor - offset if leaf == "weight" else part * factor)

    def queries(module: str) -> Callable[[Tensor], Tensor] | None:
        fused = next((dim for ending, dim in family.fused.items() if module.endswith(ending)), None)
        return None if fused is None else lambda t: t.chunk(3, fused if t.ndim > 1 else 0)[0]

    def offset(path: str) -> int:
        norm = norms.get(renamed(path))
        return 0 if norm is None else norm.offset

    for path, _ in stock.named_modules():
        norm = norms.get(renamed(path))
        if norm is None:
            continue
        if norm.factor != 1.0:
            multiply(path, norm.factor, norm.offset)
        for ending, feeder in family.feeds.items():
            if path.endswith(ending) and eps is not None and norm.eps != eps:
                multiply(path.removesuffix(ending) + feeder, math.sqrt(eps / norm.eps))

    def adjust(scale: Scale, prefix: str) -> None:
        factor = _ratio(reach(model, renamed(prefix + scale.number)), reach(stock, prefix + scale.number))
        switch = reach(model, f"config.{scale.when}") if scale.when else True
        if factor is None or factor == 1.0 or not switch:
            return
        factor = factor**scale.power
        target = prefix + scale.into
        multiply(target, factor, offset(target), queries(target))
        if scale.tied and ties(named_tensors(stock))[1].get(f"{target}.weight"):
            multiply(prefix + scale.tied, 1.0 / factor, offset(prefix + scale.tied))

    for scale in family.scales:
        adjust(scale, base_prefix(stock))
    for place in where:
        for number in range(len(place.kept)):
            for scale in place.stack.scales:
                adjust(scale, f"{place.path}{number}.")


def _ratio(mine: Any, stocks: Any) -> float | None:
    """The subnet's number over the stock model's; None if there is none."""
    if mine is None or stocks is None:
        return None
    if isinstance(mine, Tensor) and isinstance(stocks, Tensor) and torch.equal(mine, stocks.to(mine.dtype)):
        return 1.0  # up to a cast
    return float(mine) / float(stocks)


def _offset(norm: nn.Module) -> int:
    """What a norm adds to its weight: with a weight of zeros it returns zeros, or not."""
    probe = copy_module(norm).double()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        width = next((p.shape[0] for p in probe.parameters()), 1)
        device = next((p.device for p in probe.parameters()), None)
        return int(bool(probe(torch.ones(1, 1, width, dtype=torch.float64, device=device)).any()))


# ----------------------------------------------------------------------------------------------------------------
# The comparison
# ----------------------------------------------------------------------------------------------------------------

_FLOOR = 8  # roundings of the dtype that are no difference, 1e-6 in float32
_SPREAD = 10  # or as many times what rounding does to the subnet itself


def check(model: nn.Module, stock: nn.Module, wide: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Compare the stock model with the subnet, in float64 with unrounded weights and in its own dtype.

    Raises:
        StockError: they differ.
    """
    exact = copy_module(stock).double()
    put(exact, wide)
    try:
        verify_subnet(model, exact, inputs)
    except VerificationError as error:
        raise StockError(
            f"the stock {type(stock).__name__} would compute something else: {error}; {WAY_OUT}"
        ) from error
    own = dtype_of(model)
    if own in (None, torch.float64):
        return
    assert own is not None
    for seed in range(2):
        fresh = cast_inputs(fresh_inputs(inputs, seed), own)
        reference = _outputs(copy_module(model).double(), cast_inputs(fresh, torch.float64))
        mine, found = _outputs(copy_module(model), fresh), _outputs(copy_module(stock), fresh)
        for name, expected in reference.items():
            peak = float(expected.abs().max()) or 1.0
            rounding = float((mine[name].double() - expected).abs().max()) / peak
            difference = float((found[name].double() - expected).abs().max()) / peak
            allowed = max(_FLOOR * torch.finfo(own).eps, _SPREAD * rounding)
            if not difference <= allowed:
                raise StockError(
                    f"{name} of the stock {type(stock).__name__} differs from the subnet's by {difference:.2g} in "
                    f"{str(own).removeprefix('torch.')}, more than rounding explains ({allowed:.2g}); {WAY_OUT}"
                )


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    widest = dtype_of(model) is torch.float64
    with torch.no_grad(), in_float64() if widest else nullcontext():
        output = call_model(model.eval(), clone_inputs(inputs))
    return {name: t.detach() for name, t in named_outputs(output) if t.is_floating_point() and t.numel()}
