"""The command line: look at a saved subnet, or at what could be removed from a model.

only-train-once inspect slim/
only-train-once analyze torchvision.models:resnet18 --input 1,3,224,224 --svg groups.svg
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from . import groups as groups_module
from .checkpoint import read_manifest
from .errors import CheckpointError, ConfigurationError, OTOError
from .report import SubnetReport, groups_table, with_file
from .trace import trace
from .visualize import draw_groups

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train once, get a smaller network.")

_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "long": torch.int64}


def read_report(directory: Path) -> SubnetReport:
    """The report saved beside a subnet; the tensors are not opened."""
    manifest = read_manifest(directory)
    try:
        report = SubnetReport.from_dict(manifest.report)
    except CheckpointError as error:
        raise CheckpointError(f"{manifest.path}: {error}") from error
    sizes = [(directory / file).stat().st_size for file in manifest.files if (directory / file).is_file()]
    return with_file(report, str(directory), sum(sizes)) if len(sizes) == len(manifest.files) else report


def parse_input(text: str) -> Tensor:
    """``1,3,224,224`` or ``1,16:long`` as an example tensor.

    Integer tensors are zeros, which every embedding accepts; others are random.
    """
    sizes, _, dtype_name = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
        dtype = _DTYPES[dtype_name or "float"]
        if min(shape) < 1:
            raise ValueError
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"--input {text!r}: expected positive sizes with commas and optionally a type of {sorted(_DTYPES)}, "
            "as in 1,3,224,224 or 1,16:long"
        ) from error
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def build_model(spec: str) -> nn.Module:
    """Call the factory that ``package.module:name`` names; modules of the working directory count."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{spec!r}: expected MODULE:FACTORY, as in torchvision.models:resnet18")
    sys.path.insert(0, str(Path.cwd()))
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{spec!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    model = target if isinstance(target, nn.Module) else target()
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{spec!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _or_exit(action: Callable[[], None]) -> None:
    """Library errors are for the reader: the message without a traceback, and a status that scripts see."""
    try:
        action()
    except OTOError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder written by subnet.save().")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show the report of a saved subnet."""

    def action() -> None:
        report = read_report(directory)
        if as_json:
            typer.echo(json.dumps(report.to_dict(), indent=2))
        else:
            Console().print(report)

    _or_exit(action)


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="MODULE:FACTORY, a callable without arguments that makes the model.")],
    input: Annotated[list[str], typer.Option(help="Sizes of an example input; again for each further one.")],
    svg: Annotated[Path | None, typer.Option(help="Also draw the groups into this file.")] = None,
    wide: Annotated[bool, typer.Option(help="Also offer the widths of normalized streams.")] = False,
) -> None:
    """Print what could be removed from a model, and why the rest could not."""

    def action() -> None:
        network = build_model(model)
        examples = tuple(parse_input(text) for text in input)
        found = groups_module.find_groups(trace(network, examples), wide=wide)
        console = Console()
        console.print(groups_table(found))
        units = sum(g.size for g in found.prunable)
        console.print(f"{len(found)} groups, {len(found.prunable)} prunable with {units} units")
        if svg is not None:
            svg.write_text(draw_groups(found, title=model), encoding="utf-8")
            console.print(f"picture: {svg}", markup=False)

    _or_exit(action)


if __name__ == "__main__":
    app()
