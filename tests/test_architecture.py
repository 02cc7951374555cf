"""ARCHITECTURE.md's table of folders, held against the imports that the code really makes.

The table under `## Folders` has the columns `folder | holds | third-party packages`, from top to bottom. A module belongs to the row of its
folder; a module that stands in `pipeline/` itself, to the row that names the file, or else to the row `pipeline/*.py` alone. It imports
from its own folder and from folders below it, in functions too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
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
    """One line of the table: a folder, or single files of one."""

    folder: str
    files: tuple[str, ...]
    third_party: frozenset[str]


def parse_table(text: str) -> list[Row]:
    """Return the rows of the table under `## Folders`, from top to bottom."""
    section = text.partition("\n## Folders\n")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert lines, "ARCHITECTURE.md has no table under '## Folders'"
    assert lines[0] == ["folder", "holds", "third-party packages"], f"unexpected columns {lines[0]}"
    return [
        Row(folder.removesuffix("/*.py"), tuple(files), frozenset(words(names)))
        for (folder, *files), names in ((words(cells[0]), cells[2]) for cells in lines[2:])
    ]


def words(cell: str) -> tuple[str, ...]:
    return tuple(word for word in cell.replace("`", " ").split() if word != "-")


@cache
def table() -> tuple[Row, ...]:
    return tuple(parse_table((REPOSITORY / "ARCHITECTURE.md").read_text()))


def row_of(module: str) -> Row:
    folder, _, file = module.rpartition("/")
    rows = [row for row in table() if row.folder == folder]
    named = [row for row in rows if file in row.files]
    rows = named or [row for row in rows if not row.files]
    assert len(rows) == 1, f"{module} belongs to {len(rows)} rows of ARCHITECTURE.md's table of folders, not to one"
    return rows[0]


def level(row: Row) -> int:
    """Return the row's height: 0 for the bottom one."""
    return len(table()) - 1 - table().index(row)


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
    rows = "| `p/*.py` `a.py` | top | `click` |\n| `c` | core | - |"
    text = f"# A\n\n## Folders\nWords.\n\n| folder | holds | third-party packages |\n|---|---|---|\n{rows}\n\n## Next\n| x |\n"
    assert parse_table(text) == [Row("p", ("a.py",), frozenset({"click"})), Row("c", (), frozenset())]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_exactly_one_place_in_the_table(module: str) -> None:
    row_of(module)


def test_every_entry_of_the_table_exists() -> None:
    folders = {module.rpartition("/")[0] for module in MODULES}
    stale = [row.folder for row in table() if row.folder not in folders]
    stale += [f"{row.folder}/{file}" for row in table() for file in row.files if f"{row.folder}/{file}" not in MODULES]
    assert not stale, f"ARCHITECTURE.md names what does not exist: {stale}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports_are_those_of_the_table(module: str) -> None:
    third_party = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - set(PACKAGES)
    forbidden = third_party - row_of(module).third_party
    assert not forbidden, (
        f"{module} imports {sorted(forbidden)}; its row in ARCHITECTURE.md allows {sorted(row_of(module).third_party)}"
    )


def test_no_row_allows_what_none_of_its_files_imports() -> None:
    for row in table():
        used = {name.split(".")[0] for module in MODULES if row_of(module) == row for name in imports(module)}
        assert row.third_party <= used, f"{row.folder} no longer imports {sorted(row.third_party - used)}"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    own = level(row_of(module))
    for name in imports(module):
        target = file_of(name)
        if target is not None:
            assert level(row_of(target)) <= own, f"{module} imports {name}, which stands above it"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for name in imports(module, only_on_import=True) if (target := file_of(name))} - {module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_each_large_library_stays_in_few_folders() -> None:
    """The rules that no edit of the table may break."""
    importers = {module: {name.split(".")[0] for name in imports(module)} for module in MODULES}
    for package, wanted in {
        "click": r"pipeline/(commands/\w+|cli\w*|ddpm_pipe_command)",
        "mlflow": r"pipeline/tracking/\w+",
        "obstore": r"pipeline/storage/remote",
        "pyarrow": r"pipeline/(ingest/\w+|data/shard\w+|storage/remote|runs/sample)",
        "ray": r"pipeline/(cluster|jobs|sweeps)/\w+",
    }.items():
        for module in MODULES:
            assert package not in importers[module] or re.match(rf"{wanted}\.py$", module), (
                f"{module} imports {package}"
            )
    for module in MODULES:
        if module.startswith("ddpm/"):
            assert importers[module] - set(sys.stdlib_module_names) <= {"torch", "ddpm"}, module


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
