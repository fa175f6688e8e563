"""Bytes of the Python standard library's source, predicted one by one; small networks like GPT-2's and Llama's."""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task
from benchmarks.quality.tasks.digits import scaled
from benchmarks.quality.transformer import Block, GatedBlock, RootMeanSquare, attention_layers

LENGTH, BATCH, PER_EPOCH = 64, 32, 64
SCORED = 256  # sequences


@functools.cache
def data() -> dict[str, Tensor]:
    """Split -> bytes (count,): of every ten files of the library eight, one and one."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for number, file in enumerate(files):
        parts[{8: "validation", 9: "test"}.get(number % 10, "train")].append(file.read_bytes())
    return {name: torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8).long() for name, p in parts.items()}


def _rows(text: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()])


def batches(generator: torch.Generator) -> Iterator[Batch]:
    text = data()["train"]
    for _ in range(PER_EPOCH):
        yield _rows(text, torch.randint(len(text) - LENGTH, (BATCH,), generator=generator))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, split: str) -> float:
    text = data()[split]
    rows = _rows(text, torch.linspace(0, len(text) - LENGTH - 1, SCORED).long())
    return float(loss(model.eval(), rows)) / math.log(2)


class Gpt(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width, heads, head_dim, hidden, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, 256)
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


class Llama(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(GatedBlock(width, heads, head_dim, hidden) for _ in range(depth)))
        self.norm, self.head = RootMeanSquare(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, 256)
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def gpt(width: float) -> nn.Module:
    return Gpt(scaled(width, 64), scaled(width, 8), 8, scaled(width, 256), 3)


def llama(width: float) -> nn.Module:
    return Llama(scaled(width, 64), scaled(width, 8), 8, scaled(width, 176), 3)


def _language(name: str, build: Callable[[float], nn.Module]) -> Callable[[], Task]:
    def make() -> Task:
        return Task(
            name=name,
            build=build,
            batches=batches,
            loss=loss,
            score=bits_per_byte,
            optimizer=lambda p: torch.optim.AdamW(p, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
            example=_rows(data()["train"], torch.arange(2))[:, :-1],
            steps=150,
            metric="bits per byte",
            sign=-1,
            wide=True,
            heads=attention_layers,
            kept=lambda model: [model.head],
            recipe="undertrained",
        )

    return make


TASKS = {"bytes_gpt": _language("bytes_gpt", gpt), "bytes_llama": _language("bytes_llama", llama)}
