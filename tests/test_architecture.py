"""ARCHITECTURE.md's table of layers, held against the imports that the code really makes.

The table under `## Layers` has the columns `layer | files | may import`. Layers stand from the top of the picture to the
bottom: a file may import from its own layer and from those below it, in functions too. Files are paths or patterns; every
module is matched by exactly one row. "May import" names every third-party package of the row's files; the standard
library is free.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("ddpm", "pipeline")
MODULES = sorted(
    path.relative_to(REPOSITORY).as_posix() for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    layer: str
    patterns: tuple[str, ...]
    may_import: frozenset[str]


def parse_table(text: str) -> list[Row]:
    """Return the rows of the table under `## Layers`."""
    section = text.partition("\n## Layers\n")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert lines, "ARCHITECTURE.md has no table under '## Layers'"
    assert lines[0] == ["layer", "files", "may import"], f"unexpected columns {lines[0]}"
    return [Row(layer, words(files), frozenset(words(names))) for layer, files, names in lines[2:]]


def words(cell: str) -> tuple[str, ...]:
    return tuple(word for word in cell.replace("`", " ").split() if word not in {"-", "—"})


@cache
def table() -> tuple[Row, ...]:
    return tuple(parse_table((REPOSITORY / "ARCHITECTURE.md").read_text()))


def rows_of(module: str) -> list[Row]:
    return [row for row in table() if any(fnmatch(module, pattern) for pattern in row.patterns)]


def row_of(module: str) -> Row:
    rows = rows_of(module)
    assert len(rows) == 1, f"{module} is matched by {len(rows)} rows of ARCHITECTURE.md's table of layers, not by one"
    return rows[0]


def level(layer: str) -> int:
    """Return the layer's height: 0 for the bottom one."""
    from_top = list(dict.fromkeys(row.layer for row in table()))
    return len(from_top) - 1 - from_top.index(layer)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((REPOSITORY / module).read_text(), filename=module)


def file_of(dotted: str) -> str | None:
    """Return the file of a module of ours ("pipeline.cluster.train" -> "pipeline/cluster/train.py"), or None if there is no such file."""
    path = dotted.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in MODULES), None)


def imported_names(node: ast.AST, module: str) -> list[str]:
    """Return the dotted names that one import statement of `module` names, [] for another node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split("/")[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        # `from pipeline import presets` names a module, `from ddpm import UNet` an object of one.
        return [name if file_of(name) else base for name in (f"{base}.{alias.name}" for alias in node.names)]
    return []


def imports(module: str, only_on_import: bool = False) -> set[str]:
    """Return every dotted name that `module` imports, or only those it imports while being imported."""
    nodes: list[ast.AST] = list(tree_of(module).body) if only_on_import else list(ast.walk(tree_of(module)))
    return {name for node in nodes for name in imported_names(node, module)}


def test_the_parser_reads_the_agreed_format() -> None:
    rows = "| top | `p/cli*.py` | `click` |\n| core | `c/a.py` c/b.py | - |"
    text = f"# A\n\n## Layers\nWords.\n\n| layer | files | may import |\n|---|---|---|\n{rows}\n\n## Next\n| x |\n"
    assert parse_table(text) == [
        Row("top", ("p/cli*.py",), frozenset({"click"})),
        Row("core", ("c/a.py", "c/b.py"), frozenset()),
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_exactly_one_place_in_the_table(module: str) -> None:
    row_of(module)


def test_every_entry_of_the_table_exists() -> None:
    stale = [
        pattern
        for row in table()
        for pattern in row.patterns
        if not any(fnmatch(module, pattern) for module in MODULES)
    ]
    assert not stale, f"ARCHITECTURE.md names files that do not exist: {stale}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports_are_those_of_the_table(module: str) -> None:
    third_party = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - set(PACKAGES)
    forbidden = third_party - row_of(module).may_import
    assert not forbidden, (
        f"{module} imports {sorted(forbidden)}; its row in ARCHITECTURE.md allows {sorted(row_of(module).may_import)}"
    )


def test_no_row_allows_what_none_of_its_files_imports() -> None:
    for row in table():
        used = {name.split(".")[0] for module in MODULES if row_of(module) == row for name in imports(module)}
        assert row.may_import <= used, f"{row.patterns} no longer import {sorted(row.may_import - used)}"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    own = level(row_of(module).layer)
    for name in imports(module):
        target = file_of(name)
        if target is not None:
            assert level(row_of(target).layer) <= own, (
                f"{module} ({row_of(module).layer}) imports {name} ({row_of(target).layer})"
            )


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for name in imports(module, only_on_import=True) if (target := file_of(name))} - {module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_outside_worlds_are_each_in_few_layers() -> None:
    """The rules that the table must not be edited to break."""
    importers = {module: {name.split(".")[0] for name in imports(module)} for module in MODULES}
    layers = {row_of(module).layer: set[str]() for module in MODULES}
    for module, packages in importers.items():
        layers[row_of(module).layer] |= packages
    assert {layer for layer, packages in layers.items() if "click" in packages} == {"cli"}
    assert {layer for layer, packages in layers.items() if "ray" in packages} <= {"edge"}
    assert layers["core"] - set(sys.stdlib_module_names) <= {"torch", "ddpm"}
    for package, wanted in {
        "mlflow": r"tracking/\w+",
        "pyarrow": r"(ingest/\w+|data/shard\w+|storage/remote|workflows/sample)",
    }.items():
        for module in MODULES:
            known = re.match(rf"pipeline/{wanted}\.py$", module)
            assert known or package not in importers[module], f"{module} imports {package}"


def called(node: ast.AST) -> str:
    """Return "torch.load" for a call of that name, "" for another node."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def arguments_of(node: ast.AST) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords} if isinstance(node, ast.Call) else {}


@pytest.mark.parametrize("module", MODULES)
def test_no_input_can_run_code(module: str) -> None:
    nodes = list(ast.walk(tree_of(module)))
    safe_loaders = {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    imported = {name.split(".")[0] for name in imports(module)}
    assert not imported & {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in nodes:
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        assert called(node) not in {"eval", "exec"}, where
        assert (
            not called(node).startswith("yaml.")
            or called(node) != "yaml.load"
            or arguments_of(node).get("Loader") in safe_loaders
        ), where
        assert arguments_of(node).get("allow_pickle", "False") == "False", where
        if called(node) == "torch.load":
            assert arguments_of(node).get("weights_only") == "True", where
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{where}: pickle is there to name torch's refusal only"
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            assert {alias.name for alias in node.names} == {"UnpicklingError"}, where
        # Parquet's key tools would let a file's own metadata name a key server.
        assert "decryption_properties" not in arguments_of(node), where


def test_torch_load_is_called_in_one_module_at_most() -> None:
    callers = [module for module in MODULES if any(called(node) == "torch.load" for node in ast.walk(tree_of(module)))]
    assert len(callers) <= 1, callers


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_named_by_what_they_are(module: str) -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "misc"}
    assert not vague & set(re.split(r"[/_.]", module))


HEAVY = {
    "torch",
    "numpy",
    "ray",
    "mlflow",
    "pyarrow",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "PIL",
    "diffusers",
    "torchvision",
}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["runs", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["ddpm-pipe", *{arguments!r}]
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", *sorted(set(sys.modules) & {HEAVY!r}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in out.stdout
    assert out.stdout.splitlines()[-1] == "HEAVY"
