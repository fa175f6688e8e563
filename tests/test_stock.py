"""Subnets as ordinary models of transformers and timm, read where this library cannot be imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from only_train_once import OTO, Subnet
from only_train_once.errors import CheckpointError, ConfigurationError, StockError
from only_train_once.groups import Role
from only_train_once.inputs import in_float64
from only_train_once.masking import regions
from only_train_once.stock.convert import check
from tests.stock_models import (
    DECODER,
    GPT2,
    MODELS,
    Written,
    first_output,
    ids,
    jittered,
    mixer,
    read_elsewhere,
    transformers_model,
    vision_transformer,
    write_expected,
    write_gguf,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def analysed(name: str, wide: bool = False, model: nn.Module | None = None) -> OTO:
    entry = MODELS[name]
    built = entry.build() if model is None else model
    return OTO(built, dummy_input=entry.inputs(), wide=wide, strict_out_nodes=True)


def images(model: nn.Module, size: int = 32) -> OTO:
    return OTO(model, dummy_input={"x": torch.randn(2, 3, size, size)})


def zero(oto: OTO, chosen: dict[str, Sequence[int]]) -> None:
    """Zero units; a name stands for all groups that end with it."""
    units = {g.name: np.asarray(u) for g in oto.groups for name, u in chosen.items() if g.name.endswith(name)}
    assert units
    tensors = oto._named_tensors()
    with torch.no_grad():
        for region in regions([oto.groups[n] for n in units], units, tensors, (Role.ZERO,)):
            region.zero_(tensors[region.name])


def uniform(oto: OTO, share: float = 0.5) -> Subnet:
    """The same share of equal groups is the same number of units."""
    oto.mark_unprunable_for_stock()
    oto.random_set_zero_groups(share, seed=0)
    return oto.construct_subnet()


def difference(stock: nn.Module, subnet: Subnet) -> float:
    with torch.no_grad():
        expected = first_output(subnet.model, subnet.inputs)
        found = first_output(stock, subnet.inputs)
    return float((found - expected).abs().max() / expected.abs().max())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- read elsewhere --------------------------------------------------------------------------------------------------


def _without_layers(oto: OTO) -> Subnet:
    oto.zero_layers(1)
    return uniform(oto)


CASES: dict[str, tuple[Callable[[], Subnet], str]] = {
    **{name: (lambda name=name: uniform(analysed(name)), MODELS[name].reader) for name in MODELS},
    **{
        f"{name}, width": (lambda name=name: uniform(analysed(name, wide=True)), MODELS[name].reader)
        for name in ("llama", "qwen3", "gemma", "t5", "vit")
    },
    **{
        f"{name}, layers": (lambda name=name: _without_layers(analysed(name)), MODELS[name].reader)
        for name in ("gpt2", "llama", "qwen3", "vit")
    },
    "timm": (lambda: uniform(images(vision_transformer())), "timm"),
    "timm, layers": (lambda: _without_layers(images(vision_transformer())), "timm"),
    "timm mixer": (lambda: uniform(images(mixer(), 224)), "timm"),
}  # type: ignore[misc]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Subnet, float, str, int]]:
    """Every case, written, and read in one process that cannot import this library."""
    subnets, written = {}, []
    for name, (make, reader) in CASES.items():
        torch.manual_seed(0)
        subnets[name] = make()
        folder = subnets[name].save_pretrained(tmp_path_factory.mktemp("stock"))
        written.append(write_expected(Written(folder, reader), subnets[name].model, subnets[name].inputs))
    return {
        name: (subnet, *found) for (name, subnet), found in zip(subnets.items(), read_elsewhere(written), strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_others_read_it(name: str, elsewhere: dict[str, tuple[Subnet, float, str, int]]) -> None:
    subnet, found, library, size = elsewhere[name]
    assert found <= 1e-6
    assert library == ("timm" if name.startswith("timm") else "transformers")
    left_out = "layers" in name
    assert (size < parameters(subnet.model)) if left_out else (size == parameters(subnet.model))
    assert size < subnet.report.parameters_before


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "t5", "vit", "gpt2", "bert"])
def test_in_float64_it_is_exact(name: str) -> None:
    subnet = uniform(analysed(name, wide=MODELS[name].wide, model=MODELS[name].build().double()))
    stock = subnet.to_stock()
    with in_float64():
        assert difference(stock, subnet) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    subnet = uniform(analysed("llama", wide=True, model=MODELS["llama"].build().to(dtype)))
    stock = subnet.to_stock()
    assert {p.dtype for p in stock.parameters()} == {dtype}
    assert difference(stock, subnet) <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_second_rotary_pair_can_stay(name: str) -> None:
    oto = analysed(name, wide=True)
    group = next(g for g in oto.groups if any(s.param.endswith("head_dim") for s in g.slices))
    zero(oto, {group.name: [1, 3]})
    subnet = oto.construct_subnet()
    stock = subnet.to_stock()
    assert stock.config.head_dim == 4
    assert difference(stock, subnet) <= 1e-6


def test_other_rotary_pairs_cannot() -> None:
    oto = analysed("llama", wide=True)
    group = next(g for g in oto.groups if any(s.param.endswith("head_dim") for s in g.slices))
    zero(oto, {group.name: [0, 3]})
    with pytest.raises(StockError, match=r"inv_freq keeps 2 frequencies .* head_dim of 4.*mark_unprunable_for_stock"):
        oto.construct_subnet().to_stock()


def test_positions_of_heads_without_rotary_pairs_go() -> None:
    subnet = uniform(analysed("vit", wide=True))
    stock = subnet.to_stock()
    assert (stock.config.num_attention_heads, stock.config.head_dim, stock.config.hidden_size) == (2, 6, 48)


def test_one_eps_serves_norms_of_two_widths() -> None:
    """q_norm keeps its width and its eps while the configuration's doubles; small queries make eps matter."""
    model = MODELS["qwen3"].build()
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(1e-3)
            layer.self_attn.k_proj.weight.mul_(1e-3)
    subnet = uniform(analysed("qwen3", wide=True, model=model))
    stock = subnet.to_stock()
    assert stock.config.rms_norm_eps == pytest.approx(2e-6)
    assert difference(stock, subnet) <= 1e-6


