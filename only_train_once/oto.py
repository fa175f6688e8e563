"""`OTO`: the facade that strings the verbs together.

It holds a model, its example inputs, its graph and its groups, and keeps the entry points of the library's earlier
generations, so that scripts written for those run on. All work is done by the functions it calls.
"""

from __future__ import annotations

import copy
import logging
import re
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from . import checkpoint, latency_cache, stock
from .budgets import CostModel, Costs
from .copying import copy_module
from .cutting import CutEvent, LiveCuts
from .errors import ConfigurationError, TraceError, VerificationError
from .exact import Attempt
from .flops import count_flops
from .graph import Node, ValueKind
from .groups import GroupList, PruningGroup, Role, find_groups
from .inputs import call_model, dtype_of, inputs_for, map_inputs, observing
from .latency import LatencyTable, measure_latency
from .masking import regions
from .optim import AttachedOptimizer, build
from .optim import attach as attach_method
from .optim.arguments import SPARSITY, Budget, flag
from .optim.cutting import refuse_uncuttable
from .optim.selection import removable
from .recipe import CHEAPER, Recipe, measure_of, one_length, recipe_for
from .record import from_runs
from .report import build_report, count_parameters, explanation, groups_table, render
from .rules.norm import normalizes
from .sensitivity import Sensitivity, analyse
from .sharding import gather_into, is_running, is_spread, plainly_named
from .subnet import Subnet
from .suggest import Suggestion, suggest
from .surgery import norm_in_the_way, staying_at_zero, whole_multiples, zero_units
from .trace import trace
from .visualize import draw_groups

logger = logging.getLogger(__name__)


