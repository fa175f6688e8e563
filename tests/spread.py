"""Training runs on one process or many: a table of ways to spread a model, and what each run leaves behind.

Run by torchrun, ``torchrun --nproc-per-node 2 -m tests.spread FOLDER``: every process writes what
its runs chose, the first one also the whole weights. ``test_distributed.py`` compares that with runs of one process.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from only_train_once import OTO
from only_train_once.errors import ConfigurationError
from only_train_once.groups import PruningGroup
from only_train_once.masking import unit_dot, unit_sq_norm
from only_train_once.optim import attach, expect
from only_train_once.sharding import held, local, part_of, whole
from tests.methods import config
from tests.reference.nets import NETS, C, F, Mlp, Z, batch, group, loss_of, make, tensors_of

STEPS = 20


class Block(nn.Module):
    """Attention and an MLP between norms, written so that each process may have some of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    def groups(self) -> list[Any]:
        heads = [(f"{m}.{p}", 0, F) for m in "qk" for p in ("weight", "bias")]
        heads += [("v.weight", 0, Z), ("v.bias", 0, Z), ("o.weight", 1, C)]
        inner = [("up.weight", 0, Z), ("up.bias", 0, Z), ("down.weight", 1, C)]
        return [group("heads", 4, self, heads), group("up", 12, self, inner)]


NETS["block"] = (Block, (4, 3, 8))

Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def fsdp_layers(model: nn.Module) -> nn.Module:
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    return fully_shard(model)


def fsdp_last_dim(model: nn.Module) -> nn.Module:
    """Sharded over the last dim that divides, as ``shard_placement_fn`` wants it."""
    size = torch.distributed.get_world_size()

    def place(parameter: nn.Parameter) -> Shard:
        even = [d for d in range(1, parameter.dim()) if parameter.shape[d] % size == 0]
        return Shard(even[-1] if even else 0)

    return fully_shard(model, shard_placement_fn=place)


PLANS = {
    "mlp": {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()},
    "layer_norm": {"up": ColwiseParallel(), "down": RowwiseParallel()},  # the rest of the stream is everywhere
    "block": {
        **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
        **{name: RowwiseParallel() for name in ("o", "down")},
    },
}


def _name(model: nn.Module) -> str:
    return next(name for name, (make_one, _) in NETS.items() if make_one is type(model))


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, PLANS[_name(model)])


def two_dims(model: nn.Module) -> nn.Module:
    """A tensor-parallel plan over pairs of processes, and FSDP over what each pair has."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(model, mesh["tp"], PLANS[_name(model)])
    return fully_shard(model, mesh=mesh["dp"])


def hybrid(model: nn.Module) -> nn.Module:
    """Sharded over pairs of processes, replicated over the pairs."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size() // 2, 2), mesh_dim_names=("rep", "shard"))
    return fully_shard(model, mesh=mesh)


# how a model is spread, and over how many rows of the batch: (this process's number among the data-parallel ones, all)
WAYS: dict[str, tuple[Wrap, Callable[[int, int], tuple[int, int]]]] = {
    "alone": (lambda model: model, lambda rank, size: (0, 1)),
    "ddp": (ddp, lambda rank, size: (rank, size)),
    "fsdp": (fsdp, lambda rank, size: (rank, size)),
    "fsdp_layers": (fsdp_layers, lambda rank, size: (rank, size)),
    "fsdp_last_dim": (fsdp_last_dim, lambda rank, size: (rank, size)),
    "tensor_parallel": (tensor_parallel, lambda rank, size: (0, 1)),
    "two_dims": (two_dims, lambda rank, size: (rank // 2, size // 2)),
    "hybrid": (hybrid, lambda rank, size: (rank, size)),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        way: a key of `WAYS`.
        net: a key of ``NETS``.
        method: a key of ``CONFIGS``.
        processes: number of processes.
        base: a key of `BASES`.
        clip: the largest norm of the gradients, or None.
        scaled: whether a GradScaler scales the loss, and a gradient overflows in one process now and then.
        more: arguments of the method.
    """

    way: str
    net: str
    method: str
    processes: int = 2
    base: str = "adamw"
    clip: float | None = None
    scaled: bool = False
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        more = "".join(f"-{k if v is True else getattr(v, '__name__', v)}" for k, v in self.more.items())
        return f"{self.way}-{self.processes}-{self.net}-{self.method}-{self.base}{more}".replace(" ", "")


def rows(net: str, step: int, part: int, parts: int) -> Tensor:
    """This part of the step's rows; networks with batch norm see all of them everywhere."""
    x = torch.cat([batch(net, 2 * step + half) for half in range(2)])
    return x if net in ("conv", "residual") else x[part::parts]


BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02, momentum=0.9, foreach=False),
    "adamw": lambda p: AdamW(p, lr=3e-3, foreach=False),
    "adamw foreach": lambda p: AdamW(p, lr=3e-3, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=3e-3, fused=True),
}


def base_of(run: Run, model: nn.Module) -> Optimizer:
    return BASES[run.base](model.parameters())


def build(run: Run, alone: bool = False) -> tuple[nn.Module, Any]:
    """The model of a run, spread, and its optimizer."""
    model = make(run.net)
    groups = model.groups()  # type: ignore[operator]
    model = WAYS["alone" if alone else run.way][0](model)
    return model, attach(base_of(run, model), groups, tensors_of(model), **config(run.method, **run.more))


def train(run: Run, model: nn.Module, optimizer: Optimizer, steps: range, alone: bool = False) -> None:
    rank = 0 if alone else torch.distributed.get_rank()
    part, parts = WAYS["alone" if alone else run.way][1](rank, run.processes)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=run.scaled)
    for step in steps:
        for overflows in (True, False) if run.scaled and step in (2, 5, 9) else (False,):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, rows(run.net, step, part, parts))).backward()
            if overflows and rank == 0:
                local(next(p.grad for p in model.parameters() if p.grad is not None)).fill_(torch.inf)
            if run.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            scaler.step(optimizer)
            scaler.update()


