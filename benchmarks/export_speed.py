"""How fast slim models run, next to the dense ones and to what Torch-Pruning makes of them, at the same FLOPs.

    python -m benchmarks.export_speed                     into benchmarks/results/export_speed.md
    python -m benchmarks.export_speed resnet50 vit_b_16   only these, printed

Each network is cut to half of its FLOPs by magnitude, without training: by this library (what is left of a group
that loses units is a multiple of 16) and by Torch-Pruning (`MetaPruner`, group magnitude, ``round_to=16``, the share
that comes nearest to the same FLOPs). Eager mode, ONNX Runtime and AOTInductor then run all three in turns, in one
process with one thread. Seconds are the processor's, and the medians of ratios within rounds count: on a busy machine a
pass waits, and for how long says nothing about it.

The bar, at batches of 8: dense / slim is at least 0.85 times dense FLOPs / slim FLOPs; and never is slim slower.
A line per cell is kept in export_speed.jsonl; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch; one thread)
from only_train_once import OTO
from only_train_once.export import export_model, open_exported
from only_train_once.flops import count_flops
from only_train_once.inputs import call_model
from only_train_once.speed import slow_layers

LEFT, BAR, BATCHES, ROUNDS = 0.5, 0.85, (1, 8), 9
BACKENDS = ("eager", "onnx", "aot")
LINES, TABLE = Path("benchmarks/results/export_speed.jsonl"), Path("benchmarks/results/export_speed.md")


@dataclass(frozen=True)
class Network:
    """A network, inputs for a batch of so many, and what Torch-Pruning has to be told about it.

    Attributes:
        heads: attention layers by which it finds heads, and how many they have.
        ignored: layers that it must not cut.
        round_to: what its widths are multiples of; where heads share a width, that has to be divisible by them.
        whole_heads: whether it takes whole heads instead of positions inside them, as rotary positions want.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {}
    ignored: Callable[[nn.Module], list[nn.Module]] = lambda model: []
    round_to: int = 16
    whole_heads: bool = False


