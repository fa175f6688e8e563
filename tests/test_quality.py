"""The harness of ``benchmarks/quality``: budgets, sizes and verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.devices import CPU
from benchmarks.quality import __main__ as quality
from benchmarks.quality import same_size as again
from benchmarks.quality.competitors import COMPETITORS, Asked, dense, once, scratch, unsuited
from benchmarks.quality.devices import on
from benchmarks.quality.report import Cell, comparison, matches, same_size, verdict
from benchmarks.quality.task import Task, falling, learning_rate, nearest, quarters
from benchmarks.quality.tasks import AT_HAND, LONG, ON_DISK
from benchmarks.quality.tasks import sentences as encoder

PICTURES = torch.randn(16, 1, 6, 6)


def network(width: float) -> nn.Module:
    n = max(1, round(48 * width))
    return nn.Sequential(
        nn.Conv2d(1, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4),
    )  # fmt: skip


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    yield PICTURES, torch.randint(4, (16,), generator=generator)


TASK = Task(
    name="noise",
    build=network,
    batches=batches,
    loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    score=lambda model, split: float(model.eval()(PICTURES).mean()),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    example=PICTURES[:2],
    steps=40,
)


@pytest.mark.parametrize("competitor", [dense, scratch, COMPETITORS["hesso"], COMPETITORS["ours"]])
def test_everyone_spends_the_budget(competitor) -> None:  # type: ignore[no-untyped-def]
    level = 1.0 if competitor is dense else 0.3
    model, run = competitor(Asked(TASK, level, 0, "flops"))
    assert run.spent == pytest.approx(40, rel=0.05)
    assert TASK.share(model) == pytest.approx(level, rel=0.1)
    assert run.done > 40 or level == 1.0


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("tp_taylor_first", {}, "fresh weights"),
        ("tp_taylor_first", {"pretrained": True}, None),
        ("tp_iterative", {"heads": lambda model: {model: 2}}, "cannot remove heads"),
        ("tp_iterative", {}, None),
        ("ours", {"pretrained": True, "heads": lambda model: {model: 2}}, None),
    ],
)
def test_who_can_run(name: str, changes: dict[str, object], reason: str | None) -> None:
    found = unsuited(name, dataclasses.replace(TASK, **changes))  # type: ignore[arg-type]
    assert found is None if reason is None else reason in (found or "")


def test_the_budget_in_steps() -> None:
    _, run = scratch(Asked(TASK, 0.3, 0, "steps"))
    assert run.done == 40
    assert run.spent < 20


def test_the_same_seed_gives_the_same_network() -> None:
    first, second = (once(Asked(TASK, 0.3, 3, "flops"), recipe={})[0] for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_that_is_too_large_does_not_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Task.share
    monkeypatch.setattr(Task, "share", lambda self, model: 1.02 * share(self, model))
    with pytest.raises(RuntimeError, match=r"of the FLOPs are left, asked for were 0\.3"):
        once(Asked(TASK, 0.3, 0, "flops"), recipe={})


def test_competitors_are_never_smaller() -> None:
    assert nearest({0.5: 0.24, 0.6: 0.27, 0.7: 0.4}, 0.25) == (0.6, 0.27)
    assert nearest({0.5: 0.2478, 0.6: 0.27}, 0.25) == (0.5, 0.2478)  # within 1 %


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    assert learning_rate(0.0, 0.1) == 0
    assert learning_rate(0.1, 0.1) == 1
    assert learning_rate(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate(1.0, 0.1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "progress", "rate"),
    [
        (falling, 0.05, 0.5), (falling, 0.1, 1.0), (falling, 0.55, 0.5), (falling, 1.0, 0.0),
        (quarters, 0.0, 1.0), (quarters, 0.249, 1.0), (quarters, 0.25, 0.1), (quarters, 0.5, 0.01),
        (quarters, 1.0, 1e-3),
    ],
)  # fmt: skip
def test_the_schedules_of_the_papers(schedule, progress: float, rate: float) -> None:  # type: ignore[no-untyped-def]
    assert schedule(progress, 0.1) == pytest.approx(rate)


def test_a_schedule_and_a_limit_of_gradients_are_the_task_s() -> None:
    """A step of SGD is no longer than the learning rate times the limit, and there is none at a rate of 0."""
    moved: list[float] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved.append(float((now - last[-1]).norm()) if last else 0.0)
        last.append(now)
        return 1e3 * TASK.loss(model, batch)

    last: list[Tensor] = []
    task = dataclasses.replace(
        TASK, clip=0.5, loss=loss, steps=5, schedule=lambda progress, rise: float(progress < 0.5),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    dense(Asked(task, 1.0, 0, "flops"))
    assert moved == pytest.approx([0, 0.05, 0.05, 0.05, 0], rel=1e-3)


def test_a_task_on_a_device() -> None:
    """Networks, batches and the example go there; a score still sees the CPU."""
    seen: list[tuple[str, str]] = []

    class There(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(("network", x.device.type))
            return torch.ones(len(x), 4)  # a tensor without values cannot come back

    def score(model: nn.Module, split: str) -> float:
        found = model.eval()(PICTURES)
        seen.append((split, found.device.type))
        return float(found.mean())

    there = on(dataclasses.replace(TASK, score=score, also={"twice": score}), torch.device("meta"))
    assert {p.device.type for p in there.build(0.5).parameters()} == {"meta"}
    batch = next(there.stream(0))
    assert [t.device.type for t in (*batch, there.example, there.loss(there.build(1.0), batch))] == ["meta"] * 4
    assert there.full_flops == TASK.full_flops
    assert there.score(There(), "test") == there.also["twice"](There(), "validation") == 1
    assert seen == [("network", "meta"), ("test", "cpu"), ("network", "meta"), ("validation", "cpu")]


def test_forward_passes_in_bfloat16() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = model(batch[0])
        seen.append(found.dtype)
        return F.cross_entropy(found, batch[1])

    task = on(dataclasses.replace(TASK, loss=loss, steps=2), CPU, bf16=True)
    model, _ = dense(Asked(task, 1.0, 0, "flops"))
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        short, full = task.score(model, "test"), TASK.score(model, "test")
    assert short == pytest.approx(full, rel=0.02)
    assert short != full
    assert on(TASK, CPU) is TASK


def test_the_settled_loss_is_computed_as_the_other_one() -> None:
    seen = []

    def settled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(model(batch[0]).dtype)
        return TASK.loss(model, batch)

    task = on(dataclasses.replace(TASK, settled_loss=settled, steps=2), CPU, bf16=True)
    scratch(Asked(task, 0.5, 0, "flops"))
    assert set(seen) == {torch.bfloat16}
    assert on(TASK, CPU, bf16=True).settled_loss is None


@pytest.mark.parametrize(
    ("competitor", "level"),
    [("ours", 0.3), ("scratch", 0.3), ("tp_magnitude", 0.3), ("tp_iterative", 0.3), ("dense", 1.0)],
)
def test_the_settled_loss_counts_once_the_network_has_its_size(competitor: str, level: float) -> None:
    seen: list[tuple[str, int]] = []

    def told(name: str) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append((name, sum(p.numel() for p in model.parameters())))
            return F.cross_entropy(model(batch[0]), batch[1])

        return loss

    losses = {"loss": told("loss"), "settled_loss": told("settled")}
    task = dataclasses.replace(TASK, **losses, kept=lambda model: [model[-1]])  # Torch-Pruning would cut the classes
    model, run = COMPETITORS[competitor](Asked(task, level, 0, "flops"))
    final = sum(p.numel() for p in model.parameters())
    assert len(seen) == run.done
    names = [name for name, _ in seen]
    if competitor == "dense":
        assert set(names) == {"loss"}
    else:
        first = names.index("settled")
        assert set(names[first:]) == {"settled"}
        assert all(size == final for _, size in seen[first:])
        assert all(size > final for _, size in seen[:first])


def test_a_long_training_has_no_sentence_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def functions(*docstrings: str) -> str:
        return "".join(f'def f():\n    """{text}"""\n\n' for text in docstrings)

    first = [f"The first paragraph of docstring number {n}." for n in range(6)]
    (tmp_path / "top.py").write_text(
        functions(*(f"{text}\n\n    Another paragraph, of {text}" for text in first), "Short.")
    )
    for folder in ("package", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "inner.py").write_text(functions(f"A docstring of a module in {folder}.", first[0]))
    (tmp_path / "package" / "bad.py").write_text("def f(:")
    monkeypatch.setattr(encoder, "LIBRARY", tmp_path)
    monkeypatch.setattr(encoder, "COUNTS", {"test": 1, "validation": 2, "train": 3})

    assert set(encoder.sentences()) == set(first)
    found = encoder.all_sentences()
    assert len(found) == len(set(found)) == 10
    assert set(found) == {
        *encoder.sentences()[3:],
        *(f"Another paragraph, of {text}" for text in first),
        "A docstring of a module in package.",
    }
    assert not set(LONG) & set(AT_HAND)


def test_what_runs_without_files() -> None:
    assert {"cifar_vgg16", "imagenet_deit", "squad_bert"} < set(ON_DISK)
    assert not set(AT_HAND) & set(ON_DISK)


def rows(name: str, scores: list[float], level: float = 0.1, flops: float | None = None) -> list[dict[str, object]]:
    row = {"task": "t", "level": level, "competitor": name, "budget": "flops", "metric": "accuracy, %"}
    row["flops"] = flops or level
    return [{**row, "score": s, "seed": n} for n, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("ours", "sign", "word"),
    [
        ([92, 93, 94], 1, "won"),
        ([90, 91, 92], 1, "level"),
        ([89.8, 90.4, 91], 1, "behind"),
        ([80, 81, 82], 1, "**lost**"),
        ([80, 81, 82], -1, "won"),
    ],
)
def test_verdicts(ours: list[float], sign: int, word: str) -> None:
    cells = {
        "ours": Cell(rows("ours", ours)),
        "a": Cell(rows("a", [90, 91, 92])),
        "dense": Cell(rows("dense", [99, 99])),
    }
    assert verdict(cells, sign).startswith(word)


def test_two_seeds_are_no_verdict() -> None:
    cells = {"ours": Cell(rows("ours", [99, 99])), "a": Cell(rows("a", [90, 91, 92]))}
    assert verdict(cells, 1) == "too few seeds (ahead of a)"


def test_distance_is_in_standard_errors_of_the_difference() -> None:
    one, other = Cell(rows("a", [10, 12])), Cell(rows("b", [4, 6]))
    assert one.ahead_of(other, 1) == pytest.approx(6 / math.sqrt(2))


def test_the_table_keeps_lost_cells() -> None:
    lines, verdicts = comparison(
        [*rows("ours", [80, 81, 82]), *rows("a", [90, 91, 92]), *rows("dense", [99, 99], 1.0)], "flops"
    )
    assert "**lost**" in verdicts[0]
    assert "81.0 ± 1.0" in lines[-1]
    assert "**91.0 ± 1.0**, n 3" in lines[-1]


def test_ours_is_held_against_the_best_other_at_its_size() -> None:
    others = [*rows("a", [90, 91, 92], flops=0.13), *rows("b", [99, 70, 71], flops=0.2)]
    asked = [*rows("ours", [85, 86, 87], flops=0.0999), *others, *rows("dense", [99, 99, 99], 1.0)]
    (match,) = matches(asked, "flops")  # not at 1: nobody else was asked for that
    assert (match.asked, match.other, match.level, match.seeds) == (0.1, "a", 0.13, 3)
    lines, verdicts = same_size(asked, "flops")
    assert verdicts == [""]  # not run yet
    assert "a 91.0 ± 1.0, n 3 | 0.1300 | – | – |" in lines[-1]
    both = [*asked, *rows("ours", [93, 94, 95], 0.13, 0.1298)]
    assert matches(both, "flops")[0].level == 0.13
    lines, verdicts = same_size(both, "flops")
    assert "94.0 ± 1.0, n 3 | 0.1298 | won (+3.7 against a)" in lines[-1]
    lines, verdicts = comparison(both, "flops")
    assert len(lines) == 3  # the size that nobody was asked for has no line there
    assert "**lost**" in verdicts[0]


@pytest.mark.parametrize(
    ("theirs", "level"), [(0.1, 0.1), (0.1004, 0.1), (0.0997, 0.1), (0.1007, 0.1007), (0.09, 0.09)]
)
def test_the_same_size_is_within_half_a_percent(theirs: float, level: float) -> None:
    (match,) = matches([*rows("ours", [80, 81, 82]), *rows("a", [90, 91, 92], flops=theirs)], "flops")
    assert match.level == level
    assert set(match.cells) == ({"ours", "a"} if level == 0.1 else {"a"})


@pytest.mark.parametrize(("theirs", "level"), [(0.12, 0.1), (0.09, 0.09)])
def test_who_won_with_fewer_flops_need_not_have_more(theirs: float, level: float) -> None:
    (match,) = matches([*rows("ours", [80, 81, 82]), *rows("a", [70, 71, 72], flops=theirs)], "flops")
    assert match.level == level


def test_ours_is_run_again_where_another_size_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(task: str, theirs: float) -> list[dict[str, object]]:
        scored = [*rows("ours", [80, 81, 82]), *rows("a", [90, 91, 92], flops=theirs)]
        return [{**row, "task": task, "split": "test"} for row in scored]

    path, ran = tmp_path / "quality.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in [*of("digits_vgg", 0.13), *of("carn", 0.1)]))
    monkeypatch.setattr(quality, "RESULTS", path)
    monkeypatch.setattr(quality, "main", ran.append)
    again.main([])
    assert ran == [["--task", "digits_vgg", "--levels", "0.13", "--seeds", "3", "--competitor", "ours"]]
    again.main(["--task", "carn"])  # has the same size already
    assert len(ran) == 1
    with pytest.raises(SystemExit):
        again.main(["--task", "digits_vg"])
