"""Seconds of operators at a grid of sizes, and between them.

A table is plain data: `LatencyTable.to_dict` is JSON, so that one measured on a phone can be brought along::

    {"device": "...", "rest": 0.0,
     "layers": {"conv1:convolution": {"sizes": [[16, 32], [32, 64]], "seconds": [[1e-4, 2e-4], [2e-4, 4e-4]]}}}

A layer is a counted operator under the name that ``groups.workload.operators`` gives it. ``sizes`` has a list for each
dim of its operands that units can shorten, in order of appearance and ascending (dims that some group shortens both of
go together, the first stands for them, see `Workload.axes`); ``seconds`` is nested accordingly. Between sizes seconds
are linear in each dim, beyond the ends they are those of the end.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigurationError
from .workload import Operand, Operator, Workload, operands_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerLatency:
    """Seconds of one operator.

    Attributes:
        sizes: per dim ascending sizes.
        seconds: (sizes of the first dim, sizes of the second, ...)
    """

    sizes: tuple[tuple[int, ...], ...]
    seconds: NDArray[np.float64]

    def at(self, sizes: Sequence[int]) -> float:
        """Seconds at these sizes, one per dim."""
        values = self.seconds
        for grid, size in zip(self.sizes, sizes, strict=True):
            upper = min(max(bisect_right(grid, size), 1), max(len(grid) - 1, 1))
            low = grid[upper - 1]
            high = grid[upper] if upper < len(grid) else low
            share = min(max((size - low) / (high - low), 0.0), 1.0) if high > low else 0.0
            values = values[upper - 1] if share == 0.0 else (1 - share) * values[upper - 1] + share * values[upper]
        return float(values)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Seconds of a forward pass, operator by operator.

    Attributes:
        layers: name of an operator -> its seconds.
        rest: seconds of everything that is no layer, with nothing removed; taken to shrink with the bytes of
            activations. 0 leaves it out.
        device: where it was measured, in words.
    """

    layers: Mapping[str, LayerLatency]
    rest: float = 0.0
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""
        layers = {
            name: {"sizes": [list(s) for s in layer.sizes], "seconds": layer.seconds.tolist()}
            for name, layer in self.layers.items()
        }
        return {"device": self.device, "rest": self.rest, "layers": layers}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """The table that `to_dict` wrote, or one made elsewhere.

        Raises:
            ConfigurationError: it is none; names the first layer that is not sound.
        """
        layers = data.get("layers") if isinstance(data, Mapping) else None
        if not isinstance(layers, Mapping):
            raise ConfigurationError(
                f"latency_table is {data!r:.80}; it has to be a LatencyTable or the dictionary of one, with "
                f"'layers': name -> {{'sizes': ..., 'seconds': ...}}"
            )
        rest = data.get("rest", 0.0)
        if not isinstance(rest, (int, float)) or not 0 <= rest < math.inf:
            raise ConfigurationError(f"latency_table: 'rest' is {rest!r}; it has to be seconds, at least 0")
        made = {str(name): _layer(str(name), layer) for name, layer in layers.items()}
        return cls(made, float(rest), str(data.get("device", "")))

    def bound(self, workload: Workload) -> Seconds:
        """A function from what is left of every extent to seconds.

        Raises:
            ConfigurationError: an operator is missing in the table, or has another number of dims there.
        """
        layers = []
        for operator in workload.operators:
            layer = self.layers.get(operator.name)
            if layer is None:
                raise ConfigurationError(
                    f"latency_table has no layer {operator.name!r}; it has {len(self.layers)}, like "
                    f"{sorted(self.layers)[:3]}, and needs one for each of groups.workload.operators"
                )
            axes = workload.axes(operator)
            if len(layer.sizes) != len(axes):
                raise ConfigurationError(
                    f"latency_table: the layer {operator.name!r} has sizes for {len(layer.sizes)} dims; units shorten "
                    f"{len(axes)} dims of it"
                )
            layers.append((layer, tuple(extents[0] for extents in axes)))
        return Seconds(layers, self.rest, workload)


class Seconds:
    """Seconds of a workload by what is left of its extents."""

    def __init__(self, layers: Sequence[tuple[LayerLatency, tuple[int, ...]]], rest: float, workload: Workload) -> None:
        # Known sizes are remembered: from one choice of units to the next, few layers change.
        self._layers = [(layer, extents, dict[tuple[int, ...], float]()) for layer, extents in layers]
        self._rest = rest
        self._held = [(s.bytes.factor, s.bytes.extents) for s in workload.storages]
        self._full = self._held_bytes([extent.length for extent in workload.extents])

    def _held_bytes(self, left: Sequence[int]) -> int:
        return sum(factor * math.prod(left[e] for e in extents) for factor, extents in self._held)

    def __call__(self, left: NDArray[np.int64]) -> float:
        sizes = left.tolist()
        total = self._rest * self._held_bytes(sizes) / self._full if self._rest and self._full else 0.0
        for layer, extents, known in self._layers:
            key = tuple([sizes[e] for e in extents])
            if key not in known:
                known[key] = layer.at(key)
            total += known[key]
        return total


def _layer(name: str, data: Any) -> LayerLatency:
    try:
        sizes = tuple(tuple(int(n) for n in grid) for grid in data["sizes"])
        seconds = np.asarray(data["seconds"], dtype=np.float64)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"latency_table: the layer {name!r} needs 'sizes', a list per dim, and 'seconds', nested as deep: {error!r}"
        ) from error
    if seconds.shape != tuple(len(grid) for grid in sizes) or 0 in seconds.shape:
        raise ConfigurationError(
            f"latency_table: the layer {name!r} has {[len(g) for g in sizes]} sizes, and seconds of shape "
            f"{list(seconds.shape)}"
        )
    if any(list(grid) != sorted(set(grid)) or grid[0] < 1 for grid in sizes):
        raise ConfigurationError(f"latency_table: the sizes of the layer {name!r} have to ascend, from 1 or more")
    if not np.isfinite(seconds).all() or (seconds < 0).any():
        raise ConfigurationError(f"latency_table: the seconds of the layer {name!r} have to be numbers, at least 0")
    return LayerLatency(sizes, seconds)


