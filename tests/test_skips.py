"""The promise of tests/kit/skips.py: under CI, a test cannot disappear by a skip that nobody has accepted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hermetic import REPOSITORY

TESTS = """
import shutil, pytest

@pytest.mark.skipif(shutil.which("no-such-tool") is None, reason="no-such-tool is not installed")
def test_by_mark(): ...

@pytest.fixture
def tool(): pytest.skip("no tool here")

def test_by_fixture(tool): ...

def test_without_a_gpu(): pytest.skip("no CUDA device here")

@pytest.mark.xfail(strict=True, reason="known")
def test_known(): raise ValueError

def test_passes(): ...
"""
FILE = "import pytest; pytest.importorskip('no_such_module')\n"


def run_pytest(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text(FILE)
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rA",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.kit.skips",
        )
    ]
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), *arguments, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | variables
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_a_skip_that_is_not_on_the_list_fails_the_run_under_ci(tmp_path: Path) -> None:
    out = run_pytest(tmp_path, "-n", "1", CI="true")
    assert out.returncode == pytest.ExitCode.TESTS_FAILED, out.stdout
    assert "1 passed, 1 skipped, 1 xfailed, 3 errors" in out.stdout.splitlines()[-1], out.stdout
    for name, reason in (
        ("test_some.py::test_by_mark", "'no-such-tool is not installed'"),
        ("test_some.py::test_by_fixture", "'no tool here'"),
        ("test_whole_file.py", "\"could not import 'no_such_module'"),
    ):
        assert re.search(
            rf"^ERROR \S*{name} - .*skipped under CI: got the reason {reason}", out.stdout, re.MULTILINE
        ), name


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    out = run_pytest(tmp_path)
    assert (out.returncode, "1 passed, 4 skipped, 1 xfailed" in out.stdout.splitlines()[-1]) == (0, True), out.stdout
