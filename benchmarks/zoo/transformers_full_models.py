"""Model types of transformers as they are, not shrunk: the default configuration, inputs of usual size.

For timings only: what Python costs shows on small networks, and users have large ones.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import transformers_inputs
from .network import Network
from .transformers_models import model_class

TOKENS, FRAMES = 128, 3000
# Types whose default configuration is a published model of up to some 400 million parameters.
_TYPES = (
    "albert", "bart", "beit", "bert", "big_bird", "blenderbot-small", "camembert", "canine", "clip", "convbert",
    "convnext", "convnextv2", "cvt", "data2vec-audio", "deberta", "deberta-v2", "deit", "dinov2", "distilbert", "dpt",
    "electra", "ernie", "fnet", "focalnet", "funnel", "glpn", "gpt2", "hiera", "hubert", "ibert", "layoutlm", "levit",
    "longformer", "mamba", "mobilebert", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2",
    "mpnet", "mra", "nystromformer", "opt", "perceiver", "poolformer", "pvt", "pvt_v2", "regnet", "resnet", "roberta",
    "roformer", "segformer", "siglip", "splinter", "squeezebert", "swin", "swinv2", "swiftformer",
    "switch_transformers", "t5", "tapas", "unispeech", "vilt", "vit", "vit_mae", "vit_msn", "wav2vec2",
    "wavlm", "whisper", "xlnet", "yolos", "yoso",
)  # fmt: skip
# Types whose default configuration is too large for this, as a smaller published model.
_SIZES = {
    "llama": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
              "num_key_value_heads": 4},
    "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
                "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "vocab_size": 32000},
    "gemma": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 32000},
    "gpt_neox": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
    "bloom": {"hidden_size": 1024, "n_layer": 12, "n_head": 16, "vocab_size": 50000},
}  # fmt: skip


def names() -> list[str]:
    return sorted((*_TYPES, *_SIZES))


def build(name: str) -> Network:
    config: PretrainedConfig = CONFIG_MAPPING[name](**_SIZES.get(name, {}))
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    text.use_cache = False
    cls = model_class(name)
    assert cls is not None
    longest = getattr(text, "max_position_embeddings", None) or TOKENS
    transformers_inputs.LENGTH, transformers_inputs.FRAMES = min(TOKENS, longest), FRAMES
    torch.manual_seed(0)
    model = cls(config).eval()
    return Network(model, lambda seed: transformers_inputs.example(model, seed))
