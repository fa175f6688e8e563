"""Networks that are deep or large: for the tests of growth and for `benchmarks/scaling.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def llama(layers: int, large: bool) -> nn.Module:
    """A Llama on the meta device: width 8192 as in the 70-billion-parameter configuration, or the same made small."""
    import transformers

    sizes = (
        dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
        if large
        else dict(hidden_size=64, intermediate_size=112, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    )
    vocabulary = 128256 if large else 99
    config = transformers.LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **sizes)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def llama_inputs() -> dict[str, Any]:
    return {"input_ids": torch.zeros(2, 16, dtype=torch.long, device="meta")}


class DeepCNN(nn.Module):
    """A residual network of many convolutions."""

    def __init__(self, convolutions: int, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(convolutions))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(convolutions))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = F.relu(norm(conv(y)))
            if place % 2:
                x = y = x + y
        return self.head(x.mean((2, 3)))