def test_tied_weights_stay_tied() -> None:
    for name in ("gemma", "gpt2"):
        stock = uniform(analysed(name, wide=MODELS[name].wide)).to_stock()
        assert stock.get_input_embeddings().weight is stock.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_subnet_stays_as_it_was(dtype: torch.dtype) -> None:
    subnet = uniform(analysed("qwen3", wide=True, model=MODELS["qwen3"].build().to(dtype)))
    before = {name: t.clone() for name, t in subnet.model.state_dict().items()}
    stock = subnet.to_stock()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in subnet.model.state_dict().items())


def test_nothing_is_drawn_from_the_random_state() -> None:
    subnet = uniform(analysed("llama"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    subnet.to_stock()
    assert torch.equal(torch.rand(3), expected)


def test_it_generates_what_the_subnet_does() -> None:
    model: Any = MODELS["llama"].build()
    model.generation_config.max_new_tokens = 6
    subnet = uniform(analysed("llama", model=model))
    stock: Any = subnet.to_stock()
    tokens, mask = ids(3)["input_ids"], torch.ones(2, 3, dtype=torch.int64)
    made = stock.generate(tokens, attention_mask=mask)
    assert made.shape == (2, 9)
    assert torch.equal(made, subnet.model.generate(tokens, attention_mask=mask))  # type: ignore[operator]


# -- widths that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_zeros_fill_up_what_differs(name: str) -> None:
    oto = analysed(name)
    oto.random_set_zero_groups(seed=1)
    subnet = oto.construct_subnet()
    stock = subnet.to_stock(pad=True)
    assert difference(stock, subnet) <= 1e-6
    assert parameters(subnet.model) < parameters(stock) < subnet.report.parameters_before


def test_zeros_fill_up_fused_projections_of_timm() -> None:
    oto = images(vision_transformer())
    oto.random_set_zero_groups(seed=1)
    subnet = oto.construct_subnet()
    assert difference(subnet.to_stock(pad=True), subnet) <= 1e-6


def test_heads_fill_up_to_a_number_that_fits() -> None:
    """48 positions and 5 heads are refused by LlamaConfig, 6 are not."""
    options = {**DECODER, "num_attention_heads": 8, "num_key_value_heads": 8}
    oto = analysed("llama", model=transformers_model("LlamaForCausalLM", "LlamaConfig", **options))
    zero(oto, {"self_attn.v_proj:heads": [0, 1, 5]})
    subnet = oto.construct_subnet()
    with pytest.raises(StockError, match=r"(?s)LlamaConfig refuses .*num_attention_heads 5.*not a multiple.*pad=True"):
        subnet.to_stock()
    stock = subnet.to_stock(pad=True)
    assert stock.config.num_attention_heads == stock.config.num_key_value_heads == 6
    assert difference(stock, subnet) <= 1e-6


def step(**options: Any) -> nn.Module:
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    kinds = {"mlp_layer_types": ["dense"] * 3, "layer_types": ["full_attention"] * 3}
    return jittered(Step3p7TextModel(Step3p7TextConfig(**DECODER, **kinds, sliding_window=8, **options)))


def test_layers_of_their_own_width_where_transformers_knows_them(tmp_path: Path) -> None:
    oto = OTO(step(), dummy_input=ids(), strict_out_nodes=True)
    zero(oto, {"layers.1.self_attn.v_proj:heads": [0], "mlp.gate_proj": range(30)})
    subnet = oto.construct_subnet()
    subnet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"num_attention_heads": 3, "num_key_value_heads": 1}}
    module = "transformers.models.step3p7.modeling_step3p7"
    written = Written(tmp_path, "Step3p7TextModel", module)
    ((found, _, size),) = read_elsewhere([write_expected(written, subnet.model, subnet.inputs)])
    assert found <= 1e-6
    assert size == parameters(subnet.model)


