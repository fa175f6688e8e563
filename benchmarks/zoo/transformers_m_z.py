"""The model types of transformers from "m" to "z" that need something of their own, and those that cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .transformers_exceptions import Exception_
from .transformers_inputs import BATCH, LENGTH, Draw
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


def _tokens(kind: str, count: int) -> Maker:
    """Ids with ``count`` places for images (or sounds) in each of the sequences."""

    def make(d: Draw) -> Tensor:
        ids = d.integers(5, 50, BATCH, LENGTH + count)
        ids[:, 3 : 3 + count] = d.find(f"{kind}_token_id", f"{kind}_token_index")
        return ids

    return make


def _mask(ones: int, zeros: int) -> Maker:
    return _same(*[1] * ones, *[0] * zeros)


_SPECTROGRAM: dict[str, Maker | None] = {"input_features": _normal(64, MEL)}  # time before frequency
_PACKED_IMAGES: dict[str, Maker | None] = {
    "pixel_values": lambda d: d.normal(1, 3, 8, BATCH * 64 * 8),
    "target_sizes": _same(8, 8),
}

EXCEPTIONS: dict[str, Exception_] = {
    "mask2former": Exception_(config={"feature_size": 64, "hidden_dim": 64, "mask_feature_size": 64}),
    "maskformer": Exception_(config={"fpn_feature_size": 64, "mask_feature_size": 64}),
    "mimi": Exception_(
        config={
            "codebook_size": 64, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32, "num_filters": 4,
            "num_quantizers": 4, "upsample_groups": 48,
        },
        inputs={"input_values": _normal(1, 3840)},
    ),
    "mimi_decoder": Exception_(
        config={"num_filters": 4, "upsample_groups": lambda c: c.hidden_size},
        inputs={"latents": lambda d: d.normal(BATCH, d.config.hidden_size, 6)}),
    "mimi_encoder": Exception_(config={"num_filters": 4}, inputs={"input_values": _normal(1, 3840)}),
    "minicpm3": Exception_(config={"head_dim": 8}),
    "minicpm_ocr_vision": Exception_(inputs=_PACKED_IMAGES),
    "minicpmv4_6_vision": Exception_(config={"insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minicpmv4_7_vision": Exception_(config={"insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minicpm_ocr": Exception_(config={"image_token_id": 98}, inputs=_PACKED_IMAGES),
    "minicpmv4_6": Exception_(config={"image_token_id": 98, "insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "minicpmv4_7": Exception_(config={"image_token_id": 98, "insert_layer_id": 0}, inputs=_PACKED_IMAGES),
    "ministral": Exception_(config={"head_dim": 8}),
    "mistral4": Exception_(config={"head_dim": 24, "rope_parameters.partial_rotary_factor": 8 / 24}),
    "mistral_large4_text": Exception_(config={"head_dim": 24, "rope_parameters.partial_rotary_factor": 8 / 24}),
    "mistral_large4": Exception_(config={"head_dim": 24}),
    "minimax_m3_vl": Exception_(config={"merged_hidden_size": lambda c: c.text_config.hidden_size * 4}),
    "mllama": Exception_(inputs={
        "pixel_values": _normal(1, 4, 3, 64, 64), "aspect_ratio_ids": _ones(1), "aspect_ratio_mask": _ones(1, 4),
        "cross_attention_mask": _ones(13, 1, 4)}),
    "mllama_vision_model": Exception_(config={
        "vision_output_dim": lambda c: c.hidden_size * (1 + len(c.intermediate_layers_indices))}, inputs={
        "pixel_values": _normal(1, 4, 3, 64, 64), "aspect_ratio_ids": _ones(1), "aspect_ratio_mask": _ones(1, 4)}),
    "modernvbert": Exception_(inputs={"pixel_values": _normal(1, 3, 64, 64), "input_ids": _tokens("image", 4)}),
    "molmo2": Exception_(
        config={"adapter_config.vision_feature_layer": [1, 0], "adapter_config.text_hidden_size": 64,
                "text_config.additional_vocab_size": 8},
        inputs={
            "pixel_values": _normal(64, 192), "image_token_pooling": lambda d: d.integers(0, 128, 8, 4),
            "image_grids": _same(0, 0, 2, 2), "image_num_crops": _packed(1, 1), "input_ids": _tokens("image", 4),
        },
    ),
    "molmo2_adapter": Exception_(inputs={
        "image_features": _normal(64, 64), "pooled_patches_idx": lambda d: d.integers(0, 128, 8, 4)}),
    "molmo2_vision": Exception_(inputs={"pixel_values": _normal(64, 192)}),
    "moonshine": Exception_(config={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    "moonshine_streaming": Exception_(config={"num_key_value_heads": 4}),
    "moshi_depth": Exception_(inputs={
        "input_ids": lambda d: d.integers(0, 99, BATCH, 7), "last_hidden_state": _normal(7, 64)}),
    "moss_transcribe_diarize": Exception_(inputs={

        "input_features_mask": _mask(56, 4), "padding_mask": _ones(480), "input_ids": _tokens("audio", 7)}),
    "muse_glimmer": Exception_(config={"out_hidden_size": 192}),
    "muse_glimmer_assistant": Exception_(config={"sliding_window": 64}, inputs={
        "noise_embeds": _normal(16, 32), "context_hidden_states": _normal(5, 32)}),
    "muse_spark": Exception_(
        config={"out_hidden_size": 384},
        inputs={"input_values": _normal(48 * 40), "input_ids": _tokens("image", 6)}),
    "muse_spark_audio": Exception_(inputs={"input_values": _normal(48 * 40)}),
    "musicflamingo": Exception_(inputs={"input_features_mask": _ones(60), "input_ids": _tokens("audio", 15)}),
    "musicgen": Exception_(cls="MusicgenForConditionalGeneration"),
    "musicgen_melody": Exception_(cls="MusicgenMelodyForConditionalGeneration"),
    "musicgen_decoder": Exception_(inputs={"input_ids": lambda d: d.integers(5, 50, 4 * BATCH, LENGTH)}),
    "musicgen_melody_decoder": Exception_(inputs={"input_ids": lambda d: d.integers(5, 50, 4 * BATCH, LENGTH)}),
    "nemotron": Exception_(config={"num_key_value_heads": 2}),
    "nemotron3_5_asr": Exception_(inputs=_SPECTROGRAM),
    "nemotron3_5_transcribe_asr_audio": Exception_(inputs=_SPECTROGRAM),
    "nemotron3_5_transcribe_audio": Exception_(inputs=_SPECTROGRAM),
    "nemotron3_5_transcribe_word_timestamp": Exception_(inputs={"inputs_embeds": _normal(8, 48)}),
    "nemotron3_diarization": Exception_(inputs=_SPECTROGRAM),
    "nemotron3_diarization_audio": Exception_(inputs=_SPECTROGRAM),
    "nemotron_asr_streaming": Exception_(inputs=_SPECTROGRAM),
    "nemotron_asr_streaming_encoder": Exception_(inputs=_SPECTROGRAM),
    "nemo_speechlm": Exception_(inputs={
        **_SPECTROGRAM, "input_features_mask": _ones(64), "input_ids": _tokens("audio", 8)}),
    "nemotron_h_omni": Exception_(config={"image_token_id": 98}, inputs={
        "pixel_values": lambda d: d.normal(BATCH * 16, 192), "image_grid_hw": _same(4, 4),
        "input_ids": _tokens("image", 4)}),
    "neomme": Exception_(config={"embedding_rank": 24}, inputs={
        "pixel_values": lambda d: d.normal(BATCH * 4, 192), "input_ids": _tokens("image", 4)}),
    "neucodec": Exception_(config={"encoder_hidden_size": 4}, inputs={
        "input_values": _normal(1, 3200), "input_features": _normal(10, 48)}),
    "nougat": Exception_(
        cls="VisionEncoderDecoderModel", config={"decoder.is_decoder": True, "decoder.add_cross_attention": True}),
    "parakeet_ctc": Exception_(inputs=_SPECTROGRAM),
    "parakeet_encoder": Exception_(inputs=_SPECTROGRAM),
    "parakeet_rnnt": Exception_(inputs=_SPECTROGRAM),
    "parakeet_tdt": Exception_(inputs=_SPECTROGRAM),
    "radio": Exception_(config={"patch_dim": 192, "video_patch_dim": 384}),
}  # fmt: skip
NOT_RUNNABLE: dict[str, str] = {}
