"""What became of a model: numbers before and after, what was cut, what was frozen and why.

`SubnetReport` is data (`to_dict` and `from_dict` go through JSON); `str()` and rich print it as tables.
"""

from __future__ import annotations

import gc
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from .errors import CheckpointError, ConfigurationError
from .explain import coverage, way_out, what_stays
from .flops import FlopCount
from .groups import PruningGroup, Role
from .inputs import call_model, observing

PRINTED_WIDTH = 110


@dataclass(frozen=True)
class LayerSizes:
    """One tensor before and after.

    Attributes:
        name: of the parameter or buffer.
        before: shape in the full model.
        after: shape in the subnet.
        buffer: whether it is a buffer; printed tables leave those out, they follow their layer.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    buffer: bool = False


@dataclass(frozen=True)
class GroupOutcome:
    """What happened to one group.

    Attributes:
        name: of the group.
        kind: what one of its units is.
        size: units in the full model.
        removed: how many of them are gone.
        reason: why none could go, if so.
        multiple: units leave in multiples of this.
    """

    name: str
    kind: str
    size: int
    removed: int
    reason: str | None = None
    multiple: int = 1


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, both models measured in turns.

    Attributes:
        label: what was run, e.g. ``"batch 1"``.
        before, after: median seconds of the full model and of the subnet.
        spread_before, spread_after: interquartile ranges of the same, in seconds.
        ratio: median over the rounds of full / subnet; above 1 the subnet is faster.
        rounds: how many rounds the medians are over.
        memory_before, memory_after: bytes at the peak of one pass, weights included; None where nobody can tell.
    """

    label: str
    before: float
    after: float
    spread_before: float
    spread_after: float
    ratio: float
    rounds: int
    memory_before: int | None = None
    memory_after: int | None = None


@dataclass(frozen=True)
class SlowLayer:
    """A layer whose time fell less than its FLOPs, or that has none.

    Attributes:
        name: path of the module; its time is without that of modules inside it.
        kind: class of the module.
        flops_before, flops_after: of one pass.
        seconds_before, seconds_after: medians.
        why: what explains it.
    """

    name: str
    kind: str
    flops_before: int
    flops_after: int
    seconds_before: float
    seconds_after: float
    why: str

    def __str__(self) -> str:
        time = f"{self.seconds_after / self.seconds_before:.0%} of its time"
        share = f"{self.flops_after / self.flops_before:.0%} of its FLOPs and " if self.flops_before else ""
        return f"{self.name or '<model>'} ({self.kind}) kept {share}{time}: {self.why}"