def test_a_width_that_is_read_from_the_whole_configuration_is_named() -> None:
    oto = OTO(step(), dummy_input=ids(), strict_out_nodes=True)
    zero(oto, {"layers.1.mlp.gate_proj": range(30)})
    with pytest.raises(StockError, match=r"layers.1 has intermediate_size 50, layers.0 has 80, .*only_train_once.load"):
        oto.construct_subnet().to_stock()


# -- layers ----------------------------------------------------------------------------------------------------------


def test_the_least_useful_layer_goes() -> None:
    oto = analysed("llama")
    with torch.no_grad():
        for name, parameter in oto.model.named_parameters():
            if ".layers.1." in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(1e-3)
    head: Any = oto.model.train().lm_head
    head.eval()  # a part that its owner keeps in evaluation mode
    assert oto.zero_layers(1) == ["model.layers.1"]
    assert oto.model.training
    assert not head.training
    assert oto.groups["model.layers.1.mlp.gate_proj"].reason == "layer model.layers.1 is at zero as a whole"
    stock = oto.construct_subnet().to_stock()
    assert stock.config.num_hidden_layers == 2


def test_the_second_layer_is_chosen_without_the_first() -> None:
    """Layer 1 nearly undoes layer 0: alone it matters most, without layer 0 it is missed least."""
    model: Any = MODELS["llama"].build()
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
            layer.self_attn.o_proj.weight.zero_()
        for layer, factor in zip(layers, (1e-3, -1.2e-3, 1.1e-3), strict=True):
            layer.mlp.down_proj.weight.mul_(factor)
    assert analysed("llama", model=model).zero_layers(2) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "vit"])
def test_layers_at_zero_stay_there_while_the_rest_is_pruned(name: str) -> None:
    oto = analysed(name, wide=True)
    oto.mark_unprunable_for_stock()
    oto.zero_layers([1])
    widths = {"variant": "adamw", "weight_decay": 0.1, "uniform": True, "ranking": "per_layer"}
    optimizer = oto.hesso(lr=0.01, target_group_sparsity=0.5, pruning_steps=2, pruning_periods=2, **widths)
    for _ in range(4):
        optimizer.zero_grad()
        oto.model(**oto.inputs)[0].square().mean().backward()
        optimizer.step()
    oto.model.eval()
    subnet = oto.construct_subnet()
    stock = subnet.to_stock()
    assert stock.config.num_hidden_layers == 2
    assert stock.config.hidden_size == (24 if MODELS[name].wide else 48)
    assert difference(stock, subnet) <= 1e-6


def test_a_scale_by_the_place_of_a_layer_is_kept() -> None:
    model = transformers_model(
        "GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=2, scale_attn_by_inverse_layer_idx=True
    )
    oto = analysed("gpt2", model=model)
    oto.zero_layers([0])
    subnet = oto.construct_subnet()
    assert difference(subnet.to_stock(), subnet) <= 1e-6


