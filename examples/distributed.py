"""Prune a small transformer on many processes, stop in the middle, go on, and cut.

    torchrun --nproc-per-node 2 examples/distributed.py              # FSDP2
    torchrun --nproc-per-node 2 examples/distributed.py --way tp     # a tensor-parallel plan
    torchrun --nproc-per-node 4 examples/distributed.py --way 2d     # both
    torchrun --nproc-per-node 2 examples/distributed.py --way ddp

With GPUs it takes one per process and NCCL, without them the CPU and gloo. The task: say which token of a sequence is
the most frequent. The analysis runs on the meta device; only the first process ever holds the whole model, to make its
weights and to cut it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import only_train_once
from only_train_once import OTO
from only_train_once.optim import expect

TOKENS, LENGTH, WIDTH, HEAD_DIM, LAYERS, BATCH = 12, 16, 64, 8, 2, 64
CONSOLE = Console()


class Block(nn.Module):
    """Attention and an MLP between norms; head counts are read from the tensors, so each process may have a part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width) -> the same
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """Embeddings, blocks, and the scores of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, tokens) -> (batch, TOKENS)
        return self.head(self.norm(self.blocks(self.embed(tokens)).mean(1)))


def fill(model: nn.Module, device: torch.device) -> None:
    """The weights of a network that the first process makes, spread as the model is."""
    model.to_empty(device=device)
    torch.manual_seed(0)
    state = Net().state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def tensor_parallel(model: Net, mesh: Any) -> None:
    plan = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    for block in model.blocks:
        parallelize_module(block, mesh, {**plan, "o": RowwiseParallel(), "down": RowwiseParallel()})


def spread(model: Net, way: str, device: torch.device) -> tuple[nn.Module, int]:
    """The model over all processes, and how many of them share the same data."""
    size = dist.get_world_size()
    if way == "ddp":
        fill(model, device)
        return DistributedDataParallel(model), 1
    shared = 1
    if way == "fsdp":
        mesh = init_device_mesh(device.type, (size,))
    else:
        shared = size if way == "tp" else 2
        both = init_device_mesh(device.type, (size // shared, shared), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, both["tp"])
        mesh = both["dp"]  # of size 1 for a plan alone
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fill(model, device)
    return model, shared


def batch(step: int, part: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequences in which one token comes up more often than others, and which that is."""
    generator = torch.Generator().manual_seed(100_000 * part + step)
    target = torch.randint(TOKENS, (BATCH,), generator=generator)
    tokens = torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)
    often = torch.rand(BATCH, LENGTH, generator=generator) < 0.4
    return torch.where(often, target[:, None], tokens).to(device), target.to(device)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part: int, device: torch.device
) -> tuple[float, float]:
    """Loss and share of right answers in the last step."""
    loss, right = torch.zeros(()), torch.zeros(())
    for step in steps:
        tokens, target = batch(step, part, device)
        scores = model(tokens)
        loss, right = F.cross_entropy(scores, target), (scores.argmax(1) == target).float().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), right.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=["ddp", "fsdp", "tp", "2d"], default="fsdp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.5)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, steps = dist.get_rank(), arguments.steps

    def build() -> tuple[OTO, nn.Module, Any, int]:
        with torch.device("meta"):
            model = Net()
        oto = OTO(model, dummy_input=torch.zeros(2, LENGTH, dtype=torch.int64, device="meta"))
        wrapped, shared = spread(model, arguments.way, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)
        oto.attach(
            optimizer,
            method="hesso",
            target_group_sparsity=arguments.sparsity,
            start_pruning_step=steps // 5,
            pruning_steps=steps // 2,
            pruning_periods=5,
        )
        return oto, wrapped, optimizer, rank // shared

    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    checkpoint = Path(folder[0]) / "checkpoint"

    oto, model, optimizer, part = build()
    train(model, optimizer, range(steps // 2), part, device)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint)

    oto, model, optimizer, part = build()  # as if the job had been killed
    expect(optimizer, checkpoint)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loss, right = train(model, optimizer, range(steps // 2, steps), part, device)

    metrics = optimizer.compute_metrics()  # every process: the parts of the units are everywhere
    full = oto.gather(dummy_input=batch(0, 0, torch.device("cpu"))[0])
    if full is not None:
        CONSOLE.print(f"loss {loss:.3f}, right {right:.0%}, {metrics.num_zero_groups} units at zero")
        subnet = full.construct_subnet()
        CONSOLE.print(subnet.report)
        subnet.save(Path(folder[0]) / "slim")
        small = only_train_once.load(Path(folder[0]) / "slim", build=Net)
        tokens, target = batch(steps, 0, torch.device("cpu"))
        CONSOLE.print(f"the subnet answers {(small(tokens).argmax(1) == target).float().mean():.0%} right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
