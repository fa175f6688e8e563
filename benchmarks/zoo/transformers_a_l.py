"""The model types of transformers from "a" to "l" that need something of their own, and those that cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoformerConfig, InformerConfig

from .transformers_exceptions import Exception_
from .transformers_inputs import BATCH, FRAMES, LENGTH, Draw
from .transformers_shrink import MEL


def normal(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda d: d.normal(BATCH, *shape)


def ones(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda d: torch.ones(BATCH, *shape).long()


def hidden(length: int, *fields: str) -> Callable[[Draw], Tensor]:
    """Vectors as wide as the first of these fields says."""
    return lambda d: d.normal(BATCH, length, d.find(*fields))


def ids(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda d: d.words(BATCH, *shape)


_BLOCKS = {  # of the EfficientNets
    "in_channels": [32, 8, 16, 24, 32, 40, 48],
    "out_channels": [8, 16, 24, 32, 40, 48, 64],
    "num_block_repeats": [1, 1, 2, 1, 2, 1, 1],
    "hidden_dim": 64,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
_SERIES: dict[str, Any] = {
    "prediction_length": 6,
    "context_length": 12,
    "num_time_features": 2,
    "lags_sequence": [1, 2, 3],
}
_SERIES_INPUTS: dict[str, Callable[[Draw], Any] | None] = {
    "past_values": normal(15),
    "past_time_features": normal(15, 2),
    "past_observed_mask": ones(15),
    "future_values": normal(6),
    "future_time_features": normal(6, 2),
}


def _image_words(codes: int, first: int) -> dict[str, int]:
    """The vocabulary of chameleon and its kin: words for the codes of an image, named by the digits of the code."""
    names = ("".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(codes))
    return {f"IMGIMG{name}Z": first + code for code, name in enumerate(names)}


EXCEPTIONS: dict[str, Exception_] = {
    "align": Exception_(config={"projection_dim": 64}),
    "align_vision_model": Exception_(config=_BLOCKS),
    "aria": Exception_(
        config={"projector_patch_to_query_dict": {64: 12}, "max_value_projector_patch_to_query_dict": 12}
    ),
    "audio-spectrogram-transformer": Exception_(
        config={"max_length": 40, "frequency_stride": 4, "time_stride": 4}, inputs={"input_values": normal(40, MEL)}
    ),
    "audioflamingo3_encoder": Exception_(inputs={"input_features_mask": ones(FRAMES)}),
    "autoformer": Exception_(make=lambda: AutoformerConfig(**_SERIES), inputs=_SERIES_INPUTS),
    "blip-2": Exception_(config={"image_token_index": 97}),
    "blip_2_qformer": Exception_(
        inputs={"query_embeds": hidden(7, "hidden_size"), "encoder_hidden_states": hidden(9, "encoder_hidden_size")}
    ),
    "blip_text_model": Exception_(
        cls="blip.modeling_blip_text:BlipTextLMHeadModel",
        inputs={"encoder_hidden_states": hidden(9, "encoder_hidden_size")},
    ),
    "blt": Exception_(
        config={
            "encoder_hash_byte_group_vocab": 50,
            "global_config.hidden_size": lambda c: c.hidden_size,
            "encoder_config.hidden_size_global": 64,
            "decoder_config.hidden_size_global": 64,
            "global_config.encoder_cross_output_size": 96,
        }
    ),
    "blt_local_decoder": Exception_(
        config={"hidden_size_global": 48},
        inputs={"input_ids": None, "inputs_embeds": hidden(LENGTH, "hidden_size"), "patch_embeds": normal(4, 48)},
    ),
    "blt_local_encoder": Exception_(
        config={"hidden_size_global": 48},
        inputs={
            "num_patches": lambda d: 4,
            "patch_ids": lambda d: torch.div(torch.arange(LENGTH), 4, rounding_mode="floor").repeat(BATCH, 1),
        },
    ),
    "bridgetower": Exception_(config={"hidden_size": 128}),
    "bridgetower_vision_model": Exception_(config={"hidden_size": 128}),
    "bros": Exception_(
        config={
            "hidden_size": 64,
            "dim_bbox_sinusoid_emb_2d": 16,
            "dim_bbox_sinusoid_emb_1d": 2,
            "dim_bbox_projection": 16,
        },
        inputs={"bbox": lambda d: torch.rand(BATCH, LENGTH, 4, generator=d.generator)},
    ),
    "chameleon": Exception_(config={"vocabulary_map": {"<image>": 97} | _image_words(40, 50)}),
    "clap_audio_model": Exception_(
        config={"spec_size": 64}, inputs={"input_features": normal(1, 256, MEL), "is_longer": ones(1)}
    ),
    "clvp_encoder": Exception_(config={"hidden_size": 128, "projection_dim": 128}),
    "cohere_compass_text": Exception_(
        config={
            "rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        }
    ),
    "csm": Exception_(),
    "dac": Exception_(inputs={"input_values": normal(1, 3200)}),
    "dbrx": Exception_(
        config={
            "attn_config.rope_theta": 1e4,
            "attn_config.clip_qkv": 8.0,
            "attn_config.kv_n_heads": 2,
            "num_key_value_heads": 2,
        }
    ),
    "decision_transformer": Exception_(
        inputs={
            "states": hidden(LENGTH, "state_dim"),
            "actions": hidden(LENGTH, "act_dim"),
            "rewards": normal(LENGTH, 1),
            "returns_to_go": normal(LENGTH, 1),
            "timesteps": lambda d: torch.arange(LENGTH).repeat(BATCH, 1),
            "attention_mask": ones(LENGTH),
        }
    ),
    "deepseek_ocr2_encoder": Exception_(inputs={"num_patches": lambda d: 9}),
    "deepseek_ocr2_text": Exception_(
        config={"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ),
    "deepseek_ocr2_vision": Exception_(config={"encoder_config.hidden_size": lambda c: 80}),
    "deepseek_v2": Exception_(config={"num_experts_per_tok": 2}),
    "deepseek_vl_hybrid": Exception_(inputs={"high_res_pixel_values": normal(3, 64, 64)}),
    "dia": Exception_(inputs={"decoder_input_ids": ids(LENGTH, 9)}),
    "dia_decoder": Exception_(
        inputs={"input_ids": ids(LENGTH, 9), "encoder_hidden_states": hidden(9, "cross_hidden_size")}
    ),
    "dots1": Exception_(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "efficientnet": Exception_(config=_BLOCKS),
    "encodec": Exception_(inputs={"input_values": normal(1, 3200)}),
    "esm": Exception_(config={"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 98}),
    "informer": Exception_(make=lambda: InformerConfig(**_SERIES), inputs=_SERIES_INPUTS),
}

_PART = "a part without a class of its own; it runs inside {}"
_NO_FORWARD = "its class has no forward; it only encodes inside {}"
NOT_RUNNABLE: dict[str, str] = {
    "bark": "BarkModel has no forward: its parts take turns while generating",
    "chameleon_vqgan": _NO_FORWARD.format("chameleon"),
    "dinat": "needs the compiled package natten",
    "edgetam_mask_decoder": _PART.format("edgetam"),
    "edgetam_prompt_encoder": _PART.format("edgetam"),
    "edgetam_video_mask_decoder": _PART.format("edgetam_video"),
    "edgetam_video_prompt_encoder": _PART.format("edgetam_video"),
    "gemma4_unified_audio": _PART.format("gemma4_unified"),
    "gemma4_unified_vision": _PART.format("gemma4_unified"),
    "higgs_audio_v2_tokenizer": "needs the compiled package torchaudio",
    "layoutlmv2": "needs the compiled package detectron2",
    "layoutxlm": "a tokenizer and a configuration of layoutlmv2, which needs the compiled package detectron2",
}