def test_entries_per_layer_follow_the_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = transformers_model(
        "Qwen2ForCausalLM", "Qwen2Config", **DECODER, use_sliding_window=True, sliding_window=4, layer_types=kinds
    )
    oto = analysed("qwen2", model=model)
    oto.zero_layers([0])
    subnet = oto.construct_subnet()
    stock = subnet.to_stock()
    assert stock.config.layer_types == kinds[1:]
    assert difference(stock, subnet) <= 1e-6


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("bert", 1, "layers of a BertForSequenceClassification cannot be left out: its norms come after the sums"),
        ("llama", 3, "3 layers add something, and one has to stay"),
        ("llama", -1, "layers=-1"),
        ("llama", True, "how many, or a list of places from 0 to 2"),
        ("llama", "1", "how many, or a list of places"),
        ("llama", 0.5, "how many, or a list of places"),
        ("llama", [0, 3], "layers holds 3: the places run from 0 to 2"),
        ("llama", [0, "1"], "layers holds '1'"),
        ("llama", [0, 1, 2], "one of the 3 layers has to stay"),
    ],
)
def test_layers_that_cannot_go(name: str, layers: Any, message: str) -> None:
    oto = analysed(name)
    before = {n: t.clone() for n, t in oto.model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        oto.zero_layers(layers)
    assert all(torch.equal(t, before[n]) for n, t in oto.model.state_dict().items())
    assert all(p.requires_grad for p in oto.model.parameters())


# -- known before training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frozen", "reason"),
    [
        ("bert", "attention.self.query:head_dim", "BertConfig has no field for its width alone"),
        ("bert", "pooler.dense", "BertConfig has no field for its width alone"),
        ("bert", "word_embeddings:width", "a stock layer norm averages over the width it finds"),
        ("gpt2", "attn.c_attn:head_dim", "GPT2Config has no field for its width alone"),
        ("llama", "q_proj:head_dim", "a stock model computes the rotary frequencies anew"),
    ],
)
def test_what_has_no_field_is_frozen_before_training(name: str, frozen: str, reason: str) -> None:
    oto = analysed(name, wide=True)
    hits = [g.name for g in oto.groups if g.name.endswith(frozen)]
    assert hits
    assert all(oto.groups[n].prunable for n in hits)
    oto.mark_unprunable_for_stock()
    assert all(not oto.groups[n].prunable and reason in str(oto.groups[n].reason) for n in hits)
    assert oto.groups.prunable


# -- refusals --------------------------------------------------------------------------------------------------------


def _uneven() -> Subnet:
    oto = analysed("llama")
    zero(oto, {"layers.2.mlp.gate_proj": range(8)})
    return oto.construct_subnet()


def _half(name: str, wide: bool = False) -> Subnet:
    oto = analysed(name, wide=wide)
    oto.random_set_zero_groups(0.5, seed=0)
    return oto.construct_subnet()


def _of_no_family() -> Subnet:
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    model = transformers_model("OPTForCausalLM", "OPTConfig", **sizes, vocab_size=99, num_attention_heads=4)
    return OTO(model, dummy_input=ids()).construct_subnet()


def _plain() -> Subnet:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return OTO(model, dummy_input=torch.randn(2, 4)).construct_subnet()


