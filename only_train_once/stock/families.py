"""`FAMILIES`: what the configuration of each stock architecture can say about widths, one row per family.

A row names places in the modules of transformers or timm: which tensor of a layer shows a width, which number in the
code is computed from it, what a layer adds to its residual stream. Nothing here decides whether a conversion is
right: the stock model is built, given the weights and compared. A wrong row ends in an error, never in a wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Width:
    """How one field of the configuration is read from a layer.

    Attributes:
        field: of the configuration.
        at: path in the layer, of a tensor or, without ``dim``, of an ``int``.
        dim: of the tensor.
        per: path of an ``int`` that the size is divided by.
    """

    field: str
    at: str
    dim: int | None = None
    per: str = ""


@dataclass(frozen=True)
class Scale:
    """A number that the stock model computes anew; where it comes out another one, weights make up for it.

    Attributes:
        number: path of the number.
        into: path of a module; its weight and bias are multiplied by the subnet's number over the stock model's.
        power: of the number, as the code uses it.
        tied: path of a norm that is divided by the same where ``into`` shares its weight with the output layer.
        when: field of the configuration that switches the number on.
    """

    number: str
    into: str
    power: float = 1.0
    tied: str = ""
    when: str = ""


@dataclass(frozen=True)
class Stack:
    """Layers that repeat; all paths are relative to one of them.

    Attributes:
        layers: path of their list in the base model.
        count: field of the configuration that has their number.
        widths: what is read from each of them.
        adds: the modules whose outputs a layer adds to the stream that passes it; empty where a layer of zeros cannot
            be left out: it normalizes the sums, or the library has no argument for the number of layers.
        scales: numbers that change with a width, or with a layer's place.
    """

    layers: str
    count: str
    widths: tuple[Width, ...]
    adds: tuple[str, ...] = ()
    scales: tuple[Scale, ...] = ()


@dataclass(frozen=True)
class Family:
    """What is known about an architecture.

    Attributes:
        stacks: its layers.
        whole: ending of a tensor's name -> why its width cannot change alone; for messages.
        norm_eps: field of the configuration and attribute of the RMS norms that hold eps; empty for layer norms.
        feeds: norm in a layer -> the module before it, whose weight takes what eps cannot.
        fused: module in a layer that makes queries, keys and values at once -> dim of its weight with their rows.
        scales: numbers outside of the layers, paths in the base model.
        lists: fields of the configuration with an entry per layer.
        unread: endings of tables that a model computes for other settings than its own.
        heads: fields that grow together, by the same factor, where a configuration allows certain numbers only.
    """

    stacks: tuple[Stack, ...]
    whole: Mapping[str, str] = field(default_factory=dict)
    norm_eps: tuple[str, str] | None = None
    feeds: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, int] = field(default_factory=dict)
    scales: tuple[Scale, ...] = ()
    lists: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


_HEADS = "its heads have hidden_size / number of heads positions each, so heads and positions stay as they are"
_HIDDEN = "its size is hidden_size"


def _tied_to_hidden(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, _HEADS)


_BERT = Family(
    stacks=(
        Stack(
            "encoder.layer",
            "num_hidden_layers",
            widths=(Width("intermediate_size", "intermediate.dense.weight", 0),),
        ),
    ),
    whole=_tied_to_hidden(
        *(f"attention.self.{name}.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")),
        "attention.output.dense.weight",
    )
    | {"pooler.dense.weight": _HIDDEN, "classifier.dense.weight": _HIDDEN},
)

_DISTILBERT = Family(
    stacks=(Stack("transformer.layer", "n_layers", widths=(Width("hidden_dim", "ffn.lin1.weight", 0),)),),
    whole=_tied_to_hidden(
        *(f"attention.{name}.{kind}" for name in ("q_lin", "k_lin", "v_lin") for kind in ("weight", "bias")),
        "attention.out_lin.weight",
    )
    | {"pre_classifier.weight": _HIDDEN},
)

_GPT2 = Family(
    stacks=(
        Stack(
            "h",
            "n_layer",
            widths=(Width("n_inner", "mlp.c_fc.weight", 1),),
            adds=("attn.c_proj", "mlp.c_proj"),
            scales=(Scale("attn.scaling", "attn.c_attn"),),
        ),
    ),
    whole=_tied_to_hidden("attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"),
    fused={"attn.c_attn": 1},
)

_VIT = Family(
    stacks=(
        Stack(
            "layers",
            "num_hidden_layers",
            widths=(
                Width("head_dim", "attention.head_dim"),
                Width("num_attention_heads", "attention.q_proj.weight", 0, per="attention.head_dim"),
                Width("intermediate_size", "mlp.fc1.weight", 0),
            ),
            adds=("attention.o_proj", "mlp.fc2"),
            scales=(Scale("attention.scaling", "attention.q_proj"),),
        ),
    ),
    whole={"pooler.dense.weight": "its size is pooler_output_size"},
    heads=("num_attention_heads",),
)

_LLAMA = Family(
    stacks=(
        Stack(
            "layers",
            "num_hidden_layers",
            widths=(
                Width("hidden_size", "mlp.gate_proj.weight", 1),
                Width("head_dim", "self_attn.head_dim"),
                Width("num_attention_heads", "self_attn.q_proj.weight", 0, per="self_attn.head_dim"),
                Width("num_key_value_heads", "self_attn.k_proj.weight", 0, per="self_attn.head_dim"),
                Width("intermediate_size", "mlp.gate_proj.weight", 0),
            ),
            adds=("self_attn.o_proj", "mlp.down_proj"),
            scales=(Scale("self_attn.scaling", "self_attn.q_proj"),),
        ),
    ),
    norm_eps=("rms_norm_eps", "variance_epsilon"),
    lists=("layer_types",),
    unread=("rotary_emb.original_inv_freq",),
    heads=("num_key_value_heads", "num_attention_heads"),
)

# queries and keys are normalized, so factors in front of the norms are lost: the norm takes that of the attention
_QWEN3 = replace(
    _LLAMA,
    stacks=(replace(_LLAMA.stacks[0], scales=(Scale("self_attn.scaling", "self_attn.q_norm"),)),),
    feeds={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
)

_GEMMA = replace(
    _LLAMA,
    norm_eps=("rms_norm_eps", "eps"),
    scales=(Scale("embed_tokens.embed_scale", "embed_tokens", tied="norm"),),
)

_STEP = replace(
    _QWEN3,
    norm_eps=("rms_norm_eps", "eps"),
    lists=("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared"),
)


def _t5_stack(layers: str, count: str, *attentions: str) -> Stack:
    size = "key_value_proj_dim"
    feed_forward = f"layer.{len(attentions)}.DenseReluDense.wo.weight"
    widths = [Width("d_model", feed_forward, 0), Width("d_ff", feed_forward, 1)]
    for number, name in enumerate(attentions):
        path = f"layer.{number}.{name}"
        widths += [Width("d_kv", f"{path}.{size}"), Width("num_heads", f"{path}.q.weight", 0, per=f"{path}.{size}")]
    return Stack(layers, count, tuple(widths))


_T5 = Family(
    stacks=(
        _t5_stack("encoder.block", "num_layers", "SelfAttention"),
        _t5_stack("decoder.block", "num_decoder_layers", "SelfAttention", "EncDecAttention"),
    ),
    norm_eps=("layer_norm_epsilon", "variance_epsilon"),
    scales=(Scale("model_dim", "decoder.final_layer_norm", power=-0.5, when="scale_decoder_outputs"),),
    heads=("num_heads",),
)

_TIMM_VIT = Family(
    stacks=(
        Stack(
            "blocks",
            "depth",
            widths=(Width("mlp", "mlp.fc1.weight", 0),),
            adds=("attn.proj", "mlp.fc2"),
        ),
    ),
    whole=dict.fromkeys(
        ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"),
        "its heads have embed_dim / num_heads positions each, so heads and positions stay as they are",
    ),
    fused={"attn.qkv": 0},
)

_TIMM_MIXER = Family(
    stacks=(
        Stack(
            "blocks",
            "num_blocks",
            widths=(Width("tokens", "mlp_tokens.fc1.weight", 0), Width("channels", "mlp_channels.fc1.weight", 0)),
        ),
    ),
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "vit": _VIT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "step3p5": _STEP,
    "t5": _T5,
}
"""``model_type`` of a configuration of transformers -> what it can say."""

TIMM: dict[str, tuple[Family, tuple[str, ...]]] = {
    "VisionTransformer": (_TIMM_VIT, ("mlp",)),
    "MlpMixer": (_TIMM_MIXER, ("tokens", "channels")),
}
"""Class of timm -> what its arguments can say, and the widths that ``mlp_ratio`` holds as shares of ``embed_dim``."""
