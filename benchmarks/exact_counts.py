"""Every method reaches exactly the number of units asked for, on real data, from 10 to 95 %, with ten seeds.

    python -m benchmarks.exact_counts          writes benchmarks/results/exact_counts.md (half an hour)

The residual network of ``examples/digits.py`` and a small vision transformer learn scikit-learn's digits for two
epochs, half of which prune. Counted are the units that are at zero in the weights, not what the optimizer says; a layer
that has lost all of them is dead.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import DigitsNet, batches, load_data
from only_train_once import OTO
from only_train_once.masking import unit_is_zero
from only_train_once.optim.selection import units_for

SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
EPOCHS, SEEDS = 2, 10


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """A vision transformer for images of 8x8 pixels in patches of 2x2."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # network, whether widths are offered too
    "CNN": (lambda: DigitsNet(16), False),
    "ViT": (DigitsViT, False),
    "ViT, wide": (DigitsViT, True),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3),
}


def schedules(steps: int) -> dict[str, dict[str, Any]]:
    """Method -> its arguments for a run of so many steps."""
    start, length = steps // 4, steps // 2
    usual = {"start_pruning_step": start, "pruning_steps": length, "pruning_periods": 3}
    return {
        "hesso": usual,
        "hesso_cric": {
            "start_cric_step": start,
            "sampling_steps": length // 6,
            "max_cycle_period": 2,
            "hybrid_training_steps": length // 2,
        },
        "hspg": {**usual, "warm_up_steps": start // 2},
        "ada_hspg": usual,
        "dhspg": usual,
    }


def run(network: str, optimizer: str, method: str, sparsity: float, seed: int) -> tuple[int, int, int, float]:
    """Units asked for, units at zero in the end, dead groups, test accuracy."""
    torch.manual_seed(seed)
    data = load_data(0)
    build, wide = NETWORKS[network]
    model = build()
    oto = OTO(model, data.train_x[:2], wide=wide)
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    arguments = schedules(EPOCHS * data.steps_per_epoch)[method]
    oto.attach(made, method=method, target_group_sparsity=sparsity, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for images, labels in batches(data, generator):
            loss = F.cross_entropy(model(images), labels)
            made.zero_grad()
            loss.backward()
            made.step()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    groups = made._method.groups  # type: ignore[attr-defined]
    zero = [int(unit_is_zero(g, tensors).sum()) for g in groups]
    dead = sum(n == g.size for n, g in zip(zero, groups, strict=True))
    with torch.no_grad():
        right = (model.eval()(data.test_x).argmax(1) == data.test_y).double().mean()
    return units_for(sum(g.size for g in groups), sparsity), sum(zero), dead, float(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exact_counts.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = [f"{s:.0%}" for s in SPARSITIES]
    lines = [
        "# Exactly the number of units asked for",
        "",
        f"`python -m benchmarks.exact_counts` with torch {torch.__version__}: digits, {EPOCHS} epochs, {options.seeds} "
        "seeds. Each cell: runs that ended with exactly the requested number of units at zero, and the mean accuracy "
        "in % (for orientation: the runs are short).",
        "",
        f"| network | optimizer | method | {' | '.join(columns)} |",
        f"|---|---|---|{'---:|' * len(columns)}",
    ]
    exact = dead = total = 0
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            for method in schedules(8):
                cells = []
                for sparsity in SPARSITIES:
                    found = [run(network, optimizer, method, sparsity, seed) for seed in range(options.seeds)]
                    right = sum(asked == zero for asked, zero, _, _ in found)
                    exact, total = exact + right, total + len(found)
                    dead += sum(d for _, _, d, _ in found)
                    cells.append(f"{right}/{len(found)}, {100 * statistics.mean(a for *_, a in found):.0f}")
                lines.append(f"| {network} | {optimizer} | {method} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    lines += ["", f"Exact: {exact} of {total} runs. Dead layers: {dead}.", ""]
    options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
