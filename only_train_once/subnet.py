"""`Subnet`: what construction hands back, and what is made of it: files, ordinary checkpoints, programs, timings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, stock
from .errors import ConfigurationError
from .export import Exported, export_model
from .inputs import dtype_of, inputs_for
from .record import SurgeryRecord
from .report import SubnetReport, with_file
from .speed import measure_speed


@dataclass
class Subnet:
    """The smaller model, with how it came about.

    Attributes:
        model: same class as the full one, ordinary submodules, smaller tensors.
        report: numbers before and after; prints well.
        record: what was cut where; applied again when the subnet is loaded.
        inputs: the example inputs it was made with; what is made of it is compared on others like them.
    """

    model: nn.Module
    report: SubnetReport
    record: SurgeryRecord
    inputs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._dtype = dtype_of(self.model)

    def save(
        self,
        out_dir: str | Path,
        *,
        max_shard_size: int | str = checkpoint.SHARD_SIZE,
        builder: Mapping[str, Any] | bool | None = None,
    ) -> Path:
        """Write tensors (safetensors), surgery record and report (JSON) into a folder; returns it.

        ``report`` then also knows the place and the size of the tensors' files.

        Args:
            max_shard_size: a model that takes more gets several tensor files, with the index that Hugging Face's
                libraries read.
            builder: how the full model is made, so that ``load`` needs no constructor, for example
                ``{"library": "torchvision", "name": "resnet18", "arguments": {"num_classes": 10}}``. None finds it out
                for models of transformers and timm, False leaves it out.
        """
        directory = checkpoint.save(
            self.model, self.record, self.report.to_dict(), out_dir, max_shard_size=max_shard_size, builder=builder
        )
        size = sum((directory / file).stat().st_size for file in checkpoint.read_manifest(directory).files)
        self.report = with_file(self.report, str(directory), size)
        return directory

    def to_stock(
        self, *, pad: bool = False, inputs: Any = None, arguments: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """The subnet as an ordinary model of transformers or timm: the same class, a configuration of smaller widths.

        It needs nothing of this library. It was compared with the subnet in float64 and in its own precision.

        Args:
            pad: fill up with zeros what a configuration has no number for: layers that are narrower than the widest,
                heads where their number is fixed.
            inputs: other example inputs than those the subnet was made with.
            arguments: of ``timm.create_model``, where timm has not written them down.

        Raises:
            StockError: the configuration cannot say what the subnet is; names the layer and the field.
        """
        return stock.to_stock(self.model, self._inputs(inputs), pad=pad, arguments=arguments)

    def save_pretrained(
        self,
        out_dir: str | Path,
        *,
        pad: bool = False,
        inputs: Any = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write :meth:`to_stock` as its library does; returns the folder.

        ``AutoModel.from_pretrained(folder)`` reads it (a class of transformers), or
        ``timm.create_model("local-dir:folder", pretrained=True)``. Arguments and errors as for :meth:`to_stock`.
        """
        return stock.save_pretrained(self.model, self._inputs(inputs), out_dir, pad=pad, arguments=arguments)

    def export(self, kind: str, path: str | Path, *, inputs: Any = None, dynamic: bool | str = True) -> Exported:
        """Write the subnet as a program, ``"torch_export"``, ``"onnx"`` or ``"aot"``; see :func:`export.export_model`.

        It is read back and compared with the subnet, at other sizes too, before the file is kept. ``inputs`` are those
        of the analysis where none are given.
        """
        return export_model(self.model, kind, path, inputs=self._inputs(inputs), dynamic=dynamic)

    def measure_speed(self, full: nn.Module, *, inputs: Any = None, **options: Any) -> SubnetReport:
        """Time the subnet and the model it was cut from in turns; the report returned, and kept, has the rows.

        Args:
            full: the model before.
            **options: backends, batch sizes, threads; see :func:`speed.measure_speed`.
        """
        speed = measure_speed(full, self.model, self._inputs(inputs), **options)
        notes = (*self.report.notes, *(n for n in speed.notes if n not in self.report.notes))
        self.report = replace(self.report, latency=speed.latency, slow_layers=speed.slow_layers, notes=notes)
        return self.report

    def _inputs(self, inputs: Any) -> Any:
        if inputs is None and self.inputs is None:
            raise ConfigurationError("this subnet has no example inputs: give inputs=..., what its forward takes")
        return inputs_for(self.model, self.inputs, self._dtype) if inputs is None else inputs

    def __str__(self) -> str:
        return str(self.report)
