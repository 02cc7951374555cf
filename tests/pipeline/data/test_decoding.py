"""The note of what is being decoded: it outlives a process that a decoder ends, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decoding import Decoding, rows_left
from pipeline.data.shards import Dataset
from pipeline.errors import DataError
from tests.kit.data import dataset_of, some_images

# at the second image the decoder follows a null pointer
CRASHING = """
import ctypes, sys
import PIL.Image
from pipeline.data.decoding import Decoding
from pipeline.data.shards import Dataset

opened, calls = PIL.Image.open, []

def crashing(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        ctypes.string_at(0)
    return opened(*arguments, **options)

PIL.Image.open = crashing
dataset = Dataset.open(sys.argv[1])
with Decoding("k7m2", 2, 0) as dataset.decoding:
    dataset.read([30, 11, 12])
"""


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Images that are kept as PNG; and a temporary folder of this test's own, for its processes too."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    dataset = dataset_of(tmp_path / "data", some_images(40, (66, 30, 1)))
    assert dataset.manifest.encoding == "png"
    return dataset


@pytest.mark.fault(27)
def test_the_row_at_which_a_process_crashed_is_known_once(large: Dataset) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHING, large.location], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert rows_left("k7m2", 1) == frozenset()  # of another attempt
    assert rows_left("k7m2", 2) == {11}
    assert rows_left("k7m2", 2) == frozenset()


def test_nothing_stays_of_what_ended_by_itself(large: Dataset, tmp_path: Path) -> None:
    with Decoding("k7m2", 1, 0) as large.decoding:
        large.read([3, 4])
    stored, first = large.storage(1), np.array([0])
    stored[0] = b"no image"
    with pytest.raises(DataError), Decoding("k7m2", 1, 0) as large.decoding:
        large.decode(stored, first, first, np.empty((1, 1, 66, 30), dtype=np.uint8))
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


def test_a_machine_that_cannot_keep_the_note_trains_all_the_same(large: Dataset, tmp_path: Path) -> None:
    (tmp_path / "tmp" / f"ddpm-pipe-{os.getuid()}").touch()
    with Decoding("k7m2", 1, 0) as large.decoding:
        assert len(large.read([3])) == 1
