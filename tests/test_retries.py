"""The promise of tests/kit/retries.py: what a test tried again is counted and named at the end, whichever process ran it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hermetic import REPOSITORY

TESTS = """
import pytest
from tests.kit.retries import note_retry

@pytest.fixture
def cluster(): note_retry("the start of a head")

def test_starts(cluster): note_retry("the start of a node")

def test_passes(): ...
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_retry_is_named_with_its_test(tmp_path: Path, processes: str) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    options = f"-q -c {os.devnull} -p no:cacheprovider -p tests.kit.retries -n {processes} --rootdir"
    command = [sys.executable, "-m", "pytest", *options.split(), str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "tried again: 2" in done.stdout
    assert "test_some.py::test_starts (setup): the start of a head\n" in done.stdout
    assert "test_some.py::test_starts (call): the start of a node\n" in done.stdout
