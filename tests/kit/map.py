"""The last column of the tables in tests/README.md, made from the marks on the tests: which test holds which fault, oracle and promise.

    python -m tests.kit.map            prints the rows that no test holds
    python -m tests.kit.map --write    writes the column anew

A row's key is in its first column: a number in the tables of faults and oracles, a name such as P1 in that of promises. Files are named
without their folder.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
MAP = TESTS / "README.md"
MARKS = ("fault", "oracle", "promise")
NONE = "none"
Key = tuple[str, str]  # a mark and its argument: ("fault", "3")


def marks_of(node: ast.expr) -> Iterator[Key]:
    """Yield the keys of a decorator, or of a list of marks."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MARKS:
            for argument in call.args:
                yield call.func.attr, str(ast.literal_eval(argument))


def is_of_test_all_alone(decorators: list[ast.expr]) -> bool:
    """Whether a test bears the mark `all`: `make test` leaves it out."""
    return any(ast.unparse(node).endswith("mark.all") for decorator in decorators for node in parts_of(decorator))


def parts_of(node: ast.expr) -> list[ast.expr]:
    """Return the marks of a list, or the one mark."""
    return node.elts if isinstance(node, ast.List) else [node]


def holders(folder: Path = TESTS, *, in_make_test: bool = False) -> dict[Key, list[str]]:
    """Return the tests that bear each mark, as `file::test`, in the order of their names; all of them, or those of `make test`."""
    found: dict[Key, list[str]] = defaultdict(list)
    for file in sorted(folder.rglob("test_*.py"), key=lambda path: path.name):
        tree = ast.parse(file.read_text())
        of_file = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [*of_file, *node.decorator_list]
                if in_make_test and is_of_test_all_alone(marks):
                    continue
                for key in dict.fromkeys(key for mark in marks for key in marks_of(mark)):
                    found[key].append(f"{file.name}::{node.name}")
    return dict(found)


def rendered(text: str, found: dict[Key, list[str]]) -> str:
    """Return the map with the last column of its tables made anew."""
    lines, mark = [], None
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            if cells[-2].strip() == "tests" and cells[1].strip() in MARKS:
                mark = cells[1].strip()
            elif mark is not None and not cells[1].startswith("--"):
                names = found.get((mark, cells[1].strip()), [])
                cells[-2] = f" {'<br>'.join(f'`{name}`' for name in names) or NONE} "
                line = "|".join(cells)
        else:
            mark = None
        lines.append(line)
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[Key]:
    """Return the keys of the map's rows."""
    keys, mark = [], None
    for line in text.splitlines():
        first = line.split("|")[1].strip() if line.startswith("|") else ""
        if first in MARKS:
            mark = first
        elif not line.startswith("|"):
            mark = None
        elif mark is not None and not first.startswith("--"):
            keys.append((mark, first))
    return keys


def main(arguments: list[str]) -> int:
    """Print the rows that no test holds, or write the column."""
    text, found = MAP.read_text(), holders()
    if arguments == ["--write"]:
        MAP.write_text(rendered(text, found))
        return 0
    for key in rows(text):
        if key not in found:
            print(*key)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
