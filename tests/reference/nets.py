"""Small networks with their groups written by hand, one per structure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role

Z, C, F = Role.ZERO, Role.CONSUMER, Role.FOLLOW


def group(
    name: str, units: int, model: nn.Module, cuts: list[tuple[str, int, Role]], pinned: bool = False
) -> PruningGroup:
    """A group whose unit u owns the u-th of ``units`` equal blocks in every dim named."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    slices = []
    for param, dim, role in cuts:
        length = tensors[param].shape[dim]
        index = np.arange(length, dtype=np.int64).reshape(units, -1)
        slices.append(ParamSlice(param, dim, index, role, length, pinned))
    return PruningGroup(name, Kind.CHANNEL, tuple(slices))


def norm_cuts(name: str) -> list[tuple[str, int, Role]]:
    """Slices of an affine batch norm."""
    return [(f"{name}.weight", 0, Z), (f"{name}.bias", 0, Z), (f"{name}.running_mean", 0, F)]


class ConvNet(nn.Module):
    """conv-bn-relu, twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))

    def groups(self) -> list[PruningGroup]:
        first = [("conv1.weight", 0, Z), ("conv1.bias", 0, Z), *norm_cuts("bn1"), ("conv2.weight", 1, C)]
        second = [("conv2.weight", 0, Z), ("conv2.bias", 0, Z), *norm_cuts("bn2"), ("fc.weight", 1, C)]
        return [group("conv1", 6, self, first), group("conv2", 8, self, second)]


class Residual(nn.Module):
    """A residual stream under batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.b(self.bn1(self.a(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))

    def groups(self) -> list[PruningGroup]:
        stream = [("stem.weight", 0, Z), *norm_cuts("bn0"), ("b.weight", 0, Z), *norm_cuts("bn2")]
        stream += [("a.weight", 1, C), ("fc.weight", 1, C)]
        inner = [("a.weight", 0, Z), *norm_cuts("bn1"), ("b.weight", 1, C)]
        return [group("stream", 8, self, stream), group("inner", 6, self, inner)]


class Mlp(nn.Module):
    """A GELU MLP, whose inner width is removed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))

    def groups(self) -> list[PruningGroup]:
        return [group("fc1", 12, self, [("fc1.weight", 0, Z), ("fc1.bias", 0, Z), ("fc2.weight", 1, C)])]


class Attention(nn.Module):
    """Four heads; a removed head has V and O at zero and live Q and K."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))

    def groups(self) -> list[PruningGroup]:
        cuts = [(f"{m}.{p}", 0, F) for m in "qk" for p in ("weight", "bias")]
        cuts += [("v.weight", 0, Z), ("v.bias", 0, Z), ("o.weight", 1, C)]
        return [group("heads", 4, self, cuts)]


class LayerNormStream(nn.Module):
    """A residual stream under layer norm: its statistics leak gradient into removed units."""

    pinned = True

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ln = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(nn.functional.gelu(self.up(self.ln(x))))
        return self.head(x)

    def groups(self, pinned: bool = True) -> list[PruningGroup]:
        stream = [(f"{m}.{p}", 0, Z) for m in ("embed", "ln", "down") for p in ("weight", "bias")]
        stream += [("up.weight", 1, C), ("head.weight", 1, C)]
        inner = [("up.weight", 0, Z), ("up.bias", 0, Z), ("down.weight", 1, C)]
        return [group("width", 8, self, stream, pinned), group("up", 10, self, inner)]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (4, 3, 5, 5)),
    "residual": (Residual, (4, 3, 5, 5)),
    "mlp": (Mlp, (4, 6)),
    "attention": (Attention, (2, 3, 8)),
    "layer_norm": (LayerNormStream, (4, 6)),
}


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of the table, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETS[name][0]().to(dtype)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def batch(name: str, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The inputs of a step: the same in every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(NETS[name][1], generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that has gradients everywhere and moves its target with the batch, which goes where the model is."""
    x = x.to(next(model.parameters()).device)
    y = model(x)
    return (y - x.flatten(1).sum(1).tanh().view(-1, *[1] * (y.dim() - 1))).square().mean() + 0.1 * y.sin().mean()
