"""Weights that are computed from other parameters each time: standardized, normalized, masked, modulated, mixed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from .case import Case, images


class StandardizedConv(nn.Conv2d):
    """Zero mean and unit variance per output channel, as in Big Transfer: an output row at zero stays at zero."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-8)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BatchNormStandardizedConv(nn.Conv2d):
    """The same by a batch norm over the flattened weight, with a gain and the fan-in, as NF networks in timm."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        self.factor = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, (self.gain * self.factor).view(-1), None, True, 0.0, 1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class ScaledStandardizedConv(nn.Conv2d):
    """The same in one formula that divides by the fan-in, as the first NF networks do."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True)
        fan_in = self.weight[0].numel()
        scale = torch.rsqrt(torch.clamp(var * fan_in, min=1e-4)) * self.gain
        return F.conv2d(x, self.weight * scale - mean * scale, self.bias, self.stride, self.padding)


class Standardized(nn.Module):
    """Two such convolutions: the first cannot lose channels, for they would count in the second's statistics."""

    def __init__(self, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3, 6, 3), conv(6, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.b(F.relu(self.a(x))))))


def hooked(function: Callable[..., nn.Module], layer: nn.Module, **arguments: int) -> nn.Module:
    """Weight and spectral norm by hooks, which PyTorch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(layer, **arguments)


class Chain(nn.Module):
    """Two convolutions, one of them transposed, whose weights are computed in some way."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = wrap(nn.Conv2d(3, 6, 3, padding=1)), wrap(nn.Conv2d(6, 8, 1))
        self.c = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.1)), 0.1))


class Softened(nn.Module):
    """A weight that is never 0."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight) / 16


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def parametrized(function: nn.Module) -> Callable[[nn.Module], nn.Module]:
    def wrap(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", function)
        return layer

    return wrap


def masked(layer: nn.Module) -> nn.Module:
    """Single weights of it were pruned before, which leaves a mask as a buffer."""
    return prune.random_unstructured(layer, "weight", amount=0.3)


class ModulatedConv(nn.Module):
    """One convolution per image by groups, its weight scaled by a style and normalized, as StyleGAN2's."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.style = nn.Linear(style, inputs)
        self.scale = (inputs * 9) ** -0.5

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.scale * self.weight * self.style(style).view(b, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4)) + 1e-8).view(b, -1, 1, 1, 1)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight.view(-1, c, 3, 3), padding=1, groups=b)
        return out.view(b, -1, h, w)


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.stem = nn.Linear(4, 7), nn.Conv2d(3, 6, 1)
        self.a, self.b, self.head = ModulatedConv(6, 8, 7), ModulatedConv(8, 5, 7), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        style = F.leaky_relu(self.mapping(z), 0.2)
        x = F.leaky_relu(self.a(self.stem(x), style), 0.2)
        return self.head(F.leaky_relu(self.b(x, style), 0.2))


class MixedConv(nn.Module):
    """Each image gets its own mixture of a few kernels, as in CondConv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.kernels = nn.Parameter(torch.randn(4, 8, 6, 3, 3) * 0.1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        share = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = torch.einsum("be,eoikl->boikl", share, self.kernels)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.flatten(0, 1), padding=1, groups=b)
        return self.head(F.relu(y.view(b, -1, h, w)))


class FlatMixedConv(MixedConv):
    """The same with the kernels as rows of a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        share = torch.sigmoid(self.route(x.mean((2, 3))))
        _, outputs, inputs, _, _ = self.kernels.shape
        weight = (share @ self.kernels.view(self.kernels.shape[0], -1)).view(b * outputs, inputs, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(F.relu(y.view(b, outputs, h, w)))


WEIGHTS: dict[str, Case] = {
    "standardized_conv": Case(lambda: Standardized(StandardizedConv), images(), 8, "when this dim is reduced"),
    "standardized_by_batch_norm": Case(
        lambda: Standardized(BatchNormStandardizedConv), images(), 8, "statistics run over this dim"
    ),
    "scaled_standardized_conv": Case(lambda: Standardized(ScaledStandardizedConv), images(), 8, "a mean divides"),
    "weight_norm_hook": Case(lambda: Chain(lambda m: hooked(nn.utils.weight_norm, m)), images(), 14),
    "weight_norm_by_input": Case(lambda: Chain(lambda m: parametrizations.weight_norm(m, dim=1)), images(), 14),
    "weight_norm_of_all": Case(lambda: Chain(lambda m: parametrizations.weight_norm(m, dim=None)), images(), 14),
    "spectral_norm_hook": Case(lambda: Chain(lambda m: hooked(nn.utils.spectral_norm, m)), images(), 14),
    "spectral_norm": Case(lambda: Chain(parametrizations.spectral_norm), images(), 14),
    "orthogonal": Case(lambda: Chain(parametrizations.orthogonal), images(), 0, "no rule for this operator"),
    "parametrized": Case(lambda: Chain(parametrized(Halved())), images(), 14),
    "parametrized_above_zero": Case(lambda: Chain(parametrized(Softened())), images(), 8, "does not become 0"),
    "masked": Case(lambda: Chain(masked), images(), 14),
    "modulated_conv": Case(Modulated, lambda: dict(x=torch.randn(2, 3, 6, 6), z=torch.randn(2, 4)), 26),
    "mixed_conv": Case(MixedConv, images(), 18),
    "flat_mixed_conv": Case(FlatMixedConv, images(), 18),
}
