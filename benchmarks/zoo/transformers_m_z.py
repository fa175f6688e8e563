"""The model types of transformers from "m" to "z" that need something of their own, and those that cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import OmDetTurboConfig, PretrainedConfig, TimeSeriesTransformerConfig, TimmBackboneConfig

from .transformers_exceptions import Exception_
from .transformers_inputs import BATCH, FRAMES, LENGTH, Draw
from .transformers_shrink import MEL

Maker = Callable[[Draw], Any]


def _normal(*shape: int) -> Maker:
    return lambda d: d.normal(BATCH, *shape)


def _ones(*shape: int) -> Maker:
    return lambda d: torch.ones(BATCH, *shape, dtype=torch.long)


def _same(*values: Any) -> Maker:
    """The same values for every element of the batch."""
    return lambda d: torch.tensor([list(values)] * BATCH)


def _packed(*values: Any) -> Maker:
    """What a model takes without a batch."""
    return lambda d: torch.tensor(list(values))


def _tokens(*places: tuple[str, int]) -> Maker:
    """Words around so many places for images, sounds, ... in every sequence."""

    def make(d: Draw) -> Tensor:
        words = d.words(BATCH, LENGTH)
        tokens = [
            token for kind, count in places for token in [d.find(f"{kind}_token_id", f"{kind}_token_index")] * count
        ]
        return torch.cat([words[:, :3], torch.tensor([tokens] * BATCH), words[:, 3:]], 1)

    return make


def _mask(ones: int, zeros: int) -> Maker:
    return _same(*[1] * ones, *[0] * zeros)


_PACKED_IMAGES: dict[str, Maker | None] = {
    "pixel_values": lambda d: d.normal(1, 3, 8, BATCH * 64 * 8),
    "target_sizes": _same(8, 8),
}


def _codes(d: Draw) -> Tensor:
    """Words of four codebooks."""
    return d.integers(5, 50, 4 * BATCH, LENGTH)


def _points(d: Draw) -> Tensor:
    """Two points in one object of every image."""
    return d.normal(BATCH, 1, 2, 2).sigmoid() * 60


def _flattened(d: Draw) -> Tensor:
    """A row and a column in front of every patch."""
    places = torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 6)).float()
    return torch.cat([places.expand(BATCH, -1, -1), d.normal(BATCH, 15, d.find("patch_embed_hidden_size"))], 2)


_PERCEPTION = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "ref_feat_shape": (8, 8)}
_RATIOS = (("long", 7), ("mid", 5), ("short", 3))
_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{f"vertical_long_to_small_conv_{r}ratio": [[k, 1], 1, [k // 2, 0]] for r, k in _RATIOS},
    **{f"horizontal_small_to_long_conv_{r}ratio": [[1, k], 1, [0, k // 2]] for r, k in _RATIOS},
    **{f"symmetric_conv_long_{r}ratio": [[k, k], 1, [k // 2, k // 2]] for r, k in _RATIOS},
}


def _omdet() -> PretrainedConfig:
    return OmDetTurboConfig(backbone_config=TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3]))


_DETECTING_BLOCKS = [
    [[3, 32, 32, 1, True]],
    [[3, 32, 32, 2, False]],
    [[3, 32, 48, 2, False], [3, 48, 48, 1, True]],
    [[3, 48, 64, 2, False]],
]

EXCEPTIONS: dict[str, Exception_] = {
    "marian": Exception_(cls="MarianMTModel"),
    "markuplm": Exception_(
        inputs={
            "attention_mask": _ones(LENGTH),  # without it, it looks for padding and warns
            "xpath_tags_seq": lambda d: d.integers(0, 200, BATCH, LENGTH, 50),
            "xpath_subs_seq": lambda d: d.integers(0, 900, BATCH, LENGTH, 50),
        }
    ),
    "mask2former": Exception_(config={"feature_size": 64, "hidden_dim": 64, "mask_feature_size": 64}),
    "maskformer": Exception_(config={"fpn_feature_size": 64, "mask_feature_size": 64}),
    "mimi": Exception_(
        config={
            "codebook_size": 64,
            "codebook_dim": 32,
            "vector_quantization_hidden_dimension": 32,
            "num_filters": 4,
            "num_quantizers": 4,
            "upsample_groups": 48,
        },
        inputs={"input_values": _normal(1, 3840)},
    ),
    "mimi_decoder": Exception_(
        config={"num_filters": 4, "upsample_groups": lambda c: c.hidden_size},
        inputs={"latents": lambda d: d.normal(BATCH, d.config.hidden_size, 6)},
    ),
    "mimi_encoder": Exception_(config={"num_filters": 4}, inputs={"input_values": _normal(1, 3840)}),
    "minicpm_ocr": Exception_(
        config={
            "image_token_id": 98,
            "insert_layer_id": 0,
            "vision_config.insert_layer_id": 0,
            "downsample_mode": "16x",
        },
        inputs={**_PACKED_IMAGES, "input_ids": _tokens(("image", 4))},
    ),
    "minicpm_ocr_vision": Exception_(config={"insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minicpmv4_6": Exception_(
        config={"image_token_id": 98, "insert_layer_id": 0},
        inputs={**_PACKED_IMAGES, "input_ids": _tokens(("image", 4))},
    ),
    "minicpmv4_6_vision": Exception_(config={"insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minicpmv4_7": Exception_(
        config={"image_token_id": 98, "insert_layer_id": 0},
        inputs={**_PACKED_IMAGES, "input_ids": _tokens(("image", 4))},
    ),
    "minicpmv4_7_vision": Exception_(config={"insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minimax_m3_vl": Exception_(config={"merged_hidden_size": lambda c: c.text_config.hidden_size * 4}),
    "mistral4": Exception_(config={"head_dim": 24, "rope_parameters.partial_rotary_factor": 8 / 24}),
    "mllama": Exception_(
        inputs={
            "pixel_values": _normal(1, 4, 3, 64, 64),
            "aspect_ratio_ids": _ones(1),
            "aspect_ratio_mask": _ones(1, 4),
            "cross_attention_mask": _ones(13, 1, 4),
        }
    ),
    "mllama_vision_model": Exception_(
        config={"vision_output_dim": lambda c: c.hidden_size * (1 + len(c.intermediate_layers_indices))},
        inputs={
            "pixel_values": _normal(1, 4, 3, 64, 64),
            "aspect_ratio_ids": _ones(1),
            "aspect_ratio_mask": _ones(1, 4),
        },
    ),
    "mm-grounding-dino": Exception_(config={"d_model": 64}),
    "molmo2": Exception_(
        config={
            "adapter_config.vision_feature_layer": [1, 0],
            "adapter_config.text_hidden_size": 64,
            "text_config.additional_vocab_size": 8,
        },
        inputs={
            "pixel_values": _normal(64, 192),
            "image_token_pooling": lambda d: d.integers(0, 128, 8, 4),
            "image_grids": _same(0, 0, 2, 2),
            "image_num_crops": _packed(1, 1),
            "input_ids": _tokens(("image", 4)),
        },
    ),
    "molmo2_adapter": Exception_(
        inputs={"image_features": _normal(64, 64), "pooled_patches_idx": lambda d: d.integers(0, 128, 8, 4)}
    ),
    "molmo2_vision": Exception_(inputs={"pixel_values": _normal(64, 192)}),
    "moonshine": Exception_(config={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    "moonshine_streaming": Exception_(config={"num_key_value_heads": 4}),
    "moshi_depth": Exception_(
        inputs={"input_ids": lambda d: d.integers(0, 99, BATCH, 7), "last_hidden_state": _normal(7, 64)}
    ),
    "moss_transcribe_diarize": Exception_(
        inputs={
            "input_features": _normal(MEL, FRAMES),
            "input_features_mask": _mask(56, FRAMES - 56),
            "padding_mask": _ones(480),
            "input_ids": _tokens(("audio", 7)),
        }
    ),
    "muse_glimmer": Exception_(config={"out_hidden_size": 192}),
    "muse_glimmer_assistant": Exception_(
        config={"sliding_window": 64}, inputs={"noise_embeds": _normal(16, 32), "context_hidden_states": _normal(5, 32)}
    ),
    "muse_spark": Exception_(
        config={"out_hidden_size": 384},
        inputs={"input_values": _normal(48 * 40), "input_ids": _tokens(("image", 6), ("audio", 40))},
    ),
    "muse_spark_audio": Exception_(inputs={"input_values": _normal(48 * 40)}),
    "musicflamingo": Exception_(
        inputs={
            "input_features": _normal(MEL, FRAMES),
            "input_features_mask": _ones(FRAMES),
            "input_ids": _tokens(("audio", 16)),
        }
    ),
    "musicgen": Exception_(
        cls="MusicgenForConditionalGeneration",
        config={"audio_encoder.num_filters": 2},
        inputs={"decoder_input_ids": _codes, "input_values": None},
    ),
    "musicgen_decoder": Exception_(inputs={"input_ids": _codes}),
    "musicgen_melody": Exception_(
        cls="MusicgenMelodyForConditionalGeneration",
        config={"audio_encoder.num_filters": 2},
        inputs={"decoder_input_ids": _codes, "input_features": _normal(20, 12), "input_values": None},
    ),
    "musicgen_melody_decoder": Exception_(inputs={"input_ids": _codes}),
    "nemotron": Exception_(config={"num_key_value_heads": 2}),
    "nemotron3_5_transcribe_word_timestamp": Exception_(inputs={"inputs_embeds": _normal(8, 48)}),
    "nemotron_h_omni": Exception_(
        config={"image_token_id": 98},
        inputs={
            "pixel_values": lambda d: d.normal(BATCH * 16, 192),
            "image_grid_hw": _same(4, 4),
            "input_ids": _tokens(("image", 4)),
        },
    ),
    "nemotron_h": Exception_(config={"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}),
    "neomme": Exception_(
        config={"embedding_rank": 24},
        inputs={"pixel_values": lambda d: d.normal(BATCH * 4, 192), "input_ids": _tokens(("image", 4))},
    ),
    "neucodec": Exception_(
        config={
            "encoder_hidden_size": 4,
            "quantization_dim": lambda c: c.hidden_size + c.semantic_model_config.hidden_size,
        },
        inputs={"input_values": _normal(1, 3200), "input_features": _normal(10, 48)},
    ),
    "omdet-turbo": Exception_(
        make=_omdet,
        config={"apply_layernorm_after_vision_backbone": False, "encoder_in_channels": [64, 128, 256]},
        inputs={
            "classes_input_ids": lambda d: d.integers(5, 50, 2 * BATCH, 7),
            "classes_attention_mask": lambda d: torch.ones(2 * BATCH, 7).long(),
            "tasks_input_ids": lambda d: d.integers(5, 50, BATCH, 7),
            "tasks_attention_mask": _ones(7),
            "classes_structure": _packed(2, 2),
        },
    ),
    "oneformer": Exception_(
        config={"conv_dim": 64, "hidden_dim": 64, "mask_dim": 64},
        inputs={"task_inputs": lambda d: d.integers(5, 50, BATCH, 77)},
    ),
    "ovis2": Exception_(config={"hidden_size": lambda c: c.text_config.hidden_size}),
    "paddleocr_vl": Exception_(
        inputs={"pixel_values": lambda d: d.normal(BATCH * 24, 3, 8, 8), "input_ids": _tokens(("image", 6))}
    ),
    "paddleocr_vl_text": Exception_(config={"rope_parameters.mrope_section": [2, 3, 3]}),
    "paddleocr_vl_vision": Exception_(
        inputs={"pixel_values": lambda d: d.normal(1, BATCH * 24, 3, 8, 8), "grid_thw": _same(1, 4, 6)}
    ),
    "patchtsmixer": Exception_(
        cls="PatchTSMixerForPrediction",
        config={"num_input_channels": 3, "d_model": 16},
        inputs={"past_values": _normal(32, 3)},
    ),
    "patchtst": Exception_(
        cls="PatchTSTForPrediction",
        config={"num_input_channels": 3, "do_mask_input": False, "patch_length": 4, "patch_stride": 4},
        inputs={"past_values": _normal(32, 3)},
    ),
    "pe_audio": Exception_(inputs={"input_values": _normal(1, 3840)}),
    "pe_audio_encoder": Exception_(inputs={"input_values": _normal(1, 3840)}),
    "pe_audio_video": Exception_(
        inputs={"input_values": _normal(1, 3840), "pixel_values_videos": _normal(3, 3, 64, 64)}
    ),
    "pe_audio_video_encoder": Exception_(
        inputs={"input_values": _normal(1, 3840), "pixel_values_videos": _normal(3, 3, 64, 64)}
    ),
    "pe_video": Exception_(inputs={"pixel_values_videos": _normal(3, 3, 64, 64)}),
    "pe_video_encoder": Exception_(
        config={"vision_config.model_args": _PERCEPTION}, inputs={"pixel_values_videos": _normal(3, 3, 64, 64)}
    ),
    "perceiver": Exception_(config={"pad_token_id": 0, "d_latents": 64, "d_model": 48}),
    "perception_lm": Exception_(
        config={"vision_config.architecture": "vit_pe_core_large_patch14_336", "vision_config.model_args": _PERCEPTION},
        inputs={"pixel_values": _normal(1, 3, 64, 64), "input_ids": _tokens(("image", 64))},
    ),
    "phi4_multimodal_audio": Exception_(
        config={"input_size": 80}, inputs={"hidden_states": _normal(64, 80), "mask": _ones(64)}
    ),
    "pi0": Exception_(
        inputs={
            "state": _normal(32),
            "noise": _normal(8, 32),
            "timestep": lambda d: d.normal(BATCH).sigmoid(),
            "pixel_values": _normal(1, 3, 64, 64),
            "pixel_attention_mask": _ones(1),
            "attention_mask": _ones(LENGTH + 64),
            "input_ids": _tokens(("image", 64)),
        }
    ),
    "pix2struct": Exception_(inputs={"flattened_patches": _flattened}),
    "pix2struct_text_model": Exception_(
        config={"initializer_range": 0.02}, inputs={"encoder_hidden_states": _normal(9, 32)}
    ),
    "pix2struct_vision_model": Exception_(
        config={"patch_embed_hidden_size": 48}, inputs={"flattened_patches": _flattened}
    ),
    "pocket_tts_audio_tokenizer": Exception_(
        config={"num_filters": 4, "upsample_groups": lambda c: c.hidden_size}, inputs={"input_values": _normal(1, 3840)}
    ),
    "pocket_tts_audio_tokenizer_decoder": Exception_(
        config={"num_filters": 4, "upsample_groups": lambda c: c.hidden_size},
        inputs={"latents": lambda d: d.normal(BATCH, d.config.hidden_size, 6)},
    ),
    "pocket_tts_audio_tokenizer_encoder": Exception_(
        config={"num_filters": 4, "upsample_groups": lambda c: c.hidden_size}, inputs={"input_values": _normal(1, 3840)}
    ),
    "pop2piano": Exception_(inputs={"input_ids": None, "input_features": _normal(LENGTH, 32)}),
    "pp_chart2table_vision": Exception_(cls="got_ocr2.modeling_got_ocr2:GotOcr2VisionEncoder"),
    "pp_doclayout_v2": Exception_(
        config={
            "reading_order_config.max_2d_position_embeddings": 1024,
            "class_thresholds": [0.5, 0.5],
            "class_order": [1, 0],
        }
    ),
    "pp_formulanet_text": Exception_(
        inputs={"encoder_hidden_states": lambda d: d.normal(BATCH, 9, d.find("d_model", "hidden_size"))}
    ),
    "pp_lcnet_v4": Exception_(
        config={
            "block_configs": [
                [[3, 32, 32, 1, True]],
                [[3, 32, 32, 1, False]],
                [[3, 32, 48, [2, 1], False], [3, 48, 48, 1, True]],
                [[3, 48, 64, [2, 1], False]],
            ],
            "stem_channels": [3, 16, 32],
            "depths": [1, 1, 2, 1],
            "stage_out_channels": [32, 32, 48, 64],
        }
    ),
    "pp_ocrv5_mobile_rec": Exception_(inputs={"pixel_values": _normal(3, 96, 160)}),
    "pp_ocrv5_server_det": Exception_(
        config={"intraclass_block_config": _INTRACLASS, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]}
    ),
    "pp_ocrv6_medium_det": Exception_(
        config={
            "backbone_config.block_configs": _DETECTING_BLOCKS,
            "backbone_config.out_indices": [1, 2, 3, 4],
            "intraclass_block_config": _INTRACLASS,
            "scale_factor_list": [1, 2, 4, 8],
            "kernel_list": [3, 2, 2],
        }
    ),
    "pp_ocrv6_small_det": Exception_(
        config={
            "backbone_config.block_configs": _DETECTING_BLOCKS,
            "backbone_config.out_indices": [1, 2, 3, 4],
            "layer_list_out_channels": [32, 32, 48, 64],
        }
    ),
    "prompt_depth_anything": Exception_(inputs={"prompt_depth": lambda d: d.normal(BATCH, 1, 32, 32).abs()}),
    "qwen2_5_omni_audio_encoder": Exception_(
        config={"n_window": 10},
        inputs={
            "input_features": lambda d: d.normal(MEL, 120),
            "feature_lens": _packed(60, 60),
            "aftercnn_lens": _packed(30, 30),
        },
    ),
    "qwen2_5_omni_bigvgan": Exception_(
        config={"upsample_initial_channel": 256}, inputs={"mel_spectrogram": _normal(MEL, 10)}
    ),
    "qwen2_5_omni_dit": Exception_(
        config={"enc_channels": [96, 96, 96, 96, 288]},
        inputs={
            "hidden_states": _normal(12, MEL),
            "condition_vector": _normal(12, MEL),
            "speaker_embedding": _normal(12, 80),
            "quantized_code": lambda d: d.integers(0, 99, BATCH, 6),
            "time_step": lambda d: torch.tensor(0.3),
            "apply_cfg": lambda d: False,
        },
    ),
    "qwen2_5_omni_talker": Exception_(
        config={"rope_parameters.mrope_section": [2, 1, 1]},
        inputs={
            "thinker_reply_part": _normal(2, 32),
            "position_ids": lambda d: torch.arange(LENGTH).expand(3, BATCH, -1),
        },
    ),
    "qwen2_5_omni_text": Exception_(config={"rope_parameters.mrope_section": [2, 1, 1]}),
    "qwen2_5_omni_thinker": Exception_(
        config={"audio_config.output_dim": 64, "text_config.rope_parameters.mrope_section": [2, 3, 3]},
        inputs={
            "input_features": _normal(MEL, FRAMES),
            "feature_attention_mask": _ones(FRAMES),
            "input_ids": _tokens(("image", 6), ("audio", 16)),
        },
    ),
    "qwen2_5_omni_token2wav": Exception_(
        inputs={
            "code": lambda d: d.integers(0, 99, BATCH, 6),
            "conditioning": _normal(80),
            "reference_mel": _normal(20, MEL),
            "num_steps": lambda d: 2,
        }
    ),
    "qwen2_5_vl": Exception_(
        config={
            "vision_config.out_hidden_size": 64,
            "text_config.hidden_size": 64,
            "text_config.rope_parameters.mrope_section": [2, 3, 3],
        }
    ),
    "qwen2_5_vl_text": Exception_(config={"rope_parameters.mrope_section": [2, 1, 1]}),
    "qwen2_audio": Exception_(
        inputs={
            "input_features": _normal(MEL, FRAMES),
            "feature_attention_mask": _ones(FRAMES),
            "input_ids": _tokens(("audio", 16)),
        }
    ),
    "qwen2_vl": Exception_(
        config={
            "vision_config.hidden_size": 64,
            "text_config.hidden_size": 64,
            "text_config.rope_parameters.mrope_section": [2, 3, 3],
        }
    ),
    "qwen2_vl_text": Exception_(config={"rope_parameters.mrope_section": [2, 1, 1]}),
    "qwen3_asr": Exception_(
        config={"audio_config.output_dim": 64},
        inputs={
            "input_features": _normal(MEL, 100),
            "input_features_mask": _ones(100),
            "input_ids": _tokens(("audio", 13)),
        },
    ),
    "qwen3_asr_encoder": Exception_(inputs={"input_features": _normal(MEL, 100), "input_features_mask": _ones(100)}),
    "qwen3_omni_moe_audio_encoder": Exception_(
        inputs={"input_features": lambda d: d.normal(MEL, 200), "feature_lens": _packed(100, 100)}
    ),
    "qwen3_omni_moe_talker_code_predictor": Exception_(inputs={"input_ids": None, "inputs_embeds": _normal(3, 32)}),
    "qwen3_omni_moe_talker_text": Exception_(
        config={"shared_expert_intermediate_size": 32}, inputs={"input_ids": None, "inputs_embeds": _normal(LENGTH, 48)}
    ),
    "qwen3_omni_moe_thinker": Exception_(
        config={"audio_config.output_dim": 96},
        inputs={
            "input_features": _normal(MEL, 100),
            "feature_attention_mask": _ones(100),
            "input_ids": _tokens(("image", 6), ("audio", 13)),
        },
    ),
    "qwen4_exp_text": Exception_(
        config={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [],
        }
    ),
    "radio": Exception_(config={"patch_dim": 192, "video_patch_dim": 384}),
    "rag": Exception_(
        config={"n_docs": 2},
        inputs={
            "context_input_ids": lambda d: d.integers(5, 50, 2 * BATCH, LENGTH),
            "context_attention_mask": lambda d: torch.ones(2 * BATCH, LENGTH).long(),
            "doc_scores": _normal(2),
        },
    ),
    "reformer": Exception_(
        config={
            "axial_pos_embds_dim": (32, 32),
            "axial_pos_shape": (4, 4),
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
        inputs={"input_ids": lambda d: d.integers(5, 50, BATCH, 16)},
    ),
    "sam": Exception_(inputs={"input_points": _points}),
    "sam2": Exception_(inputs={"input_points": _points}),
    "sam2_hiera_det_model": Exception_(
        config={"hidden_size": 32, "embed_dim_per_stage": [32, 48, 64, 96], "global_attention_blocks": [4]}
    ),
    "sam2_prompt_encoder": Exception_(config={"patch_size": 16}),
    "sam2_video": Exception_(inputs={"input_points": _points}),
    "sam2_video_prompt_encoder": Exception_(config={"patch_size": 16}),
    "sam2_vision_model": Exception_(
        config={"backbone_channel_list": [96, 64, 48, 32], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    ),
    "sam3_detr_decoder": Exception_(
        inputs={
            "vision_features": _normal(16, 32),
            "text_features": _normal(5, 32),
            "vision_pos_encoding": _normal(16, 32),
            "spatial_shapes": lambda d: torch.tensor([[4, 4]]),
        }
    ),
    "sam3_detr_encoder": Exception_(
        inputs={
            "vision_features": lambda d: [d.normal(BATCH, 32, 4, 4)],
            "text_features": _normal(5, 32),
            "vision_pos_embeds": lambda d: [d.normal(BATCH, 32, 4, 4)],
        }
    ),
    "sam3_mask_decoder": Exception_(
        inputs={
            "decoder_queries": _normal(7, 32),
            "encoder_hidden_states": _normal(16, 32),
            "backbone_features": lambda d: [d.normal(BATCH, 32, n, n) for n in (16, 8, 4)],
        }
    ),
    "sam3_tracker": Exception_(
        config={"vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}, inputs={"input_points": _points}
    ),
    "sam3_tracker_video": Exception_(
        cls="Sam3TrackerModel",
        config={"vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
        inputs={"input_points": _points},
    ),
    "sam3_video": Exception_(
        config={"tracker_config.vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
        inputs={"input_points": _points},
    ),
    "sam_hq": Exception_(inputs={"input_points": _points}),
    "sam_hq_prompt_encoder": Exception_(config={"image_embedding_size": 8}),
    "sam_hq_vision_model": Exception_(config={"num_pos_feats": 16}),
    "sam_prompt_encoder": Exception_(config={"image_embedding_size": 8}),
    "sam_vision_model": Exception_(config={"num_pos_feats": 16}),
    "sapiens2": Exception_(
        config={
            "head_config.upsample_out_channels": [24, 16],
            "head_config.upsample_kernel_sizes": [4, 4],
            "head_config.conv_out_channels": [16],
            "head_config.conv_kernel_sizes": [1],
        }
    ),
    "seggpt": Exception_(
        cls="SegGptForImageSegmentation",
        config={"num_hidden_layers": 6, "merge_index": 1, "intermediate_hidden_state_indices": [2, 3, 4, 5]},
        inputs={
            "pixel_values": _normal(3, 32, 64),
            "prompt_pixel_values": _normal(3, 32, 64),
            "prompt_masks": _normal(3, 32, 64),
        },
    ),
    "shieldgemma2": Exception_(config={"mm_tokens_per_image": 16}),
    "speech-encoder-decoder": Exception_(inputs={"input_features": None}),
    "speech_to_text": Exception_(inputs={"input_features": _normal(60, MEL)}),
    "speecht5_hifigan": Exception_(inputs={"spectrogram": _normal(10, 32)}),
    "step3p5": Exception_(config={"sliding_window": 8}),
    "superglue": Exception_(inputs={"pixel_values": _normal(2, 3, 64, 64)}),
    "superpoint": Exception_(config={"keypoint_decoder_dim": 65}),
    "t5gemma2_decoder": Exception_(config={"dropout_rate": 0.0}, inputs={"encoder_hidden_states": _normal(9, 32)}),
    "t5gemma2_encoder": Exception_(config={"mm_tokens_per_image": 16}),
    "t5gemma2_text": Exception_(config={"dropout_rate": 0.0}),
    "time_series_transformer": Exception_(
        cls="TimeSeriesTransformerForPrediction",
        make=lambda: TimeSeriesTransformerConfig(
            prediction_length=6, context_length=12, num_time_features=2, lags_sequence=[1, 2, 3]
        ),
        inputs={
            "past_values": _normal(15),
            "past_time_features": _normal(15, 2),
            "past_observed_mask": _ones(15),
            "future_values": _normal(6),
            "future_time_features": _normal(6, 2),
        },
    ),
    "timesfm": Exception_(
        inputs={"past_values": lambda d: [d.normal(96), d.normal(96)], "freq": lambda d: torch.tensor([0, 1])}
    ),
    "timesfm2_5": Exception_(inputs={"past_values": lambda d: [d.normal(96), d.normal(96)]}),
    "timesformer": Exception_(config={"num_frames": 3}, inputs={"pixel_values": _normal(3, 3, 64, 64)}),
    "timm_backbone": Exception_(make=lambda: TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3])),
    "tvp": Exception_(
        cls="TvpForVideoGrounding",
        config={"num_frames": 2, "max_img_size": 64, "visual_prompt_size": 8},
        inputs={  # adds positions of columns to a batch of 1 only
            "pixel_values": lambda d: d.normal(1, 2, 3, 64, 64),
            "input_ids": lambda d: d.words(1, LENGTH),
        },
    ),
    "univnet": Exception_(
        config={"model_in_channels": 64}, inputs={"input_features": _normal(20, MEL), "noise_sequence": _normal(20, 64)}
    ),
    "unlimited_ocr_vision_encoder": Exception_(inputs={"patch_embeds": _normal(32, 8, 8)}),
    "uvdoc": Exception_(config={"backbone_config.out_indices": [1, 2, 3, 4, 5, 6]}),
    "vibevoice": Exception_(
        inputs={"padding_mask": _ones(6400), "input_values": _normal(1, 6400), "input_ids": _tokens(("audio", 2))}
    ),
    "vibevoice_acoustic_tokenizer": Exception_(config={"num_filters": 4}, inputs={"input_values": _normal(1, 6400)}),
    "vibevoice_acoustic_tokenizer_decoder": Exception_(
        config={"num_filters": 4}, inputs={"hidden_states": lambda d: d.normal(BATCH, d.find("hidden_size"), 2)}
    ),
    "vibevoice_acoustic_tokenizer_encoder": Exception_(
        config={"num_filters": 4}, inputs={"hidden_states": _normal(1, 6400)}
    ),
    "vibevoice_asr": Exception_(
        config={"acoustic_tokenizer_chunk_size": 6400},
        inputs={"input_values": _normal(1, 6400), "input_ids": _tokens(("audio", 2))},
    ),
    "video_llama_3": Exception_(inputs={"image_merge_sizes": _packed(2, 2), "input_ids": _tokens(("image", 6))}),
    "video_llama_3_vision": Exception_(inputs={"merge_sizes": _packed(2, 2)}),
    "video_llava": Exception_(
        inputs={
            "pixel_values_images": _normal(3, 64, 64),
            "pixel_values_videos": _normal(8, 3, 64, 64),
            "input_ids": _tokens(("image", 64), ("video", 520)),
        }
    ),
    "videomae": Exception_(config={"num_frames": 4}, inputs={"pixel_values": _normal(4, 3, 64, 64)}),
    "videomt": Exception_(inputs={"pixel_values_videos": _normal(2, 3, 64, 64)}),
    "vipllava": Exception_(config={"vision_feature_layer": [-1, -2, 0, 1, 2]}),
    "vision-text-dual-encoder": Exception_(config={"vision_config.pooler_output_size": lambda c: c.hidden_size}),
    "visual_bert": Exception_(
        config={"visual_embedding_dim": 24},
        inputs={"visual_embeds": _normal(5, 24), "visual_attention_mask": _ones(5), "attention_mask": _ones(LENGTH)},
    ),
    "vitmatte": Exception_(
        config={
            "backbone_config.patch_size": 16,
            "hidden_size": lambda c: c.backbone_config.hidden_size,
            "fusion_hidden_sizes": lambda c: list(c.fusion_hidden_sizes),
        }
    ),
    "vits": Exception_(inputs={"input_ids": lambda d: d.integers(1, 38, BATCH, LENGTH)}),
    "vivit": Exception_(
        config={"num_frames": 4, "tubelet_size": [2, 16, 16]}, inputs={"pixel_values": _normal(4, 3, 64, 64)}
    ),
    "voxtral": Exception_(config={"audio_token_id": 98}, inputs={"input_ids": _tokens(("audio", 8))}),
    "voxtral_encoder": Exception_(config={"intermediate_size": 128}),
    "voxtral_realtime": Exception_(inputs={"input_features": _normal(MEL, 8 * LENGTH)}),
    "voxtral_realtime_encoder": Exception_(config={"intermediate_size": 128}),
    "voxtral_realtime_text": Exception_(inputs={"t_cond": lambda d: d.normal(1, d.find("hidden_size"))}),
    "wav2vec2-bert": Exception_(config={"vocab_size": 40}, inputs={"input_features": _normal(40, 32)}),
    "wav2vec2-conformer": Exception_(config={"vocab_size": 40}),
    "xclip": Exception_(config={"vision_config.num_frames": 2}, inputs={"pixel_values": _normal(2, 3, 64, 64)}),
    "xclip_vision_model": Exception_(
        config={"num_frames": 2}, inputs={"pixel_values": lambda d: d.normal(2 * BATCH, 3, 64, 64)}
    ),
    "xcodec": Exception_(config={"codebook_dim": 128}, inputs={"input_values": _normal(1, 3200)}),
    "xcodec2": Exception_(
        config={
            "encoder_hidden_size": 4,
            "quantization_dim": lambda c: c.hidden_size + c.semantic_model_config.hidden_size,
        },
        inputs={"input_values": _normal(1, 3200), "input_features": _normal(10, 48)},
    ),
    "xmod": Exception_(config={"default_language": "en_XX"}),
    "zamba": Exception_(  # ties what its hybrid layers share, and there have to be two
        config={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "attention_hidden_size": lambda c: 2 * c.hidden_size,
            "attention_head_dim": lambda c: 2 * c.hidden_size // c.num_attention_heads,
        }
    ),
    "zamba2": Exception_(
        config={"mamba_headdim": 24, "attention_hidden_size": 96, "attention_head_dim": 24, "adapter_rank": 8}
    ),
    "zoedepth": Exception_(config={"bottleneck_features": lambda c: c.fusion_hidden_size}),
}
for _name in ("detr_encoder", "detr_decoder", "mask_decoder"):
    EXCEPTIONS[f"sam3_lite_text_{_name}"] = EXCEPTIONS[f"sam3_{_name}"]

_PARTS = {  # plain modules inside of a model that is run
    "sam_mask_decoder": "SamModel",
    "sam_prompt_encoder": "SamModel",
    "sam_hq_mask_decoder": "SamHQModel",
    "sam_hq_prompt_encoder": "SamHQModel",
    "sam2_mask_decoder": "Sam2Model",
    "sam2_prompt_encoder": "Sam2Model",
    "sam2_video_mask_decoder": "Sam2Model",
    "sam2_video_prompt_encoder": "Sam2Model",
    "sam3_geometry_encoder": "Sam3Model",
    "sam3_lite_text_geometry_encoder": "Sam3LiteTextModel",
    "sam3_tracker_mask_decoder": "Sam3TrackerModel",
    "sam3_tracker_prompt_encoder": "Sam3TrackerModel",
    "sam3_tracker_video_mask_decoder": "Sam3TrackerModel",
    "sam3_tracker_video_prompt_encoder": "Sam3TrackerModel",
    "t5_gemma_module": "T5GemmaForConditionalGeneration",
    "vibevoice_diffusion": "VibeVoiceForConditionalGeneration",
    "sapiens2_head": "Sapiens2ForSemanticSegmentation",
}
NOT_RUNNABLE: dict[str, str] = {
    "nougat": "its configuration names the model type donut_swin, which transformers registers as donut-swin: "
    "NougatConfig() raises",
    "qwen2_5_omni": "has no forward, only generate; its parts are types of their own",
    "qwen3_omni_moe": "has no forward, only generate; its parts are types of their own",
    **{name: f"no class of its own; a part of {whole}" for name, whole in _PARTS.items()},
}
