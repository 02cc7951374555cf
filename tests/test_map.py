"""tests/README.md says which tests hold which fault, oracle and promise: it and the marks on the tests agree, and no row is empty."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit.map import MAP, TESTS, holders, rendered, rows

FAULTS, ORACLES, PROMISES = range(1, 29), range(1, 13), range(1, 7)


def test_every_row_is_there_once() -> None:
    every = [("fault", str(n)) for n in FAULTS] + [("oracle", str(n)) for n in ORACLES]
    assert sorted(rows(MAP.read_text())) == sorted([*every, *(("promise", f"P{n}") for n in PROMISES)])


def test_the_map_and_the_marks_agree() -> None:
    text = MAP.read_text()
    assert text == rendered(text, holders()), "run: .venv/bin/python -m tests.kit.map --write"


def test_no_mark_names_a_row_that_there_is_not_and_no_row_is_without_a_test() -> None:
    assert holders().keys() == set(rows(MAP.read_text()))


def test_make_test_holds_every_row_without_what_it_leaves_to_make_test_all() -> None:
    assert holders(in_make_test=True).keys() == set(rows(MAP.read_text()))


def test_every_mark_is_found_where_pytest_finds_it(pytestconfig: pytest.Config) -> None:
    """The script reads decorators and `pytestmark`: a mark written in any other place would be missed."""
    written = re.compile(r"\bmark\.(?:fault|oracle|promise)\(")
    for file in set(TESTS.rglob("test_*.py")) - {Path(__file__)}:
        marked = [line for line in file.read_text().splitlines() if written.search(line)]
        assert all(re.match(r"@pytest\.mark|pytestmark = ", line) for line in marked), file
    registered = " ".join(pytestconfig.getini("markers"))
    assert all(f"{mark}(" in registered for mark in ("fault", "oracle", "promise"))


def test_every_folder_with_tests_is_on_the_map() -> None:
    folders = {str(path.parent.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    text = MAP.read_text()
    assert [folder for folder in folders if f"| `{folder}/` |" not in text and folder != "."] == []


def test_a_missing_test_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\npytestmark = [pytest.mark.promise('P1')]\n\n@pytest.mark.fault(1, 3)\ndef test_a(): ...\n\ndef test_b(): ...\n"
    )
    found = holders(tmp_path)
    assert found == {
        ("promise", "P1"): ["test_x.py::test_a", "test_x.py::test_b"],
        ("fault", "1"): ["test_x.py::test_a"],
        ("fault", "3"): ["test_x.py::test_a"],
    }
    text = "| fault | what | tests |\n|---|---|---|\n| 1 | a | old |\n| 2 | b \\| c | old |\n\n| 1 | no table of ours | x |\n"
    assert rows(text) == [("fault", "1"), ("fault", "2")]
    assert rendered(text, found).splitlines()[2:4] == ["| 1 | a | `test_x.py::test_a` |", "| 2 | b \\| c | none |"]
    assert rendered(text, found).splitlines()[-1] == "| 1 | no table of ours | x |"


def test_what_make_test_leaves_out_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.fault(1)\n@pytest.mark.all\ndef test_a(): ...\n\n"
        "@pytest.mark.fault(2)\n@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.all)])\ndef test_b(n): ...\n"
    )
    (tmp_path / "test_y.py").write_text(
        "import pytest\npytestmark = [pytest.mark.ray, pytest.mark.all]\n\n@pytest.mark.fault(3)\ndef test_c(): ...\n"
    )
    assert holders(tmp_path).keys() == {("fault", "1"), ("fault", "2"), ("fault", "3")}
    assert holders(tmp_path, in_make_test=True).keys() == {("fault", "2")}
