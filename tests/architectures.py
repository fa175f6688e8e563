"""Networks people use, from their libraries: how to build each one small, and what the analysis has to cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One network.

    `default` and `wide` are the least shares of the parameters that some prunable group has to reach; where they are
    below 0.6 and 0.95 for a vision model, `because` says why.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    default: float = 0.6
    wide: float = 0.95
    because: str = ""


def _torchvision(name: str, size: int = 64, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return Architecture(build, lambda: torch.randn(2, 3, size, size))


def _timm(
    name: str, size: int = 64, because: str = "", default: float = 0.6, wide: float = 0.95, **options: Any
) -> Architecture:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return Architecture(build, lambda: torch.randn(2, 3, size, size), default, wide, because)


def _ids(length: int = 12) -> torch.Tensor:
    return torch.randint(5, 99, (2, length))


def _transformers(
    model: str, config: str, inputs: Callable[[], Any], default: float, wide: float, **options: Any
) -> Architecture:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Architecture(build, inputs, default, wide)


ARCHITECTURES: dict[str, Architecture] = {
    **{
        name: _torchvision(name)
        for name in (
            "resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
            "shufflenet_v2_x1_0", "squeezenet1_0", "regnet_y_400mf", "convnext_tiny", "swin_t", "resnext50_32x4d",
            "mnasnet1_0",
        )
    },
    "googlenet": _torchvision("googlenet", init_weights=False, aux_logits=True),
    "inception_v3": _torchvision("inception_v3", 299, init_weights=False, aux_logits=True),
    "vit_b_16": _torchvision("vit_b_16", image_size=64),
    "deeplabv3_resnet50": _torchvision("deeplabv3_resnet50", weights_backbone=None),
    "deit_tiny": _timm("deit_tiny_patch16_224", img_size=64),
    "pvt_v2_b0": _timm(
        "pvt_v2_b0", default=0.45,
        because="its attention reshapes to (B, N, C) with the C of the residual stream, also in the reduction; "
        "without wide=True that width stays, and the user's own code then fixes queries, keys, values and reduction "
        "(shown in test_architectures.py)",
    ),
    "mixer_s32": _timm(
        "mixer_s32_224", 224, wide=0.88,
        because="token mixing adds biases along the tokens, so a channel whose weights are all 0 still carries a "
        "constant under the next layer norm: removing it changes the function (measured in test_architectures.py)",
    ),
    "levit_128s": _timm("levit_128s", 224),
    "ghostnet_100": _timm("ghostnet_100"),
    "repvgg_a0": _timm("repvgg_a0"),
    "poolformer_s12": _timm("poolformer_s12"),
    "bert": _transformers(
        "BertForSequenceClassification", "BertConfig", lambda: {"input_ids": _ids()}, 0.55, 0.95, vocab_size=99,
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=3,
    ),
    "gpt2": _transformers(
        "GPT2LMHeadModel", "GPT2Config", lambda: {"input_ids": _ids()}, 0.6, 0.95, vocab_size=99, n_embd=48, n_layer=2,
        n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    "llama": _transformers(
        "LlamaForCausalLM", "LlamaConfig", lambda: {"input_ids": _ids()}, 0.6, 0.95, vocab_size=99, hidden_size=48,
        intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    ),
    "t5": _transformers(
        "T5ForConditionalGeneration", "T5Config", lambda: {"input_ids": _ids(), "decoder_input_ids": _ids(7)}, 0.6,
        0.94, vocab_size=99, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
    ),
    "vit": _transformers(
        "ViTForImageClassification", "ViTConfig", lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, 0.6, 0.95,
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=5,
    ),
    "whisper": _transformers(
        "WhisperForConditionalGeneration", "WhisperConfig",
        lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _ids(7)}, 0.6, 0.95, vocab_size=99,
        d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    ),
}  # fmt: skip
