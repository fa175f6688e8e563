"""Save here, load in a fresh process: every network of the test zoo, and some that people use.

    python -m benchmarks.round_trips

40 % of the units of every group leave, by default and with wide=True; the subnet is compared with the full network
(1e-9 in float64) and saved, its example inputs and outputs beside it. One process that has seen none of it then loads
all of them: from their constructors, and those that say how they are made (networks of torchvision, timm and
transformers) from their folders alone. Outputs have to be bit-equal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tests.conftest  # noqa: F401  (one thread; lets torchvision import beside a CPU build of torch)
from benchmarks.zoo.process import source
from only_train_once.checkpoint import load, read_manifest, save
from only_train_once.groups import find_groups
from only_train_once.inputs import Inputs, call_model, output_tensors
from only_train_once.surgery import construct_subnet
from only_train_once.trace import trace
from only_train_once.verify import verify_subnet
from tests.pruning import choose, randomize, zero
from tests.zoo import ZOO

RESULTS = Path("benchmarks/results/round_trips.md")
SAMPLE = {
    "torchvision": ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"),
    "timm": ("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_resnet", "test_vit"),
    "transformers": ("bert", "clip", "gpt2", "llama", "mamba", "qwen3", "swin", "t5", "vit", "wav2vec2"),
}
Key = tuple[str, str]  # library ("zoo" for the test zoo) and name


def built(key: Key) -> tuple[nn.Module, Inputs]:
    library, name = key
    if library == "zoo":
        return ZOO[name].build(), ZOO[name].inputs()
    network = source(library).build(name)
    return network.model, network.inputs(0)


def constructor(key: Key) -> Callable[[], nn.Module]:
    return ZOO[key[1]].build if key[0] == "zoo" else lambda: source(key[0]).build(key[1]).model


def told(key: Key, model: nn.Module) -> dict[str, Any] | None:
    """How a network of torchvision is made; those of timm and transformers are found out."""
    plain = type(model).__module__.startswith("torchvision.")
    return {"library": "torchvision", "name": key[1], "arguments": {}} if key[0] == "torchvision" and plain else None


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return list(output_tensors(call_model(model.eval(), inputs)))


def written(key: Key, wide: bool, folder: Path) -> bool:
    """Cut, compare and save; whether there was anything to cut."""
    torch.manual_seed(0)
    model, inputs = built(key)
    model.eval()
    randomize(model)
    groups = find_groups(trace(model, inputs), wide=wide)
    if not groups.prunable:
        return False
    zero(model, groups, choose(groups))
    subnet, record = construct_subnet(model, groups)
    verify_subnet(model, subnet, inputs, tolerance=1e-9)
    save(subnet, record, {}, folder, builder=told(key, model))
    torch.save((inputs, outputs(subnet, inputs)), folder / "outputs.pt")
    return True


def checked(folder: Path) -> None:
    """In the fresh process: a line for every folder."""
    for path in sorted(folder.iterdir()):
        library, name, _ = path.name.split("~")
        alone = "library" in read_manifest(path).builder
        try:
            model = load(path) if alone else load(path, build=constructor((library, name)))
            inputs, expected = torch.load(path / "outputs.pt", weights_only=False)  # written by the other process
            found = outputs(model, inputs)
            same = len(found) == len(expected) and all(map(_equal, found, expected))
            print(path.name, "alone" if alone else "build", "equal" if same else "differs", sep="\t", flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")
            print(path.name, "alone" if alone else "build", text[:300], sep="\t", flush=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.check:
        checked(options.check)
        return
    keys = [("zoo", name) for name in ZOO] + [(lib, name) for lib, names in SAMPLE.items() for name in names]
    start = time.perf_counter()
    lines: list[list[str]] = []
    whole, failed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for library, name in keys:
            for wide in (False, True):
                if options.names and name not in options.names:
                    continue
                path = Path(folder) / f"{library}~{name}~{'wide' if wide else 'default'}"
                path.mkdir()
                try:
                    if not written((library, name), wide, path):
                        path.rmdir()
                        whole += 1
                except Exception as error:
                    failed.append(f"{library} {name}{' wide' if wide else ''}: {type(error).__name__}: {error}"[:300])
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.round_trips", "--check", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2]
        saved = len(list(Path(folder).iterdir()))
    options.out.write_text(report(lines, saved, whole, failed, time.perf_counter() - start))
    equal = sum(line[2] == "equal" for line in lines)
    print(f"{saved} subnets, {equal} bit-equal, {len(failed)} not saved, {whole} times nothing to cut")
    sys.exit(0 if equal == saved and not failed else 1)


def report(lines: list[list[str]], saved: int, whole: int, failed: list[str], seconds: float) -> str:
    wrong = [line for line in lines if line[2] != "equal"]
    rows = []
    for library in ("zoo", *SAMPLE):
        own = [line for line in lines if line[0].startswith(f"{library}~")]
        alone = sum(line[1] == "alone" for line in own)
        rows.append(f"| {library} | {len(own)} | {alone} | {sum(line[2] == 'equal' for line in own)} |")
    return "\n".join(
        [
            "# Round trips",
            "",
            f"`python -m benchmarks.round_trips` with torch {torch.__version__}, {seconds:.0f} seconds: 40 % of the",
            "units of every group cut, by default and with wide=True, exact to 1e-9 in float64, saved, loaded by a",
            f"fresh process. {whole} times there was nothing to cut. What is loaded alone needs no constructor.",
            "",
            "| networks | subnets saved | of them loaded alone | bit-equal outputs |",
            "|---|---|---|---|",
            *rows,
            "",
            f"## Not bit-equal: {len(wrong) + saved - len(lines)}",
            "",
            *([f"- {' '.join(line)}" for line in wrong] or ["None."]),
            "",
            f"## Not saved: {len(failed)}",
            "",
            *([f"- {text}" for text in failed] or ["None."]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
