"""FLOPs, report, picture, command line, and the facade on hand-written groups."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from only_train_once import OTO, checkpoint, cli, exact, oto
from only_train_once.errors import CheckpointError, ConfigurationError, SurgeryError, VerificationError
from only_train_once.flops import count_flops
from only_train_once.groups import GroupList, Kind, ParamSlice, PruningGroup, Role
from only_train_once.report import (
    GroupOutcome,
    LayerSizes,
    SubnetReport,
    build_report,
    count_parameters,
    measure_latency,
    render,
)
from only_train_once.visualize import draw_groups


class Attention(nn.Module):
    """Scaled dot products of (batch, tokens, width) with itself, two heads."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


# name: (model, input, FLOPs by hand)
COUNTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5), 2 * 3 * 5 * 7),
    "linear without bias, 3-d": (lambda: nn.Linear(5, 7, bias=False), (3, 4, 5), 2 * 12 * 5 * 7),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5), 2 * 2 * 30 * 8 * 3 * 9),
    "conv, stride": (lambda: nn.Conv2d(3, 8, 3, stride=2), (2, 3, 7, 7), 2 * 2 * 9 * 8 * 3 * 9),
    "grouped conv": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (1, 4, 5, 5), 2 * 25 * 8 * 1 * 9),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9), 2 * 2 * 9 * 4 * 3 * 3),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 2 * 25 * 4 * 6 * 4),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 5, 5), 2 * 25 * 4 * 3 * 4),
    "attention": (Attention, (2, 6, 8), 2 * 2 * 2 * 6 * 6 * (4 + 4)),
    "lstm": (lambda: nn.LSTM(5, 7, 2), (4, 3, 5), 2 * 12 * 4 * 7 * ((5 + 7) + (7 + 7))),
    "gru": (lambda: nn.GRU(5, 7), (4, 3, 5), 2 * 12 * 3 * 7 * (5 + 7)),
    "pointwise": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.GELU(), nn.Softmax(1)), (3, 4), 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_by_hand(name: str) -> None:
    build, shape, expected = COUNTED[name]
    count = count_flops(build(), torch.randn(shape))
    assert count.total == expected
    assert sum(count.by_module.values()) == sum(count.by_operator.values()) == expected


def test_bilinear_and_two_inputs() -> None:
    count = count_flops(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)))
    assert count.total == 2 * 2 * 3 * 4 * 5


def test_encoder_layer_counts_attention_and_modules() -> None:
    """Projections 4 E E, feed-forward 2 E F, scores and values 2 T E, per token."""
    width, hidden, tokens, batch = 16, 32, 5, 2
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    count = count_flops(layer, torch.randn(batch, tokens, width))
    per_token = 4 * width * width + 2 * width * hidden + 2 * tokens * width
    assert count.total == 2 * batch * tokens * per_token
    assert count.by_module["linear1"] == count.by_module["linear2"] == 2 * batch * tokens * width * hidden


def test_flops_agree_with_torch_where_torch_counts() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2), nn.Flatten()
    )
    net.append(nn.Linear(4 * 25, 10))
    x = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as reference, torch.no_grad():
        net(x)
    assert count_flops(net, x).total == reference.get_total_flops()


