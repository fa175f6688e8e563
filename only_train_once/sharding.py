"""Tensors spread over processes: which part of each is here, and numbers per unit that agree everywhere.

The one file that knows ``torch.distributed``. Ordinary tensors pass through everything here as they are.

[Note: parts of tensors]
A parameter that FSDP2 or a tensor-parallel plan has spread over processes is a DTensor: it has the shape of the whole
and holds a *part*, some positions in every dim. What a group says about positions is about the whole; whoever indexes a
tensor by unit asks `held` for the positions that are here and works on `local`.

Sums over units are sums of what the processes have. Each entry must count once, however many processes hold it, so one
of them counts it, see `Shares`. All decisions are taken from sums that were added up over the processes, or from what
the first process says, hence are the same everywhere.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from only_train_once.errors import ConfigurationError


def is_dtensor(value: object) -> bool:
    """Whether a tensor is spread over processes, or could be (replicated DTensors count)."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and not needed unless someone has
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that is here, sharing memory; an ordinary tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return cast(Any, tensor).to_local()


def locals_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    """The parts of the named tensors that are here, without their history."""
    return [local(tensors[n]).detach() for n in names]


def held(tensor: Tensor) -> dict[int, NDArray[np.int64]]:
    """Dim -> the positions of the whole that are here, in the order in which they lie here; only dims that are split.

    Raises:
        ConfigurationError: the tensor is a sum that was never added up, or a placement is unknown.
    """
    if not is_dtensor(tensor):
        return {}
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    at = mesh.get_coordinate()
    splits: dict[int, list[tuple[int, int, int]]] = {}  # dim -> (mesh dim, its size, split factor)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard"):
            raise ConfigurationError(
                f"a tensor of shape {tuple(tensor.shape)} has the placement {placement}; parameters have to be "
                f"sharded or replicated over {mesh}"
            )
        factor = int(getattr(placement, "split_factor", 1))
        splits.setdefault(placement.dim % tensor.dim(), []).append((mesh_dim, mesh.size(mesh_dim), factor))
    out: dict[int, NDArray[np.int64]] = {}
    for dim, split in splits.items():
        positions = np.arange(tensor.shape[dim] if at is not None else 0, dtype=np.int64)
        for mesh_dim, parts in _in_order(split, placements):
            length = -(-len(positions) // parts)  # as torch.chunk does
            first = 0 if at is None else at[mesh_dim] * length
            positions = positions[first : first + length]
        out[dim] = positions
    here = local(tensor)
    nothing = here.numel() == 0 and any(len(positions) == 0 for positions in out.values())  # of whatever shape
    for dim, positions in out.items():
        if not nothing and here.shape[dim] != len(positions):
            raise ConfigurationError(
                f"a tensor of shape {tuple(tensor.shape)} placed as {placements} should have {len(positions)} "
                f"positions of dim {dim} in this process and has {here.shape[dim]}; shard it with torch's own functions"
            )
    return out


def _in_order(split: Sequence[tuple[int, int, int]], placements: object) -> list[tuple[int, int]]:
    """(mesh dim, its size) of what splits one dim, in the order in which it was split.

    A strided shard says by its factor that mesh dims that come after it have split the dim that many ways before.
    """
    if not split:
        return []
    (mesh_dim, size, factor), *rest = split
    before = 0
    while factor > 1 and before < len(rest):
        factor, over = divmod(factor, rest[before][1])
        before += 1
        if over:
            break
    if factor != 1:
        raise ConfigurationError(
            f"the placements {placements} do not say in which order a dim was split; shard parameters with "
            f"parallelize_module first, and then with fully_shard"
        )
    return [*_in_order(rest[:before], placements), (mesh_dim, size), *_in_order(rest[before:], placements)]


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A part as the tensor it is part of: placed like ``tensor``, without asking anybody."""
    if not is_dtensor(tensor) or is_dtensor(part):
        return part
    from torch.distributed.tensor import DTensor

    whole = cast(Any, tensor)
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=tensor.shape, stride=whole.stride()
    )


def part_of(value: Tensor, tensor: Tensor) -> Tensor:
    """What of ``value``, which is whole or placed in any way, lies in this process when placed like ``tensor``.

    All processes have to ask together where the placements differ.
    """
    if is_dtensor(value):
        if not is_dtensor(tensor):
            return cast(Any, value).full_tensor()
        if cast(Any, value).placements != cast(Any, tensor).placements:
            value = cast(Any, value).redistribute(placements=cast(Any, tensor).placements)
        return local(value)
    for dim, positions in held(tensor).items():
        value = value.index_select(dim, torch.from_numpy(positions).to(value.device))
    return value if value.numel() else value.reshape(local(tensor).shape)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it has to be; all processes ask together."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def unsplit(tensor: Tensor, dim: int) -> tuple[Tensor, bool]:
    """The tensor placed so that every process has all positions of ``dim``, and whether this one counts its part.

    Split along another dim instead where there is one, so that no process holds more than before.
    """
    if not is_dtensor(tensor) or dim % tensor.dim() not in held(tensor):
        return tensor, True
    from torch.distributed.tensor import Replicate, Shard

    given = cast(Any, tensor)
    taken = {p.dim for p in given.placements if not p.is_replicate()}
    free = [d for d in range(tensor.dim()) if d not in taken]
    placements, counted, at = [], True, given.device_mesh.get_coordinate()
    for mesh_dim, placement in enumerate(given.placements):
        if placement.is_replicate() or placement.dim != dim % tensor.dim():
            placements.append(placement)
        elif free:
            placements.append(Shard(free.pop()))
        else:
            placements.append(Replicate())
            counted = counted and at is not None and at[mesh_dim] == 0
    return given.redistribute(placements=placements), counted


# -- what all processes have -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Who counts what, so that sums over all processes count every entry once.

    Attributes:
        counted: names of the tensors whose part here this process counts; None for all.
        group: the processes; None for a run of one.
    """

    counted: frozenset[str] | None = None
    group: Any = None

    @property
    def split(self) -> bool:
        """Whether some process lacks a part of a tensor."""
        return self.counted is not None

    def counts(self, name: str) -> bool:
        return self.counted is None or name in self.counted

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each of these added up over the processes, in float64, with one message; the same bits everywhere."""
        if not self.split or not parts:
            return list(parts)
        flat = torch.cat([p.detach().reshape(-1).to(parts[0].device, torch.float64) for p in parts])
        torch.distributed.all_reduce(flat, group=self.group)
        done = flat.split([p.numel() for p in parts])
        return [d.view(p.shape).to(p.device, p.dtype) for d, p in zip(done, parts, strict=True)]

    def total(self, value: Tensor) -> Tensor:
        """What each process has found in data of its own, added up; the same bits everywhere."""
        if self.group is not None:
            torch.distributed.all_reduce(value, group=self.group)
        return value

    def agreed(self, value: Tensor) -> Tensor:
        """What the first process has; processes whose sums differ in the last bit decide alike then."""
        if self.group is not None:
            value = value.contiguous()
            torch.distributed.broadcast(value, group=self.group, group_src=0)
        return value

    def __deepcopy__(self, memo: Any) -> Shares:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # a group of processes is nothing that can be written down
        return _unpickled, (self.counted, self.group is not None)


ALONE = Shares()


def _unpickled(counted: frozenset[str] | None, several: bool) -> Shares:
    return Shares(counted, torch.distributed.group.WORLD if several and is_running() else None)


def is_running() -> bool:
    """Whether a process group was made."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class SharedTensors(dict[str, Tensor]):
    """Tensors by name that know their `Shares`."""

    def __init__(self, tensors: Mapping[str, Tensor], shares: Shares) -> None:
        super().__init__(tensors)
        self.shares = shares

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedTensors, (dict(self), self.shares)


def shares_of(tensors: Mapping[str, Tensor]) -> Shares:
    """The shares that the tensors know, or those of a run of one process."""
    return getattr(tensors, "shares", ALONE)


def shared_as(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``values`` with what ``tensors`` know."""
    return SharedTensors(values, tensors.shares) if isinstance(tensors, SharedTensors) else values


def share(tensors: dict[str, Tensor], partition: Callable[[], str], process_group: Any = None) -> dict[str, Tensor]:
    """Find out who counts what; all processes of the group ask together, and each for the same tensors.

    Args:
        tensors: parameters and buffers by name.
        partition: says what has to be the same everywhere.
        process_group: the processes that train these tensors; None for all.

    Raises:
        ConfigurationError: the processes have other groups or tensors, or the parts do not make up the whole.
    """
    several = is_running() and torch.distributed.get_world_size(process_group) > 1
    if not several and not any(is_dtensor(tensor) for tensor in tensors.values()):
        return tensors
    parts = {name: _part(tensor) for name, tensor in tensors.items()}
    group, everyone, own = None, [("", parts)], 0
    if several:
        group = torch.distributed.group.WORLD if process_group is None else process_group
        own = torch.distributed.get_rank(group)
        everyone = [("", {})] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, (partition(), parts), group=group)
        _check_same(everyone)
    first: dict[str, dict[str, int]] = {name: {} for name in parts}  # name -> part -> who counts it
    for rank, (_, theirs) in enumerate(everyone):
        for name, (part, _) in theirs.items():
            first[name].setdefault(part, rank)
    for name, tensor in tensors.items():
        have = sum(everyone[rank][1][name][1] for rank in first[name].values())
        if have != tensor.numel():
            raise ConfigurationError(
                f"{name!r} has {tensor.numel()} entries, the different parts in {len(everyone)} process(es) have "
                f"{have}: parts are missing or overlap. Give the processes that hold it as process_group, or shard it "
                f"with fully_shard or parallelize_module"
            )
    mine = frozenset(name for name, (part, _) in parts.items() if first[name][part] == own)
    everything = all(len(found) == 1 for found in first.values())
    return SharedTensors(tensors, Shares(None if everything else mine, group))


def _part(tensor: Tensor) -> tuple[str, int]:
    """A digest of the positions that are here, and the number of entries."""
    digest, here = hashlib.sha256(str(tuple(tensor.shape)).encode()), held(tensor)
    for dim, positions in sorted(here.items()):
        if len(positions) < tensor.shape[dim]:
            digest.update(f"|{dim}|".encode() + positions.astype("<i8").tobytes())
    sizes = [len(here[d]) if d in here else n for d, n in enumerate(tensor.shape)]
    return digest.hexdigest()[:16], math.prod(sizes)


def _check_same(everyone: Sequence[Any]) -> None:
    for rank, (partition, parts) in enumerate(everyone):
        if partition != everyone[0][0] or list(parts) != list(everyone[0][1]):
            other = sorted(set(parts) ^ set(everyone[0][1]))[:5]
            raise ConfigurationError(
                f"process {rank} has another partition into groups than process 0{f' ({other})' if other else ''}; "
                f"analyse the same model with the same arguments in every process, before it is sharded"
            )


# -- whole models ----------------------------------------------------------------------------------------------------


def is_spread(model: nn.Module) -> bool:
    """Whether a process may lack a part of the model."""
    return any(is_dtensor(t) for t in (*model.parameters(), *model.buffers()))


def gather_into(model: nn.Module | None, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model, one after the other; all processes call it, those without a model help.

    Raises:
        ConfigurationError: a name or a shape differs. Raised in processes with a model only.
    """
    own: dict[str, Tensor] = {}
    wrong = None
    if model is not None:
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        unknown = sorted(set(own) - set(tensors))
        wrong = f"the model to fill has {unknown[:5]}, which nothing here is called" if unknown else None
    for name, tensor in tensors.items():
        with torch.no_grad():
            value = whole(tensor.detach())
        if model is None or wrong is not None:
            continue
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "nothing"
            wrong = f"{name!r} has shape {tuple(value.shape)}, the model to fill has {found} of that name"
        else:
            with torch.no_grad():
                own[name].copy_(value)
    if wrong is not None:
        raise ConfigurationError(f"{wrong}; give a model made like the one that was analysed")


# -- names -----------------------------------------------------------------------------------------------------------

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """The name without what ``torch.compile``, checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plainly_named(tensors: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the names they have in the model that was analysed, whatever wraps it now."""
    if all(name in tensors for name in wanted):
        return dict(tensors)
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    if all(name.startswith("module.") for name in plain):  # DistributedDataParallel, AveragedModel
        stripped = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
        if not all(name in plain for name in wanted):
            plain = stripped
    return plain if len(plain) == len(tensors) else dict(tensors)
