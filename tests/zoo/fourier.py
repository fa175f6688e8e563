"""Mixers that work on frequencies: channels pass a Fourier transform, what is transformed stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, images, tokens


class FNet(nn.Module):
    """Over tokens and over channels: a removed channel would be in every frequency, so the width stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Linear(6, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm1(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head(self.norm2(x + self.fc2(F.gelu(self.fc1(x)))))


class GlobalFilter(nn.Module):
    """GFNet: every channel has a filter over the frequencies of the image, kept as pairs of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.filter = nn.Parameter(torch.randn(4, 3, 8, 2) * 0.3)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).permute(0, 2, 3, 1)
        _, h, w, _ = x.shape
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        y = torch.fft.irfft2(y, s=(h, w), dim=(1, 2), norm="ortho")
        return self.head(x + self.fc2(F.gelu(self.fc1(y))))


class SpectralConv(nn.Module):
    """FNO: complex weights mix channels, mode by mode, for the lowest frequencies; the rest is zero."""

    def __init__(self, inputs: int, outputs: int, modes: int) -> None:
        super().__init__()
        self.outputs, self.modes = outputs, modes
        self.low = nn.Parameter(torch.randn(inputs, outputs, modes, modes, dtype=torch.cfloat) * 0.2)
        self.high = nn.Parameter(torch.randn(inputs, outputs, modes, modes, dtype=torch.cfloat) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        seen = torch.fft.rfft2(x)
        made = torch.zeros(
            b, self.outputs, h, w // 2 + 1, dtype=torch.cfloat if x.dtype == torch.float32 else torch.cdouble
        )
        m = self.modes
        made[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", seen[:, :, :m, :m], self.low)
        made[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", seen[:, :, -m:, :m], self.high)
        return torch.fft.irfft2(made, s=(h, w))


class FourierOperator(nn.Module):
    """A spectral convolution beside a pointwise one, between a lift and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.spectral, self.point = nn.Conv2d(3, 6, 1), SpectralConv(6, 8, 2), nn.Conv2d(6, 8, 1)
        self.hidden, self.head = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.lift(x))
        return self.head(F.gelu(self.hidden(F.gelu(self.spectral(x) + self.point(x)))))


class BlockFilter(nn.Module):
    """AFNO: blocks of channels go through a small network of real and imaginary parts, then a soft threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = 2
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        self.w1, self.b1 = nn.Parameter(torch.randn(2, 2, 4, 6) * 0.3), nn.Parameter(torch.randn(2, 2, 6) * 0.3)
        self.w2, self.b2 = nn.Parameter(torch.randn(2, 2, 6, 4) * 0.3), nn.Parameter(torch.randn(2, 2, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(b, h, w // 2 + 1, self.blocks, -1)

        def mix(real: Tensor, imag: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            def by(t: Tensor, part: int) -> Tensor:
                return torch.einsum("bxyki,kio->bxyko", t, weight[part])

            return by(real, 0) - by(imag, 1) + bias[0], by(imag, 0) + by(real, 1) + bias[1]

        real, imag = (F.relu(t) for t in mix(y.real, y.imag, self.w1, self.b1))
        y = F.softshrink(torch.stack(mix(real, imag, self.w2, self.b2), dim=-1), lambd=0.01)
        y = torch.view_as_complex(y).reshape(b, h, w // 2 + 1, c)
        return self.head(x + torch.fft.irfft2(y, s=(h, w), dim=(1, 2), norm="ortho"))


class FastConvolution(nn.Module):
    """LaMa: real and imaginary parts of the frequencies stand side by side as channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        seen = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        y = torch.stack((seen.real, seen.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
        y = F.relu(self.norm(self.conv(y.view((y.shape[0], -1, *y.shape[3:])))))
        y = y.view((y.shape[0], -1, 2, *y.shape[2:])).permute(0, 1, 3, 4, 2).contiguous()
        made = torch.fft.irfftn(torch.complex(y[..., 0], y[..., 1]), s=x.shape[-2:], dim=(-2, -1), norm="ortho")
        return self.head(made)


FOURIER: dict[str, Case] = {
    "fnet": Case(FNet, tokens(6), 12, "is transformed as a whole"),
    "global_filter": Case(GlobalFilter, images(size=4), 20),
    "fourier_operator": Case(FourierOperator, images(size=6), 24),
    "block_filter": Case(BlockFilter, images(size=4), 12),
    "fast_convolution": Case(FastConvolution, images(size=4), 14),
}
