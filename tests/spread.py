"""Training runs on one process or many: a table of ways to spread a model, and what each run leaves behind.

Run by torchrun, ``torchrun --nproc-per-node 2 -m tests.spread FOLDER``: every process writes what
its runs chose, the first one also the whole weights. ``test_distributed.py`` compares that with runs of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from only_train_once.optim import attach
from only_train_once.sharding import whole
from tests.methods import config
from tests.reference.nets import NETS, C, F, Z, batch, group, loss_of, make, tensors_of

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
    "block": {
        **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
        **{name: RowwiseParallel() for name in ("o", "down")},
    },
}


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, PLANS["block" if hasattr(model, "up") else "mlp"])


def two_dims(model: nn.Module) -> nn.Module:
    """A tensor-parallel plan over pairs of processes, and FSDP over what each pair has."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(model, mesh["tp"], PLANS["block" if hasattr(model, "up") else "mlp"])
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
        base: "sgd" or "adamw".
        clip: the largest norm of the gradients, or None.
        more: arguments of the method.
    """

    way: str
    net: str
    method: str
    processes: int = 2
    base: str = "adamw"
    clip: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        criterion = "".join(f"-{v}" for v in self.more.values())
        return f"{self.way}-{self.processes}-{self.net}-{self.method}-{self.base}{criterion}".replace(" ", "")


def rows(net: str, step: int, part: int, parts: int) -> Tensor:
    """This part of the step's rows; networks with batch norm see all of them everywhere."""
    x = torch.cat([batch(net, 2 * step + half) for half in range(2)])
    return x if net in ("conv", "residual") else x[part::parts]


def base_of(run: Run, model: nn.Module) -> Optimizer:
    if run.base == "sgd":
        return SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=False)
    return AdamW(model.parameters(), lr=3e-3, foreach=False)


def build(run: Run, alone: bool = False) -> tuple[nn.Module, Any]:
    """The model of a run, spread, and its optimizer."""
    model = make(run.net)
    groups = model.groups()  # type: ignore[operator]
    model = WAYS["alone" if alone else run.way][0](model)
    return model, attach(base_of(run, model), groups, tensors_of(model), **config(run.method, **run.more))


def train(run: Run, model: nn.Module, optimizer: Optimizer, steps: range, alone: bool = False) -> None:
    rank = 0 if alone else torch.distributed.get_rank()
    part, parts = WAYS["alone" if alone else run.way][1](rank, run.processes)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rows(run.net, step, part, parts)).backward()
        if run.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()


def facts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a run leaves behind; every process asks."""
    metrics = optimizer.compute_metrics()
    weights = {n.removeprefix("module."): whole(t.detach()).clone() for n, t in tensors_of(model).items()}
    return {"removed": optimizer.removed, "metrics": vars(metrics), "weights": weights}


def result(run: Run, alone: bool = False) -> dict[str, Any]:
    model, optimizer = build(run, alone)
    train(run, model, optimizer, range(STEPS), alone)
    return facts(model, optimizer)


METHODS = ("hesso", "hspg", "hspg, prox", "dhspg", "dhspg, tolerance", "ada_hspg", "hesso_cric")
CRITERIA = ("fisher_diagonal", "lamp", "fpgm", "otov2")
CRITERIA_OF_CONVS = ("fpgm", "batch_norm_scale")
RUNS = [
    *(Run("fsdp", "block", method) for method in METHODS),
    *(Run("fsdp_last_dim", "block", method, base="sgd") for method in ("hesso", "hspg", "dhspg", "hesso_cric")),
    *(Run("tensor_parallel", "block", method) for method in METHODS),
    *(Run("ddp", "block", method) for method in ("hesso", "dhspg", "hesso_cric")),
    *(Run("fsdp", "mlp", "hesso", more={"importance_score_criteria": name}) for name in CRITERIA),
    *(
        Run("fsdp_last_dim", "conv", "hesso", more={"importance_score_criteria": n})
        for n in ("fpgm", "batch_norm_scale")
    ),
    Run("fsdp", "residual", "hesso", base="sgd", clip=0.5),
    Run("fsdp", "layer_norm", "hesso", base="sgd"),
    Run("ddp", "conv", "hspg"),
    *(Run("two_dims", "block", method, 4) for method in ("hesso", "hspg", "dhspg", "ada_hspg", "hesso_cric")),
    *(Run("fsdp", net, "hesso", 4) for net in ("conv", "residual", "layer_norm", "block")),
    *(Run("hybrid", "block", method, 4) for method in ("hesso", "dhspg")),
    Run("two_dims", "block", "hesso", 4, more={"importance_score_criteria": "fpgm"}),
]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {str(run): result(run) for run in RUNS if run.processes == size}
    torch.save(results, Path(folder) / f"{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
