"""`shrink`: the default configuration of a model type made small by what its fields are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

IMAGE, PATCH, POSITIONS, MEL = 64, 8, 128, 16


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those inside it."""
    yield config
    for value in vars(config).values():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, PretrainedConfig):
                yield from parts(each)


@dataclass
class _Sizes:
    """What the numbers of one configuration tree become. Equal numbers in the same role stay equal."""

    width: dict[int, int] = field(default_factory=dict)
    vocabulary: dict[int, int] = field(default_factory=dict)
    codebooks: set[int] = field(default_factory=set)
    token: dict[int, int] = field(default_factory=dict)

    def words(self, value: int) -> int:
        """A vocabulary; that of a codebook is a power of 2 and stays one."""
        return min(value, _CODEBOOK) if value in self.codebooks else self.vocabulary.get(value, value)


_WIDTH = re.compile(
    r"(.*_)?(hidden_sizes?|hidden_dim|dim|dims|d_model|d_ff|ffn_dim|ffn_size|intermediate_size\w*|channels?|n_embd|"
    r"embd_dim|embed_dim|width|d_inner|embedding_size|units|size|inner_dim|inplanes|ffn|dff|proj_size|embds)"
)
_NOT_WIDTH = re.compile(
    r".*(image|patch|window|kernel|vocab|chunk|crop|grid|pool(?!er_hidden)|num_|max_|batch|block|merge|beam|context|stride|"
    r"sampling|hop|shape|context|mask_size|head_dim|dim_head|roi|train|feat_size|group_size|conv_L|padding|reduc|step|"
    r"background|codebook_size|state_size|d_state|position_embedding_size|generation|frame_size|spec_size|"
    r"unit_size|canvas|n_fft|in_channels_|audio_channels).*|scale|expand"
)
_TOKEN = re.compile(r".*(_id|_ids|_token_index|_idx)|.*token_id.*")
_VOCABULARY = re.compile(r".*vocab_size.*|codebook_size|n_codes_total")
_CODEBOOK = 64  # a power of 2 stays one
_LAYERS = re.compile(
    r"(.*_)?(num_\w*layers|layers|n_layers?|depth|num_blocks|num_layers_\w+)|num_hidden_groups|n_attn_blocks|\w+_num_layers"
)
_LAYER_LISTS = re.compile(
    r"(layer_types|mlp_layer_types|.*_layers|layers_.*|no_rope.*|.*_per_layer|.*pattern.*|.*types)"
)
_HEADS = re.compile(
    r"(.*_)?(num|n)_(\w+_)?heads?(_per_stage)?|(.*_)?attention_heads|(.*_)?heads|encoder_attention_heads"
)
_TAPS = re.compile(
    r"(backbone_out|_?out|intermediate|encoder_projection)\w*_(indices|ids)|_?out_indices|.*hook_ids|feature_layers?"
)
_PICKS = re.compile(r".*(indexes|indices|_idxs|layer_ids)")
_FIXED: tuple[tuple[str, int], ...] = (  # (field, at most); first match wins
    (r".*qk_rope_head_dim", 8), (r".*qk_nope_head_dim", 16), (r".*v_head_dim", 12), (r".*index_head_dim", 16),
    (r"linear_key_head_dim|linear_head_dim", 8), (r"qk_head_dim", 24),
    (r"(.*_)?(head_dim|d_kv|dim_head|d_head|kv_channels|attention_head_size)", 16),
    (r"rotary_dim", 8), (r"hidden_size_per_layer_input|laurel_rank", 16),
    (r"num_experts_per_tok\w*|moe_k|moe_top_?k|top_?k|num_selected_experts|moe_topk", 2),
    (r"topk_group", 1), (r"n_group|num_expert_group", 2),
    (r".*shared_experts?|num_dense_layers|first_k_dense_replace|moe_num_shared_experts|prefix_dense\w*", 1),
    (r".*(n|num)_(\w+_)?experts|expert_num", 4),
    (r"index_topk\w*", 4),
    (r"image_size|img_size|resolution|crop_size|input_size|pretrain_image_size", IMAGE),
    (r"patch_size|patch_sizes", PATCH),
    (r".*max_\w*position_embeddings|.*n_positions|n_ctx|max_pos_emb\w*|context_length|max_seq_len|seq_len", POSITIONS),
    (r"max_(source|target|speech|text)_positions", 32),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel|feature_size|mel_dim", MEL),
    (r"num_position_embeddings", (IMAGE // PATCH) ** 2),
    (r"num_conv_pos_embeddings", 16), (r"num_conv_pos_embedding_groups", 4),
    (r"window_size", 4), (r"sliding_window\w*", 8), (r"num_queries|num_query_tokens|\w*num_latents\w*", 7),
    (r"(.*_)?(state_size|d_state)", 16), (r".*chunk_size", 8), (r".*n_groups|.*num_groups|upsample_groups", 2),
    (r"\w+_lora_rank|time_step_rank|mamba_dt_rank", 12),
)  # fmt: skip
_FIXED_RE = [(re.compile(pattern), most) for pattern, most in _FIXED]


def shrink(config: PretrainedConfig) -> None:
    """Make a default configuration small, in place."""
    tree = list(parts(config))
    sizes = _Sizes()
    widths, vocabularies, tokens = set(), set(), set()
    for part in tree:
        for key, value in vars(part).items():
            found = list(numbers(value))
            if _is_width(key):
                widths.update(n for n in found if n >= 24)
            elif _VOCABULARY.fullmatch(key):
                sizes.codebooks.update(n for n in found if key == "codebook_size" and n & (n - 1) == 0)
                vocabularies.update(n for n in found if n >= 64)
            elif _TOKEN.fullmatch(key):
                tokens.update(n for n in found if n >= 20)
    sizes.width = {value: 32 + 16 * rank for rank, value in enumerate(sorted(widths))}
    sizes.vocabulary = {value: 99 + 12 * rank for rank, value in enumerate(sorted(vocabularies))}
    sizes.token = {value: 98 - rank for rank, value in enumerate(sorted(tokens, reverse=True))}
    for part in tree:
        _shrink_part(part, sizes)
    for part in tree:
        vision, text = getattr(part, "vision_config", None), getattr(part, "text_config", None)
        if isinstance(getattr(vision, "out_hidden_size", None), int) and hasattr(text, "hidden_size"):
            vision.out_hidden_size = text.hidden_size  # the defaults do not fit each other


def _is_width(key: str) -> bool:
    return bool(_WIDTH.fullmatch(key)) and not _NOT_WIDTH.fullmatch(key)


def numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from numbers(each)


def _map(value: Any, function: Callable[[int], int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(each, function) for each in value)
    return value


def _heads(value: int) -> int:
    return {1: 1, 2: 2, 3: 2}.get(value, 4)


def _shrink_part(part: PretrainedConfig, sizes: _Sizes) -> None:
    before = dict(vars(part))
    after: dict[str, Any] = {}
    count = before.get("num_hidden_layers") or before.get("n_layer") or before.get("num_layers") or before.get("depth")
    chosen = _chosen_layers(before, count) if isinstance(count, int) else []
    for key, value in before.items():
        if isinstance(value, (dict, str, bool)) or value is None or key in ("id2label", "chunk_size_feed_forward"):
            continue
        if chosen and isinstance(value, (list, tuple)) and len(value) == count and not _TAPS.fullmatch(key):
            value = type(value)(value[i] for i in chosen)
            after[key] = value
        if (
            chosen
            and _TAPS.fullmatch(key)
            and isinstance(value, (list, tuple))
            and max(numbers(value), default=0) >= len(chosen)
        ):
            top = len(chosen) - (0 if key in ("_out_indices", "out_indices") else 1)
            after[key] = type(value)(max(top - len(value) + 1 + i, 0) for i in range(len(value)))
        elif (
            chosen
            and _PICKS.fullmatch(key)
            and isinstance(value, (list, tuple))
            and all(isinstance(i, int) for i in value)
        ):
            after[key] = type(value)([1])
        elif key in ("layer_types", "mlp_layer_types"):
            pass
        elif _VOCABULARY.fullmatch(key):
            after[key] = _map(value, sizes.words)
        elif _TOKEN.fullmatch(key):
            after[key] = _map(value, lambda n: sizes.token.get(n, n))
        elif fixed := next((most for pattern, most in _FIXED_RE if pattern.fullmatch(key)), None):
            after[key] = _map(value, lambda n: min(n, fixed))
        elif _is_width(key):
            after[key] = _map(value, lambda n: sizes.width.get(n, n))
        elif _LAYERS.fullmatch(key) and isinstance(value, int) and key != "num_feat_extract_layers":  # counts conv_dim
            after[key] = len(chosen) if value == count and chosen else min(value, 2)
        elif key in ("depths", "block_repeats", "num_block_repeats", "stage_num_blocks", "blocks_per_stage"):
            after[key] = _map(value, lambda n: min(n, 2))
        elif "key_value_heads" in key or key in ("num_kv_heads", "n_head_kv", "kv_n_heads"):
            heads = next((before[k] for k in ("num_attention_heads", "num_heads", "n_head") if k in before), None)
            after[key] = _map(value, lambda n, heads=heads: 4 if n == heads and n > 1 else min(n, 2))  # type: ignore[misc]
        elif key in ("linear_num_key_heads",):
            after[key] = 2
        elif _HEADS.fullmatch(key):
            after[key] = _map(value, _heads)
    _fix(before, after)
    for key, value in after.items():
        setattr(part, key, value)
    _fix_rope(part, before)
    _fix_stages(part)
    if hasattr(part, "use_cache"):
        part.use_cache = False


def _chosen_layers(before: dict[str, Any], count: int) -> list[int]:
    """The layers that stay: two, or one of every kind, or one for each tap."""
    lists = [
        v
        for k, v in before.items()
        if isinstance(v, (list, tuple)) and len(v) == count and k.endswith(("types", "_type"))
    ]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * count
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    wanted = [2]
    for key, value in before.items():
        if _TAPS.fullmatch(key) and isinstance(value, (list, tuple)):
            wanted.append(len(value))
    for i in range(count):
        if len(chosen) >= min(count, max(wanted)):
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def _fix(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Keep what held between the numbers."""

    def both(*keys: str) -> bool:
        return all(isinstance(before.get(key), int) and isinstance(after.get(key), int) for key in keys)

    for head in ("head_dim", "d_kv"):
        for heads in ("num_attention_heads", "num_heads", "n_head"):
            for hidden in ("hidden_size", "d_model"):
                if both(head, heads, hidden) and before[head] * before[heads] == before[hidden]:
                    after[head] = after[hidden] // after[heads]
    if before.get("head_dim", 0) is None and both("hidden_size", "num_attention_heads"):
        after["head_dim"] = after["hidden_size"] // after["num_attention_heads"]
    if both("window_size", "patch_size") and before["window_size"] % (4 * before["patch_size"]) == 0:
        after["window_size"] = 4 * after["patch_size"]  # counts pixels, whole pairs of patches
    if both("upsample_groups", "hidden_size") and before["upsample_groups"] == before["hidden_size"]:
        after["upsample_groups"] = after["hidden_size"]
    if both("head_dim", "qk_rope_head_dim") and before["head_dim"] == before["qk_rope_head_dim"]:
        after["head_dim"] = after["qk_rope_head_dim"]  # there it says how many positions are rotated
    if both("qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        after["qk_head_dim"] = after["qk_nope_head_dim"] + after["qk_rope_head_dim"]
    for heads, head in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        expand = before.get("mamba_expand", before.get("expand"))
        if (
            both(heads, head, "hidden_size")
            and expand
            and before[heads] * before[head] == int(expand * before["hidden_size"])
        ):
            after[heads] = 4
            after[head] = int(expand * after["hidden_size"]) // 4


def _fix_stages(part: PretrainedConfig) -> None:
    """A backbone names its stages; where they are its layers, there are fewer now."""
    count, names = getattr(part, "num_hidden_layers", None), getattr(part, "stage_names", None)
    if names and count and len(names) > count + 1 and all(name.startswith(("stem", "stage")) for name in names):
        part.stage_names = names[: count + 1]
        part._out_features = [names[i] for i in part._out_indices]


def _fix_rope(part: PretrainedConfig, before: dict[str, Any]) -> None:
    def walk(table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value)
            elif key == "mrope_section":
                head = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
                old = before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"]
                total = head // 2 * sum(value) * 2 // old
                new = [n * total // sum(value) for n in value]
                new[0] += total - sum(new)
                table[key] = new
            elif key == "original_max_position_embeddings":
                table[key] = POSITIONS // 2

    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(getattr(part, key, None), dict):
            walk(getattr(part, key))
