"""Questions and answers of SQuAD v1.1, from ``data/squad``, by the BERT in ``data/bert-base-uncased``.

    python -m benchmarks.quality --task squad_bert --competitor ours scratch dense --levels 0.5 --device cuda

10 epochs of batches of 32, gradients clipped to a norm of 1, as for HSPG; AdamW with a learning rate of 3e-5 as for
HESSO, which falls to 0 in a straight line; 384 tokens, in windows that share 128. Heads and hidden neurons can go, the
residual stream stays. The score is F1 as SQuAD defines it; an answer is the best span of at most 30 tokens, of all of
them. One training article of twenty is for the choice of settings; ``dev-v1.1.json`` is the test split.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Task, falling
from benchmarks.quality.tasks.digits import scaled
from benchmarks.quality.tasks.folders import Source, present, steps

FOLDER, BERT = "squad", "bert-base-uncased"
FILES = {"train": "train-v1.1.json", "test": "dev-v1.1.json"}
WAY = "Both files are at https://rajpurkar.github.io/SQuAD-explorer/dataset/"
BERT_WAY = f"hf download google-bert/{BERT} --local-dir {{0}} brings it, or transformers' save_pretrained"
EPOCHS, BATCH, HELD_OUT = 10, 32, 20
AT_ONCE = 1000  # questions: Python's numbers of all of them would take gigabytes
TOKENS, SHARED, QUESTION, ANSWER = 384, 128, 64, 30  # of a window, of two neighbours, at most in each of the two
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Span = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A question, and its right answers: text and first character in the context."""

    text: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read(path: Path) -> list[list[Question]]:
    """Questions of each article of a file of SQuAD v1.1."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            [
                Question(
                    qa["question"].strip(),
                    paragraph["context"],
                    tuple((a["text"], a["answer_start"]) for a in qa["answers"]),
                )
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
            for article in articles
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not as SQuAD v1.1 writes it, data > paragraphs > context, qas > question, answers > text, "
            f"answer_start: {type(error).__name__} {error}"
        ) from error
    without = next((q.text for questions in found for q in questions if not q.answers), None)
    if without is not None:
        raise ValueError(f"{path}: no answer to {without!r}; SQuAD v1.1 has one to every question, v2.0 does not")
    return found


@dataclass(frozen=True, eq=False)
class Windows:
    """Questions with parts of their contexts, as long as the network reads at once.

    Attributes:
        inputs: (windows, 3, TOKENS), in the order of ``INPUTS``.
        spans: (windows, 2), first and last token of the first answer; 0 and 0 where the window has it not.
        offsets: (windows, TOKENS, 2), characters of the context; -1 for other tokens.
        of: (windows,), number of the question.
    """

    questions: list[Question]
    inputs: Tensor
    spans: Tensor
    offsets: Tensor
    of: Tensor


def span_of(offsets: Tensor, start: int, end: int) -> Span:
    """First and last token of these characters, 0 and 0 if not all of them are in the window."""
    inside = offsets[:, 0] >= 0
    if not bool(inside.any()) or start < int(offsets[inside, 0].min()) or end > int(offsets[:, 1].max()):
        return 0, 0
    touched = (inside & (offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


def windows(questions: list[Question], tokenizer: Any) -> Windows:
    parts = [_windows(questions[at : at + AT_ONCE], at, tokenizer) for at in range(0, len(questions), AT_ONCE)]
    return Windows(questions, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _windows(questions: list[Question], number: int, tokenizer: Any) -> tuple[Tensor, ...]:
    """The tensors of the windows of these questions, whose numbers start at this one."""
    asked = tokenizer([q.text for q in questions], truncation=True, max_length=QUESTION, return_offsets_mapping=True)
    ends = [max(end for _, end in offsets) for offsets in asked["offset_mapping"]]
    encoded = tokenizer(
        [q.text[:end] for q, end in zip(questions, ends, strict=True)],
        [q.context for q in questions],
        truncation="only_second",
        max_length=TOKENS,
        stride=SHARED,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int32)
    context = torch.tensor([[part == 1 for part in encoded.sequence_ids(n)] for n in range(len(offsets))])
    offsets[~context] = -1
    of = torch.tensor(encoded["overflow_to_sample_mapping"])
    first = [questions[n].answers[0] for n in of.tolist()]
    spans = [span_of(o, start, start + len(text)) for o, (text, start) in zip(offsets, first, strict=True)]
    inputs = torch.stack([torch.tensor(encoded[name], dtype=torch.int32) for name in INPUTS], 1)
    return inputs, torch.tensor(spans), offsets, of + number


@functools.cache
def data(folder: Path) -> dict[str, Windows]:
    """Split -> windows of it; ``folder`` has SQuAD's and BERT's."""
    from transformers import AutoTokenizer

    paths = {split: folder / FOLDER / name for split, name in FILES.items()}
    present(paths.values(), "SQuAD v1.1", WAY)
    present([folder / BERT], "BERT", BERT_WAY.format(folder / BERT))
    tokenizer = AutoTokenizer.from_pretrained(str(folder / BERT))
    train, test = (read(path) for path in paths.values())
    parts = {
        "train": [q for n, article in enumerate(train) for q in article if n % HELD_OUT],
        "validation": [q for article in train[::HELD_OUT] for q in article],
        "test": [q for article in test for q in article],
    }
    absent = next((split for split, questions in parts.items() if not questions), None)
    if absent is not None:
        raise ValueError(f"{folder / FOLDER} has no question for the {absent} split, of {len(train)} training articles")
    return {split: windows(questions, tokenizer) for split, questions in parts.items()}


def named(inputs: Tensor) -> dict[str, Tensor]:
    return {name: inputs[:, n].long() for n, name in enumerate(INPUTS)}


def batches(generator: torch.Generator, folder: Path) -> Iterator[Batch]:
    rows = data(folder)["train"]
    order = torch.randperm(len(rows.of), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        yield named(rows.inputs[chosen]), rows.spans[chosen]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs, spans = batch
    found = model(**inputs)
    return (F.cross_entropy(found.start_logits, spans[:, 0]) + F.cross_entropy(found.end_logits, spans[:, 1])) / 2


def best_spans(starts: Tensor, ends: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each window the best sum of a start and an end, not before it nor too far, and the span's characters."""
    context = offsets[..., 0] >= 0
    both = context[:, :, None] & context[:, None, :]
    near = torch.ones(both.shape[1:]).triu() - torch.ones(both.shape[1:]).triu(ANSWER) > 0
    sums = (starts[:, :, None] + ends[:, None, :]).masked_fill(~(both & near), -torch.inf).flatten(1)
    value, at = sums.max(1)
    rows, tokens = torch.arange(len(at)), starts.shape[1]
    return value, torch.stack([offsets[rows, at // tokens, 0], offsets[rows, at % tokens, 1]], 1)


@torch.no_grad()
def answers(model: nn.Module, rows: Windows) -> list[str]:
    """The best of all windows, for each question."""
    best = [(-float("inf"), "")] * len(rows.questions)
    model.eval()
    for at in torch.arange(len(rows.of)).split(BATCH):
        found = model(**named(rows.inputs[at]))
        values, spans = best_spans(found.start_logits, found.end_logits, rows.offsets[at])
        for n, value, (start, end) in zip(rows.of[at].tolist(), values.tolist(), spans.tolist(), strict=True):
            if value > best[n][0]:
                best[n] = value, rows.questions[n].context[start:end]
    return [text for _, text in best]


def plain(text: str) -> list[str]:
    """Words that are compared: in small letters, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact(found: str, right: str) -> float:
    return float(plain(found) == plain(right))


def overlap(found: str, right: str) -> float:
    """F1 of the words."""
    one, other = plain(found), plain(right)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def score(model: nn.Module, split: str, folder: Path, measure: Callable[[str, str], float]) -> float:
    """In %, the mean over the questions of the best over the right answers."""
    rows = data(folder)[split]
    pairs = zip(answers(model, rows), rows.questions, strict=True)
    return 100 * statistics.mean(max(measure(found, text) for text, _ in q.answers) for found, q in pairs)


@functools.cache
def pretrained(folder: Path) -> nn.Module:
    from transformers import BertForQuestionAnswering
    from transformers.utils import logging

    logging.set_verbosity_error()  # the layer that finds answers is not in the file
    logging.disable_progress_bar()
    return BertForQuestionAnswering.from_pretrained(str(folder)).float()


def build(width: float, folder: Path) -> nn.Module:
    """The pretrained network and a fresh last layer; below width 1 fresh layers with so much of heads and neurons."""
    model = copy.deepcopy(pretrained(folder))
    wide, deviation = model.config.hidden_size, model.config.initializer_range
    model.qa_outputs = nn.Linear(wide, 2)
    fresh = [model.qa_outputs]
    if width < 1:
        head_dim = wide // model.config.num_attention_heads
        heads = scaled(width, model.config.num_attention_heads)
        hidden = scaled(width, model.config.intermediate_size)
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.key, attention.value = (nn.Linear(wide, head_dim * heads) for _ in range(3))
            layer.attention.output.dense = nn.Linear(head_dim * heads, wide)
            layer.intermediate.dense, layer.output.dense = nn.Linear(wide, hidden), nn.Linear(hidden, wide)
            attention.num_attention_heads, attention.all_head_size = heads, head_dim * heads
            fresh += [attention.query, attention.key, attention.value, layer.attention.output.dense]
            fresh += [layer.intermediate.dense, layer.output.dense]
    for linear in fresh:
        nn.init.normal_(linear.weight, std=deviation)
        nn.init.zeros_(linear.bias)
    return model


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    parts = [layer.attention.self for layer in model.bert.encoder.layer]
    return {layer: layer.out_features // a.attention_head_size for a in parts for layer in (a.query, a.key, a.value)}


def _kept(model: nn.Module) -> list[Any]:
    layers = model.bert.encoder.layer
    streams = [x for layer in layers for x in (layer.attention.output, layer.output)]
    return [model.bert.embeddings, *streams, model.qa_outputs]


def bert(source: Source = Source()) -> Task:  # noqa: B008  (it is frozen)
    folder = source.folder
    rows = data(folder)["train"]
    return Task(
        name="squad_bert",
        build=functools.partial(build, folder=folder / BERT),
        batches=functools.partial(batches, folder=folder),
        loss=loss,
        score=functools.partial(score, folder=folder, measure=overlap),
        also={"exact_match": functools.partial(score, folder=folder, measure=exact)},
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-5, weight_decay=0.01),
        example=named(rows.inputs[:2]),
        pretrained=True,
        steps=steps(len(rows.of), BATCH, EPOCHS, folder / FOLDER),
        metric="F1, %",
        heads=_heads,
        kept=_kept,
        schedule=falling,
        clip=1.0,
    )


TASKS = {"squad_bert": bert}
