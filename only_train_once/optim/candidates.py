"""Which groups can be pruned with an optimizer: those whose ``zero`` tensors it trains."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from only_train_once.errors import ConfigurationError, NothingPrunableError
from only_train_once.groups import GroupList, PruningGroup, Role
from only_train_once.masking import check
from only_train_once.sharding import Shares, plainly_named, share, shares_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """What a method may work on.

    Attributes:
        groups: prunable groups whose ``zero`` tensors are all trained.
        dropped: name of every other group -> why not.
        tensors: every tensor of ``groups`` by name; in a run of several processes they know who has what.
        trained: names of those the optimizer trains.
        named_tensors: all parameters and buffers that were given, by name.
        analysis: the groups that were given, if they are those of `find_groups`: they know what a pass takes.
        modules: those of the model by path, if it was given.
    """

    groups: tuple[PruningGroup, ...]
    dropped: dict[str, str]
    tensors: dict[str, Tensor]
    trained: frozenset[str]
    named_tensors: dict[str, Tensor]
    analysis: GroupList | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def shares(self) -> Shares:
        """Who counts what, in a run of several processes."""
        return shares_of(self.tensors)


def fingerprint(group: PruningGroup) -> str:
    """A short digest of what a group cuts where; changes when the partition does."""
    digest = hashlib.sha256()
    for s in group.slices:
        digest.update(f"{s.param}|{s.dim}|{s.role.value}|{s.length}|{s.index.shape}".encode())
        digest.update(np.ascontiguousarray(s.index, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def find_candidates(
    optimizer: Optimizer,
    groups: Iterable[PruningGroup],
    named_tensors: Mapping[str, Tensor],
    process_group: Any = None,
    model: nn.Module | None = None,
) -> Candidates:
    """Choose the groups that can be pruned with this optimizer; all processes of ``process_group`` (None: all) call it.

    Raises:
        ConfigurationError: a tensor is missing or has another shape; a trainable tensor of a group is not in the
            optimizer's param_groups.
        NothingPrunableError: no group is left; the message lists the reasons.
    """
    analysis = groups if isinstance(groups, GroupList) else None
    groups = tuple(groups)
    prunable = [g for g in groups if g.prunable]
    named_tensors = plainly_named(named_tensors, [name for g in prunable for name in g.params])
    check(prunable, named_tensors)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept: list[PruningGroup] = []
    dropped = {g.name: g.reason or "marked unprunable" for g in groups if not g.prunable}
    missing: dict[str, str] = {}
    for group in prunable:
        zero = [s.param for s in group.with_role(Role.ZERO)]
        for name in [*zero, *(s.param for s in group.with_role(Role.CONSUMER))]:
            if named_tensors[name].requires_grad and id(named_tensors[name]) not in owned:
                missing.setdefault(name, group.name)
        frozen = list(dict.fromkeys(name for name in zero if not named_tensors[name].requires_grad))
        if not zero:
            dropped[group.name] = "no slice has the role 'zero'"
        elif frozen:
            dropped[group.name] = f"not trained (requires_grad=False): {', '.join(frozen)}"
        else:
            kept.append(group)
    if missing:
        named = ", ".join(f"{name} (group {group})" for name, group in missing.items())
        raise ConfigurationError(
            f"these parameters have to be trained to prune their groups, but are in none of the optimizer's "
            f"param_groups: {named}; give them to the optimizer, set requires_grad_(False) on them, or mark their "
            f"groups unprunable"
        )
    for group in prunable:
        if group.name in dropped:
            logger.info("group %s is left alone: %s", group.name, dropped[group.name])
    if not kept:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in dropped.items()) or " there is no group at all"
        raise NothingPrunableError(f"no group can be pruned:{listed}")
    used = {name: named_tensors[name] for group in kept for name in group.params}
    trained = frozenset(n for n, t in used.items() if id(t) in owned)
    shared = share(used, lambda: " ".join(f"{g.name}:{g.size}:{fingerprint(g)}" for g in kept), process_group)
    modules = {} if model is None else dict(model.named_modules())
    return Candidates(tuple(kept), dropped, shared, trained, dict(named_tensors), analysis, modules)
