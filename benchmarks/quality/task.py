"""A task: data, networks of any width, a loss and a score. A competitor trains on it and sees nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from only_train_once.flops import count_flops
from only_train_once.recipe import Recipe

Batch = Any
NEAR = 0.99  # a competitor's network has at least so much of the FLOPs asked for
RISE = 0.05  # of the steps of the dense training: so many let the learning rate rise, in every training


def learning_rate(progress: float, rise: float) -> float:
    """Of the peak, when this share of a schedule is done: a rise over its share ``rise``, then half a cosine to 0."""
    if progress < rise:
        return progress / rise
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def falling(progress: float, rise: float) -> float:
    """The same rise, then a straight line to 0, as BERT is fine-tuned."""
    return progress / rise if progress < rise else (1 - progress) / (1 - rise)


def quarters(progress: float, rise: float) -> float:
    """A tenth of it after each quarter and no rise, as the papers of OTO train residual networks."""
    return 0.1 ** min(int(4 * progress), 3)


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned, and how: the same for all competitors.

    Attributes:
        name: unique.
        build: (width, relative to the full one) -> network with fresh weights; 1 is the full network.
        batches: (generator) -> one epoch of batches, shuffled and augmented.
        loss: (network, batch) -> scalar.
        score: (network, "validation" or "test") -> what is compared.
        optimizer: (parameters) -> torch optimizer at the peak learning rate.
        example: inputs of the analysis, on which FLOPs are counted too.
        steps: of the dense training.
        metric: name of the score.
        sign: 1 where a higher score is better, -1 where a lower one is.
        wide: whether widths of residual streams are offered, too.
        heads: (network) -> what Torch-Pruning has to be told of attention: layer that makes queries, keys or values
            -> number of heads.
        kept: (network) -> layers whose outputs Torch-Pruning has to leave alone.
        pretrained: whether ``build(1.0)`` knows something already.
        recipe: this library's recipe or its name, where it is not the one for the budget; part of what is measured,
            and written down.
        settled_loss: (network, batch) -> scalar, once a network that gets smaller has its final size; None for the
            same loss.
        schedule: (share of the steps done, share in which it may rise) -> share of the peak learning rate.
        clip: norm that gradients are clipped to; None for no limit.
        also: other scores that are written down, by name.
        mend: (network, after Torch-Pruning cut it): sets what its forward reads beside the weights.
    """

    name: str
    build: Callable[[float], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, str], float]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    example: Any
    steps: int
    metric: str = "accuracy, %"
    sign: int = 1
    wide: bool = False
    heads: Callable[[nn.Module], Mapping[nn.Module, int]] = lambda model: {}
    kept: Callable[[nn.Module], list[Any]] = lambda model: []
    pretrained: bool = False
    recipe: Recipe | str | None = None
    settled_loss: Callable[[nn.Module, Batch], Tensor] | None = None
    schedule: Callable[[float, float], float] = learning_rate
    clip: float | None = None
    also: Mapping[str, Callable[[nn.Module, str], float]] = field(default_factory=dict)
    mend: Callable[[nn.Module], None] = lambda model: None

    @functools.cached_property
    def full_flops(self) -> int:
        return flops(self.build(1.0), self.example)

    def share(self, model: nn.Module) -> float:
        """FLOPs of a forward pass, of those of the full network."""
        return flops(model, self.example) / self.full_flops

    def stream(self, seed: int) -> Iterator[Batch]:
        """Batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from self.batches(generator)

    def narrow(self, left: float) -> nn.Module:
        """The network of uniform width whose FLOPs are this share of the full one's, or as little more as can be."""
        low, high = 0.0, 1.0
        found: dict[float, float] = {}
        for _ in range(12):
            middle = (low + high) / 2
            found[middle] = self.share(self.build(middle))
            low, high = (middle, high) if found[middle] < left else (low, middle)
        return self.build(nearest(found, left)[0])


def nearest(found: Mapping[float, float], left: float) -> tuple[float, float]:
    """The entry with the least value that is not below ``left``, but for 1 % of it."""
    return min(((value, key) for key, value in found.items() if value >= NEAR * left), default=(1.0, 1.0))[::-1]


def flops(model: nn.Module, example: Any) -> int:
    training = model.training
    total = count_flops(model.eval(), example).total
    model.train(training)
    return total