class OTO:
    """Find what can be removed from a model, train it away, cut it out.

    Example::

        oto = OTO(model, dummy_input=x)
        optimizer = oto.hesso(variant="adamw", lr=1e-3, target_group_sparsity=0.7,
                              start_pruning_step=100, pruning_steps=500, pruning_periods=5)
        ...                                    # the usual training loop
        subnet = oto.construct_subnet()
        print(subnet.report)
        subnet.save("slim/")

    Args:
        model: any module that runs on ``dummy_input``; never changed, except by training and what says so.
        dummy_input: a tensor, a tuple (positional) or a dict (keyword arguments).
        compress_mode: only ``"prune"``.
        skip_patterns: chains of operators, ``"mul->softmax"``, whose dims are left alone; anything without an arrow
            is a regular expression, and groups that touch a parameter whose name it finds are frozen.
        strict_out_nodes: only outputs that no operator reads again have to keep their width, as for a model that
            also returns hidden states or key-value caches.
        wide: also offer the widths of normalized residual streams and the positions inside attention heads.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        dummy_input: Any = None,
        compress_mode: str = "prune",
        skip_patterns: str | Sequence[str] | None = None,
        strict_out_nodes: bool = False,
        wide: bool = False,
    ) -> None:
        if compress_mode != "prune":
            raise ConfigurationError(
                f"compress_mode={compress_mode!r} is not implemented: units are removed by 'prune', the only mode"
            )
        self.wide = wide
        self.compressed_model_path: str | None = None
        self.full_group_sparse_model_path: str | None = None
        self._skipped_operators: tuple[str, ...] = ()
        self._cuts: LiveCuts | None = None  # made with the first optimizer
        self._user_frozen: dict[str, str] = {}  # group -> reason, kept when the groups are found again
        if model is None and dummy_input is not None:
            raise ConfigurationError("dummy_input is given, but no model: OTO(model, dummy_input=x)")
        if model is not None:
            self.initialize(model, dummy_input, skip_patterns, strict_out_nodes)
            self.partition_pzigs()

    # -- analysis ----------------------------------------------------------------------------------------------

    def initialize(
        self,
        model: nn.Module,
        dummy_input: Any,
        skip_patterns: str | Sequence[str] | None = None,
        strict_out_nodes: bool = False,
    ) -> None:
        """Trace ``model``; the groups are found by :meth:`partition_pzigs`."""
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
        patterns = () if skip_patterns is None else _name_list(skip_patterns, "skip_patterns")
        compiled = tuple(_compiled(pattern) for pattern in patterns if "->" not in pattern)
        graph = trace(model, dummy_input)
        skipped_nodes: set[int] = set()
        for pattern in patterns:
            if "->" in pattern:
                chain = [name.strip() for name in pattern.split("->")]
                found = graph.chains(chain)
                if not found:
                    raise ConfigurationError(
                        f"skip_patterns: no {' -> '.join(chain)} in this model; its operators are "
                        f"{', '.join(sorted(graph.operators()))}"
                    )
                skipped_nodes |= found
        plain = _hollow(model) if is_running() else None
        # From here on nothing fails: what was there before stays until the new model is understood.
        self.model, self.inputs, self.graph = model, dummy_input, graph
        self.strict_out_nodes = strict_out_nodes
        self._dtype = dtype_of(model)
        self._plain = plain  # for `gather`, when the model is sharded
        self._skip_patterns, self._skipped_nodes = compiled, skipped_nodes
        self._groups: GroupList | None = None
        self._cuts = None

    def partition_pzigs(self) -> GroupList:
        """Find the groups (again); what the user has frozen by name stays frozen."""
        if self._cuts is not None and self._cuts.cut:
            raise ConfigurationError(
                "units have left the model since it was analysed: analyse what is left of it, OTO(model, dummy_input=x)"
            )
        found = find_groups(
            self.graph,
            wide=self.wide,
            strict_outputs=self.strict_out_nodes,
            skip_operators=self._skipped_operators,
            skip_nodes=self._skipped_nodes,
        )
        self._groups = found.of([self._with_user_freezes(group) for group in found])
        self.set_trainable()
        if not is_spread(self.model):
            stay = {group.name: norm_in_the_way(self.model, group) for group in self.groups.prunable}
            self._freeze({name: reason for name, reason in stay.items() if reason is not None})
        return self.groups

    @property
    def groups(self) -> GroupList:
        """The groups in network order, frozen ones included.

        When units have left the model (`compact`), what is left; ``group.origin`` has the numbers that its units had.
        """
        self.model  # noqa: B018  # or what is missing is told, see `__getattr__`
        if self._cuts is not None and self._cuts.cut:
            return self._cuts.groups
        if self._groups is None:
            self.partition_pzigs()
        assert self._groups is not None
        return self._groups

    def __getattr__(self, name: str) -> Any:
        # Asked only for what `initialize` has not set yet.
        if name in ("model", "inputs", "graph", "_groups"):
            raise ConfigurationError("no model yet: OTO(model, dummy_input=x), or initialize(model, x) first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _with_user_freezes(self, group: PruningGroup) -> PruningGroup:
        reason = self._user_frozen.get(group.name)
        if reason is None:
            hits = (p.pattern for p in self._skip_patterns if any(p.search(name) for name in group.params))
            pattern = next(hits, None)
            reason = None if pattern is None else f"skip_patterns: {pattern}"
        return replace(group, prunable=False, reason=reason) if reason is not None and group.prunable else group

    def _freeze(self, names: Mapping[str, str]) -> None:
        """Freeze groups by name, each with a reason."""
        if self._cuts is not None and self._cuts.cut:
            raise ConfigurationError(
                "units have left the model, and what can be removed was settled before: freeze groups before training, "
                "or analyse what is left, OTO(model, dummy_input=x)"
            )
        self._user_frozen.update({n: r for n, r in names.items() if self.groups[n].prunable})
        self._groups = self.groups.of([self._with_user_freezes(group) for group in self.groups])

    def set_trainable(self) -> None:
        """Freeze the groups that training cannot bring to zero: none of their zero slices takes a gradient."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        frozen = {}
        for group in self.groups.prunable:
            needed = {s.param for s in group.with_role(Role.ZERO)}
            if needed and not needed & trained:
                frozen[group.name] = "none of its parameters is trained (requires_grad=False)"
        self._freeze(frozen)

    def skip_operators(self, operators: Sequence[str]) -> None:
        """Freeze what the named ATen operators touch, ``["aten.softmax"]``, and find the groups again."""
        names = {n for name in self.graph.operators() for n in (name, name.partition(".")[2])}
        for absent in sorted(set(_name_list(operators, "operators")) - names):
            logger.warning("skip_operators: this model calls no %s; see oto.graph.operators()", absent)
        self._skipped_operators = tuple(dict.fromkeys((*self._skipped_operators, *_name_list(operators, "operators"))))
        self.partition_pzigs()

    def mark_unprunable_by_param_names(self, param_names: Sequence[str]) -> None:
        """Freeze every group that cuts one of these; parameter, buffer or module names, or node ids.

        A module's name stands for everything below it. Call it before the optimizer is made.
        """
        by_tensor: dict[str, str] = {}
        nodes: list[str] = []
        for name in _name_list(param_names, "param_names"):
            tensors = self._tensors_named(name)
            if tensors:
                by_tensor.update(dict.fromkeys(tensors, f"marked unprunable: {name}"))
            elif self._node(name) is not None:
                nodes.append(name)
            else:
                raise ConfigurationError(
                    f"{name!r} is no parameter, buffer, module or node of this {type(self.model).__name__}; "
                    "names are those of model.named_parameters() and model.named_modules()"
                )
        self._freeze_tensors(by_tensor)
        if nodes:
            self.mark_unprunable_by_node_ids(nodes)

    def mark_unprunable_by_node_ids(self, node_ids: Sequence[str | int]) -> None:
        """Freeze every group that touches one of these graph nodes; ids are ``42``, ``"42"`` or ``"node-42"``.

        A node without parameters stands for the parameters that make its inputs, however far back they are.
        """
        by_tensor: dict[str, str] = {}
        if not isinstance(node_ids, (str, int, Sequence)):
            raise ConfigurationError(f"node_ids is {node_ids!r}: give a list of ids, see print(oto.graph)")
        for node_id in [node_ids] if isinstance(node_ids, (str, int)) else node_ids:
            node = self._node(str(node_id))
            if node is None:
                raise ConfigurationError(
                    f"{node_id!r} is no node: ids run from 0 to {len(self.graph.nodes) - 1}, see print(oto.graph)"
                )
            reason = f"marked unprunable: node {node.index}, {self.graph.where(node)}"
            by_tensor.update(dict.fromkeys(self._tensors_behind(node), reason))
        self._freeze_tensors(by_tensor)

    def mark_unprunable_for_stock(self) -> None:
        """Freeze what a stock architecture has no number for, so that ``subnet.save_pretrained`` will work.

        For a model of transformers or timm, before the optimizer is made; its argument ``uniform=True`` does the
        rest: the same widths in every layer.

        Raises:
            StockError: no table knows the architecture.
        """
        reasons = stock.reasons_to_stay(self.model, self.groups)
        self._freeze({name: f"marked unprunable: {reason}" for name, reason in reasons.items()})

    def zero_layers(self, layers: int | Sequence[int]) -> list[str]:
        """Zero whole layers, **in the model that was given**: they pass on what they get, and train no further.

        ``subnet.save_pretrained`` leaves them out. Their groups are frozen: the layers go as a whole. Call it before
        the optimizer is made, or when training is over.

        Args:
            layers: which ones; or how many, those without which the outputs on the example inputs change least.

        Returns:
            their paths.

        Raises:
            ConfigurationError: there are no such layers, or a layer of this model does more than adding to what
                passes it.
            StockError: no table knows the architecture.
        """
        if self._cuts is not None and self._cuts.cut:
            raise ConfigurationError("units have left the model: zero layers before training, or analyse what is left")
        zeroed = stock.zero_layers(self.model, layers, self._inputs_now())
        inside = {
            group.name: f"layer {path} is at zero as a whole"
            for group in self.groups
            for path in zeroed
            if all(s.param.startswith(f"{path}.") for s in group.slices)
        }
        self._freeze(inside)
        return zeroed

    def _freeze_tensors(self, by_tensor: Mapping[str, str]) -> None:
        frozen = {}
        for group in self.groups:
            hit = next((name for name in group.params if name in by_tensor), None)
            if hit is not None:
                frozen[group.name] = by_tensor[hit]
        self._freeze(frozen)

    def _tensors_named(self, name: str) -> list[str]:
        """First names of the tensors that ``name`` is, or that are below the module ``name``."""
        firsts: dict[int, str] = {}
        everything: dict[str, str] = {}
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for full_name, tensor in named:
            everything[full_name] = firsts.setdefault(id(tensor), full_name)
        return [first for n, first in everything.items() if n == name or n.startswith(f"{name}.")]

    def _node(self, node_id: str) -> Node | None:
        # Nothing looser: "-1" and a misspelt name that ends in a number are no nodes.
        match = re.fullmatch(r"(?:node-)?([0-9]+)", node_id)
        known = match is not None and int(match[1]) < len(self.graph.nodes)
        return self.graph.nodes[int(match[1])] if match is not None and known else None

    def _tensors_behind(self, node: Node) -> set[str]:
        """Parameters a node reads, also through a view; where it reads none, those of the nearest nodes behind it."""
        makers = self.graph.producers()
        weights: dict[int, frozenset[str]] = {}  # values computed from parameters alone -> from which
        for value in self.graph.values:
            if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
                weights[value.index] = frozenset({value.name})
        for maker in self.graph.nodes:
            if maker.inputs and all(index in weights for index in maker.inputs):
                names = frozenset[str]().union(*(weights[index] for index in maker.inputs))
                weights.update({out: names for out in maker.outputs if out is not None})
        found: set[str] = set()
        pending, seen = [node], {node.index}
        while pending:
            current = pending.pop()
            read = {name for index in current.inputs for name in weights.get(index, ())}
            found |= read
            behind = [makers[index] for index in current.inputs if index in makers] if not read else []
            pending += [n for n in behind if n.index not in seen]
            seen |= {n.index for n in behind}
        return found

    def cluster_node_groups(self, num_clusters: int = 1) -> dict[str, int]:
        """Group name -> cluster, prunable groups of like size and number of parameters together (k-means)."""
        groups = list(self.groups.prunable)
        whole = isinstance(num_clusters, int) and not isinstance(num_clusters, bool)
        if not whole or not 1 <= num_clusters <= max(1, len(groups)):
            raise ConfigurationError(
                f"num_clusters={num_clusters!r}: 1 to {len(groups)}, the number of prunable groups"
            )
        if num_clusters == 1:
            return {g.name: 0 for g in groups}
        shapes = {n: t.numel() for n, t in self._named_tensors().items()}
        features = np.log1p([[g.size, sum(shapes[p] for p in g.params)] for g in groups])
        _, labels = kmeans2(features, num_clusters, minit="++", rng=0)
        return {g.name: int(label) for g, label in zip(groups, labels, strict=True)}

    def explain(self, name: str | None = None) -> str:
        """What can be removed, what stays and why, and what would free it, as text.

        Args:
            name: of a group, tensor or module: only the groups that touch it, with everything they cut.
        """
        if name is None:
            return render(explanation(self.groups, {n: tuple(p.shape) for n, p in self.model.named_parameters()}))
        if name in self.groups:
            return render(groups_table([self.groups[name]]))
        tensors = set(self._tensors_named(name))
        if not tensors:
            raise ConfigurationError(f"{name!r} is no group, parameter, buffer or module of this model")
        users = [g for g in self.groups if tensors & set(g.params)]
        return render(groups_table(users)) if users else f"{name}: no group cuts it"

    # -- training ----------------------------------------------------------------------------------------------

    def _named_tensors(self) -> dict[str, Tensor]:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return plainly_named(tensors, [name for group in self.groups for name in group.params])

    def hesso(
        self,
        lr: float = 0.1,
        weight_decay: float | None = None,
        first_momentum: float | None = None,
        second_momentum: float | None = None,
        variant: str | type[torch.optim.Optimizer] = "sgd",
        target_group_sparsity: float = SPARSITY,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        device: Any = None,
        dampening: float | None = None,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        importance_score_criteria: Any = "default",
        **optimizer_kwargs: Any,
    ) -> torch.optim.Optimizer:
        """A torch optimizer for the whole model with HESSO attached; see :class:`optim.Hesso` and :func:`optim.build`.

        ``device`` is accepted for scripts of earlier generations and not needed: tensors stay where they are.
        """
        if pruning_steps == 1 and target_group_sparsity:
            logger.warning(
                "pruning_steps=1: all units go to zero in the single step %d; spread them over a tenth of the training "
                "or more, for example pruning_steps=1000, pruning_periods=10",
                start_pruning_step,
            )
        return self._build_optimizer(
            "hesso",
            variant=variant,
            lr=lr,
            weight_decay=weight_decay,
            first_momentum=first_momentum,
            second_momentum=second_momentum,
            dampening=dampening,
            target_group_sparsity=target_group_sparsity,
            start_pruning_step=start_pruning_step,
            pruning_steps=pruning_steps,
            pruning_periods=pruning_periods,
            device=device,
            group_divisible=group_divisible,
            fixed_zero_groups=fixed_zero_groups,
            importance_score_criteria=importance_score_criteria,
            **optimizer_kwargs,
        )

    def dhspg(
        self,
        lr: float = 0.1,
        weight_decay: float | None = None,
        first_momentum: float | None = None,
        second_momentum: float | None = None,
        variant: str | type[torch.optim.Optimizer] = "sgd",
        target_group_sparsity: float = SPARSITY,
        tolerance_group_sparsity: float = 0.0,
        start_pruning_step: int = 0,
        pruning_steps: int = 1,
        pruning_periods: int = 1,
        device: Any = None,
        dampening: float | None = None,
        group_divisible: int = 1,
        fixed_zero_groups: bool = True,
        importance_score_criteria: Any = "default",
        **options: Any,
    ) -> torch.optim.Optimizer:
        """A torch optimizer for the whole model with DHSPG attached; see :class:`optim.Dhspg` and :func:`optim.build`.

        ``options`` are its other arguments (``epsilon``, ``lmbda``, ...) and those of the optimizer class.
        """
        return self._build_optimizer(
            "dhspg",
            variant=variant,
            lr=lr,
            weight_decay=weight_decay,
            first_momentum=first_momentum,
            second_momentum=second_momentum,
            dampening=dampening,
            target_group_sparsity=target_group_sparsity,
            tolerance_group_sparsity=tolerance_group_sparsity,
            start_pruning_step=start_pruning_step,
            pruning_steps=pruning_steps,
            pruning_periods=pruning_periods,
            device=device,
            group_divisible=group_divisible,
            fixed_zero_groups=fixed_zero_groups,
            importance_score_criteria=importance_score_criteria,
            **options,
        )

    def hspg(self, **options: Any) -> torch.optim.Optimizer:
        """A torch optimizer for the whole model with HSPG attached; see :class:`optim.Hspg`.

        ``options`` are its arguments and those of :func:`optim.build`, by name, and those of the optimizer class.
        """
        return self._build_optimizer("hspg", **options)

    def hesso_cric(self, **options: Any) -> torch.optim.Optimizer:
        """A torch optimizer for the whole model with HESSO-CRIC attached; see :class:`optim.HessoCric`.

        ``options`` are its arguments and those of :func:`optim.build`, by name, and those of the optimizer class.
        """
        return self._build_optimizer("hesso_cric", **options)

    def ada_hspg(self, **options: Any) -> torch.optim.Optimizer:
        """A torch optimizer for the whole model with AdaHSPG+ attached; see :class:`optim.AdaHspg`.

        ``options`` are its arguments and those of :func:`optim.build`, by name, and those of the optimizer class.
        """
        return self._build_optimizer("ada_hspg", **options)

    def attach(
        self, optimizer: torch.optim.Optimizer, method: str = "hesso", *, physical_cuts: bool = False, **config: Any
    ) -> torch.optim.Optimizer:
        """Attach a pruning method to an optimizer that exists; returns the same object.

        Args:
            optimizer: any torch optimizer over the model's parameters.
            method: a name in `optim.METHODS`.
            physical_cuts: see `compact`; it then happens at the end of every period.
            **config: the method's arguments, and ``process_group`` of :func:`optim.attach`.
        """
        flag("physical_cuts", physical_cuts)
        if physical_cuts:
            refuse_uncuttable(optimizer, self._named_tensors())
        return self._with_cuts(
            attach_method(optimizer, self.groups, self._named_tensors(), method=method, model=self.model, **config),
            physical_cuts,
        )

    def train_once(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None = None,
        *,
        full_steps: int | None = None,
        recipe: Recipe | str | None = None,
        physical_cuts: bool = True,
        **config: Any,
    ) -> torch.optim.Optimizer:
        """Attach HESSO with the settings of a recipe to an optimizer that exists; returns the same object.

        Args:
            optimizer: any torch optimizer over the model's parameters.
            total_steps: of the training, which costs less than the full network's; or
            full_steps: it costs what so many steps of the full network cost, and has :meth:`steps_within` steps.
            recipe: the settings: a `Recipe`, or the name of one of ``recipe.py``: "pretrained" where the weights know
                something already, "undertrained" where the training ends before the full network has learned what it
                can. None for "cheaper" with ``total_steps``, "equal_cost" with ``full_steps``.
            physical_cuts: see :meth:`compact`.
            **config: ``target_flops`` or another target, and whatever else should differ from the recipe.
        """
        one_length(total_steps, full_steps, config)
        chosen = recipe_for(recipe, full_steps)
        left = 1.0 if config.get("target_flops") is None else self._left(config["target_flops"])
        steps = total_steps if full_steps is None else chosen.steps_within(full_steps, left)
        assert steps is not None
        made = chosen.arguments(steps, measure_of(config), left, normalized=normalizes(self.graph))
        settings = {**made, **config}
        return self.attach(optimizer, "hesso", physical_cuts=physical_cuts, **settings)

    def steps_within(self, full_steps: int, target_flops: float, recipe: Recipe | str | None = None) -> int:
        """How many steps ``train_once(full_steps=...)`` has: they cost what so many of the full network cost."""
        return recipe_for(recipe, full_steps).steps_within(full_steps, self._left(target_flops))

    def _left(self, target_flops: float) -> float:
        """A target in FLOPs as the share that is kept; refuses what is none."""
        budget = Budget(target_flops=target_flops)
        full = 1.0 if budget.target <= 1 else float(self.compute_flops(in_million=False)["total"])
        return budget.level(full) / full

    def _build_optimizer(self, method: str, *, physical_cuts: bool = False, **options: Any) -> torch.optim.Optimizer:
        flag("physical_cuts", physical_cuts)
        return self._with_cuts(
            build(method, self._named_tensors(), self.groups, model=self.model, **options), physical_cuts
        )

    def _with_cuts(self, optimizer: torch.optim.Optimizer, physical: bool) -> torch.optim.Optimizer:
        assert isinstance(optimizer, AttachedOptimizer)
        if self._cuts is None:
            self._cuts = LiveCuts(self.model, self.groups, self.inputs, other_outputs_may_shrink=self.strict_out_nodes)
        elif not self._cuts.cut:
            self._cuts.groups = self._cuts.full_groups = self.groups  # some may have been frozen since
        if physical:
            self._cuts.attach(optimizer, by_itself=True)
        else:
            self._cuts.also(optimizer)
        return optimizer

    def compact(self, optimizer: torch.optim.Optimizer, verify: bool = True) -> CutEvent | None:
        """Let the units that are settled leave **the model that was given**, so that what follows costs less.

        Parameters, gradients and the optimizer's state get smaller in place; the loop goes on as it is, and ends where
        it would have. ``optimizer.removed`` goes on using the numbers that the units had. With ``physical_cuts=True``
        the optimizer does it by itself at the end of every period.

        Args:
            optimizer: with a method attached by this object.
            verify: make the cut on a copy first and compare; a group that is not exact keeps its units.

        Returns:
            what was done; None if no unit could leave.

        Raises:
            ConfigurationError: the optimizer's state cannot be cut. Nothing was changed then.
        """
        if not isinstance(optimizer, AttachedOptimizer):
            raise ConfigurationError(
                f"no method is attached to this {type(optimizer).__name__}, so nothing says which units can leave: "
                "oto.attach(optimizer, ...) first"
            )
        if self._cuts is None or optimizer not in self._cuts.optimizers:
            raise ConfigurationError("this optimizer was attached by another OTO object: give it to that one")
        if optimizer._cutter is None:
            self._cuts.attach(optimizer, by_itself=False)
        return self._cuts.leave(optimizer, verify)

    def resume(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], model_state: Mapping[str, Any]
    ) -> None:
        """Load both states in the order that works also when units had left: the optimizer's says what has to leave.

        ``optimizer.load_state_dict``, then ``model.load_state_dict``.
        """
        optimizer.load_state_dict(optimizer_state)
        self.model.load_state_dict(model_state)

    def random_set_zero_groups(self, target_group_sparsity: float | None = None, seed: int | None = None) -> None:
        """Set random units of every prunable group to zero, **in the model that was given**; for trying things out.

        Args:
            target_group_sparsity: share of each group's units, rounded down to what may leave; a random share per
                group if None. At least one unit of a group stays.
            seed: of the choice; None draws from torch's global generator.
        """
        share = target_group_sparsity
        number = isinstance(share, (int, float, np.floating)) and not isinstance(share, bool)
        if share is not None and not (number and 0.0 <= share < 1.0):
            raise ConfigurationError(f"target_group_sparsity={share!r}: 0 or more, and less than 1")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise ConfigurationError(f"seed={seed!r}: a whole number, at least 0, or None")
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()) if seed is None else seed)
        chosen = {}
        for group in self.groups.prunable:
            drawn = float(torch.rand((), generator=generator)) if share is None else float(share)
            count = removable(group, drawn)
            chosen[group.name] = torch.randperm(group.size, generator=generator)[:count].numpy()
        tensors = self._named_tensors()
        with torch.no_grad():
            for region in regions(self.groups.prunable, chosen, tensors, (Role.ZERO,)):
                region.zero_(tensors[region.name])

    # -- construction ------------------------------------------------------------------------------------------

    def gather(self, model: nn.Module | None = None, dummy_input: Any = None) -> OTO | None:
        """The whole model on the CPU of the first process, with this analysis; None in the others.

        Every process calls it. Tensors are gathered one at a time. Continue in the first process::

            full = oto.gather()
            if full is not None:
                full.construct_subnet().save("slim/")

        Args:
            model: where to gather it, made like the one that was analysed; None for a copy of that one's modules as
                they were before it was sharded, kept where ``torch.distributed`` ran at the analysis.
            dummy_input: example inputs with values, where the analysis had inputs on the meta device.
        """
        tensors = self._named_tensors()
        first = not is_running() or torch.distributed.get_rank() == 0
        if model is None and self._plain is None:
            raise ConfigurationError(
                "gather() needs a model to fill: there was no process group when the model was analysed, so no copy of "
                "its modules was kept; call gather(make_model()), or make the OTO after init_process_group"
            )
        if model is None and first:
            assert self._plain is not None
            room: dict[int, Tensor] = {
                id(p): nn.Parameter(torch.empty(p.shape, dtype=tensors[n].dtype), p.requires_grad)
                for n, p in self._plain.named_parameters()
            }
            model = copy_module(self._plain, instead=room).to("cpu").train(self.model.training)
        gather_into(model if first else None, tensors)
        if not first:
            return None
        full = copy.copy(self)
        assert model is not None
        full.model, full._cuts = model, None
        full.inputs = map_inputs(_on_cpu, self.inputs if dummy_input is None else dummy_input)
        return full

    def construct_subnet(
        self,
        out_dir: str | Path | None = None,
        *,
        merge_lora_to_base: bool = False,
        unmerge_lora_to_base: bool = False,
        export_huggingface_format: bool = False,
        export_float16: bool = False,
        full_group_sparse_model_dir: str | Path | None = None,
        compressed_model_dir: str | Path | None = None,
        save_full_group_sparse_model: bool = True,
        ckpt_format: str = "torch",
        verify: bool = True,
    ) -> Subnet:
        """Cut the units that are at zero out of a copy of the model, and check that nothing changed.

        Where the cut of a group changes the function, the group is excluded (its units stay in, at zero), the
        subnet is built again without it, and the report names it.

        Args:
            out_dir: where to write whole-module files for ``torch.load(..., weights_only=False)``; None writes
                nothing. ``Subnet.save`` is the safe format.
            full_group_sparse_model_dir, compressed_model_dir: other places for either file.
            save_full_group_sparse_model: whether to write the full model as well.
            ckpt_format: only ``"torch"``.
            verify: compare the subnet with the full model in float64; skip it only where that cannot fit.

        Raises:
            VerificationError: no unit can be cut exactly.
        """
        refused = {
            "merge_lora_to_base": (merge_lora_to_base, "merge the adapters into the model before OTO(...) sees it"),
            "unmerge_lora_to_base": (unmerge_lora_to_base, "unmerge the adapters before OTO(...) sees the model"),
            "export_huggingface_format": (export_huggingface_format, "use subnet.save(dir) and load(dir, build)"),
            "export_float16": (export_float16, "call subnet.model.half() on the result"),
        }
        for name, (value, way_out) in refused.items():
            if value:
                raise ConfigurationError(f"{name}=True is not implemented: {way_out}")
        if ckpt_format != "torch":
            raise ConfigurationError(
                f"ckpt_format={ckpt_format!r}: only 'torch' is written here; for safetensors use subnet.save(dir), "
                "for ONNX subnet.export('onnx', path)"
            )
        for folder in (out_dir, full_group_sparse_model_dir, compressed_model_dir):
            if folder is not None and not isinstance(folder, (str, Path)):
                raise ConfigurationError(f"{folder!r} is no folder: give a path, or None to write nothing")
        for directory in (out_dir, full_group_sparse_model_dir, compressed_model_dir):
            if directory is not None and checkpoint.folder(directory).is_file():
                raise ConfigurationError(f"{directory} is a file: give a folder's path")
        if is_spread(self.model):
            raise ConfigurationError(
                "the parameters are spread over processes: call full = oto.gather() in all of them, then "
                "full.construct_subnet() in the first, where full is not None"
            )
        full, groups = self._full()
        subnet = self._build(full, groups, verify)
        self._write_reference_files(
            full,
            subnet.model,
            full_group_sparse_model_dir or out_dir if save_full_group_sparse_model else None,
            compressed_model_dir or out_dir,
        )
        return subnet

    def compress(self, out_dir: str | Path | None = None, **options: Any) -> Subnet:
        """The earlier name of :meth:`construct_subnet`."""
        return self.construct_subnet(out_dir, **options)

    def _full(self) -> tuple[nn.Module, GroupList]:
        """The model with all its units, those that have left at zero, and the groups that were found in it."""
        if self._cuts is not None and self._cuts.cut:
            return self._cuts.full_model(), self._cuts.full_groups
        return self.model, self.groups

    def _build(self, full: nn.Module, groups: GroupList, verify: bool) -> Subnet:
        zero = {name: units for name, units in zero_units(full, groups).items() if len(units)}
        leaving = {name: whole_multiples(groups[name], units) for name, units in zero.items()}
        notes = tuple(
            staying_at_zero(groups[name], len(zero[name]), len(units))
            for name, units in leaving.items()
            if len(units) < len(zero[name])
        )
        removed: dict[str, list[int]] = {name: units.tolist() for name, units in leaving.items()}
        attempt = Attempt(full, groups, self._inputs_now(), removed, verify, self.strict_out_nodes)
        wanted = [name for name, units in removed.items() if units]
        kept, excluded = attempt.largest_exact(wanted, [])
        if wanted and not kept:
            attempt.largest_exact([], [])  # when even the uncut copy differs, say that instead
            reasons = "; ".join(f"{name}: {attempt.reasons[name]}" for name in excluded)
            raise VerificationError(f"no group can be cut without changing what the model computes: {reasons}")
        model, record, verification = attempt.built(kept)
        cut = {name: from_runs(runs).tolist() for name, runs in record.removed.items()}  # one unit always stays
        report = build_report(
            full,
            model,
            groups,
            cut,
            flops_before=count_flops(full, self._inputs_now()),
            flops_after=count_flops(model, self._inputs_now()),
        )
        for name in excluded:
            logger.warning("group %s stays in the subnet: %s", name, attempt.reasons[name])
        report = replace(report, excluded={n: attempt.reasons[n] for n in excluded}, notes=notes, **verification)
        return Subnet(model, report, record, self._inputs_now())

    def _inputs_now(self) -> Any:
        """The example inputs, cast along when the model was (``model.half()`` after training)."""
        return inputs_for(self.model, self.inputs, self._dtype)

    def _zero_units(self) -> dict[str, Any]:
        return {name: units for name, units in zero_units(self.model, self.groups).items() if len(units)}

    def _write_reference_files(
        self, full: nn.Module, compressed: nn.Module, full_dir: str | Path | None, compressed_dir: str | Path | None
    ) -> None:
        """Whole-module files under the names that earlier scripts read back from the two path attributes."""
        name = type(self.model).__name__
        if full_dir is not None:
            path = Path(full_dir) / f"{name}_full_group_sparse.pt"
            checkpoint.save_reference_format(full, path)
            self.full_group_sparse_model_path = str(path)
        if compressed_dir is not None:
            path = Path(compressed_dir) / f"{name}_compressed.pt"
            checkpoint.save_reference_format(compressed, path)
            self.compressed_model_path = str(path)

    # -- numbers and pictures ----------------------------------------------------------------------------------

    def compute_flops(self, in_million: bool = True, in_billion: bool = False) -> dict[str, Any]:
        """FLOPs (2 per multiply-accumulate) on the example inputs: total, by module and by producing group."""
        scale = 1e9 if in_billion else 1e6 if in_million else 1
        count = count_flops(self.model, self._inputs_now())
        by_groups = {}
        for group in self.groups:
            producers = {s.param.rpartition(".")[0] for s in group.with_role(Role.ZERO, Role.FOLLOW)}
            by_groups[group.name] = sum(count.by_module.get(p, 0) for p in producers) / scale
        by_nodes = {path: flops / scale for path, flops in count.by_module.items()}
        return {"total": count.total / scale, "by_nodes": by_nodes, "by_node_groups": by_groups}

    def costs(
        self, removed: Mapping[str, Sequence[int]] | None = None, latency_table: LatencyTable | None = None
    ) -> Costs:
        """Parameters, FLOPs, memory and (by a table) seconds of the network without some units; nothing is built.

        Args:
            removed: group name -> units; None for the full network.
            latency_table: seconds of operators, see :meth:`measure_latency`.
        """
        known = {} if removed is None else removed
        if not isinstance(known, Mapping) or not all(name in self.groups for name in known):
            raise ConfigurationError(f"removed is {removed!r:.80}: a dict from group names to units is needed")
        return CostModel(self.groups, self._named_tensors(), latency=latency_table).costs(known)

    def sensitivity(self, evaluate: Callable[[nn.Module], Any], **options: Any) -> Sensitivity:
        """How much a metric changes when units of one group, or of all, are at zero; the model is as before afterwards.

        Example::

            found = oto.sensitivity(lambda model: accuracy(model, validation), metric="accuracy")
            print(found)
            found.plot("sensitivity.svg")
            optimizer = oto.hesso(..., min_units=found.min_units(tolerance=0.05))

        Args:
            evaluate: model -> number; called once per group and level.
            **options: ``levels``, ``criteria``, ``metric``, ``higher_is_better``; see :func:`sensitivity.analyse`.
        """
        if is_spread(self.model):
            raise ConfigurationError(
                "the parameters are spread over processes: full = oto.gather() has all of them in the first"
            )
        return analyse(self.model, list(self.groups.prunable), self._named_tensors(), evaluate, **options)

    def suggest(
        self,
        total_steps: int,
        *,
        sensitivity: Sensitivity | None = None,
        tolerance: float | None = None,
        recipe: Recipe | str = CHEAPER,
    ) -> Suggestion:
        """A target and a schedule for a training of so many steps, and why.

        ``suggestion.arguments`` go to :meth:`hesso` or :meth:`attach`; ``print(suggestion)`` says why.

        Args:
            total_steps: of the whole training.
            sensitivity, tolerance: what :meth:`sensitivity` found, and by how much the metric may be worse when one
                group alone is cut: groups then keep what they need for that.
            recipe: when to prune.
        """
        model = CostModel(self.groups, self._named_tensors())
        chosen, normalized = recipe_for(recipe, None), normalizes(self.graph)
        return suggest(self.groups, model, total_steps, chosen, sensitivity, tolerance, normalized=normalized)

    def measure_latency(
        self, device: str | torch.device | None = None, *, cache: bool | str | Path = False, **options: Any
    ) -> LatencyTable:
        """Time every matrix product, convolution and attention at a grid of sizes, for ``target_latency``.

        Args:
            device: where; None for the model's. What is no such operator counts only there.
            cache: take what was timed on this machine before from a file, and keep what is timed now: True for the
                user's folder for caches, or a folder.
            **options: see :func:`latency.measure_latency`.
        """
        own = next((t.device for t in self._named_tensors().values()), torch.device("cpu"))
        where = own if device is None else torch.device(device)
        workload = self.groups.workload
        if workload is None:
            raise ConfigurationError("the operators of these groups are not known: partition_pzigs() finds them again")
        if not isinstance(cache, (bool, str, Path)):
            raise ConfigurationError(f"cache is {cache!r}; it has to be True, False or a folder")
        with ExitStack() as stack:
            if cache is not False:
                folder = None if cache is True else cache
                options["known"] = stack.enter_context(latency_cache.remembered(where, folder))
            if where == own:
                model = copy_module(self.model)
                stack.enter_context(observing(model))
                options["total"] = lambda: call_model(model, self._inputs_now())
            return measure_latency(workload, where, **options)

    def compute_num_params(self, in_million: bool = True, in_billion: bool = False) -> float:
        """Number of parameters, a tied one counted once."""
        return count_parameters(self.model) / (1e9 if in_billion else 1e6 if in_million else 1)

    def visualize(
        self,
        out_dir: str | Path | None = None,
        view: bool = False,
        vertical: bool = True,
        by_node_groups: bool = True,
        display_params: bool = False,
    ) -> Path:
        """Draw the groups as SVG into ``out_dir`` (default: the working directory); returns the file's path."""
        directory = checkpoint.folder("." if out_dir is None else out_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{directory} cannot be made ({error}): give another folder") from error
        name = type(self.model).__name__
        path = directory / f"{name}_groups.svg"
        picture = draw_groups(
            self.groups,
            title=f"Pruning groups of {name}",
            removed=self._zero_units(),
            vertical=vertical,
            by_node_groups=by_node_groups,
            display_params=display_params,
        )
        path.write_text(picture, encoding="utf-8")
        if view:
            webbrowser.open(path.resolve().as_uri())
        return path


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.device.type == "meta":
        raise ConfigurationError("the model was analysed with inputs on the meta device: give gather(dummy_input=x)")
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters take no memory."""
    empty: dict[int, Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy_module(model, TraceError, empty)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(f"skip_patterns: {pattern!r} is no regular expression: {error}") from error


def _name_list(names: Any, argument: str) -> list[str]:
    """A lone string is one name, not a sequence of letters."""
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    strange = [name for name in listed if not isinstance(name, str)]
    if strange:
        raise ConfigurationError(f"{argument} holds {strange[0]!r}: give a string, or a list of them")
    return listed