def test_counting_leaves_everything_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].eval()
    net.register_buffer("calls", torch.zeros(()))
    net.register_forward_pre_hook(lambda module, _: module.calls.add_(torch.rand(())) and None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    count_flops(net, torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(len(m._forward_hooks) == 0 for m in net.modules())
    assert not nn.modules.module._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failing_forward_is_cleaned_up_after() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        count_flops(net, torch.randn(2, 3))
    assert not nn.modules.module._global_forward_pre_hooks
    assert net.training


# -- report ------------------------------------------------------------------------------------------------


def _rows(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(n, dtype=np.int64)[:, None]


class Net(nn.Module):
    """Three linear layers; ``fc1`` and ``fc2`` have removable outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def _groups() -> GroupList:
    def group(name: str, following: str, n: int) -> PruningGroup:
        return PruningGroup(
            name,
            Kind.CHANNEL,
            (
                ParamSlice(f"{name}.weight", 0, _rows(n), Role.ZERO, n),
                ParamSlice(f"{name}.bias", 0, _rows(n), Role.ZERO, n),
                ParamSlice(f"{following}.weight", 1, _rows(n), Role.CONSUMER, n),
            ),
        )

    out = ParamSlice("fc3.weight", 0, _rows(3), Role.ZERO, 3)
    frozen = PruningGroup("fc3", Kind.CHANNEL, (out,), prunable=False, reason="aten.addmm in fc3 reaches an output")
    return GroupList([group("fc1", "fc2", 6), group("fc2", "fc3", 5), frozen])


def _report() -> SubnetReport:
    return SubnetReport(
        model="Net",
        parameters_before=83,
        parameters_after=50,
        flops_before=138,
        flops_after=90,
        layers=(
            LayerSizes("fc1.weight", (6, 4), (4, 4)),
            LayerSizes("fc3.bias", (3,), (3,)),
            LayerSizes("mean", (6,), (4,), buffer=True),
        ),
        groups=(GroupOutcome("fc1", "channel", 6, 2), GroupOutcome("fc3", "channel", 3, 0, "reaches [an output]")),
        verified_difference=3e-16,
        verification="float64",
        excluded={"fc2": "the function changes"},
        notes=("a note",),
    )


def test_report_survives_json() -> None:
    report = _report()
    assert SubnetReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("damage", [{"layers": [{"name": "x"}]}, {"surprise": 1}, {"groups": 3}])
def test_damaged_report_is_named(damage: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no report of a subnet"):
        SubnetReport.from_dict({**_report().to_dict(), **damage})


def test_report_prints_what_matters() -> None:
    text = str(_report())
    for part in ("2 units removed (33%", "83", "60.2%", "6 x 4", "4 x 4", "3.0e-16", "reaches [an output]", "a note"):
        assert part in text, part
    assert "excluded fc2: the function changes" in text
    assert "fc3.bias" not in text  # unchanged tensors are left out
    assert "mean" not in text  # and so are buffers
    assert "\x1b" not in text


def test_report_of_nothing_removed_says_so() -> None:
    net = Net()
    text = str(build_report(net, net, _groups(), {}))
    assert "the subnet equals the model" in text
    assert count_parameters(net) == 6 * 4 + 6 + 5 * 6 + 5 + 3 * 5 + 3


def test_latency_measures_in_turns_and_restores() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    large.insert(0, nn.Linear(8, 256))
    row = measure_latency(large, small, torch.randn(64, 8), rounds=6)
    assert row.before > row.after > 0
    assert row.ratio > 1.5
    assert large.training
    assert small.training
    with pytest.raises(ConfigurationError, match="rounds=1"):
        measure_latency(large, small, torch.randn(2, 8), rounds=1)


# -- picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("by_node_groups", [True, False])
@pytest.mark.parametrize("display_params", [True, False])
def test_picture_is_valid_and_complete(vertical: bool, by_node_groups: bool, display_params: bool) -> None:
    nasty = replace(_groups()["fc3"], name='<fc3 & "x">\x00', reason="no rule for <aten.sort> & co")
    groups = GroupList([*_groups()[:2], nasty])
    picture = draw_groups(
        groups,
        title="A & B <c>",
        removed={"fc1": [0, 1, 2]},
        vertical=vertical,
        by_node_groups=by_node_groups,
        display_params=display_params,
    )
    root = ElementTree.fromstring(picture)
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "A & B <c>" in texts
    assert any("3 groups, 2 prunable with 11 units, 3 of them at zero" in t for t in texts)
    if by_node_groups:
        assert any(t.startswith('<fc3 & "x">') for t in texts)
        assert "frozen: no rule for <aten.sort> & co" in texts
        assert "6 units (channel), 3 removed" in texts
    else:
        assert {"fc1.weight", "fc2.weight", "fc3.weight"} <= set(texts)
        assert "dim 1: fc1 (consumer)" in texts
    width = float(root.attrib["width"])
    rects = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len({r.attrib["x"] for r in rects if r.attrib.get("rx") == "6"}) == (1 if vertical else 3)
    for rect in rects:
        assert float(rect.attrib.get("x", 0)) + float(rect.attrib["width"]) <= width


def test_picture_shortens_long_lists_unless_asked() -> None:
    slices = tuple(ParamSlice(f"layer{i}.weight", 0, _rows(2), Role.ZERO, 2) for i in range(20))
    groups = [PruningGroup("stream", Kind.CHANNEL, slices)]
    assert "and 15 more" in draw_groups(groups)
    full = draw_groups(groups, display_params=True)
    assert all(f"layer{i}.weight" in full for i in range(20))


def test_picture_shows_long_names_whole() -> None:
    name = ".".join(f"block{i}" for i in range(30))
    for by_node_groups, group, tensor in ((True, name, "weight"), (False, "group", name)):
        groups = [PruningGroup(group, Kind.CHANNEL, (ParamSlice(tensor, 0, _rows(2), Role.ZERO, 2),))]
        root = ElementTree.fromstring(draw_groups(groups, by_node_groups=by_node_groups))
        texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
        assert name in "".join(texts)
        assert max(map(len, texts)) <= 90


def test_picture_of_no_groups() -> None:
    ElementTree.fromstring(draw_groups([]))


# -- facade ------------------------------------------------------------------------------------------------


@pytest.fixture
def facade(monkeypatch: pytest.MonkeyPatch) -> OTO:
    """An `OTO` whose analysis is replaced by groups written by hand."""
    monkeypatch.setattr(oto, "find_groups", lambda graph, **_: _groups())
    return OTO(Net(), dummy_input=torch.randn(2, 4))


def _zero(model: Net, layer: str, units: list[int]) -> None:
    with torch.no_grad():
        module = model.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        module.weight[units] = 0
        module.bias[units] = 0


def test_construction_cuts_verifies_and_reports(facade: OTO, tmp_path: Path) -> None:
    _zero(facade.model, "fc1", [0, 3])
    _zero(facade.model, "fc2", [4])
    x = torch.randn(7, 4)
    subnet = facade.construct_subnet()
    assert type(subnet.model) is Net
    assert subnet.model.fc1.weight.shape == (4, 4)
    assert subnet.model.fc2.weight.shape == (4, 4)
    torch.testing.assert_close(subnet.model(x), facade.model(x), rtol=1e-5, atol=1e-6)
    report = subnet.report
    assert report.units_removed == 3
    assert report.verified_difference is not None
    assert report.verified_difference <= 1e-9
    assert (report.flops_before, report.flops_after) == (2 * 2 * (24 + 30 + 15), 2 * 2 * (16 + 16 + 12))
    assert not list(tmp_path.iterdir())
    subnet.save(tmp_path / "slim")
    assert subnet.report.bytes_on_disk
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "slim")])
    assert result.exit_code == 0, result.output
    assert "3 units removed" in result.output
    as_json = CliRunner().invoke(cli.app, ["inspect", "--json", str(tmp_path / "slim")])
    assert json.loads(as_json.output)["parameters_after"] == report.parameters_after


def test_nothing_at_zero_gives_the_model_back(facade: OTO) -> None:
    subnet = facade.construct_subnet()
    assert subnet.model is not facade.model
    assert all(torch.equal(a, b) for a, b in zip(subnet.model.parameters(), facade.model.parameters(), strict=True))
    assert "the subnet equals the model" in str(subnet.report)


def test_a_group_that_is_zero_throughout_keeps_one_unit_and_the_report_says_so(facade: OTO) -> None:
    _zero(facade.model, "fc2", [0, 1, 2, 3, 4])
    subnet = facade.construct_subnet()
    assert subnet.model.fc2.out_features == 1
    assert {g.name: g.removed for g in subnet.report.groups} == {"fc1": 0, "fc2": 4, "fc3": 0}


class Encoder(Net):
    """Returns logits and, as a base model does, what it computed on the way."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(hidden))), hidden


def test_only_the_first_output_counts_when_asked() -> None:
    """Without groups written by hand: the analysis freezes ``fc1`` unless told that its output does not matter."""
    model = Encoder()
    assert "fc1" not in {g.name for g in OTO(model, torch.randn(2, 4)).groups.prunable}
    facade = OTO(model, torch.randn(2, 4), strict_out_nodes=True)
    _zero(model, "fc1", [1])
    subnet = facade.construct_subnet()
    assert subnet.model.fc1.out_features == 5
    assert "not compared" in subnet.report.verification


def _inexact(names: set[str]) -> Callable[[], GroupList]:
    """Groups of which some lie: they leave out the bias, so a unit that still has one is cut."""

    def groups() -> GroupList:
        return GroupList(
            [replace(g, slices=(g.slices[0], *_as_follow(g))) if g.name in names else g for g in _groups()]
        )

    def _as_follow(group: PruningGroup) -> tuple[ParamSlice, ...]:
        return (replace(group.slices[1], role=Role.FOLLOW), group.slices[2])

    return groups


@pytest.mark.parametrize("wrong", [{"fc1"}, {"fc2"}])
def test_a_group_that_is_not_exact_is_excluded_and_named(wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oto, "find_groups", lambda graph, **_: _inexact(wrong)())
    facade = OTO(Net(), dummy_input=torch.randn(2, 4))
    _zero(facade.model, "fc1", [0, 3])
    _zero(facade.model, "fc2", [4])
    with torch.no_grad():  # the bias that the lying group does not declare
        facade.model.get_submodule(next(iter(wrong))).bias[[0, 3, 4]] = 2.0  # type: ignore[index, operator]
        right = ({"fc1", "fc2"} - wrong).pop()
    subnet = facade.construct_subnet()
    assert set(subnet.report.excluded) == wrong
    assert "relative" in subnet.report.excluded[next(iter(wrong))]
    assert {g.name: g.removed for g in subnet.report.groups if g.removed} == {right: 2 if right == "fc1" else 1}
    assert f"excluded {next(iter(wrong))}" in str(subnet.report)


def test_nothing_exact_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oto, "find_groups", lambda graph, **_: _inexact({"fc1", "fc2"})())
    facade = OTO(Net(), dummy_input=torch.randn(2, 4))
    with torch.no_grad():
        for layer in (facade.model.fc1, facade.model.fc2):
            layer.weight[1] = 0
            layer.bias[1] = 2.0
    with pytest.raises(VerificationError, match=r"no group can be cut.*fc1: .*fc2: "):
        facade.construct_subnet()
    assert facade.construct_subnet(verify=False).report.verified_difference is None


def test_a_comparison_that_never_holds_blames_no_group(facade: OTO, monkeypatch: pytest.MonkeyPatch) -> None:
    _zero(facade.model, "fc1", [0])

    def never(*_: Any, **__: Any) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr(exact, "verify_subnet", never)
    with pytest.raises(VerificationError, match="not even an uncut copy computes what the model computes: differs"):
        facade.construct_subnet()


def test_bisection_finds_every_offender_also_when_only_together_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """``b`` fails alone; ``d`` and ``e`` only together; the largest exact set found keeps all but ``b`` and one."""
    names = list("abcdefgh")
    attempt = exact.Attempt(Net(), _groups(), torch.randn(2, 4), {n: [0] for n in names}, verify=True)
    tried: list[list[str]] = []

    def built(chosen: list[str]) -> Any:
        tried.append(chosen)
        if "b" in chosen or {"d", "e"} <= set(chosen):
            raise SurgeryError(f"wrong: {chosen}")
        return None

    monkeypatch.setattr(attempt, "built", built)
    kept, excluded = attempt.largest_exact(names, [])
    assert (kept, excluded) == (list("acdfgh"), ["b", "e"])
    assert set(attempt.reasons) == {"b", "e"}
    assert len(tried) <= 2 * len(names)


def test_freezing_by_parameter_module_and_node(facade: OTO) -> None:
    facade.mark_unprunable_by_param_names(["fc1.bias"])
    assert not facade.groups["fc1"].prunable
    assert facade.groups["fc1"].reason == "marked unprunable: fc1.bias"
    facade.partition_pzigs()
    assert not facade.groups["fc1"].prunable  # finding the groups again does not forget
    nodes = [n for n in facade.graph.nodes if n.module == "fc2"]
    node = nodes[-1]  # the matrix product; it reads the weight through a transposed view
    assert facade._tensors_behind(node) == {"fc2.weight", "fc2.bias"}
    relu = next(n for n in facade.graph.nodes if n.index > node.index)
    assert facade._tensors_behind(relu) == {"fc2.weight", "fc2.bias"}
    facade.mark_unprunable_by_node_ids([f"node-{node.index}"])
    assert not facade.groups["fc2"].prunable
    assert f"node {node.index}" in (facade.groups["fc2"].reason or "")
    with pytest.raises(ConfigurationError, match=r"'fc9\.weight' is no parameter"):
        facade.mark_unprunable_by_param_names(["fc9.weight"])
    with pytest.raises(ConfigurationError, match="is no node"):
        facade.mark_unprunable_by_node_ids(["node-999999"])


def test_a_module_name_stands_for_what_is_below(facade: OTO) -> None:
    facade.mark_unprunable_by_param_names("fc2")
    assert [g.name for g in facade.groups.prunable] == []  # fc2.weight is a slice of fc1's and of fc2's group


def test_skip_patterns_and_untrained_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oto, "find_groups", lambda graph, **_: _groups())
    skipped = OTO(Net(), torch.randn(2, 4), skip_patterns=[r"^fc1\."])
    assert skipped.groups["fc1"].reason == r"skip_patterns: ^fc1\."
    model = Net()
    model.fc2.requires_grad_(False)
    assert [g.name for g in OTO(model, torch.randn(2, 4)).groups.prunable] == ["fc1"]
    with pytest.raises(ConfigurationError, match="no regular expression"):
        OTO(Net(), torch.randn(2, 4), skip_patterns="(")


def test_random_zero_groups_are_repeatable_and_counted(facade: OTO) -> None:
    facade.random_set_zero_groups(target_group_sparsity=0.5, seed=3)
    zero = {n: sorted(int(u) for u in units) for n, units in facade._zero_units().items()}
    assert {n: len(units) for n, units in zero.items()} == {"fc1": 3, "fc2": 2}
    again = Net()
    other = OTO(again, torch.randn(2, 4))
    other._groups = facade.groups
    other.random_set_zero_groups(target_group_sparsity=0.5, seed=3)
    assert {n: sorted(int(u) for u in units) for n, units in other._zero_units().items()} == zero
    with pytest.raises(ConfigurationError, match=r"target_group_sparsity=1\.0"):
        facade.random_set_zero_groups(1.0)


def test_numbers_and_picture_of_the_facade(facade: OTO, tmp_path: Path) -> None:
    flops = facade.compute_flops(in_million=False)
    assert flops["total"] == 2 * 2 * (24 + 30 + 15)
    assert flops["by_nodes"] == {"fc1": 96, "fc2": 120, "fc3": 60}
    assert flops["by_node_groups"] == {"fc1": 96, "fc2": 120, "fc3": 60}
    assert facade.compute_flops()["total"] == flops["total"] / 1e6
    assert facade.compute_flops(in_billion=True)["total"] == flops["total"] / 1e9
    assert facade.compute_num_params(in_million=False) == count_parameters(facade.model)
    path = facade.visualize(tmp_path / "pictures")
    assert "fc1" in path.read_text(encoding="utf-8")
    assert "fc2.weight[1] (consumer)" in facade.explain("fc1")
    assert "reaches an output" in facade.explain()
    assert set(facade.cluster_node_groups(1).values()) == {0}
    assert set(facade.cluster_node_groups(2)) == {"fc1", "fc2"}
    with pytest.raises(ConfigurationError, match="num_clusters=3"):
        facade.cluster_node_groups(3)


def test_reference_files_and_refused_options(facade: OTO, tmp_path: Path) -> None:
    _zero(facade.model, "fc1", [0])
    facade.construct_subnet(out_dir=tmp_path / "a", compressed_model_dir=tmp_path / "b")
    x = torch.randn(3, 4)
    full = torch.load(facade.full_group_sparse_model_path, weights_only=False)
    slim = torch.load(facade.compressed_model_path, weights_only=False)
    assert Path(facade.compressed_model_path or "").parent == tmp_path / "b"
    torch.testing.assert_close(full(x), slim(x))
    assert slim.fc1.out_features == 5
    before = set((tmp_path / "a").iterdir())
    facade.construct_subnet(out_dir=tmp_path / "c", save_full_group_sparse_model=False)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["Net_compressed.pt"]
    assert set((tmp_path / "a").iterdir()) == before
    for option in ("merge_lora_to_base", "unmerge_lora_to_base", "export_huggingface_format", "export_float16"):
        with pytest.raises(ConfigurationError, match=f"{option}=True is not implemented: "):
            facade.construct_subnet(**{option: True})
    with pytest.raises(ConfigurationError, match="5 is no folder"):
        facade.construct_subnet(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="ckpt_format='onnx'"):
        facade.construct_subnet(ckpt_format="onnx")
    with pytest.raises(ConfigurationError, match="compress_mode='erase'"):
        OTO(Net(), torch.randn(2, 4), compress_mode="erase")


def test_a_facade_without_a_model_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="no model yet"):
        _ = OTO().groups


