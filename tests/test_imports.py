"""Modules of the package import in one order of folders, without circles."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A folder imports folders before it, and its own modules; `errors` and `utils` are one step.
ORDER = (
    "utils",
    "kernels",
    "ops",
    "prompts",
    "subject",
    "attention",
    "tiny_world",
    "pipelines",
    "training",
    "evaluation",
    "cli",
)
OUTSIDE = ("benchmarks", "evals", "tests")


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((ROOT / "sefi_fast", "sefi_fast"), (ROOT / "kernels", "kernels")):
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            if prefix == "kernels":
                parts.insert(0, "sefi_fast")
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


class Imports(ast.NodeVisitor):
    """Collect the imports of a module outside `if TYPE_CHECKING`."""

    def __init__(self, name: str) -> None:
        self.found: set[str] = set()
        is_package = MODULES[name].name == "__init__.py"
        self.package = name.split(".") if is_package else name.split(".")[:-1]

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{module}.{alias.name}"
            self.found.add(full if full in MODULES else module)


def imports_of(name: str) -> set[str]:
    visitor = Imports(name)
    visitor.visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return visitor.found


def place_of(module: str) -> str:
    """Return the folder of a module inside the package, or the name of a top module."""
    place = module.split(".")[1] if "." in module else ""
    return "utils" if place == "errors" else place


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_folders_before_its_own(name):
    place = place_of(name)
    imports = imports_of(name)
    assert not {module for module in imports if module.split(".")[0] in OUTSIDE}
    if not place:
        return
    later = ORDER[ORDER.index(place) + 1 :]
    wrong = {module for module in imports if module in MODULES and place_of(module) in later}
    assert not wrong, f"{name} is in {place}, and {', '.join(later)} come after it"


def test_no_import_is_circular():
    graph = {name: imports_of(name) & MODULES.keys() - {name, "sefi_fast"} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
