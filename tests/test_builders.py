"""Saved subnets that say how their model is made: loading without a constructor, and what such a file may not do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from only_train_once import inflate, load
from only_train_once.checkpoint import RECORD_FILE, builders, json_digest, read_record, save
from only_train_once.errors import CheckpointError
from only_train_once.groups import find_groups
from only_train_once.inputs import call_model, output_tensors
from only_train_once.record import SurgeryRecord
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace

from .pruning import choose, randomize, zero

NOTHING = SurgeryRecord()
WORDS = {"input_ids": torch.arange(1, 15).reshape(2, 7)}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


def bert(**options: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=5, **options))


def eager_bert() -> nn.Module:
    return bert(attn_implementation="eager")


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60))


def clip() -> nn.Module:
    """Configurations inside of a configuration."""
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.CLIPConfig(
        text_config={**SMALL, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def images(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


# How it is made, inputs, what is given to `save` (None: found out).
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any] | None]] = {
    "bert": (bert, WORDS, None),
    "bert, eager attention": (eager_bert, WORDS, None),
    "llama": (llama, WORDS, None),
    "gpt2": (gpt2, WORDS, None),
    "clip": (clip, {**WORDS, "pixel_values": images(16)}, None),
    "resnet of timm": (lambda: timm.create_model("test_resnet", num_classes=3, in_chans=1), images(64, 1), None),
    "vit of timm": (lambda: timm.create_model("test_vit", drop_rate=0.1, num_classes=0), images(160), None),
    "told": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        images(64),
        {"library": "torchvision", "name": "mobilenet_v3_small", "arguments": {"num_classes": 4}},
    ),
    "told, without arguments": (
        lambda: torchvision.models.squeezenet1_1(),
        images(64),
        {"library": "torchvision", "name": "squeezenet1_1"},
    ),
    "told, of timm": (
        lambda: timm.create_model("test_resnet", num_classes=3),
        images(64),
        {"library": "timm", "name": "test_resnet", "arguments": {"num_classes": 3}},
    ),
}


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(output_tensors(call_model(model.eval(), inputs)))


def cut(name: str) -> tuple[nn.Module, SurgeryRecord, Any]:
    make, inputs, _ = CASES[name]
    model = make().eval()
    randomize(model)
    groups = find_groups(trace(model, inputs))
    zero(model, groups, choose(groups))
    return *construct_subnet(model, groups), inputs


@pytest.mark.parametrize("name", CASES)
def test_load_without_a_constructor(name: str, tmp_path: Path) -> None:
    subnet, record, inputs = cut(name)
    assert record.tensors
    save(subnet, record, {}, tmp_path, builder=CASES[name][2])
    loaded: Any = load(tmp_path)
    assert type(loaded) is type(subnet)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, inputs), outputs(subnet, inputs), strict=True))
    if name == "llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    full = inflate(tmp_path, inputs=inputs)
    shapes = {n: t.shape for n, t in CASES[name][0]().state_dict().items()}
    assert {n: t.shape for n, t in full.state_dict().items()} == shapes


def test_the_way_attention_is_computed_is_kept(tmp_path: Path) -> None:
    for make, kind in ((bert, "sdpa"), (eager_bert, "eager")):
        save(make(), NOTHING, {}, tmp_path)
        loaded: Any = load(tmp_path)
        assert loaded.config._attn_implementation == kind


def test_in_a_process_that_has_imported_none_of_it(tmp_path: Path) -> None:
    for name in ("bert", "resnet of timm", "told"):
        subnet, record, inputs = cut(name)
        save(subnet, record, {}, tmp_path / name, builder=CASES[name][2])
        torch.save((inputs, outputs(subnet, inputs)), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch, only_train_once, tests.conftest\n"
        "from only_train_once.inputs import call_model, output_tensors\n"
        "assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)\n"
        "for name in ('bert', 'resnet of timm', 'told'):\n"
        f"    model = only_train_once.load({str(tmp_path)!r} + '/' + name)\n"
        f"    inputs, expected = torch.load({str(tmp_path)!r} + '/' + name + '.pt')\n"
        "    with torch.no_grad():\n"
        "        found = list(output_tensors(call_model(model, inputs)))\n"
        "    assert all(map(torch.equal, found, expected)), name\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.endswith("same\n"), done.stderr


class Bert(transformers.BertModel):
    """A class of the user's own."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Linear(2, 2), "Linear is no model of transformers or timm"),
        (lambda: Bert(transformers.BertConfig(**SMALL)), "Bert is no model of transformers or timm"),
        (lambda: _changed(bert(), lambda m: setattr(m.bert.encoder.layer[0].attention.self, "scaling", 2)), "scaling"),
        (lambda: _changed(bert(), lambda m: setattr(m, "dropout", nn.Identity())), "dropout is a Dropout"),
        (lambda: _changed(timm.create_model("test_resnet"), lambda m: setattr(m, "fc", nn.Linear(9, 3))), "features"),
        (lambda: _changed(bert(), lambda m: setattr(m.config, "auto_map", {"a": "b"})), "'auto_map': what fetches"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_out_needs_a_constructor(make: Any, why: str, tmp_path: Path) -> None:
    save(make(), NOTHING, {}, tmp_path)
    assert why in read_record(tmp_path)["builder"]["unknown"]
    with pytest.raises(CheckpointError, match=r"does not say how the model is made .*give build=") as caught:
        load(tmp_path)
    assert why[:60] in str(caught.value)
    load(tmp_path, build=make)


def _changed(model: nn.Module, change: Callable[[Any], None]) -> nn.Module:
    change(model)
    return model


def test_nothing_is_said_when_told_so(tmp_path: Path) -> None:
    save(bert(), NOTHING, {}, tmp_path, builder=False)
    assert read_record(tmp_path)["builder"] == {}
    with pytest.raises(CheckpointError, match="does not say how the model is made: give build="):
        load(tmp_path)


@pytest.mark.parametrize(
    ("builder", "match"),
    [
        ({"library": "torchvision", "name": "resnet18"}, "its modules are others"),
        ({"library": "timm", "name": "test_resnet"}, "the model.num_classes is 1000, not 3"),
        ({"library": "timm", "name": "test_resnet", "arguments": {"num_classes": 3, "typo": 1}}, "typo"),
        ({"library": "os", "name": "system", "arguments": {}}, "the builder's library is 'os'"),
        ({"library": "timm"}, "the builder is "),
        ({"library": "timm", "name": "test_resnet", "arguments": {"a": object()}}, "not JSON serializable"),
        ({}, "the builder is "),
        (True, "is no model of"),
    ],
)
def test_what_is_told_is_checked(builder: Any, match: str, tmp_path: Path) -> None:
    model: nn.Module = nn.Linear(2, 2) if builder is True else timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(CheckpointError, match=match):
        save(model, NOTHING, {}, tmp_path, builder=builder)
    assert not list(tmp_path.iterdir())


def described(library: str, name: Any, **arguments: Any) -> dict[str, Any]:
    return {"library": library, "name": name, "arguments": arguments}


def config(**entries: Any) -> dict[str, Any]:
    return described("transformers", "BertModel", config={"model_type": "bert", **SMALL, **entries})


FORGED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "builder is a list"),
    "another library": (described("os", "system"), "library is 'os'"),
    "a module": (described("timm.models", "x"), "library is 'timm.models'"),
    "a place": (described("timm", "hf-hub:someone/something"), "name is 'hf-hub:"),
    "a path": (described("timm", "../../x"), "name is "),
    "no name": (described("timm", 3), "name is 3"),
    "unknown": (described("timm", "no_such_model"), "timm registers no model"),
    "unknown too": (described("torchvision", "no_such_model"), "torchvision registers no model"),
    "no model": (described("transformers", "AutoConfig", config={}), "transformers has no model 'AutoConfig'"),
    "a function": (described("transformers", "pipeline", config={}), "transformers has no model 'pipeline'"),
    "a module of it": (described("transformers", "models", config={}), "transformers has no model 'models'"),
    "no arguments": ({"library": "timm", "name": "test_resnet"}, "the builder is"),
    "a list of arguments": ({"library": "timm", "name": "test_resnet", "arguments": []}, "are no JSON object"),
    "weights": (described("torchvision", "resnet18", weights="DEFAULT"), "'weights': what fetches"),
    "weights of a backbone": (described("torchvision", "fcn_resnet50", weights_backbone="DEFAULT"), "what fetches"),
    "pretrained": (described("timm", "test_resnet", pretrained=True), "'pretrained': what fetches"),
    "a file": (described("timm", "test_resnet", checkpoint_path="/tmp/x.pt"), "'checkpoint_path': what fetches"),
    "an overlay": (described("timm", "test_resnet", pretrained_cfg_overlay={"file": "/tmp/x"}), "what fetches"),
    "remote code": (config(auto_map={"AutoModel": "someone/repo--m.M"}), "'auto_map': what fetches"),
    "remote code inside": (config(text_config={"auto_map": {"a": "b"}}), "'auto_map': what fetches"),
    "a kernel": (config(attn_implementation="someone/kernel"), "'attn_implementation' = 'someone/kernel'"),
    "a kernel by its own name": (config(_attn_implementation_internal="someone/kernel"), "someone/kernel"),
    "a kernel beside": (
        described("transformers", "BertModel", config=dict(SMALL), attn_implementation={"": "someone/kernel"}),
        "attn_implementation is {'': 'someone/kernel'}",
    ),
    "a backbone": (config(backbone="hf-hub:someone/x", use_timm_backbone=True), "a place to fetch something from"),
    "its weights": (config(use_pretrained_backbone=True), "'use_pretrained_backbone': what fetches"),
    "quantized": (config(quantization_config={"quant_method": "awq"}), "'quantization_config': what fetches"),
    "machinery": (config(__class__="x"), "'__class__': what fetches"),
    "no configuration": (described("transformers", "BertModel"), "expected a config"),
    "other arguments": (described("transformers", "BertModel", config={}, trust=1), "expected a config"),
    "many layers": (config(num_hidden_layers=2**23), "it has many more tensors than"),
    "wide layers": (
        config(hidden_size=2**22, intermediate_size=2**22, num_attention_heads=1),
        "does not fit the model",
    ),
    "absurd width": (config(hidden_size=2**40), "more than 16777216"),
    "negative width": (config(hidden_size=-4), "cannot be made"),
    "many labels": (config(num_labels=2**24), "labels, 65536 at most"),
    "a word for a width": (config(hidden_size="wide"), "cannot be made"),
    "many empty layers": (described("timm", "test_vit", depth=2**20), "it has many more"),
    "another model": (described("timm", "test_resnet"), "does not fit the model"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(transformers.BertModel(transformers.BertConfig(**SMALL)), NOTHING, {}, tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("name", FORGED)
def test_forged_descriptions(name: str, saved: Path) -> None:
    """Its checksum is right: whoever forges a file sees to that."""
    builder, match = FORGED[name]
    whole = (saved / RECORD_FILE).read_text()
    data = json.loads(whole)
    data["builder"] = builder
    data["sha256"] = json_digest(data)
    try:
        (saved / RECORD_FILE).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=match) as caught:
            load(saved)
        assert str(saved) in str(caught.value)
    finally:
        (saved / RECORD_FILE).write_text(whole)
    load(saved)


def test_a_constructor_that_reads_values_gets_small_ones() -> None:
    """Rates computed from a small tensor are right; what is large has no values, and takes no memory."""

    def make() -> nn.Module:
        model: Any = nn.Linear(2**20, 2**20)
        model.rates = [x.item() for x in torch.linspace(0, 1, 3)]
        return model

    made: Any = builders._made(make, 2)
    assert made.rates == [0.0, 0.5, 1.0]
    assert made.weight.device.type == "meta"

    def hides() -> nn.Module:
        model: Any = nn.Linear(2, 2)
        model.table = [torch.ones(2**17)]
        return model

    with pytest.raises(CheckpointError, match="a tensor attribute of Linear needs values"):
        builders._made(hides, 2)


def test_a_missing_library_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"which cannot be imported.*pip install only_train_once\[hf\]"):
        load(saved)