# -- command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "no JSON"),
        ("[]", "is foreign"),
    ],
)
def test_inspect_names_what_is_wrong(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / checkpoint.RECORD_FILE).write_text(content)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize(("report", "message"), [({}, "no report of a subnet"), ({"layers": 1}, "no report")])
def test_inspect_of_a_subnet_without_a_readable_report(report: Any, message: str, tmp_path: Path, facade: OTO) -> None:
    subnet = facade.construct_subnet()
    checkpoint.save(subnet.model, subnet.record, report, tmp_path)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.output)


def test_analyze_prints_groups_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_net_for_cli.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        cli.app, ["analyze", "small_net_for_cli:make", "--input", "2,4", "--svg", "g.svg"], terminal_width=200
    )
    assert result.exit_code == 0, result.output
    assert "prunable with 6 units" in result.output
    ElementTree.parse(tmp_path / "g.svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn", "--input", "1"], "expected MODULE:FACTORY"),
        (["torch.nn:Nothing", "--input", "1"], "cannot be imported"),
        (["builtins:dict", "--input", "1"], "not a torch.nn.Module"),
        (["torch.nn:Identity", "--input", "1,x"], "expected positive sizes"),
        (["torch.nn:Identity", "--input", "1:quad"], "expected positive sizes"),
        (["torch.nn:Identity", "--input", "0,3"], "expected positive sizes"),
    ],
)
def test_analyze_names_what_is_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["analyze", *arguments])
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.output)


def test_example_inputs_of_the_command_line() -> None:
    assert cli.parse_input("1,3,8").shape == (1, 3, 8)
    tokens = cli.parse_input("1,16:long")
    assert tokens.dtype == torch.int64
    assert not tokens.any()


def test_render_has_no_colour_codes_and_no_trailing_blanks() -> None:
    assert all(line == line.rstrip() for line in render(_report()).splitlines())
