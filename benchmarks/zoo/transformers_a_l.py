"""The model types of transformers from "a" to "l" that need something of their own, and those that cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoformerConfig, EfficientLoFTRConfig, Gemma4Config, Gemma4UnifiedConfig, InformerConfig

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
    "hidden_dim": 1280,  # its width is written as a number
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


def sections(*shares: int) -> dict[str, Callable[[Any], Any]]:
    """Positions of several kinds (time, height, width) take turns in the rotated dims, in these shares."""

    def table(config: Any) -> dict[str, Any]:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pairs = int(head * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
        parts = [pairs * share // sum(shares) for share in shares]
        parts[-1] += pairs - sum(parts)
        return {**config.rope_parameters, "mrope_section": parts}

    return {"rope_parameters": table}


def _tiles(d: Draw) -> Tensor:
    """An image of 64 x 128 and its two tiles."""
    return d.normal(BATCH, 3, 3, 64, 64)


_TILES = {"image_grid_pinpoints": [[64, 64], [64, 128], [128, 64]]}
_TILES_INPUTS: dict[str, Callable[[Draw], Any] | None] = {
    "pixel_values": _tiles,
    "image_sizes": lambda d: torch.tensor([[64, 128]] * BATCH),
}


def _image_then_words(image: int) -> Callable[[Draw], Tensor]:
    """So many tokens of an image, then words."""
    return lambda d: torch.cat([torch.full((BATCH, image), d.find("image_token_index")), d.words(BATCH, LENGTH)], 1)


def _marked(image: int) -> Callable[[Draw], Tensor]:
    """Where the words are an image: after the first."""
    return lambda d: ((torch.arange(LENGTH) > 0) & (torch.arange(LENGTH) <= image)).long().repeat(BATCH, 1)


def _flattened(d: Draw) -> Tensor:
    """Patches that start with their row and column."""
    places = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 5)).repeat(BATCH, 1, 1)
    return torch.cat([places, d.normal(BATCH, 12, d.find("patch_embed_hidden_size"))], -1)


def _places(d: Draw) -> Tensor:
    """The columns and rows of 6 x 6 patches."""
    return torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(-1).repeat(BATCH, 1, 1)


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
    "big_bird": Exception_(config={"block_size": 4}, inputs={"input_ids": ids(64)}),
    "bigbird_pegasus": Exception_(config={"block_size": 4}, inputs={"input_ids": ids(64)}),
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
    "bridgetower": Exception_(config={"hidden_size": 128, "text_config.hidden_size": 128}),
    "bridgetower_vision_model": Exception_(config={"hidden_size": 128}, inputs={"image": normal(3, 64, 64)}),
    "bros": Exception_(
        config={
            "hidden_size": 64,
            "dim_bbox_sinusoid_emb_2d": 16,
            "dim_bbox_sinusoid_emb_1d": 2,
            "dim_bbox_projection": 16,
        },
        inputs={"bbox": lambda d: torch.rand(BATCH, LENGTH, 4, generator=d.generator)},
    ),
    "canary_decoder": Exception_(inputs={"encoder_hidden_states": hidden(9, "hidden_size")}),
    "chameleon": Exception_(
        config={
            "vocabulary_map": {"<image>": 97} | _image_words(40, 50),
            "image_token_id": 97,
            "vq_config.num_embeddings": 40,
        }
    ),
    "clap": Exception_(inputs={"input_features": normal(1, 256, MEL), "is_longer": ones(1)}),
    "clap_audio_model": Exception_(
        config={"spec_size": 64, "patch_embeds_hidden_size": 24},
        inputs={"input_features": normal(1, 256, MEL), "is_longer": ones(1)},
    ),
    "clvp": Exception_(config={"speech_config.vocab_size": 120}),
    "clvp_encoder": Exception_(config={"hidden_size": 128, "projection_dim": 128}),
    "cohere_compass_text": Exception_(
        config={
            "rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        }
    ),
    "colmodernvbert": Exception_(inputs={"pixel_values": normal(1, 3, 64, 64)}),
    "colqwen2": Exception_(
        config={"vlm_config.text_config.rope_parameters": sections(1, 1, 1)["rope_parameters"]},
        inputs={"pixel_values": normal(24, 384)},
    ),
    "csm": Exception_(inputs={"input_ids": ids(LENGTH, 32), "input_values": None}),
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
    "deepseek_v4": Exception_(inputs={"input_ids": ids(40)}),
    "deepseek_vl_hybrid": Exception_(inputs={"high_res_pixel_values": normal(3, 64, 64)}),
    "dia": Exception_(inputs={"decoder_input_ids": ids(LENGTH, 9)}),
    "dia_decoder": Exception_(
        inputs={"input_ids": ids(LENGTH, 9), "encoder_hidden_states": hidden(9, "cross_hidden_size")}
    ),
    "depth_pro": Exception_(config={"intermediate_hook_ids": [1, 0], "scaled_images_feature_dims": (32, 32, 32)}),
    "diffusion_gemma_text": Exception_(config={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    "dots1": Exception_(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "dots3_note": Exception_(inputs={"input_features": None}),
    "dots3_note_audio_encoder": Exception_(
        config={"conv_output_size": 96},
        inputs={"input_features": normal(MEL, FRAMES), "chunk_sample_lengths": lambda d: torch.tensor([10240, 8960])},
    ),
    "dots3_note_text": Exception_(
        config={
            "rope_parameters": lambda c: {
                kind: {**table, "partial_rotary_factor": 0.5} for kind, table in c.rope_parameters.items()
            },
        }
    ),
    "edgetam": Exception_(config={"prompt_encoder_config.patch_size": 16}),
    "edgetam_vision_model": Exception_(
        config={
            "backbone_config.architecture": "repvit_m1",
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        }
    ),
    "efficientloftr": Exception_(
        make=lambda: EfficientLoFTRConfig(stage_num_blocks=[1, 2, 2, 2], num_attention_layers=1),
        small=True,
        inputs={"pixel_values": normal(2, 3, 64, 64)},
    ),
    "efficientnet": Exception_(config=_BLOCKS),
    "encodec": Exception_(inputs={"input_values": normal(1, 3200)}),
    "embedding_gemma2": Exception_(inputs={"pixel_values": None, "input_features": None}),
    "emu3": Exception_(
        config={
            "vocabulary_map": {"<image>": 97, "<|extra_200|>": 96}
            | {f"<|visual token {code:06d}|>": 50 + code for code in range(40)},
            "image_token_id": 97,
            "vq_config.hidden_size": 128,
            "vq_config.codebook_size": 40,
        }
    ),
    "ernie4_5_vl_moe_text": Exception_(config=sections(1, 1, 2)),
    "esm": Exception_(config={"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 98}),
    **dict.fromkeys(
        ("EvollaModel", "evolla"),
        Exception_(inputs={"protein_input_ids": ids(11), "protein_attention_mask": ones(11)}),
    ),
    "falcon_h1": Exception_(config={"mamba_d_ssm": 32}),
    "fast_vlm": Exception_(config={"vision_config.architecture": "fastvit_t8", "vision_config.hidden_size": 768}),
    "fastspeech2_conformer": Exception_(config={"speaking_speed": 1e-9}, note="every phoneme lasts one frame"),
    "fastspeech2_conformer_hifigan": Exception_(
        config={"model_in_dim": MEL}, inputs={"spectrogram": normal(LENGTH, MEL)}
    ),
    "flava": Exception_(cls="FlavaModel"),
    "florence_vision": Exception_(inputs={"hidden_states": normal(3, 64, 64)}),
    "fun_asr_nano": Exception_(inputs={"input_features": normal(FRAMES, 7 * MEL)}),
    "fun_asr_nano_encoder": Exception_(
        inputs={"input_features": normal(FRAMES, 7 * MEL), "input_features_mask": ones(FRAMES)}
    ),
    "fuyu": Exception_(inputs={"pixel_values": normal(16, 192)}),
    "gemma3": Exception_(config={"mm_tokens_per_image": 16}),
    "gemma3n_audio": Exception_(
        inputs={"audio_mel": normal(FRAMES, 128), "audio_mel_mask": lambda d: torch.zeros(BATCH, FRAMES).bool()}
    ),
    "gemma3n_text": Exception_(config={"num_kv_shared_layers": 0}),
    "gemma3n": Exception_(
        config={"vision_soft_tokens_per_image": 4},
        inputs={"input_features": None, "input_features_mask": None},
        note="words and images",
    ),
    "gemma3n_vision": Exception_(
        config={"architecture": "mobilenetv4_conv_small_035", "hidden_size": 336},
        note="a small network of timm in place of mobilenetv5_300m",
    ),
    "gemma4": Exception_(
        make=lambda: Gemma4Config(vision_config={}),
        inputs={"pixel_values": normal(36, 192), "image_position_ids": _places, "input_features": None},
        note="words and images",
    ),
    "gemma4_unified": Exception_(
        make=lambda: Gemma4UnifiedConfig(vision_config={}),
        inputs={"pixel_values": normal(36, 1728), "image_position_ids": _places, "input_features": None},
        note="words and images",
    ),
    "gemma4_audio": Exception_(inputs={"input_features": normal(FRAMES, 128)}),
    "gemma4_vision": Exception_(inputs={"pixel_values": normal(36, 192), "pixel_position_ids": _places}),
    "glm4v_moe_text": Exception_(config=sections(1, 1, 1)),
    "glm4v_text": Exception_(config=sections(1, 1, 1)),
    "glm_image": Exception_(
        inputs={"pixel_values": None, "image_grid_thw": None}, note="words only: images become words by argmax"
    ),
    "glm_image_text": Exception_(config=sections(1, 1, 1)),
    "glm_ocr_text": Exception_(config=sections(1, 1, 1)),
    "granite4_vision": Exception_(
        config={
            **_TILES,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [(0, 0), (1, 1)],
            "spatial_target_layers": [1],
        },
        inputs={**_TILES_INPUTS, "input_ids": _image_then_words(52)},
    ),
    "granite_docling": Exception_(
        inputs={"pixel_values": normal(2, 3, 64, 64), "pixel_attention_mask": lambda d: torch.ones(BATCH, 2).bool()}
    ),
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus"),
        Exception_(
            config={"window_size": 15, "projector_config.encoder_hidden_size": 80},
            inputs={"input_features": hidden(FRAMES, "input_dim")},
        ),
    ),
    "granite_speech5_ctc": Exception_(inputs={"input_features": normal(FRAMES, 4 * MEL)}),
    "granite_speech5_encoder": Exception_(inputs={"input_features": normal(FRAMES, 4 * MEL)}),
    "granite_speech_encoder": Exception_(
        config={"context_size": 16, "max_pos_emb": 32}, inputs={"hidden_states": hidden(FRAMES, "input_dim")}
    ),
    "granite_speech_plus_encoder": Exception_(
        config={"context_size": 16, "max_pos_emb": 32}, inputs={"hidden_states": hidden(FRAMES, "input_dim")}
    ),
    "grounding-dino": Exception_(config={"d_model": 64}),
    "hunyuan_vl_text": Exception_(config=sections(1, 1, 1, 1)),
    "idefics": Exception_(inputs={"pixel_values": normal(1, 3, 64, 64), "image_attention_mask": ones(LENGTH, 1)}),
    "idefics2_perceiver": Exception_(inputs={"context": hidden(9, "hidden_size"), "attention_mask": ones(9)}),
    "idefics_vision": Exception_(cls="idefics.vision:IdeficsVisionTransformer"),
    "informer": Exception_(make=lambda: InformerConfig(**_SERIES), inputs=_SERIES_INPUTS),
    **dict.fromkeys(
        ("inkling2", "inkling2_vision"),
        Exception_(
            inputs={
                "pixel_values": lambda d: d.normal(BATCH * 6, 16, 16, 3),
                "image_grid_thw": lambda d: torch.tensor([[1, 2, 3]] * BATCH),
            }
        ),
    ),
    "inkling_audio": Exception_(inputs={"audio_input_ids": lambda d: d.integers(0, 99, BATCH, LENGTH, MEL)}),
    "inkling_mm_model": Exception_(inputs={"pixel_values": lambda d: d.normal(BATCH, 2, 8, 8, 3)}),
    "inkling_vision": Exception_(inputs={"pixel_values": lambda d: d.normal(BATCH, 2, 8, 8, 3)}),
    "instructblip": Exception_(config={"image_token_index": 97}, inputs={"qformer_input_ids": ids(LENGTH)}),
    "instructblipvideo": Exception_(
        config={"video_token_index": 97},
        inputs={"qformer_input_ids": ids(LENGTH), "pixel_values": normal(2, 3, 64, 64)},
    ),
    "janus": Exception_(config={"vision_config.projection_dim": 96}),
    "janus_vqgan": Exception_(config={"num_patches": 4, "num_embeddings": 40}),
    "jev": Exception_(
        inputs={
            "input_ids": lambda d: d.words(1, LENGTH),
            "marks": lambda d: torch.tensor([[5, 9, 12]]),
            "num_options": lambda d: torch.tensor([[2, 4, 3]]),
            "question_type_ids": lambda d: torch.tensor([[0, 1, 2]]),
        }
    ),
    "kimi_k25": Exception_(inputs={"pixel_values": lambda d: d.normal(BATCH * 24, 3, 8, 8)}),
    "kimi_k25_vision": Exception_(
        config={"pos_emb_height": 16, "pos_emb_width": 16},
        inputs={"pixel_values": lambda d: d.normal(BATCH * 24, 3, 8, 8)},
    ),
    "kosmos-2": Exception_(config={"latent_query_num": 7}, inputs={"image_embeds_position_mask": _marked(7)}),
    "kosmos-2.5": Exception_(
        config={"latent_query_num": 7},
        inputs={"flattened_patches": _flattened, "image_embeds_position_mask": _marked(7)},
    ),
    "kosmos_2_5_vision_model": Exception_(
        config={"patch_embed_hidden_size": 48}, inputs={"flattened_patches": _flattened}
    ),
    "kyutai_speech_to_text": Exception_(inputs={"input_ids": ids(LENGTH, 33)}),
    "layoutlmv3": Exception_(config={"coordinate_size": 8, "shape_size": 16}),
    "led": Exception_(config={"attention_window": 8}),
    "levit": Exception_(config={"patch_size": 16}),
    "lfm2_moe": Exception_(config={"layer_types": ["conv", "full_attention"]}),
    "lightglue": Exception_(
        config={"keypoint_detector_config.keypoint_decoder_dim": 65, "intermediate_size": 160},
        inputs={"pixel_values": normal(2, 3, 64, 64)},
    ),
    "lilt": Exception_(config={"hidden_size": 48}),
    "llama4_vision_model": Exception_(
        config={"intermediate_size": 128, "vision_output_dim": 48, "projector_output_dim": 48}
    ),
    "llava": Exception_(inputs={"image_sizes": None}),
    "llava_next": Exception_(config=_TILES, inputs=_TILES_INPUTS),
    "llava_next_video": Exception_(config=_TILES, inputs=_TILES_INPUTS),
    "llava_onevision": Exception_(config=_TILES, inputs=_TILES_INPUTS),
    "lw_detr": Exception_(
        config={"projector_scale_factors": [1.0], "projector_in_channels": [128], "num_feature_levels": 1}
    ),
    "lxmert": Exception_(inputs={"visual_feats": hidden(9, "visual_feat_dim"), "visual_pos": normal(9, 4)}),
}

_PART = "a part without a class of its own; it runs inside {}"
_ASSISTANT = "cannot be made: all its layers have to share keys and values, and one of each type has to make them"
_NO_FORWARD = "its class has no forward; it only encodes inside {}"
NOT_RUNNABLE: dict[str, str] = {
    "bark": "BarkModel has no forward: its parts take turns while generating",
    "chameleon_vqgan": _NO_FORWARD.format("chameleon"),
    "edgetam_video": "its forward takes a session object with the video inside, not tensors",
    "emu3_vqgan": _NO_FORWARD.format("emu3"),
    "glm_image_vqmodel": _NO_FORWARD.format("glm_image"),
    "idefics_perciever": _PART.format("idefics"),
    "dinat": "needs the compiled package natten",
    "edgetam_mask_decoder": _PART.format("edgetam"),
    "edgetam_prompt_encoder": _PART.format("edgetam"),
    "edgetam_video_mask_decoder": _PART.format("edgetam_video"),
    "edgetam_video_prompt_encoder": _PART.format("edgetam_video"),
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "gemma4_unified_audio": _PART.format("gemma4_unified"),
    "gemma4_unified_vision": _PART.format("gemma4_unified"),
    "higgs_audio_v2_tokenizer": "needs the compiled package torchaudio",
    "layoutlmv2": "needs the compiled package detectron2",
    "layoutxlm": "a tokenizer and a configuration of layoutlmv2, which needs the compiled package detectron2",
}
