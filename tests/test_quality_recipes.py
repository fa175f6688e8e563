"""The recipes for CIFAR-10, ImageNet and SQuAD on generated files in the same formats, by the benchmark's command."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.devices import CPU
from benchmarks.quality.__main__ import main
from benchmarks.quality.devices import on
from benchmarks.quality.tasks import cifar, imagenet, make, squad
from benchmarks.quality.tasks.folders import Source
from benchmarks.quality.tasks.pictures import transforms
from only_train_once.flops import count_flops
from tests import recipe_data

CIFAR: dict[str, tuple[float, dict[str, Any]]] = {
    "cifar_resnet18": (1 / 8, {}),
    "cifar_resnet50": (1 / 8, {"blocks": (1, 2, 1, 1)}),
    "cifar_resnet56": (1 / 2, {"blocks": (2, 1, 1)}),
    "cifar_vgg16": (1 / 8, {}),
}
SMALLER: dict[str, Callable[..., nn.Module]] = {
    "imagenet_resnet50": lambda build, width, classes, side: build(width / 8, classes, side),
    "imagenet_deit": lambda build, width, classes, side: build(width / 4, classes, side, depth=2),
}


def narrower(build: Callable[[float], nn.Module], share: float, width: float) -> nn.Module:
    return build(share * width)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The command turns warnings of logs off."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets, generated."""
    at = tmp_path_factory.mktemp("data")
    for write in (recipe_data.cifar_binary, recipe_data.imagenet, recipe_data.squad, recipe_data.bert):
        write(at)
    return at


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks, pictures, windows and batches of a test's size; everything else is as it is."""
    for name, (share, more) in CIFAR.items():
        network = cifar.NETWORKS[name]
        narrow = functools.partial(narrower, functools.partial(network.build, **more), share)
        monkeypatch.setitem(cifar.NETWORKS, name, dataclasses.replace(network, build=narrow))
    for name, build in SMALLER.items():
        settings = imagenet.SETTINGS[name]
        smaller = functools.partial(build, settings.build)
        monkeypatch.setitem(imagenet.SETTINGS, name, dataclasses.replace(settings, build=smaller, batch=4, side=32))
    monkeypatch.setattr(cifar, "BATCH", 8)
    for name, value in (("BATCH", 4), ("TOKENS", 32), ("SHARED", 8), ("QUESTION", 8), ("AT_ONCE", 50)):
        monkeypatch.setattr(squad, name, value)
    squad.data.cache_clear()
    yield
    squad.data.cache_clear()


RIVALS = {
    "cifar_resnet18": "scratch",
    "cifar_resnet50": "scratch",
    "cifar_resnet56": "scratch",
    "cifar_vgg16": "tp_magnitude",
    "imagenet_resnet50": "scratch",
    "imagenet_deit": "tp_magnitude",
    "squad_bert": "tp_magnitude",
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("task", "rival"), RIVALS.items())
def test_one_command(task: str, rival: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    asked = ["--levels", "0.5", "--seeds", "1", "--steps", "10", "--data", str(folder), "--out", str(out)]
    main(["--task", task, "--competitor", "ours", rival, *asked])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task"], row["competitor"]) for row in lines] == [(task, "ours"), (task, rival)]
    for row in lines:
        assert row["flops"] == pytest.approx(0.5, abs=0.01 if row["competitor"] == "ours" else 0.05)
        assert row["training_flops"] == pytest.approx(1, abs=0.1)
        assert 0 <= row["score"] <= 100
        assert row["steps"] > row["dense_steps"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bf16"], "name a file for them with --out"),
        (["--steps", "10"], "name a file for them with --out"),
        (["--task", "squad_bert", "--data", "nowhere"], "nowhere/squad/train-v1.1.json, nowhere/squad/dev-v1.1.json"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# What can be wrong with the files ------------------------------------------------------------------------------------


def without(*parts: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for part in parts:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def written(part: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / part).write_text(edit((folder / part).read_text())) and None


def shortened(folder: Path) -> None:
    file = folder / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-5])


def labelled(folder: Path) -> None:
    file = folder / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])


