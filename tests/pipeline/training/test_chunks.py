"""Chunks that are kept: read once, known by their header, and computed again where they are damaged or of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.tensor_file import Arrays, pack, read_card, unpack
from pipeline.training import chunks
from pipeline.training.chunks import ChunkStore, Task, compute


class Squares(Task):
    """The squares of indices, and which chunks were computed."""

    def __init__(self) -> None:
        self.computed: list[int] = []

    def start(self, here: object) -> None:
        pass

    def __call__(self, indices: range) -> Arrays:
        self.computed.append(indices.start)
        return {"square": np.array(indices, np.int64) ** 2}


def squares(task: Squares, store: ChunkStore) -> list[int]:
    return np.concatenate([part["square"] for part in compute(task, 7, 3, store)]).tolist()


def test_what_is_kept_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, task = ChunkStore(tmp_path, {"of": "squares"}), Squares()
    expected = [i * i for i in range(7)]
    assert squares(task, store) == expected
    assert task.computed == [0, 3, 6]
    verified = []
    monkeypatch.setattr(chunks, "unpack", lambda data: verified.append(len(data)) or unpack(data))
    assert squares(task, store) == expected
    assert (task.computed, len(verified)) == ([0, 3, 6], 3)


def test_a_chunk_of_more_items_serves_fewer_and_one_of_fewer_is_computed_again(tmp_path: Path) -> None:
    store, task = ChunkStore(tmp_path, {"of": "squares"}), Squares()
    for count, computed in ((4, [0, 3]), (7, [0, 3, 3, 6]), (5, [0, 3, 3, 6]), (2, [0, 3, 3, 6])):
        found = np.concatenate([part["square"] for part in compute(task, count, 3, store)]).tolist()
        assert found == [i * i for i in range(count)]
        assert task.computed == computed


@pytest.mark.parametrize("damage", ["a bit", "cut short", "header", "empty", "of something else", "gone"])
def test_a_chunk_that_is_not_whole_is_computed_again(tmp_path: Path, damage: str) -> None:
    store, task = ChunkStore(tmp_path, {"of": "squares"}), Squares()
    expected = squares(task, store)
    path = sorted(store.folder.iterdir())[1]
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
    elif damage == "cut short":
        del data[-4:]
    elif damage == "header":
        data[0] ^= 0xFF
    elif damage == "empty":
        data.clear()
    elif damage == "of something else":
        data = bytearray(pack({"square": np.zeros(3, np.int64)}, {"of": "cubes"}))
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    assert squares(task, store) == expected
    assert task.computed == [0, 3, 6, 3]
    assert squares(task, store) == expected
    assert task.computed == [0, 3, 6, 3]


def test_the_card_is_read_without_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": np.arange(5), "b": np.zeros((2, 3), np.float32)}, {"of": "two"}))
    assert read_card(path) == unpack(path.read_bytes())[0] == {"of": "two"}
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a file of arrays"):
        read_card(path)
