"""What a step of an optimizer with a method attached costs, next to the base optimizer's own step.

    python -m benchmarks.step_cost            writes benchmarks/results/step_cost.md
    python -m benchmarks.step_cost hesso      only rows with this in their name, printed
    python -m benchmarks.step_cost --device cuda      into step_cost_cuda.md, without floors, which are the CPU's

A network with fixed gradients, and two optimizers over the same weights, gradients and state, so that where those lie
in memory says nothing: the base optimizer alone and one with the method step in turns in one process, and the median of
the ratio is taken over the steps before, during and after pruning, and over those of them that look at gradients for
scores. The forward and backward pass are not in it. Memory is what tensors take at most from the first step on, weights
and gradients included, over the base optimizer's, of two copies of the network.

The floor is what no implementation of a kind of method can go below: the base step, and then the least that has to be
read and written, with the fastest operators that torch has for it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tests.conftest  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from benchmarks.devices import CPU, clock_of, moved
from only_train_once import OTO
from only_train_once.groups import Role

START, STEPS, END = 40, 180, 280
ABOUT = Path("benchmarks/about_step_cost.md")  # what was tried, and how the committed figures were made


def resnet18() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet18(weights=None), torch.randn(2, 3, 64, 64)


def bert() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 8192, (2, 16))}


def gpt() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=16384, n_embd=512, n_layer=7, n_head=8, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 16384, (2, 16))}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-18": resnet18, "BERT-like, 6 layers": bert, "GPT-like, 30 M": gpt
}  # fmt: skip
_KERNELS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    f"{name}, {kernel}": (cls, {**options, **chosen})
    for name, cls, options in (
        ("SGD momentum", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        ("AdamW", torch.optim.AdamW, {"lr": 1e-3}),
    )
    for kernel, chosen in _KERNELS.items()
}
_PERIODS = {"start_pruning_step": START, "pruning_steps": STEPS, "pruning_periods": 3}
METHODS: dict[str, dict[str, Any]] = {
    "hesso": _PERIODS,
    "hesso_cric": {
        "start_cric_step": START, "sampling_steps": 30, "max_cycle_period": 3, "hybrid_training_steps": STEPS - 90,
    },
    "hspg": {**_PERIODS, "warm_up_steps": START},
    # once, as their papers choose; a window of a later period would add its sums to the copy of the weights
    "ada_hspg": {**_PERIODS, "pruning_periods": 1},
    "dhspg": {**_PERIODS, "pruning_periods": 1},
}  # fmt: skip
# HESSO with everything; what else a method does at a step does not depend on the base optimizer
ROWS = [
    *(("hesso", network, base) for network in NETWORKS for base in BASES),
    *((method, network, "SGD momentum, foreach") for method in [*METHODS][1:] for network in NETWORKS),
    *((method, "ResNet-18", "AdamW, fused") for method in [*METHODS][1:]),
]


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, from when they were made inside."""

    def __init__(self, begin: int) -> None:
        super().__init__()
        self.now = self.peak = begin
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in given or storage._cdata in self.known or not storage.nbytes():
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def prepared(
    method: str, network: str, base: str, device: torch.device = CPU
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The base optimizer, and one with the method, over two copies of a network with gradients."""
    torch.manual_seed(0)
    cls, options = BASES[base]
    plain, inputs = NETWORKS[network]()
    plain, inputs = plain.to(device), moved(inputs, device)
    pruned = copy.deepcopy(plain)
    oto = OTO(pruned, inputs)
    one, other = (cls(m.parameters(), **options) for m in (plain, pruned))
    oto.attach(other, method=method, target_group_sparsity=0.5, **METHODS[method])
    for model in (plain, pruned):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
    return one, other


def seconds(step: Callable[[], object], device: torch.device = CPU) -> float:
    clock = clock_of(device)
    start = clock()
    step()
    return clock() - start


def peak(optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Bytes of tensors at most during the first steps."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with Live(sum(2 * p.numel() * p.element_size() for p in parameters)) as live:
        for _ in range(steps):
            optimizer.step()
    return live.peak


def beside(optimizer: torch.optim.Optimizer, base: str) -> torch.optim.Optimizer:
    """The base optimizer alone over the weights and the state of another one."""
    cls, options = BASES[base]
    plain = cls([p for group in optimizer.param_groups for p in group["params"]], **options)
    plain.state = optimizer.state
    return plain


def scores(optimizer: Any) -> bool:
    """Whether the step that was just taken looked at gradients for scores that come later."""
    method = optimizer._method
    return method.scoring.average.count > 0 or (method.name == "hesso_cric" and method._snapshot is not None)


def row(method: str, network: str, base: str, device: torch.device = CPU) -> str:
    one, other = prepared(method, network, base, device)
    optimizer: Any = other
    plain = beside(other, base)
    ratios: dict[str, list[float]] = {"before": [], "during": [], "after": [], "scoring": []}
    for step in range(END):
        first, second = seconds(plain.step, device), seconds(other.step, device)
        phase = "before" if step < START else "during" if step < START + STEPS else "after"
        scoring = scores(optimizer)
        if phase != "before" or not scoring:
            ratios[phase].append(second / first)
        if scoring:
            ratios["scoring"].append(second / first)
    one, other = prepared(method, network, base, device)
    steps = START + STEPS // 3 + 2  # the first scoring and its window, and the second period's
    memory = peak(other, steps) / peak(one, steps)
    medians = (f"{statistics.median(r):.2f}" if r else "" for r in ratios.values())
    return " | ".join([f"| {method} | {network} | {base}", *medians, f"{memory:.2f}"]) + " |"


Flat = list[tuple[Tensor, Tensor]]  # of every tensor with prunable entries, its weights and a copy of them


def _scaled(flat: Flat, share: float) -> None:
    for w, _ in flat:
        w[: int(share * len(w))].mul_(1.0)


def _norms(flat: Flat) -> None:
    for w, _ in flat:
        torch.dot(w, w)


def _products(flat: Flat) -> None:
    for w, x in flat:
        torch.dot(w, x)


def _moved(flat: Flat) -> None:
    _products(flat)
    for w, x in flat:
        w.add_(x, alpha=1e-12)


def _copied(flat: Flat) -> None:
    torch._foreach_copy_([x for _, x in flat], [w for w, _ in flat])
    _moved(flat)


def _read(array: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    torch.from_numpy(array).index_select(0, torch.from_numpy(rows))


def _put_back(array: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Gathered, scaled and put back; NumPy is faster at it than torch."""
    array[rows] *= 0.999


def _where_they_lie(method: Any, of_rows: Callable[..., None] | None) -> Callable[[], None]:
    """A sixth of the units scaled in the weights themselves: every tensor walked as a whole, or single rows.

    Columns of a matrix share cache lines with their neighbours: of a sixth of them, spread evenly, no less than all of
    the matrix is read and written.
    """
    rows: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    whole: list[Tensor] = []
    factors: list[Tensor] = []
    for group in method.groups:
        for s in group.with_role(Role.ZERO):
            tensor = method.tensors[s.param].detach()
            if of_rows and s.dim == 0 and tensor.dim() > 1:
                rows.append((tensor.numpy().reshape(len(tensor), -1), np.asarray(s.index[::6]).reshape(-1)))
            else:
                whole.append(tensor)
                factors.append(torch.ones([n if d == s.dim else 1 for d, n in enumerate(tensor.shape)]))

    def run() -> None:
        for array, positions in rows:
            of_rows(array, positions)  # type: ignore[misc]
        if whole:
            torch._foreach_mul_(whole, factors)

    return run


# What is done -> the least that it takes, in weights that lie one after the other
FLOORS: dict[str, Callable[[Flat], None]] = {
    "a sixth of the weights scaled": lambda flat: _scaled(flat, 1 / 6),
    "half of them": lambda flat: _scaled(flat, 1 / 2),
    "all read": _norms,
    "all read with their old values": _products,
    "and moved along those": _moved,
    "and a copy of the old ones made": _copied,
}
FLOOR_BASES = ("SGD momentum, foreach", "SGD momentum, fused", "AdamW, fused")


def floor(network: str, base: str) -> str:
    """The base step and what reads and writes the entries of prunable units, over the base step."""
    _, other = prepared("hspg", network, base)
    method: Any = other._method  # type: ignore[attr-defined]
    weights = [method.tensors[name].detach().reshape(-1) for name in method.space.units.names]
    flat = [(w, w.clone()) for w in weights]
    plain = beside(other, base)

    def over(least: Callable[[], None]) -> float:
        ratios = []
        for _ in range(40):
            alone = seconds(plain.step)
            ratios.append(1 + seconds(least) / alone)
        return statistics.median(ratios)

    whole, *rows = (over(_where_they_lie(method, of_rows)) for of_rows in (None, _read, _put_back))
    found = [min(whole, one) for one in rows]
    found += [over(functools.partial(least, flat)) for least in FLOORS.values()]
    cells = [f"{ratio:.2f}" for ratio in found]
    share = sum(w.numel() for w in weights) / sum(p.numel() for g in plain.param_groups for p in g["params"])
    return " | ".join([f"| {network} | {base} | {share:.2f}", *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--device", type=torch.device, default=CPU)
    options = parser.parse_args()
    part, device = options.part, options.device
    torch.set_num_threads(1)
    rows = []
    for method, network, base in ROWS:
        if part in f"{method} {network} {base}":
            rows.append(row(method, network, base, device))
            print(rows[-1], flush=True)
    floors = []
    for network, base in itertools.product(NETWORKS, FLOOR_BASES if device.type == "cpu" else ()):
        if part in f"floor {network} {base}":
            floors.append(floor(network, base))
            print(floors[-1], flush=True)
    if part:
        return
    text = table(rows, device)
    if device.type == "cpu":
        text += [*at_least(floors), ABOUT.read_text()]
    name = "step_cost" if device.type == "cpu" else f"step_cost_{device.type}"
    Path(f"benchmarks/results/{name}.md").write_text("\n".join(text))


def table(rows: list[str], device: torch.device) -> list[str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    timed = "processor time" if device.type == "cpu" else "time until the device is done"
    return [
        "# Cost of a step",
        "",
        f"`python -m benchmarks.step_cost{'' if device.type == 'cpu' else f' --device {device}'}` with torch "
        f"{torch.__version__}, 1 thread, {hardware}, {timed}: the "
        "optimizer's step alone with a method attached over the same step without, median of interleaved steps over "
        "the same weights. The forward and backward pass, which take most of an iteration, are not in it. "
        "*in windows*: the steps that look at gradients for scores that come later, also among the others; those of "
        "HESSO-CRIC score all units every time. *memory*: what tensors take at most, weights, gradients, averaging "
        "windows and copies included, over the same without a method.",
        "",
        "| method | network | base | before pruning | during | after | in windows | memory |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]


def at_least(floors: list[str]) -> list[str]:
    return [
        "## What it costs at least",
        "",
        "The base step and the least reading and writing that a kind of method needs, over the base step, with torch's "
        "fastest operators on weights that lie one after the other and no numbers per unit at all. *share*: of the "
        "parameters, the entries of prunable units. A ramp of HESSO scales a sixth of the units at a time here "
        "(half of them in three periods), one of HESSO-CRIC half of them; units differ in size. Reading the "
        "weights before and after a step, by which the projection methods know whether a unit has left its half-"
        "space, is more than 1.10 with every network and base: **1.10 during pruning is out of reach for HSPG, "
        "AdaHSPG+ and DHSPG**, and so it is for the cycles of HESSO-CRIC, which read weights and gradients at "
        "every step. *where they lie*: every sixth unit, scattered among the others as they are, the better of walking "
        "all of their tensors and, where units are rows, of only reading those; and of gathering, scaling and putting "
        "them back, which is what NumPy and torch can do. HESSO's own choice has other units than every sixth: on "
        "ResNet-18, whose units differ in size, rather small ones. (Figures of HESSO-CRIC *during* are medians over "
        "cycles, ramp and the steps that cycles were planned for and did not take.) AdaHSPG+ and DHSPG choose once, as "
        "in their papers; with more periods a window of gradient sums lies beside the copy of the weights (1.66 of the "
        "memory on ResNet-18 with SGD). "
        "What comes on top of the products: the penalty moves units along their old values, and as an optimizer's "
        "update is its own affair, these have to be copied before the step.",
        "",
        "| network | base | share | a sixth of the units where they lie, rows read | rows scaled | "
        f"{' | '.join(FLOORS)} |",
        "|---|---|---:|---:|---:|" + "---:|" * len(FLOORS),
        *floors,
        "",
    ]


if __name__ == "__main__":
    main()
