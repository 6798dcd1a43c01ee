"""The structure of the packages: no import cycles, dependencies in one direction, files of readable size."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from cases import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT / "python", ROOT / "kernels")
    for path in folder.rglob("*.py")
}


def imported_names(module: str) -> Iterator[str]:
    """Yield the absolute names that a module imports anywhere, but for type checking."""
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full in SOURCES else source


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: {name for name in imported_names(module) if name in SOURCES} for module in SOURCES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_import_torch_and_triton_only() -> None:
    for module in SOURCES:
        if module.startswith("fused_distill_kernels"):
            roots = {name.split(".")[0] for name in imported_names(module)}
            assert roots <= {
                "torch",
                "triton",
                "fused_distill_kernels",
                "__future__",
                "collections",
                "dataclasses",
                "typing",
            }


@pytest.mark.parametrize("folder", ["chunked", "rows", "parallel"])
def test_the_losses_do_not_import_what_uses_them(folder: str) -> None:
    users = ("trainer", "serving", "compat", "rollouts", "huggingface", "cli", "env")
    for module in SOURCES:
        if module.startswith(f"fused_distill.{folder}"):
            for name in imported_names(module):
                assert name.removeprefix("fused_distill.").split(".")[0] not in users


@pytest.mark.parametrize("module", SOURCES)
def test_a_file_has_at_most_350_lines(module: str) -> None:
    assert len(SOURCES[module].read_text().splitlines()) <= 350