def facts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a run leaves behind; every process asks."""
    metrics = optimizer.compute_metrics()
    weights = {n.removeprefix("module."): whole(t.detach()).clone() for n, t in tensors_of(model).items()}
    return {"removed": optimizer.removed, "metrics": vars(metrics), "weights": weights}


def result(run: Run, alone: bool = False) -> dict[str, Any]:
    model, optimizer = build(run, alone)
    train(run, model, optimizer, range(STEPS), alone)
    return facts(model, optimizer)


def own_criterion(group: PruningGroup, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """What users may write: helpers of the library, and plain operators on the tensors they are given."""
    name = next(s.param for s in group.slices if s.role is Z and parameters[s.param].dim() == 2)
    rows = parameters[name].detach().abs().sum(1) + gradients[name].abs().sum(1)
    score = unit_sq_norm(group, gradients) + unit_dot(group, parameters, gradients).abs()
    return score + whole(rows).view(group.size, -1).sum(1)


def first_decides(group: PruningGroup, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """Scores that differ between processes."""
    alone = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return torch.arange(group.size) * (1.0 if alone else -1.0)


METHODS = ("hesso", "hspg", "hspg, prox", "dhspg", "dhspg, tolerance", "ada_hspg", "hesso_cric")
CRITERIA = ("fisher_diagonal", "group_fisher", "lamp", "fpgm")
CRITERIA_OF_CONVS = ("fpgm", "batch_norm_scale")
RUNS = [
    *(Run("fsdp", "block", method) for method in ("hesso", "hspg", "dhspg", "ada_hspg", "hesso_cric")),
    *(Run("fsdp", "mlp", "hesso", more={"importance_score_criteria": own}) for own in (own_criterion, first_decides)),
    Run("ddp", "mlp", "hesso", more={"importance_score_criteria": first_decides}),
    *(Run("fsdp_last_dim", "block", method, base="sgd") for method in ("hesso", "dhspg")),
    *(Run("tensor_parallel", "block", method) for method in METHODS),
    *(Run("tensor_parallel", "layer_norm", method) for method in ("hesso", "hspg")),
    *(Run("ddp", "block", method) for method in ("dhspg", "hesso_cric")),
    *(Run("fsdp", "mlp", "hesso", more={"importance_score_criteria": name}) for name in CRITERIA),
    *(Run("fsdp_last_dim", "conv", "hesso", more={"importance_score_criteria": name}) for name in CRITERIA_OF_CONVS),
    Run("fsdp", "residual", "hesso", base="sgd", clip=0.5),
    Run("fsdp", "mlp", "hesso", more={"rescale": True}),
    Run("fsdp_last_dim", "block", "hesso", base="sgd", more={"rescale": True}),
    Run("fsdp_layers", "layer_norm", "hesso", base="sgd"),
    Run("ddp", "conv", "hspg"),
    *(Run("fsdp", "mlp", "hesso", base=base, scaled=True) for base in ("sgd", "adamw foreach", "adamw fused")),
    *(Run("two_dims", "block", method, 4) for method in ("hesso", "ada_hspg", "hesso_cric")),
    *(Run("fsdp", net, "hesso", 4) for net in ("conv", "residual", "layer_norm")),
    *(Run("hybrid", "block", method, 4) for method in ("hesso", "dhspg")),
    Run("two_dims", "layer_norm", "dhspg", 4),
    Run("two_dims", "block", "hesso", 4, more={"importance_score_criteria": "fpgm"}),
]


# -- stopping and going on -------------------------------------------------------------------------------------------

# Saved by two processes inside a window and a period, inside a period, and inside a cycle; continued by any number.
STOPPED = {
    Run("fsdp", "block", "hesso"): 6,
    Run("fsdp", "conv", "hesso"): 10,  # when some units are at zero
    Run("fsdp", "block", "dhspg"): 9,
    Run("fsdp", "block", "hesso_cric"): 5,
}


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def stop(run: Run, folder: Path) -> None:
    """Train until the step of the table and write a checkpoint; every process a part of it."""
    model, optimizer = build(run)
    train(run, model, optimizer, range(STOPPED[run]))
    optimizer.zero_grad()
    dcp.save(_states(model, optimizer), checkpoint_id=folder / str(run))


def go_on(run: Run, processes: int, folder: Path) -> dict[str, Any]:
    """Continue a stopped run with another number of processes, 1 for this one alone."""
    now, alone = replace(run, processes=processes), processes == 1
    model, optimizer = build(now, alone)
    expect(optimizer, folder / str(run))
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=folder / str(run), no_dist=alone)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    assert optimizer.compute_metrics().step == STOPPED[run]
    train(now, model, optimizer, range(STOPPED[run], STEPS), alone)
    return facts(model, optimizer)


def through_one_file(run: Run, folder: Path) -> dict[str, Any]:
    """Stop a run, write everything with ``torch.save`` in the first process, and go on from there."""
    model, optimizer = build(run)
    train(run, model, optimizer, range(STOPPED[run]))
    optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    whole_model = get_model_state_dict(model, options=options)
    if torch.distributed.get_rank() == 0:
        torch.save({"model": whole_model, "optimizer": state}, folder / "whole.pt")
    torch.distributed.barrier()
    saved = torch.load(folder / "whole.pt", weights_only=True)
    model, optimizer = build(run)
    set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    train(run, model, optimizer, range(STOPPED[run], STEPS))
    return facts(model, optimizer)


# -- construction ----------------------------------------------------------------------------------------------------

CUT = Run("fsdp", "block", "hesso")


def example() -> Tensor:
    return batch("block", 99)


def slim(way: str, folder: Path, on_meta: bool = False) -> None:
    """Analyse, spread, train, gather, cut and save; ``on_meta``: analysed without weights, filled when sharded."""
    run = replace(CUT, way=way)
    full_state = make(run.net).state_dict()
    model = make(run.net).to("meta") if on_meta else make(run.net)
    oto = OTO(model, example().to("meta") if on_meta else example())
    model = WAYS[way][0](model)
    if on_meta:
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, full_state if torch.distributed.get_rank() == 0 else {}, options=options)
    optimizer = oto.attach(base_of(run, model), **config(run.method))
    train(run, model, optimizer, range(STEPS))
    if way != "ddp":
        try:
            oto.construct_subnet()
            raise AssertionError("a sharded model was cut")
        except ConfigurationError as error:
            assert "oto.gather()" in str(error)  # noqa: PT017
    full = oto.gather(dummy_input=example())
    assert (full is None) == (torch.distributed.get_rank() > 0)
    if full is not None:
        full.construct_subnet().save(folder / f"slim-{way}-{on_meta}")


# -- together with what else there is --------------------------------------------------------------------------------

TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "a target in FLOPs": ("fsdp", {"target_flops": 0.7}),
    "a target in parameters": ("tensor_parallel", {"target_params": 0.7}),
    "physical cuts": ("ddp", {"target_group_sparsity": 0.5, "physical_cuts": True}),
    "activations": ("ddp", {"target_group_sparsity": 0.5, "importance_score_criteria": "activation"}),
    "activations, sharded": ("fsdp", {"target_group_sparsity": 0.5, "importance_score_criteria": "activation"}),
}


def together(name: str, alone: bool = False) -> dict[str, Any]:
    """Removed units and what is left of the parameters."""
    way, arguments = TOGETHER[name]
    run, model = Run(way, "block", "hesso"), make("block")
    oto = OTO(model, example())
    wrapped = WAYS["alone" if alone else way][0](model)
    rest = {k: v for k, v in config("hesso").items() if k != "target_group_sparsity"}
    optimizer: Any = oto.attach(base_of(run, wrapped), **rest, **arguments)
    train(run, wrapped, optimizer, range(STEPS), alone)
    return {"removed": optimizer.removed, "weights": [whole(p.detach()).clone() for p in model.parameters()]}


# -- parts -----------------------------------------------------------------------------------------------------------


def parts() -> int:
    """How many parameters hold the positions that `held` says, in every way to spread them, even and uneven."""
    right = 0
    for way, (wrap, _) in WAYS.items():
        for width in (1, 3, 8, 14):
            if way == "fsdp_last_dim" and width % torch.distributed.get_world_size():
                continue  # torch refuses
            if way == "two_dims" and width == 1:
                continue  # torch loses the shapes of parts without entries, and cannot gather them
            model = Mlp()
            model.fc1, model.fc2 = nn.Linear(6, width), nn.Linear(width, 8)
            for tensor in tensors_of(wrap(model)).values():
                expected = whole(tensor.detach())
                for dim, positions in held(tensor).items():
                    expected = expected.index_select(dim, torch.from_numpy(positions))
                expected = expected if expected.numel() else expected.reshape(local(tensor).shape)
                assert torch.equal(local(tensor), expected), (way, width, tensor)
                assert torch.equal(local(tensor), part_of(whole(tensor.detach()), tensor)), (way, width, tensor)
                right += 1
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parameter = DTensor.from_local(torch.zeros(3), mesh, [Replicate()])
    gradient = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    assert part_of(gradient, parameter).tolist() == [torch.distributed.get_world_size()] * 3
    return right


# -- some of the processes -------------------------------------------------------------------------------------------


def in_pairs() -> dict[str, Any]:
    """Two runs side by side, each in two of four processes."""
    rank = torch.distributed.get_rank()
    meshes = [DeviceMesh("cpu", pair) for pair in ([0, 1], [2, 3])]
    run = (Run("fsdp", "block", "hesso"), Run("fsdp", "mlp", "dhspg"))[rank // 2]
    model = make(run.net)
    groups = model.groups()  # type: ignore[operator]
    fully_shard(model, mesh=meshes[rank // 2])
    arguments = config(run.method, process_group=meshes[rank // 2].get_group())
    optimizer = attach(base_of(run, model), groups, tensors_of(model), **arguments)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rows(run.net, step, rank % 2, 2)).backward()
        optimizer.step()
    return {"run": str(run), **facts(model, optimizer)}


def copies() -> bool:
    """Copies of an optimizer know the processes; of its pickles, all of them."""
    model, optimizer = build(Run("ddp", "mlp", "hesso"))
    others = (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))
    del model
    return all(other._method.tensors.shares == optimizer._method.tensors.shares for other in others)


# -- refusals --------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What is refused in a run of several processes -> what is said."""

    def other_groups() -> object:
        model = make("block")
        groups = model.groups()[torch.distributed.get_rank() :]  # type: ignore[operator]
        return attach(SGD(model.parameters(), lr=0.1), groups, tensors_of(model))

    def analysis_too_late() -> object:
        return OTO(fsdp(make("block")), example())

    def part_of_the_processes() -> object:
        model = make("mlp")
        groups = model.groups()  # type: ignore[operator]
        fully_shard(model)
        return attach(SGD(model.parameters(), lr=0.1), groups, tensors_of(model), process_group=alone)

    def nobody_counts() -> object:
        model = make("mlp")
        (first,) = model.groups()  # type: ignore[operator]
        return unit_sq_norm(first, tensors_of(fully_shard(model)))

    def activations_in_parts() -> object:
        model = make("block")
        oto = OTO(model, example())
        wrapped = tensor_parallel(model)
        optimizer = oto.attach(SGD(wrapped.parameters(), lr=0.1), importance_score_criteria="activation")
        return optimizer, wrapped(example())

    each = [torch.distributed.new_group([rank]) for rank in range(torch.distributed.get_world_size())]
    alone = each[torch.distributed.get_rank()]
    said = {}
    for refused in (other_groups, analysis_too_late, part_of_the_processes, nobody_counts, activations_in_parts):
        try:
            refused()
        except ConfigurationError as error:
            said[refused.__name__] = str(error)
    return said


def main(name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size, folder = torch.distributed.get_rank(), torch.distributed.get_world_size(), Path(name)
    results = {str(run): result(run) for run in RUNS if run.processes == size}
    if size == 4:
        results["pairs"] = in_pairs()
    if size == 2:
        results["copies"] = copies()
        for run in STOPPED:
            stop(run, folder)
        results["through one file"] = through_one_file(next(iter(STOPPED)), folder)
        for way in ("ddp", "fsdp", "tensor_parallel"):
            slim(way, folder)
        slim("fsdp", folder, on_meta=True)
        results["refusals"] = refusals()
        results["together"] = {name: together(name) for name in TOGETHER}
    results["parts"] = parts()
    results |= {f"{run} goes on": go_on(run, size, folder) for run in STOPPED}
    torch.save(results, folder / f"{size}-{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while another still listens
    torch.distributed.destroy_process_group()
    # Threads of torch's may outlive the interpreter, and then abort the process now and then.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
