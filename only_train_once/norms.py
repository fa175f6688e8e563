"""Normalizations that remember how wide they were before surgery.

[Note: full width]
A norm over N channels of which n are left must go on dividing by N, because the removed channels were zeros
that the full network counted. With the ratio r = n / N and the mean m of the n kept values, the statistics of the N
values (N - n of them 0) are

    mean          M = r m
    variance      V = r mean((x - M)²) + (1 - r) M²          from  V = (Σ(x - M)² + (N - n) M²) / N
    mean square   Q = r q                                     q the mean square of the n kept values

so the kept values are enough, nothing cancels, and r is the only number to remember. (``torch.var_mean`` would say the
same, but on the CPU it takes some twenty times as long as a mean.) The same holds inside every
norm group of a group norm, with the channels of one norm group in place of all channels.

Each class that has one in torch is a subclass of it, so that code that looks for a ``nn.LayerNorm`` still finds it,
and each reads nothing at run time but its tensors and a few numbers: it pickles, exports and compiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def _widen(x: Tensor) -> Tensor:
    """Half precision statistics are taken in float32, as torch's own kernels do."""
    return x.float() if x.dtype in _HALF else x


def _along(weight: Tensor, dim: int, ndim: int) -> Tensor:
    """``weight`` (n,) shaped to broadcast over dim ``dim`` of a tensor with ``ndim`` dims."""
    trailing = -dim - 1 if dim < 0 else ndim - dim - 1
    return weight.reshape(-1, *([1] * trailing))


