"""What an iteration costs once units have left, next to the share of the FLOPs that is left.

    python -m benchmarks.cut_cost            writes benchmarks/results/cut_cost.md

Two copies of a network are pruned alike, one with ``physical_cuts=True``, and a third is the subnet by itself, with the
base optimizer alone. Then whole iterations (forward, backward, step) of all take turns in one process, and medians of
the ratios of their processor times are taken, which other programs on the machine disturb less than the clock's. The
aim: at most 1.1 times the share of FLOPs left. Operators that the count of FLOPs leaves out (pooling, norms,
activations) shrink with the width and not with its square, or not at all; the last column has no such excuse.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from only_train_once import OTO
from only_train_once.flops import count_flops

ITERATIONS, DIVISIBLE = 20, 16
AIM = 1.1
Loss = Callable[[nn.Module, Any], Tensor]


def resnet18() -> tuple[nn.Module, Any, Loss]:
    import torchvision

    return torchvision.models.resnet18(weights=None), torch.randn(16, 3, 96, 96), lambda m, x: m(x).square().mean()


def gpt() -> tuple[nn.Module, Any, Loss]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=4096, n_embd=512, n_layer=6, n_head=8, n_positions=256, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    ids = torch.randint(0, 4096, (4, 256))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, lambda m, x: m(**x, labels=ids).loss


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, Loss]]] = {"ResNet-18": resnet18, "GPT-2, 6 layers of 512": gpt}
SPARSITIES = (0.3, 0.6)


def prepared(model: nn.Module, inputs: Any, loss: Loss, sparsity: float, cuts: bool) -> tuple[OTO, Callable[[], None]]:
    """Prune a model in two steps and return what does an iteration."""
    oto = OTO(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    oto.attach(
        optimizer,
        target_group_sparsity=sparsity,
        start_pruning_step=0,
        pruning_steps=2,
        group_divisible=DIVISIBLE,
        importance_score_criteria="magnitude",
        physical_cuts=cuts,
    )

    return oto, warm(model, optimizer, inputs, loss)


def warm(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, loss: Loss) -> Callable[[], None]:
    """What does an iteration, after the first three."""

    def iterate() -> None:
        optimizer.zero_grad()
        loss(model, inputs).backward()
        optimizer.step()

    for _ in range(3):
        iterate()
    return iterate


def seconds(iterate: Callable[[], None]) -> float:
    """Of the processor, on one thread."""
    start = time.process_time()
    iterate()
    return time.process_time() - start


def row(name: str, sparsity: float, iterations: int) -> str:
    whole, inputs, loss = NETWORKS[name]()
    less = copy.deepcopy(whole)
    _, one = prepared(whole, inputs, loss, sparsity, cuts=False)
    oto, other = prepared(less, inputs, loss, sparsity, cuts=True)
    alone = oto.construct_subnet(verify=False).model.train()
    third = warm(alone, torch.optim.AdamW(alone.parameters(), lr=1e-4), inputs, loss)
    flops = count_flops(less, inputs).total / count_flops(whole, inputs).total
    times = [(seconds(one), seconds(other), seconds(third)) for _ in range(iterations)]
    left = statistics.median(after / before for before, after, _ in times)
    alone_left = statistics.median(plain / before for before, _, plain in times)
    over_subnet = statistics.median(after / plain for _, after, plain in times)
    figures = (flops, left, left / flops, alone_left / flops, over_subnet)
    return " | ".join([f"| {name} | {sparsity}", *(f"{f:.2f}" for f in figures)]) + " |"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else ITERATIONS
    rows = [row(name, sparsity, iterations) for name in NETWORKS for sparsity in SPARSITIES]
    text = [
        "# Cost of an iteration after units have left",
        "",
        f"`python -m benchmarks.cut_cost {iterations}` with torch {torch.__version__}, 1 thread, CPU: an iteration "
        "with AdamW after pruning, with `physical_cuts=True` over without, processor time, median of interleaved "
        f"iterations. FLOPs are those of the forward pass. Widths stay multiples of {DIVISIBLE}. The aim for time over "
        f"FLOPs is at most {AIM}; what is above it are operators without FLOPs (pooling, norms, activations), which "
        "shrink less. *the plain subnet's* is the network of that size, built apart and trained by plain AdamW, in "
        "turns with the others: what it needs over its FLOPs is the network's own cost; the last column compares.",
        "",
        "| network | sparsity | FLOPs left | time left | time over FLOPs | the plain subnet's | time over its |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    Path("benchmarks/results/cut_cost.md").write_text("\n".join(text))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