def _of_ones_own() -> Subnet:
    import transformers

    class Mine(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    return analysed("llama", model=jittered(Mine(transformers.LlamaConfig(**DECODER)))).construct_subnet()


def _with_another_activation() -> Subnet:
    model: Any = MODELS["llama"].build()
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    return uniform(analysed("llama", model=model))


def _with_two_eps() -> Subnet:
    model: Any = MODELS["llama"].build()
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    return uniform(analysed("llama", model=model))


def _with_another_tensor() -> Subnet:
    model: Any = MODELS["vit"].build()
    model.register_buffer("extra", torch.zeros(1))
    return uniform(analysed("vit", model=model))


def _of_other_positions() -> Subnet:
    model: Any = MODELS["bert"].build()
    embeddings = model.bert.embeddings
    embeddings.position_ids = embeddings.position_ids.flip(1)
    return uniform(analysed("bert", model=model))


def _convolutions() -> Subnet:
    import timm

    return images(timm.create_model("resnet18", num_classes=5)).construct_subnet()


def _without_a_name() -> Subnet:
    from timm.models import VisionTransformer

    return images(VisionTransformer(img_size=32, depth=2, embed_dim=48, num_heads=4)).construct_subnet()


def _heads_of_timm() -> Subnet:
    oto = images(vision_transformer())
    zero(oto, {"attn.qkv:heads": [0]})
    return oto.construct_subnet()


REFUSED: dict[str, tuple[Callable[[], Subnet], str]] = {
    "uneven layers": (
        _uneven,
        r"model.layers.2 has intermediate_size 72, model.layers.0 has 80, and LlamaConfig has one number for all "
        r"layers: train with uniform=True.*pad=True.*only_train_once.load",
    ),
    "layer norm": (
        lambda: _half("gpt2", wide=True),
        r"transformer.h.0.ln_1 goes on averaging over 48 channels though 24 are left, and the stock LayerNorm",
    ),
    "heads": (
        lambda: _half("bert"),
        r"attention.self.query.weight is \[24, 48\], a BertForSequenceClassification of this configuration has "
        r"\[48, 48\] \(its heads have hidden_size / number of heads positions each",
    ),
    "heads of timm": (_heads_of_timm, r"attn.qkv.weight is \[384, 192\], .*\(its heads have embed_dim / num_heads"),
    "no family": (_of_no_family, r"no table says how a 'opt' configuration holds its widths; known are bert, "),
    "another library": (_plain, r"Sequential is no model of transformers or timm"),
    "own class": (_of_ones_own, r"Mine is a class of tests.test_stock, which others cannot load"),
    "own code": (_with_another_activation, r"the stock LlamaForCausalLM would compute something else: .*differs"),
    "two eps": (_with_two_eps, r"layers.1.input_layernorm needs eps 0.001, model.layers.0.input_layernorm needs 1e-06"),
    "another tensor": (_with_another_tensor, r"lacks \['extra'\], which the subnet has"),
    "own table": (_of_other_positions, r"bert.embeddings.position_ids is not what the stock model computes"),
    "no row for timm": (_convolutions, r"no table says which arguments of timm.create_model .* ResNet; known are Mlp"),
    "no name": (_without_a_name, r"this VisionTransformer was not made by timm.create_model, so it has no name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    subnet = make()
    with pytest.raises(StockError, match=message):
        subnet.save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_the_weights_are_compared_as_they_are_written_too() -> None:
    """In float64 with the right weights all is well; those that would be written are not the same, rounded."""
    subnet = uniform(analysed("llama"))
    stock: Any = subnet.to_stock()
    wide = {name: t.double() for name, t in stock.named_parameters()}
    check(subnet.model, stock, wide, subnet.inputs)
    with torch.no_grad():
        stock.model.layers[0].mlp.down_proj.weight.mul_(1.001)
    with pytest.raises(StockError, match=r"output\['logits'\] of the stock .* in float32, more than rounding explains"):
        check(subnet.model, stock, wide, subnet.inputs)


def test_arguments_are_checked(tmp_path: Path) -> None:
    subnet = uniform(analysed("llama"))
    (tmp_path / "file").write_text("")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pad": 1}, "pad=1: True or False"),
        ({"arguments": {"depth": 2}}, "only models of timm take them"),
        ({"inputs": 3}, "example inputs are a int"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigurationError, match=message):
            subnet.to_stock(**options)
    with pytest.raises(ConfigurationError, match="is a file"):
        subnet.save_pretrained(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="give a folder's path"):
        subnet.save_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no example inputs"):
        Subnet(subnet.model, subnet.report, subnet.record).to_stock()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*given: Any, **named: Any) -> None:
        raise PermissionError("no space here")

    subnet = uniform(analysed("llama"))
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="cannot be written: no space here; give another folder"):
        subnet.save_pretrained(tmp_path / "stock")


# -- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.usefixtures("quiet")
def test_gguf_has_a_name_for_everything(name: str, tmp_path: Path) -> None:
    """Written with the names of the gguf package, read by it and by the reader in transformers."""
    import gguf
    import transformers

    subnet = uniform(analysed(name, wide=True))
    subnet.save_pretrained(tmp_path)
    written = write_gguf(tmp_path, tmp_path / "model.gguf")
    read = gguf.GGUFReader(str(tmp_path / "model.gguf"))
    assert {t.name for t in read.tensors} == set(written)
    assert all(np.array_equal(t.data, written[t.name]) for t in read.tensors)
    # it does not read the head-dim of a qwen3 from the file
    config = {} if name == "llama" else {"config": transformers.AutoConfig.from_pretrained(tmp_path)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **config)
    assert difference(model, subnet) <= 1e-6