def _normalized(x: Tensor, dims: tuple[int, ...], ratio: float, eps: float) -> Tensor:
    """``(x - M) / √(V + eps)``, see [Note: full width]."""
    mean = ratio * x.mean(dims, keepdim=True)
    centred = x - mean
    variance = ratio * centred.square().mean(dims, keepdim=True) + (1 - ratio) * mean.square()
    return centred * torch.rsqrt(variance + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None and weight.dtype is bias.dtype is x.dtype:
        return torch.addcmul(bias, x, weight)  # one pass instead of two
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _refuse(norm: nn.Module, rest: tuple[None, ...], named: dict[str, None]) -> None:
    """The class that was replaced may have taken more than its input (a mask): that can only be left away."""
    if any(given is not None for given in (*rest, *named.values())):
        raise TypeError(
            f"{type(norm).__name__} takes the place of a norm that lost channels, and takes its input only: mark the "
            "norm's width unprunable to call it with more"
        )


def _go_on(norm: nn.Module, out: Tensor) -> Tensor:
    """The class that was replaced may go on with parts of its own (a dropout, an activation), one after the other."""
    for part in norm.children():
        out = part(out)
    return out


class FullWidthLayerNorm(nn.LayerNorm):
    """A layer norm over n channels with the mean and the variance of ``full_width``, see [Note: full width].

    Example::

        >>> norm = FullWidthLayerNorm(6, full_width=8)
        >>> norm(torch.zeros(2, 6)).shape
        torch.Size([2, 6])

    Attributes:
        full_width: N, the number of channels before surgery.
        dim: position of the channels in the input, -1 or for a channel-first norm 1; when ``normalized_shape``
            has several entries it is negative and says which of them was cut.
        offset: what is added to the weight before it multiplies: 0, or 1 for norms that store ``weight - 1``.
    """

    full_width: int
    dim: int
    offset: int = 0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        full_width: int,
        dim: int = -1,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        offset: int = 0,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias)
        self.full_width = full_width
        self.dim = dim
        self.offset = offset

    def forward(self, input: Tensor, *rest: None, **named: None) -> Tensor:
        _refuse(self, rest, named)
        several = len(self.normalized_shape) > 1
        dims = tuple(range(-len(self.normalized_shape), 0)) if several else (self.dim,)
        ratio = self.normalized_shape[self.dim if several else 0] / self.full_width
        out = _normalized(_widen(input), dims, ratio, self.eps)
        weight = self.weight + self.offset if self.offset and self.weight is not None else self.weight
        along = [p if p is None or several else _along(p, self.dim, out.ndim) for p in (weight, self.bias)]
        out = _affine(out, *along).to(input.dtype)
        # torch's own kernel lays its result out anew, and code behind it may rely on that (``.view``)
        return _go_on(self, out.contiguous() if several or self.dim == -1 else out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_width={self.full_width}, dim={self.dim}, offset={self.offset}"


class FullWidthRMSNorm(nn.RMSNorm):
    """A RMS norm over n channels with the mean square of ``full_width``, see [Note: full width].

    Attributes:
        full_width: N, the number of channels before surgery.
        dim: position of the channels in the input.
        offset: what is added to the weight before it multiplies: 0, or 1 for norms that store ``weight - 1``.
    """

    full_width: int
    dim: int
    offset: int

    def __init__(
        self,
        normalized_shape: int,
        full_width: int,
        dim: int = -1,
        eps: float | None = None,
        elementwise_affine: bool = True,
        offset: int = 0,
    ) -> None:
        super().__init__([normalized_shape], eps, elementwise_affine)
        self.full_width = full_width
        self.dim = dim
        self.offset = offset

    def forward(self, x: Tensor, *rest: None, **named: None) -> Tensor:
        _refuse(self, rest, named)
        ratio = self.normalized_shape[0] / self.full_width
        wide = _widen(x)
        # Without an eps torch takes that of the precision it computes in, so it has to be looked up here as well.
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        out = wide * torch.rsqrt(ratio * wide.square().mean(self.dim, keepdim=True) + eps)
        if self.weight is not None:
            weight = self.weight + self.offset if self.offset else self.weight
            out = out * _along(weight, self.dim, x.ndim)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_width={self.full_width}, dim={self.dim}, offset={self.offset}"


class FullWidthGatedRMSNorm(FullWidthRMSNorm):
    """A RMS norm that is multiplied by ``silu(gate)``, as state-space models and linear attention have it.

    Attributes:
        gate_first: whether the norm is taken of the gated input, or gated itself.
    """

    gate_first: bool

    def __init__(
        self,
        normalized_shape: int,
        full_width: int,
        dim: int = -1,
        eps: float | None = None,
        elementwise_affine: bool = True,
        offset: int = 0,
        gate_first: bool = False,
    ) -> None:
        super().__init__(normalized_shape, full_width, dim, eps, elementwise_affine, offset)
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if gate is None:
            return super().forward(x)
        factor = nn.functional.silu(_widen(gate))
        out = super().forward(_widen(x) * factor) if self.gate_first else super().forward(_widen(x)) * factor
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate_first={self.gate_first}"


class FullWidthScaledRMSNorm(FullWidthRMSNorm):
    """A RMS norm that multiplies by its weight first and takes the mean square of the products."""

    def forward(self, x: Tensor, *rest: None, **named: None) -> Tensor:
        _refuse(self, rest, named)
        ratio = self.normalized_shape[0] / self.full_width
        wide = _widen(x)
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        if self.weight is not None:
            wide = wide * _along(self.weight + self.offset, self.dim, x.ndim)
        return (wide * torch.rsqrt(ratio * wide.square().mean(self.dim, keepdim=True) + eps)).to(x.dtype)


class FullWidthGroupNorm(nn.GroupNorm):
    """A group norm that lost the same number of channels in every norm group, see [Note: full width].

    Attributes:
        full_width: channels per norm group before surgery (not the channels of the whole input).
    """

    full_width: int

    def __init__(
        self, num_groups: int, num_channels: int, full_width: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.full_width = full_width

    def forward(self, input: Tensor, *rest: None, **named: None) -> Tensor:
        _refuse(self, rest, named)
        ratio = self.num_channels / self.num_groups / self.full_width
        # (batch, norm groups, channels per norm group * space): each removed channel is a zero at every position
        x = _widen(input).reshape(input.shape[0], self.num_groups, -1)
        out = _normalized(x, (-1,), ratio, self.eps).reshape(input.shape)
        along = [p if p is None else _along(p, 1, input.ndim) for p in (self.weight, self.bias)]
        return _go_on(self, _affine(out, *along).to(input.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_width={self.full_width}"


class FullWidthResponseNorm(nn.Module):
    """A global response norm over n channels that divides by the mean length of ``full_width`` channels.

    ``x + shift + scale * x * length / (Σ length / N + eps)``, with a length per image and channel. A removed channel
    has length 0, so the sum is that of the full norm. It takes the place of classes that name scale and shift
    differently; they are the first and the second parameter.

    Attributes:
        full_width: N, the number of channels before surgery.
        dim: position of the channels in the input.
    """

    full_width: int
    dim: int
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide = _widen(x)
        space = [d for d in range(1, x.ndim) if d != self.dim % x.ndim]
        length = torch.linalg.vector_norm(wide, dim=space, keepdim=True)
        share = length / (length.sum(self.dim, keepdim=True) / self.full_width + self.eps)
        scale, shift = (_along(p.reshape(-1), self.dim, x.ndim) for p in self.parameters(recurse=False))
        return (wide + shift + scale * (wide * share)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, dim={self.dim}, eps={self.eps}"
