"""Train a residual network on scikit-learn's digits once, cut 70 % of its units, and show that nothing changed.

    python examples/digits.py            # a minute or two on two cores
    python examples/digits.py --epochs 3 # a quick look

Two networks of the same shape get the same budget of steps: a dense one, as the yardstick, and one with HESSO
attached. From the second, one construction gives the smaller network; nothing is trained again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import only_train_once
from only_train_once import OTO
from only_train_once.report import Latency, measure_latency

BATCH = 64
PEAK_LR = 0.1
EXAMPLES = 2  # images that the analysis runs on
CONSOLE = Console()


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:  # (batch, width_in, height, width) -> (batch, width_out, ...)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A small residual network for images of 8x8 pixels."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Data:
    """Images (count, 1, 8, 8) in [-1, 1] and labels (count,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_x) // BATCH


def load_data(seed: int) -> Data:
    """The 1797 digits, a quarter of them for the test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(images)), test_size=0.25, random_state=seed, stratify=digits.target)
    return Data(images[train], labels[train], images[test], labels[test])


def batches(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches, each moved by up to one pixel."""
    order = torch.randperm(len(data.train_x), generator=generator)
    for i in range(data.steps_per_epoch):
        chosen = order[i * BATCH : (i + 1) * BATCH]
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        yield torch.roll(data.train_x[chosen], shift, dims=(2, 3)), data.train_y[chosen]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, epochs: int, seed: int, label: str) -> None:
    """An ordinary training loop: it does not know whether the optimizer prunes."""
    generator = torch.Generator().manual_seed(seed)
    total = epochs * data.steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=total, pct_start=0.15)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task(label, total=total, status="")
        for _ in range(epochs):
            model.train()
            for images, labels in batches(data, generator):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.advance(task)
            progress.update(task, status=f"test accuracy {accuracy(model, data):.1%}")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (count,) of images (count, 1, 8, 8)."""
    return model.eval()(images).argmax(dim=1)


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test images that are classified correctly."""
    return float((predict(model, data.test_x) == data.test_y).float().mean())


def latency_cell(row: Latency, slim: bool) -> str:
    """Median and interquartile range in milliseconds."""
    middle, spread = (row.after, row.spread_after) if slim else (row.before, row.spread_before)
    return f"{middle * 1e3:.3g} ± {spread * 1e3:.2g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of all units that is removed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the subnet is saved; a temporary folder if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)  # batches this small gain little from a second thread and lose a lot on a busy machine
    data = load_data(options.seed)

    torch.manual_seed(options.seed)
    dense = DigitsNet()
    optimizer = torch.optim.SGD(dense.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4)
    train(dense, optimizer, data, options.epochs, options.seed, "dense ")

    torch.manual_seed(options.seed)
    model = DigitsNet()
    oto = OTO(model, dummy_input=data.test_x[:EXAMPLES])
    steps = options.epochs * data.steps_per_epoch
    pruning = oto.hesso(
        variant="sgd",
        lr=PEAK_LR,
        first_momentum=0.9,
        weight_decay=5e-4,
        target_group_sparsity=options.sparsity,
        start_pruning_step=steps // 10,
        pruning_steps=steps // 2,
        pruning_periods=10,
    )
    train(model, pruning, data, options.epochs, options.seed, "pruned")

    subnet = oto.construct_subnet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "slim"
        subnet.save(folder)
        slim = only_train_once.load(folder, build=DigitsNet)
        full_size = file_size(model, Path(temporary))
    show(dense, model, slim, subnet, full_size, data)
    if options.out:
        CONSOLE.print(f"saved in {options.out}; look at it with: only-train-once inspect {options.out}")


def file_size(model: nn.Module, folder: Path) -> int:
    """Bytes of the model's tensors in the format that `subnet.save` writes."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), str(folder / "full.safetensors"))
    return (folder / "full.safetensors").stat().st_size


def show(
    dense: nn.Module, full: nn.Module, slim: nn.Module, subnet: only_train_once.Subnet, full_size: int, data: Data
) -> None:
    """One table: the dense run, the pruned network with its zeros, and the smaller network loaded from its file."""
    report = subnet.report
    same = int((predict(full, data.test_x) == predict(slim, data.test_x)).sum())
    with CONSOLE.status("measuring latency"):
        latencies = [
            measure_latency(full, slim, data.test_x[:size], label=f"batch {size}", rounds=60) for size in (1, 256)
        ]
    prunable = sum(g.size for g in report.groups if g.reason is None)
    table = Table(title=f"{report.units_removed} of {prunable} prunable units removed")
    for column in ("", "dense", "pruned, full", "pruned, slim", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    table.add_row("test accuracy", *(f"{accuracy(m, data):.2%}" for m in (dense, full, slim)), "")
    table.add_row("same prediction", "", "", f"{same} of {len(data.test_y)}", "")
    sizes = (
        ("parameters", report.parameters_before, report.parameters_after),
        ("FLOPs per image", (report.flops_before or 0) // EXAMPLES, (report.flops_after or 0) // EXAMPLES),
        ("file in bytes", full_size, report.bytes_on_disk or 0),
    )
    for label, before, after in sizes:
        table.add_row(label, f"{before:,}", f"{before:,}", f"{after:,}", f"{before / after:.1f}x")
    for row in latencies:
        cells = (latency_cell(row, slim=False), latency_cell(row, slim=True), f"{row.ratio:.2f}x")
        table.add_row(row.label, "", *cells)
    CONSOLE.print(table)
    CONSOLE.print(Text(f"Verified: {report.verification}"))
    CONSOLE.print(
        "Batch rows: latency of an eager pass, median ± interquartile range of 60 rounds, both networks in turns.\n"
        "FLOPs: 2 per multiply-accumulate."
    )
    if same != len(data.test_y):
        raise SystemExit("the slim network does not predict what the full one does")


if __name__ == "__main__":
    main()