def other_checksums(folder: Path) -> None:
    shutil.rmtree(folder / "cifar-10-batches-bin")
    recipe_data.cifar_python(folder)


def without_answers(text: str) -> str:
    found = json.loads(text)
    found["data"][3]["paragraphs"][0]["qas"][1]["answers"] = []
    return json.dumps(found)


TRAIN = "squad/train-v1.1.json"
BAD: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("no CIFAR-10", "cifar_vgg16", without("cifar-10-batches-bin"), "cifar-10-binary.tar.gz"),
    ("a file of it", "cifar_vgg16", without("cifar-10-batches-bin/test_batch.bin"), "test_batch.bin is missing"),
    ("part of a record", "cifar_vgg16", shortened, "122915 bytes are no whole number of records of 3073 bytes"),
    ("CIFAR-100", "cifar_vgg16", labelled, "a label is 10, and CIFAR-10 has 0 to 9"),
    ("unknown pickles", "cifar_vgg16", other_checksums, "cifar-10-batches-py is not what torchvision knows"),
    ("no ImageNet", "imagenet_deit", without("imagenet"), "imagenet/train, .*/imagenet/val is missing"),
    ("archives", "imagenet_deit", without("imagenet/val"), "imagenet/val is missing.*torchvision.datasets.ImageNet"),
    ("empty class", "imagenet_deit", without(*(f"imagenet/val/n01443537/n01443537_{n}.JPEG" for n in (0, 1))),
     "n01443537.*one folder for each class"),
    ("classes", "imagenet_deit", without("imagenet/val/n01484850"), "not the same classes: n01484850 is in one"),
    ("weights", "imagenet_resnet50_pretrained", lambda folder: None, "has 3 classes, and the weights"),
    ("fewer than a batch", "imagenet_resnet50", lambda folder: None, "14 examples to train on, fewer than the 256"),
    ("no SQuAD", "squad_bert", without("squad"), "rajpurkar.github.io/SQuAD-explorer/dataset"),
    ("no BERT", "squad_bert", without("bert-base-uncased"), "hf download google-bert/bert-base-uncased --local-dir"),
    ("no JSON", "squad_bert", written(TRAIN, lambda text: text[:-9]), "not as SQuAD v1.1 writes it.*JSONDecodeError"),
    ("no answers", "squad_bert", written(TRAIN, lambda text: text.replace("answer_start", "start")), "KeyError"),
    ("v2.0", "squad_bert", written(TRAIN, without_answers), "SQuAD v1.1 has one to every question, v2.0 does not"),
    ("empty", "squad_bert", written(TRAIN, lambda text: '{"data": []}'), "no question for the train split"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "change", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_files_that_are_refused(
    task: str, change: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "data"
    shutil.copytree(folder, copied)
    change(copied)
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        make(task, Source(copied))
    assert re.search(message, str(raised.value))
    assert str(copied) in str(raised.value)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["binary", "python"])
def test_both_versions_of_cifar_are_read(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    for table in ("train_list", "test_list"):  # generated files have other checksums
        monkeypatch.setattr(CIFAR10, table, [[name, None] for name, _ in getattr(CIFAR10, table)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    {"binary": recipe_data.cifar_binary, "python": recipe_data.cifar_python}[version](tmp_path)
    for split, seeds in (("train", range(5)), ("test", [5])):
        images, labels = cifar.read(tmp_path, split)
        raw = torch.cat([torch.from_numpy(recipe_data.cifar_rows(40, seed)) for seed in seeds])
        assert labels.tolist() == raw[:, 0].tolist()
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (cifar.MEAN, cifar.DEVIATION))
        assert torch.allclose(images * deviation + mean, raw[:, 1:].view(-1, 3, 32, 32) / 255, atol=1e-6)
    green = (int(raw[7, 1 + 1024 + 33]) / 255 - cifar.MEAN[1]) / cifar.DEVIATION[1]  # second row, second column
    assert float(images[7, 1, 1, 1]) == pytest.approx(green, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "products"),  # millions, as the papers and their notebooks have them; ResNet-56's are He's
    [
        ("cifar_resnet18", 11.17, 555.4),
        ("cifar_resnet50", 23.52, 1297.8),
        ("cifar_resnet56", 0.86, 125.7),
        ("cifar_vgg16", 15.25, 313.7),
    ],
)
def test_the_networks_are_those_of_the_papers(name: str, parameters: float, products: float) -> None:
    model = cifar.NETWORKS[name].build(1.0).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.006)
    assert count_flops(model, torch.zeros(1, 3, 32, 32)).total / 2e6 == pytest.approx(products, abs=0.06)


def test_shifted_pictures_are_parts_of_the_padded_ones(folder: Path) -> None:
    images, labels = cifar.data(folder)["train"]
    shown, told = next(cifar.batches(torch.Generator().manual_seed(0), folder))
    padded = F.pad(images[labels == told[0]], (4, 4, 4, 4))
    found = [p[:, t : t + 32, x : x + 32] for p in padded for t in range(9) for x in range(9)]
    assert any(torch.equal(shown[0], f) or torch.equal(shown[0], f.flip(2)) for f in found)


def test_mixed_pictures_are_those_of_the_generator(folder: Path) -> None:
    task = make("cifar_vgg16", Source(folder))
    assert task.steps == 300 * 2  # 180 of 200 pictures, in whole batches
    before = torch.get_rng_state()
    (one, told), (again, _), (other, _) = (next(task.stream(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.allclose(told.sum(1), torch.ones(64))
    assert (told > 0).sum(1).max() == 2
    assert torch.equal(torch.get_rng_state(), before)


# ImageNet ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SMALLER)
def test_pictures_do_not_depend_on_who_reads_them(name: str, folder: Path) -> None:
    before = torch.get_rng_state()
    alone, helped, other = (
        list(make(name, Source(folder, workers)).batches(torch.Generator().manual_seed(seed)))
        for workers, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(helped) == 3  # 14 pictures, in whole batches of 4
    for one, two in zip(alone, helped, strict=True):
        assert one[0].shape == (4, 3, 32, 32)
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert one[1].shape == ((4, 3) if imagenet.SETTINGS[name].mix else (4,))
    assert not torch.equal(alone[0][0], other[0][0])


def test_pictures_of_imagenet_have_their_labels(folder: Path) -> None:
    """A class has its colour, also after crops, and the middle of a picture is scored."""
    settings = dataclasses.replace(imagenet.RESNET50, batch=7, side=32)
    pictures = imagenet.data(folder / "imagenet")

    class Colour(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # (batch, 3, side, side) -> (batch, 3)
            return x.mean((2, 3))

    for shown, labels in imagenet.batches(torch.Generator().manual_seed(0), pictures, settings, None, 0):
        assert Colour()(shown).argmax(1).tolist() == labels.tolist()
    wrong = Colour()
    wrong.register_forward_hook(lambda layer, inputs, out: out.roll(1, 1))
    for split in ("validation", "test"):
        assert imagenet.accuracy(Colour(), split, pictures, settings, 0) == 100
        assert imagenet.accuracy(wrong, split, pictures, settings, 0) == 0


@pytest.mark.parametrize(("name", "interpolation"), [("imagenet_resnet50", "bilinear"), ("imagenet_deit", "bicubic")])
def test_the_middles_of_pictures_are_scored(name: str, interpolation: str, folder: Path) -> None:
    from torchvision import transforms as of

    picture, _ = imagenet.data(folder / "imagenet").files["test"][0]
    how = of.InterpolationMode(interpolation)
    steps = [of.Resize(256, how), of.CenterCrop(224), of.ToTensor()]
    whole = of.Compose([*steps, of.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    assert torch.allclose(transforms(224, False, imagenet.SETTINGS[name].augment)(picture), whole(picture), atol=1e-6)


def test_splits_of_imagenet(folder: Path) -> None:
    pictures = imagenet.data(folder / "imagenet")
    assert pictures.numbers["train"].tolist() == list(range(1, 15))
    assert pictures.numbers["validation"].tolist() == [0]
    assert {f"/{part}/" in str(pictures.files[split].root) + "/" for split, part in
            (("train", "train"), ("validation", "train"), ("test", "val"))} == {True}  # fmt: skip


def test_deit_sees_each_picture_three_times(folder: Path) -> None:
    pictures = imagenet.data(folder / "imagenet")
    seen: list[int] = []

    class Noted:
        def __getitem__(self, number: int) -> tuple[Any, int]:
            seen.append(number)
            return pictures.files["train"][number]

    noted = dataclasses.replace(pictures, files={"train": Noted()})
    settings = dataclasses.replace(imagenet.DEIT, batch=6, side=32)
    assert len(list(imagenet.batches(torch.Generator().manual_seed(0), noted, settings, None, 0))) == 2
    assert [len(set(seen[at : at + 3])) for at in range(0, 12, 3)] == [1] * 4
    assert len(set(seen)) == 4


def test_weights_of_layers_decay_and_no_others() -> None:
    model = imagenet.deit(1 / 16, 3, 32, depth=1)
    decayed, rest = imagenet.adamw(model.parameters()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(
        [
            "patch_embed.proj.weight",
            "head.weight",
            *(f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        ]
    )
    assert {"pos_embed", "cls_token"} < {names[id(p)] for p in rest["params"]}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)


def test_narrow_networks_have_the_same_layers() -> None:
    full, narrow = (imagenet.resnet50(width, 10, 64) for width in (1.0, 0.25))
    assert {n: type(m) for n, m in full.named_modules()} == {n: type(m) for n, m in narrow.named_modules()}
    assert narrow.layer4[2].conv2.weight.shape == (128, 128, 3, 3)
    assert narrow(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert narrow.layer2[0].conv2.stride == full.layer2[0].conv2.stride == (2, 2)
    assert float(narrow.layer4[2].conv2.weight.detach().std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_weights_are_loaded_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder
    from torchvision.models import _api

    def state(*given: Any, **named: Any) -> dict[str, Tensor]:
        return {name: torch.full_like(t, 2) for name, t in imagenet.resnet50(1.0, 1000, 224).state_dict().items()}

    def filled(model: nn.Module, *given: Any, **named: Any) -> None:
        nn.init.constant_(model.head.weight, 2)

    monkeypatch.setattr(_api, "load_state_dict_from_url", state)
    monkeypatch.setattr(_builder, "load_pretrained", filled)
    for network, layer in (("imagenet_resnet50", "fc"), ("imagenet_deit", "head")):
        for end, width, loaded in (("", 1.0, False), ("_pretrained", 1.0, True), ("_pretrained", 0.5, False)):
            model = imagenet.SETTINGS[network + end].build(width, 1000, 224)
            assert bool((getattr(model, layer).weight == 2).all()) == loaded


# SQuAD ---------------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Finds the first right answer of every window; as sure as it is of its being the n-th."""

    def __init__(self, rows: squad.Windows) -> None:
        super().__init__()
        self.spans = {tuple(ids): span for ids, span in zip(rows.inputs[:, 0].tolist(), rows.spans, strict=True)}

    def forward(self, input_ids: Tensor, **more: Tensor) -> Any:
        found = torch.stack([self.spans[tuple(ids)] for ids in input_ids.tolist()])
        start, end = (20.0 * F.one_hot(found[:, n], input_ids.shape[1]) for n in (0, 1))
        return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.mark.usefixtures("small")
def test_who_knows_the_spans_has_all_points(folder: Path) -> None:
    task = make("squad_bert", Source(folder))
    for split in ("validation", "test"):
        oracle = Oracle(squad.data(folder)[split])
        assert task.score(oracle, split) == 100
        assert task.also["exact_match"](oracle, split) == 100


@pytest.mark.usefixtures("small")
def test_windows_share_tokens_and_know_the_answers_they_hold(folder: Path) -> None:
    rows = squad.data(folder)["train"]
    assert rows.inputs.shape[1:] == (3, 32)
    assert len(rows.of) == 2 * len(rows.questions) == 2 * 76  # 30 words in windows of 23, of which 8 are shared
    held = 0
    for (start, end), offsets, n in zip(rows.spans.tolist(), rows.offsets, rows.of.tolist(), strict=True):
        question = rows.questions[n]
        text, at = question.answers[0]
        shown = offsets[offsets[:, 0] >= 0]
        inside = int(shown[:, 0].min()) <= at and at + len(text) <= int(shown[:, 1].max())
        assert (start, end) != (0, 0) if inside else (start, end) == (0, 0)
        held += inside
        if inside:
            assert question.context[offsets[start, 0] : offsets[end, 1]] == text
    assert len(rows.questions) < held < len(rows.of)


@pytest.mark.usefixtures("small")
def test_a_long_question_is_cut(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert-base-uncased", tmp_path / "bert-base-uncased")
    recipe_data.squad(tmp_path)
    file = tmp_path / TRAIN
    file.write_text(file.read_text().replace("near what?", "near " * 40 + "what?"))
    rows = squad.data(tmp_path)["train"]
    first = rows.inputs[0, 0].tolist()
    assert first.index(recipe_data.SPECIAL.index("[SEP]")) == 1 + 6  # [CLS], and 8 with the two special tokens


def test_the_best_span_is_the_best_of_all() -> None:
    starts, ends = torch.randn(2, 4, 40).unbind()
    starts[:2, 5] = ends[0, 35] = ends[1, 34] = starts[2, 20] = ends[2, 39] = 9  # 31 tokens, 30, an end outside
    offsets = torch.stack([torch.arange(0, 160, 4), torch.arange(3, 163, 4)], 1).repeat(4, 1, 1)
    offsets[:, :4] = offsets[:, 38:] = -1
    values, spans = squad.best_spans(starts, ends, offsets)
    for row in range(4):
        every = {(s, e): float(starts[row, s] + ends[row, e]) for s in range(4, 38) for e in range(s, min(s + 30, 38))}
        start, end = max(every, key=lambda span: every[span])
        assert float(values[row]) == pytest.approx(every[start, end])
        assert spans[row].tolist() == [4 * start, 4 * end + 3]
    assert spans[1].tolist() == [4 * 5, 4 * 34 + 3]


@pytest.mark.parametrize(
    ("found", "right", "same", "shared"),
    [
        ("The Norman conquest", "norman conquest!", 1, 1),
        ("in 1066", "1066", 0, 2 / 3),
        ("a b b c", "b c c", 0, 2 * 2 / (3 + 3)),
        ("the", "", 1, 0),  # as the script of v1.1 has it
        ("", "1066", 0, 0),
        ("theatre", "atre", 0, 0),
        ("don't", "dont", 1, 1),
    ],
)
def test_scores_of_answers(found: str, right: str, same: float, shared: float) -> None:
    assert squad.exact(found, right) == same
    assert squad.overlap(found, right) == pytest.approx(shared)


@pytest.mark.usefixtures("small")
def test_berts_of_other_widths(folder: Path) -> None:
    task = make("squad_bert", Source(folder))
    full, half = task.build(1.0), task.build(0.5)
    told = squad.pretrained(folder / squad.BERT)
    assert torch.equal(full.bert.encoder.layer[0].output.dense.weight, told.bert.encoder.layer[0].output.dense.weight)
    assert half.bert.encoder.layer[1].attention.self.query.weight.shape == (16, 32)
    assert half.bert.encoder.layer[1].attention.self.num_attention_heads == 2
    assert half.bert.encoder.layer[1].intermediate.dense.weight.shape == (32, 32)
    assert 0.3 < task.share(half) < 0.6
    halved = on(task, CPU, bf16=True)
    assert halved.score(half, "test") == pytest.approx(task.score(half, "test"), abs=40)
    assert 0 <= halved.also["exact_match"](half, "test") <= 100