# ---------------------------------------------------------------- measuring


def measure_latency(
    workload: Workload,
    device: str | torch.device = "cpu",
    *,
    points: int = 4,
    multiple: int | None = None,
    seconds: float = 0.02,
    total: Callable[[], object] | None = None,
    known: MutableMapping[str, float] | None = None,
) -> LatencyTable:
    """Time every counted operator alone, with tensors of the shapes it has in the workload, at a grid of sizes.

    Args:
        workload: ``find_groups(graph).workload``.
        device: where to run.
        points: sizes per dim below the full one, in equal steps; an operator with two dims is timed at the square.
        multiple: what stays of a group is timed in multiples of this: give what ``group_divisible`` will be. None
            keeps off multiples of 8, where processors are faster and which a free choice of units rarely hits.
        seconds: how long each is repeated; the median counts.
        total: runs the whole model on that device, for ``rest``: what its seconds are more than the layers'.
        known: calls that were timed before, and takes in those that are timed now, see ``latency_cache``.
    """
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise ConfigurationError(f"multiple is {multiple!r}; it has to be a whole number, at least 1, or None")
    device = torch.device(device)
    known = {} if known is None else known
    layers: dict[str, LayerLatency] = {}
    with torch.no_grad():
        for operator in workload.operators:
            try:
                layers[operator.name] = _measured(operator, workload, points, multiple, device, seconds, known)
                continue
            except RuntimeError as error:
                logger.warning("%s is timed at its full size only: %s", operator.name, error)
            try:
                layers[operator.name] = _measured(operator, workload, 0, None, device, seconds, known)
            except RuntimeError as error:  # it needs certain numbers, not just some of the right shape
                logger.warning("%s cannot be timed alone, it is part of the rest: %s", operator.name, error)
                sizes = [(workload.extents[extents[0]].length,) for extents in workload.axes(operator)]
                layers[operator.name] = LayerLatency(tuple(sizes), np.zeros([1] * len(sizes)))
        rest = 0.0
        if total is not None:
            full = sum(float(layer.seconds.flat[-1]) for layer in layers.values())
            rest = max(_timed(total, device, 10 * seconds) - full, 0.0)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{device}, {torch.get_num_threads()} threads"
    return LatencyTable(layers, rest, where)


def _measured(
    operator: Operator,
    workload: Workload,
    points: int,
    multiple: int | None,
    device: torch.device,
    seconds: float,
    known: MutableMapping[str, float],
) -> LayerLatency:
    """An operator at every combination of sizes; what has the same shapes is timed once."""
    axes = workload.axes(operator)
    grids: list[dict[int, dict[int, int]]] = []  # per axis: size of its first extent -> sizes of all of them
    for extents in axes:
        shares = [1 - k / points for k in range(points, 0, -1)] if points else []
        at = [workload.without_last(extents, 1 - share, multiple) for share in shares]
        at.append({e: workload.extents[e].length for e in extents})
        grids.append({sizes[extents[0]]: sizes for sizes in at})
    values = np.zeros([len(grid) for grid in grids])
    for place in np.ndindex(*values.shape):
        sizes: dict[int, int] = {}
        for grid, k in zip(grids, place, strict=True):
            sizes |= list(grid.values())[k]
        operands = operands_in((operator.args, operator.kwargs))
        shapes = [(*_shape(o, sizes), o.dtype) for o in operands]
        rest = [a for a in operator.args if not isinstance(a, (Operand, list, tuple))]
        lists = [a for a in operator.args if isinstance(a, (list, tuple)) and not any(operands_in(a))]
        named = {k: v for k, v in operator.kwargs.items() if not any(operands_in(v))}
        key = str((operator.op, shapes, rest, lists, named))
        if key not in known:
            known[key] = _timed(_call(operator, sizes, device), device, seconds)
        values[place] = known[key]
    return LayerLatency(tuple(tuple(grid) for grid in grids), values)


def _shape(operand: Operand, sizes: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(n if extent is None else sizes.get(extent, n) for n, extent in operand.dims)


def _call(operator: Operator, sizes: Mapping[int, int], device: torch.device) -> Callable[[], object]:
    namespace, name, overload = operator.op.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), name), overload)

    def made(value: Any) -> Any:
        if isinstance(value, Operand):
            return _tensor(_shape(value, sizes), value.dtype, device)
        if isinstance(value, (list, tuple)):
            return type(value)([made(item) for item in value])
        return value

    args, kwargs = list(made(operator.args)), {key: made(value) for key, value in operator.kwargs.items()}
    if "convolution" in name:  # how many convolution groups follows from the shapes
        transposed, per_group = args[6], args[1].shape[1]
        channels = _shape(operator.results[0], sizes)[1] if transposed else args[0].shape[1]
        args[8] = channels // per_group
    return lambda: op(*args, **kwargs)


def _tensor(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point or kind.is_complex:
        return torch.randn(shape, device=device).to(kind)
    return torch.zeros(shape, dtype=kind, device=device)


def _timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call, repeated for so long.

    One thread on the CPU is timed by the processor's clock: by the wall's, whatever else runs on the machine would
    slow down long calls (a whole pass) more than short ones (an operator), and the difference would pass for the rest.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def once() -> float:
        begin = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begin

    for _ in range(3):
        once()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(once())
    return float(np.median(times))
