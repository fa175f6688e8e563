"""The order of the files, the public names, and no printing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import only_train_once

PACKAGE = Path(only_train_once.__file__).parent

# A file imports only from files above it. A folder is one entry: what is inside has its own order.
ORDER = [
    *("errors", "sharding", "collector", "higher_order", "copying", "inputs", "graph", "sizes", "recorder"),
    *("size_reader", "trace"),
    *("labels", "rules", "axes", "multiples", "activations", "products", "workload", "groups"),
    *("masking", "unitwise", "criteria", "importance", "schedules", "latency", "latency_cache", "budgets", "optim"),
    *("recipe", "norms", "record", "surgery", "verify", "exact", "cutting"),
    *("checkpoint", "stock"),
    *("flops", "explain", "report", "sensitivity", "suggest", "visualize", "export", "speed"),
    *("subnet", "cli", "oto", "__init__"),
]

FILES = sorted(PACKAGE.rglob("*.py"))


def _place(path: Path) -> str:
    """Entry of ``ORDER`` a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported(path: Path) -> set[str]:
    """Entries of ``ORDER`` that a file imports, wherever in the file; type-checking imports are imports."""
    package = ["only_train_once", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            modules = [full, *(f"{full}.{alias.name}" for alias in node.names)]
        parts = [m.split(".") for m in modules if m.split(".")[0] == "only_train_once"]
        found |= {p[1] for p in parts if len(p) > 1 and p[1] in ORDER}
    return found


def _violations(files: list[Path]) -> list[str]:
    out = []
    for path in files:
        place = _place(path)
        for other in sorted(_imported(path) - {place}):
            if ORDER.index(other) > ORDER.index(place):
                out.append(f"{path.relative_to(PACKAGE)} imports {other}, which is below {place}")
    return out


def test_every_file_has_a_place() -> None:
    assert {_place(p) for p in FILES} <= set(ORDER)


def test_imports_point_upward() -> None:
    assert _violations(FILES) == []


def test_the_import_check_sees_relative_imports() -> None:
    assert {"report", "exact", "groups"} <= _imported(PACKAGE / "oto.py")
    assert "errors" in _imported(PACKAGE / "oto.py")


def test_public_names_are_what_the_package_shows() -> None:
    shown = {n for n, v in vars(only_train_once).items() if not n.startswith("_") and not _is_module(v)}
    # `trace` is a function that hides the file of the same name, so nothing else may be missing.
    assert shown == set(only_train_once.__all__)
    assert list(only_train_once.__all__) == sorted(only_train_once.__all__, key=lambda n: (not n.isupper(), n))


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_printed(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_optional_libraries_are_imported_only_where_used() -> None:
    heavy = ["sklearn", "torchvision", "timm", "transformers", "onnx", "matplotlib", "graphviz", "pytest"]
    code = f"import sys, only_train_once; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