@dataclass(frozen=True)
class SubnetReport:
    """A subnet next to the model it was cut from.

    Attributes:
        model: class name.
        parameters_before, parameters_after: number of parameters, a tied one counted once.
        flops_before, flops_after: of one forward pass on the example inputs, 2 per multiply-accumulate.
        layers: tensors in the model's order.
        groups: groups in the network's order.
        verified_difference: largest relative difference found between full model and subnet, or None when the
            comparison was switched off.
        verification: the comparison in words.
        excluded: group -> why its zero units stayed in (cutting them was not exact).
        bytes_on_disk: size of the saved tensors, once saved.
        path: where it was saved.
        latency: measurements, if any were made.
        slow_layers: layers that did not get faster as their FLOPs fell, slowest first, if that was measured.
        notes: anything else a reader should know.
    """

    model: str
    parameters_before: int
    parameters_after: int
    flops_before: int | None
    flops_after: int | None
    layers: tuple[LayerSizes, ...]
    groups: tuple[GroupOutcome, ...]
    verified_difference: float | None = None
    verification: str = "not verified"
    excluded: Mapping[str, str] = field(default_factory=dict)
    bytes_on_disk: int | None = None
    path: str | None = None
    latency: tuple[Latency, ...] = ()
    slow_layers: tuple[SlowLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def units_removed(self) -> int:
        """Number of units that were cut."""
        return sum(g.removed for g in self.groups)

    @property
    def group_sparsity(self) -> float:
        """Share of the units of prunable groups that were cut."""
        size = sum(g.size for g in self.groups if g.reason is None or g.removed)
        return self.units_removed / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SubnetReport:
        """The report that `to_dict` wrote; :class:`CheckpointError` names what is missing or has the wrong type."""
        try:
            values = dict(data)
            values["layers"] = tuple(
                LayerSizes(str(d["name"]), tuple(map(int, d["before"])), tuple(map(int, d["after"])), bool(d["buffer"]))
                for d in data["layers"]
            )
            values["groups"] = tuple(GroupOutcome(**d) for d in data["groups"])
            values["latency"] = tuple(Latency(**d) for d in data["latency"])
            values["slow_layers"] = tuple(SlowLayer(**d) for d in data.get("slow_layers", ()))
            values["notes"] = tuple(map(str, data["notes"]))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"this is no report of a subnet: {type(error).__name__}: {error}; "
                "it was written by another version, or the file was changed by hand"
            ) from error

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._summary()]
        if changed := self._changed_layers():
            parts.append(changed)
        if self.latency:
            parts.append(latency_table(self.latency))
        parts.extend(Text(str(layer)) for layer in self.slow_layers)
        frozen = [g for g in self.groups if g.reason is not None]
        if frozen:
            parts.append(_frozen_table(frozen))
        for name, reason in self.excluded.items():
            parts.append(Text(f"excluded {name}: {reason}", style="yellow"))
        parts.extend(Text(f"note: {note}") for note in self.notes)
        return Group(*parts)

    def __str__(self) -> str:
        return render(self)

    def _summary(self) -> Table:
        table = Table(title=f"{self.model}: {self._headline()}", title_justify="left")
        for column in ("", "full", "subnet", "kept"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("parameters", *_before_after(self.parameters_before, self.parameters_after))
        if self.flops_before is not None and self.flops_after is not None:
            table.add_row("FLOPs (2 per MAC)", *_before_after(self.flops_before, self.flops_after))
        difference = "not verified" if self.verified_difference is None else f"{self.verified_difference:.1e}"
        table.add_row("largest relative difference", "", difference, "")
        if self.bytes_on_disk is not None:
            table.add_row(Text(f"file {self.path or ''}".strip()), "", f"{self.bytes_on_disk:,} bytes", "")
        return table

    def _headline(self) -> str:
        if not self.units_removed:
            return "no unit is at zero, the subnet equals the model"
        return f"{self.units_removed} units removed ({self.group_sparsity:.0%} of the prunable ones)"

    def _changed_layers(self) -> Table | None:
        changed = [layer for layer in self.layers if layer.before != layer.after and not layer.buffer]
        if not changed:
            return None
        table = Table("tensor", "before", "after", title="what was cut", title_justify="left")
        for layer in changed:
            table.add_row(Text(layer.name), _shape(layer.before), _shape(layer.after))
        return table


def _before_after(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else "-"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _frozen_table(frozen: Sequence[GroupOutcome]) -> Table:
    table = Table("frozen", "units", "why", title="what could not be cut", title_justify="left")
    for group in frozen:
        table.add_row(Text(group.name), str(group.size), Text(group.reason or ""))
    return table


def latency_table(rows: Sequence[Latency]) -> Table:
    """Measurements as a table: median and interquartile range in milliseconds, and memory at the peak if known."""
    known = any(row.memory_before is not None for row in rows)
    memory = ["memory, full", "subnet"] if known else []
    table = Table("latency", "full", "subnet", "full / subnet", *memory, title_justify="left")
    for row in rows:
        peaks = [_mebibytes(row.memory_before), _mebibytes(row.memory_after)] if known else []
        table.add_row(
            row.label,
            f"{row.before * 1e3:.3f} ms (IQR {row.spread_before * 1e3:.3f})",
            f"{row.after * 1e3:.3f} ms (IQR {row.spread_after * 1e3:.3f})",
            f"{row.ratio:.2f}",
            *peaks,
        )
    return table


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


def render(renderable: RenderableType, width: int = PRINTED_WIDTH) -> str:
    """Any rich renderable as plain text without colour codes."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def groups_table(groups: Sequence[PruningGroup]) -> Table:
    """Groups with what they cut, frozen ones with the reason and what would free them."""
    table = Table("group", "kind", "units", "cuts", "frozen because", title_justify="left")
    for group in groups:
        cuts = "\n".join(str(s) for s in group.slices)
        reason, free = group.reason or "", way_out(group.reason)
        text = Text(f"{reason}\nto free it: {free}" if free else reason)
        table.add_row(Text(group.name), group.kind.value, _units(group), Text(cuts), text)
    return table


def _units(group: PruningGroup) -> str:
    return f"{group.size} (by {group.multiple})" if group.multiple > 1 else str(group.size)


def explanation(groups: Sequence[PruningGroup], shapes: Mapping[str, Sequence[int]]) -> Group:
    """What can be removed, by module; what stays and why, by reason; ``shapes`` are those of all parameters."""
    free = Table("prunable", "kind", "units", "cuts", title_justify="left")
    for group in groups:
        if group.prunable:
            cuts = [str(s) for s in group.slices if s.role is not Role.FOLLOW]
            more = [f"and {len(cuts) - 4} more"] if len(cuts) > 4 else []
            free.add_row(
                Text(group.name),
                group.kind.value,
                _units(group),
                Text("\n".join([*cuts[: 4 if more else None], *more])),
            )
    stays = Table("stays", "parameters", "because", "what would free it", title_justify="left")
    for found in what_stays(groups, shapes):
        names = "\n".join([*found.tensors[:3], *([f"and {len(found.tensors) - 3} more"] if found.tensors[3:] else [])])
        stays.add_row(Text(names), f"{found.share:.1%}", Text(found.reason), Text(found.way_out or "-"))
    covered = Text(f"{coverage(groups, shapes):.1%} of the parameters are within reach of some unit.")
    return Group(*([free] if free.row_count else []), *([stays] if stays.row_count else []), covered)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, a tied one counted once."""
    return sum(p.numel() for p in model.parameters())


def build_report(
    full: nn.Module,
    subnet: nn.Module,
    groups: Sequence[PruningGroup],
    removed: Mapping[str, Sequence[int]],
    *,
    flops_before: FlopCount | None = None,
    flops_after: FlopCount | None = None,
) -> SubnetReport:
    """Compare two models tensor by tensor; the caller adds what it verified with :func:`dataclasses.replace`.

    Args:
        full: the model before.
        subnet: the model after; the same tensors by name.
        groups: the groups of ``full``, in network order.
        removed: group name -> units that were cut.
    """
    after = {name: tuple(t.shape) for name, t in (*subnet.named_parameters(), *subnet.named_buffers())}
    named = ((full.named_parameters(), False), (full.named_buffers(), True))
    layers = tuple(
        LayerSizes(name, tuple(t.shape), after[name], buffer)
        for tensors, buffer in named
        for name, t in tensors
        if name in after
    )
    return SubnetReport(
        model=type(full).__name__,
        parameters_before=count_parameters(full),
        parameters_after=count_parameters(subnet),
        flops_before=None if flops_before is None else flops_before.total,
        flops_after=None if flops_after is None else flops_after.total,
        layers=layers,
        groups=tuple(
            GroupOutcome(
                g.name,
                g.kind.value,
                g.size,
                len(removed.get(g.name, ())),
                None if g.prunable else g.reason,
                g.multiple,
            )
            for g in groups
        ),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def measure_latency(
    full: nn.Module, subnet: nn.Module, inputs: Any, *, label: str = "forward", rounds: int = 30, warmup: int = 3
) -> Latency:
    """Time eager forward passes of both models in turns, so that a busy machine slows both alike.

    The order changes from round to round, and the ratio is taken within rounds before its median is. A round
    repeats the pass until it takes a few milliseconds, so that the clock's resolution does not matter.
    """
    with observing(full), observing(subnet):
        return in_turns(lambda: call_model(full, inputs), lambda: call_model(subnet, inputs), label, rounds, warmup)


def in_turns(
    before: Callable[[], object], after: Callable[[], object], label: str, rounds: int = 30, warmup: int = 3
) -> Latency:
    """Time two calls in turns, see `measure_latency`."""
    if rounds < 2:
        raise ConfigurationError(f"rounds={rounds}: at least 2 are needed for a spread")
    calls = (before, after)

    def seconds(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    for call in calls:
        for _ in range(warmup):
            call()
    repeats = max(1, min(50, round(5e-3 / max(seconds(before, 1), 1e-6))))
    collecting = gc.isenabled()
    gc.disable()
    try:
        times: list[tuple[float, float]] = []
        for turn in range(rounds):
            pair = [0.0, 0.0]
            for position in (0, 1) if turn % 2 == 0 else (1, 0):
                pair[position] = seconds(calls[position], repeats)
            times.append((pair[0], pair[1]))
    finally:
        if collecting:
            gc.enable()
    first, spread_before = _quartiles([a for a, _ in times])
    second, spread_after = _quartiles([b for _, b in times])
    ratio = statistics.median(a / b for a, b in times)
    return Latency(label, first, second, spread_before, spread_after, ratio, rounds)


def with_file(report: SubnetReport, path: str, size: int) -> SubnetReport:
    """The report with the place and the size of the saved tensors."""
    return replace(report, path=path, bytes_on_disk=size)
