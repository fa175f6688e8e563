"""Small models of stock architectures, and checks of what is written of them that need nothing of this library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from only_train_once.inputs import call_model, named_outputs

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class StockModel:
    """How to build a model, how others load it, and what of it may shrink.

    Attributes:
        reader: class of transformers that reads it, or ``timm``.
        wide: whether its residual width can go, too.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    reader: str
    wide: bool = False


def ids(length: int = 12) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 99, (2, length))}


def pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def jittered(model: nn.Module) -> nn.Module:
    """Weights without the ones and zeros of an initialization, which hide what they are multiplied by."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def transformers_model(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return jittered(getattr(transformers, name)(getattr(transformers, config)(**options)))


DECODER = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
IMAGES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
GPT2 = {"vocab_size": 99, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}


def _decoder(name: str) -> StockModel:
    # every decoder of another family is built alike; padding is no token of these
    return StockModel(
        lambda: transformers_model(f"{name}ForCausalLM", f"{name}Config", **DECODER, pad_token_id=None),
        ids,
        "AutoModelForCausalLM",
        wide=True,
    )


MODELS: dict[str, StockModel] = {
    "bert": StockModel(
        lambda: transformers_model("BertForSequenceClassification", "BertConfig", **ENCODER, num_labels=3),
        ids,
        "AutoModelForSequenceClassification",
    ),
    "roberta": StockModel(lambda: transformers_model("RobertaModel", "RobertaConfig", **ENCODER), ids, "AutoModel"),
    "distilbert": StockModel(
        lambda: transformers_model(
            "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=99, dim=48, n_layers=3, n_heads=4,
            hidden_dim=96,
        ),
        ids,
        "AutoModelForSequenceClassification",
    ),
    "gpt2": StockModel(
        lambda: transformers_model("GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=2),
        ids,
        "AutoModelForCausalLM",
    ),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma"),
    "vit": StockModel(
        lambda: transformers_model("ViTForImageClassification", "ViTConfig", **IMAGES),
        pixels,
        "AutoModelForImageClassification",
    ),
    "t5": StockModel(
        lambda: transformers_model(
            "T5ForConditionalGeneration", "T5Config", vocab_size=99, d_model=48, d_kv=12, d_ff=96, num_layers=2,
            num_heads=4,
        ),
        lambda: {**ids(), "decoder_input_ids": ids(7)["input_ids"]},
        "AutoModelForSeq2SeqLM",
        wide=True,
    ),
}  # fmt: skip


def vision_transformer(**options: Any) -> nn.Module:
    import timm

    return jittered(timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=7, depth=3, **options))


def mixer() -> nn.Module:
    import timm

    return jittered(timm.create_model("mixer_s32_224", num_classes=7))


# ----------------------------------------------------------------------------------------------------------------
# Elsewhere
# ----------------------------------------------------------------------------------------------------------------

_READER = """
import json, sys
import tests.conftest  # lets torchvision import beside a CPU build of torch
import torch
from safetensors.torch import load_file

sys.modules["only_train_once"] = None
try:
    import only_train_once
except ImportError:
    pass
else:
    raise SystemExit("only_train_once can be imported here")

found = []
for folder, reader, kind in json.load(sys.stdin):
    if reader == "timm":
        import timm
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        import transformers
        module = transformers if hasattr(transformers, reader) else __import__(kind, fromlist=[reader])
        model = getattr(module, reader).from_pretrained(folder)
    model.eval()
    given, expected = load_file(f"{folder}/given"), load_file(f"{folder}/expected")
    with torch.no_grad():
        out = model(*given.values()) if reader == "timm" else model(**given)
    out = out if torch.is_tensor(out) else out[0]
    difference = float((out - expected["output"]).abs().max() / expected["output"].abs().max())
    found.append([difference, type(model).__module__.split(".")[0], sum(p.numel() for p in model.parameters())])
print("FOUND", json.dumps(found))
"""


@dataclass(frozen=True)
class Written:
    """A folder that others are to read.

    Attributes:
        folder: with the checkpoint; what goes in and what has to come out is written beside it.
        reader: see `StockModel`.
        module: of the class, where it is not one of transformers' own names.
    """

    folder: Path
    reader: str
    module: str = field(default="transformers")


def write_expected(written: Written, model: nn.Module, inputs: dict[str, Tensor]) -> Written:
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in inputs.items()}, written.folder / "given")
    save_file({"output": first_output(model, inputs).contiguous()}, written.folder / "expected")
    return written


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made = call_model(model, tuple(inputs.values()) if "x" in inputs else inputs)
    return next(t for _, t in named_outputs(made))


def read_elsewhere(folders: Sequence[Written]) -> list[tuple[float, str, int]]:
    """Relative difference, library of the class and parameters of each, in a process without this library."""
    jobs = json.dumps([[str(w.folder), w.reader, w.module] for w in folders])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READER],
        input=jobs,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode or not lines:
        raise AssertionError(f"the other process failed: {done.stderr[-3000:]}")
    return [tuple(each) for each in json.loads(lines[0].removeprefix("FOUND "))]


# ----------------------------------------------------------------------------------------------------------------
# GGUF
# ----------------------------------------------------------------------------------------------------------------

GGUF_ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3"}


def write_gguf(folder: Path, target: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint of transformers as GGUF in float32, by the names of the gguf package; returns what was written.

    Rotary pairs of a Llama are adjacent there and half a head apart in transformers: the rows of its queries and
    keys change places, as in llama.cpp's converter.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    architecture = getattr(gguf.MODEL_ARCH, GGUF_ARCHITECTURES[kind])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(target), gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    written = {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, f"the gguf package has no name for {name} of a {kind}"
        values = tensor.float().numpy()
        projection = name.split(".")[-2]
        if kind == "llama" and projection in heads:
            pairs = values.reshape(heads[projection], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(mapped, values)
        written[mapped] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
