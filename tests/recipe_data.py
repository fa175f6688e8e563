"""Generated files in the formats of CIFAR-10, ImageNet, SQuAD v1.1 and BERT, as the benchmark's recipes read them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch

WORDS = (
    "river", "stone", "cloud", "lamp", "green", "under", "seven", "walks",
    "writes", "near", "old", "bright", "city", "train", "paper", "glass",
)  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES = ("n01440764", "n01443537", "n01484850")


def cifar_rows(count: int, seed: int) -> np.ndarray:
    """Labels in the first column, then the red, green and blue planes."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows


def cifar_binary(folder: Path, count: int = 40) -> None:
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(cifar_rows(count, seed).tobytes())


def cifar_python(folder: Path, count: int = 40) -> None:
    """The same pictures as Python's pickles of arrays."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = cifar_rows(count, seed)
        entry = {"data": rows[:, 1:], "labels": rows[:, 0].tolist()}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(entry))
    names = {"label_names": [str(n) for n in range(10)]}
    (folder / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names))


def imagenet(folder: Path, train: int = 5, val: int = 2) -> None:
    """So many JPEG pictures of each class, of different sizes; a class has its colour."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number, name in enumerate(CLASSES):
            (folder / "imagenet" / part / name).mkdir(parents=True)
            for picture in range(count):
                pixels = draw.integers(0, 120, (40 + picture, 52, 3), dtype=np.uint8)
                pixels[..., number] += 120
                Image.fromarray(pixels).save(folder / "imagenet" / part / name / f"{name}_{picture}.JPEG")


def squad_file(articles: int, seed: int) -> dict[str, object]:
    """Articles of one paragraph with two questions; the answers are two words of it."""
    draw = np.random.default_rng(seed)
    data = []
    for article in range(articles):
        words = [*draw.choice(WORDS, 30)]
        qas = []
        for number, at in enumerate(draw.integers(0, 28, 2).tolist()):
            start, answer = len(" ".join([*words[:at], ""])), " ".join(words[at : at + 2])
            answers = [{"text": answer, "answer_start": start}] * 2
            qas.append(
                {
                    "id": f"{article}-{number}",
                    "question": f" {WORDS[number]} {words[at - 1]} near what?",
                    "answers": answers,
                }
            )
        data.append({"title": str(article), "paragraphs": [{"context": " ".join(words), "qas": qas}]})
    return {"version": "1.1", "data": data}


def squad(folder: Path, articles: int = 40) -> None:
    (folder / "squad").mkdir(parents=True)
    for name, count, seed in (("train-v1.1.json", articles, 0), ("dev-v1.1.json", 4, 1)):
        (folder / "squad" / name).write_text(json.dumps(squad_file(count, seed)), encoding="utf-8")


def bert(folder: Path) -> None:
    """A small BERT whose words are those above."""
    from transformers import BertConfig, BertForMaskedLM

    vocabulary = [*SPECIAL, *WORDS, "what", "?", "##s"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    at = folder / "bert-base-uncased"
    BertForMaskedLM(config).save_pretrained(at)
    (at / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (at / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