class Logits(nn.Module):
    """A network of transformers that takes ids and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return result


class Classes(Logits):
    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=input_ids).logits
        return result


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        made: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
        return made

    return build


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        attn_implementation="eager",
    )  # fmt: skip
    return Classes(transformers.BertForSequenceClassification(config))


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        intermediate_size=1024, attn_implementation="sdpa",
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config))


def pictures(size: int) -> Callable[[int], Any]:
    return lambda batch: torch.randn(batch, 3, size, size)


def words(vocabulary: int) -> Callable[[int], Any]:
    return lambda batch: torch.randint(0, vocabulary, (batch, 64))


def by_queries(*names: str, heads: int) -> Callable[[nn.Module], dict[nn.Module, int]]:
    return lambda model: {m: heads for n, m in model.named_modules() if n.endswith(names)}


def last(*names: str) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [m for n, m in model.named_modules() if n.endswith(names)]


NETWORKS: dict[str, Network] = {
    "resnet50": Network(of_torchvision("resnet50"), pictures(128), ignored=last("fc")),
    "mobilenet_v2": Network(of_torchvision("mobilenet_v2"), pictures(128), ignored=last("classifier.1")),
    "vit_b_16": Network(
        of_torchvision("vit_b_16", image_size=112), pictures(112), ignored=last("heads.head"), round_to=48
    ),
    "bert, 6 layers": Network(
        bert, words(8192), by_queries("query", "key", "value", heads=6), last("classifier", "pooler.dense")
    ),
    "llama, 6 layers": Network(
        llama,
        words(4096),
        by_queries("q_proj", "k_proj", "v_proj", heads=6),
        last("lm_head"),
        whole_heads=True,
    ),
}


# ---------------------------------------------------------------- cutting

SHARES = tuple(round(0.02 * step, 2) for step in range(6, 30))  # of the channels that Torch-Pruning is to cut


def ours(model: nn.Module, inputs: Any) -> tuple[nn.Module, str]:
    """Half of the FLOPs by magnitude, widths in multiples of 16."""
    oto = OTO(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    oto.attach(
        optimizer,
        target_flops=LEFT,
        start_pruning_step=0,
        pruning_steps=2,
        pruning_periods=1,
        group_divisible=16,
        importance_score_criteria="magnitude",
        min_units=0.1,
    )
    for _ in range(4):
        optimizer.zero_grad()
        out = call_model(model, inputs)
        out.mean().backward()
        optimizer.step()
    return oto.construct_subnet(verify=False).model.eval(), "multiples of 16"


def theirs(network: Network, dense: nn.Module, inputs: Any, target: int) -> tuple[nn.Module, str]:
    """Torch-Pruning at the share of channels whose FLOPs come nearest, of those that it can cut at all.

    Widths are multiples of 16, or of 8 where those leave the FLOPs farther than 2 % from the target.
    """
    best: tuple[float, nn.Module, str] | None = None
    failed: Exception | None = None
    for round_to in (network.round_to, network.round_to // 2):
        for share in SHARES:
            try:
                model = pruned_by_them(network, dense, inputs, share, round_to)
                distance = abs(count_flops(model, inputs).total - target)
            except Exception as error:
                failed = error
                continue
            if best is None or distance < best[0]:
                best = distance, model, f"share {share:.3f}, multiples of {round_to}"
        if best is not None and best[0] <= 0.02 * target:
            break
    if best is None:
        assert failed is not None
        raise failed
    return best[1], best[2]


def pruned_by_them(network: Network, dense: nn.Module, inputs: Any, share: float, round_to: int) -> nn.Module:
    """The network without this share of the channels of every layer."""
    import torch_pruning

    model = copy.deepcopy(dense).eval()
    torch_pruning.MetaPruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=share,
        ignored_layers=network.ignored(model),
        num_heads=network.heads(model),
        prune_num_heads=network.whole_heads,
        prune_head_dims=not network.whole_heads,
        head_pruning_ratio=share,
        round_to=round_to,
    ).step()
    for module in model.modules():  # attributes that it leaves as they were
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.attention_head_size = module.query.out_features // module.num_attention_heads
            module.all_head_size = module.query.out_features
        if hasattr(module, "hidden_dim") and hasattr(module, "conv_proj"):
            module.hidden_dim = module.conv_proj.out_channels
    return model


# ---------------------------------------------------------------- running


def prepared(model: nn.Module, backend: str, inputs: Any, path: Path) -> Callable[[Any], object]:
    if backend == "eager":
        return functools.partial(call_model, model)
    suffix = ".onnx" if backend == "onnx" else ".pt2"
    exported = export_model(model, backend, path.with_suffix(suffix), inputs=inputs, dynamic="batch")
    return open_exported(backend, exported.path)


def measured(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of the processor per round; the order turns from round to round."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(2):
            calls[name]()
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
    return times


def lines(name: str, done: set[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    """A line per backend and batch size."""
    if all((name, backend, batch) in done for backend in BACKENDS for batch in BATCHES):
        return
    network = NETWORKS[name]
    torch.manual_seed(0)
    dense = network.build().eval()
    slim, how = ours(copy.deepcopy(dense), network.inputs(2))
    example = network.inputs(2)
    flops = {"dense": count_flops(dense, example).total, "ours": count_flops(slim, example).total}
    models = {"dense": dense, "ours": slim}
    notes = [how]
    try:
        models["Torch-Pruning"], told = theirs(network, dense, example, flops["ours"])
        flops["Torch-Pruning"] = count_flops(models["Torch-Pruning"], example).total
        notes.append(f"Torch-Pruning: {told}")
    except Exception as error:
        notes.append(f"Torch-Pruning: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    for backend in BACKENDS:
        if all((name, backend, batch) in done for batch in BATCHES):
            continue
        said = list(notes)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            runs = {}
            for number, (which, model) in enumerate(models.items()):
                try:
                    runs[which] = prepared(model, backend, network.inputs(2), Path(folder) / str(number))
                except Exception as error:
                    said.append(f"{which}: {type(error).__name__}: {str(error)[:160]}")
            for batch in BATCHES:
                inputs = network.inputs(batch)
                row = compared(runs, inputs) | {"flops": flops, "notes": said}
                row |= {"network": name, "backend": backend, "batch": batch}
                if batch > 1 and backend == "eager" and not met(row):
                    row["slow"] = [str(layer) for layer in slow_layers(dense, slim, inputs, rounds=5)[:4]]
                yield row


def compared(runs: dict[str, Callable[[Any], object]], inputs: Any) -> dict[str, Any]:
    """Medians and interquartile ranges, and medians of the dense model's time over another's, round by round."""
    times = measured({which: functools.partial(run, inputs) for which, run in runs.items()})
    quartiles = {which: statistics.quantiles(t, n=4) for which, t in times.items()}
    return {
        "seconds": {which: q[1] for which, q in quartiles.items()},
        "spread": {which: q[2] - q[0] for which, q in quartiles.items()},
        "speedup": {
            which: statistics.median(d / s for d, s in zip(times["dense"], t, strict=True))
            for which, t in times.items()
            if which != "dense" and "dense" in times
        },
    }


def met(row: dict[str, Any]) -> bool | None:
    """Whether the bar is met; None where no number says so."""
    if "ours" not in row["speedup"]:
        return None
    needed = BAR * row["flops"]["dense"] / row["flops"]["ours"] if row["batch"] >= 8 else 1.0
    return bool(row["speedup"]["ours"] >= needed)


# ---------------------------------------------------------------- the table


def table(rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda row: (list(NETWORKS).index(row["network"]), BACKENDS.index(row["backend"])))
    text = [
        "# Speed of slim models",
        "",
        f"`python -m benchmarks.export_speed` with torch {torch.__version__}, float32, CPU, 1 thread, processor time: "
        "networks cut to half of their FLOPs by magnitude, without training, and run in turns with the dense one and "
        "with what Torch-Pruning 1.6.1 cuts (`MetaPruner`, group magnitude, uniform) at the share "
        "whose FLOPs come nearest, in multiples of 16, or of 8 where those leave them farther than 2 %. "
        f"*needed*: {BAR} times the ratio of FLOPs at batches of 8, and 1 at single examples. Speed-ups are medians of "
        f"{ROUNDS} interleaved rounds; other programs ran on the machine. Pictures have 128 x 128 pixels, 112 x 112 "
        "for vit_b_16, for which Torch-Pruning rounds to 48, or its heads would not divide the width. Its FLOPs come "
        "in coarse steps: where fewer are left than of ours, a part of its speed-up is that.",
        "",
        "| network | backend | batch | dense, ms (IQR) | ours, ms (IQR) | FLOPs left | speed-up | needed | met "
        "| Torch-Pruning, FLOPs left | its speed-up |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        flops, seconds, spread = row["flops"], row["seconds"], row["spread"]
        needed = BAR * flops["dense"] / flops["ours"] if row["batch"] >= 8 else 1.0
        cells = [row["network"], row["backend"], str(row["batch"])]
        cells += [f"{seconds[w] * 1e3:.1f} ({spread[w] * 1e3:.1f})" if w in seconds else "-" for w in ("dense", "ours")]
        speedup = row["speedup"].get("ours")
        cells += [
            f"{flops['ours'] / flops['dense']:.3f}",
            "-" if speedup is None else f"{speedup:.2f}",
            f"{needed:.2f}",
        ]
        cells.append({True: "yes", False: "**no**", None: "-"}[met(row)])
        other = flops.get("Torch-Pruning")
        cells.append("-" if other is None else f"{other / flops['dense']:.3f}")
        cells.append(f"{row['speedup']['Torch-Pruning']:.2f}" if "Torch-Pruning" in row["speedup"] else "-")
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Notes", ""]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        said = dict.fromkeys(note for row in mine for note in row["notes"])
        text += [f"- {name}: {'; '.join(said)}"]
        text += [f"  - {layer}" for row in mine for layer in row.get("slow", ())]
    return "\n".join([*text, ""])


def main() -> None:
    warnings.simplefilter("ignore")  # of networks and exporters, about themselves
    names = sys.argv[1:]
    torch.set_num_threads(1)
    known = [json.loads(text) for text in LINES.read_text().splitlines()] if LINES.exists() and not names else []
    done = {(row["network"], row["backend"], row["batch"]) for row in known}
    for name in names or NETWORKS:
        for row in lines(name, done):
            known.append(row)
            print(json.dumps(row), flush=True)
            if not names:
                with LINES.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if not names:
        TABLE.write_text(table(known))


if __name__ == "__main__":
    main()
