"""Work that comes out the same however it is shared out: canonical chunks of items, each computed once and kept until all are there.

A task computes a chunk of consecutive indices; a runner computes the missing chunks, here or over the workers of a cluster, in any order;
`compute` keeps each one as it comes, and hands all of them out in canonical order. Stopped half-way, the same call goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import StorageError
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import Arrays, pack, read_card, unpack
from pipeline.training.device import Compute


class Task(Protocol):
    """What is computed for a chunk. It must pickle: each worker has a copy."""

    def start(self, here: Compute) -> None:
        """Get ready, once, in the process that computes, on its device."""

    def __call__(self, indices: range, /) -> Arrays:
        """Return the arrays of one chunk, all with len(indices) rows or fewer; a function of the task and the indices alone."""


Runner = Callable[[Task, Mapping[int, range]], Iterator[tuple[int, Arrays]]]


def chunks_of(num_items: int, size: int) -> list[range]:
    """Return the canonical chunks that hold items 0 .. num_items - 1: whole ones, the last one padded with further indices."""
    return [range(begin, begin + size) for begin in range(0, num_items, size)]


def as_it_stands(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
    """Compute chunks one after the other with a task that is ready."""
    for number, indices in chunks.items():
        yield number, task(indices)


def in_process(here: Compute) -> Runner:
    """Return what computes chunks in this process."""

    def run(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
        if chunks:
            here.start()
            task.start(here)
        return as_it_stands(task, chunks)

    return run


class ChunkStore:
    """Computed chunks in a folder, each a file that notices damage. `identity` is all that their content depends on."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self._identity = json.loads(json.dumps(identity))
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / digest

    def get(self, number: int) -> Arrays | None:
        """Return a chunk's arrays; None where it is not there, or damaged."""
        try:
            card, arrays = unpack(self._path(number).read_bytes())
        except (OSError, ValueError):
            return None
        return arrays if card == self._identity else None

    def holds(self, number: int) -> bool:
        """Whether a chunk is there and whole in length, which reads its header alone; `get` tells whether it is undamaged, too."""
        try:
            return bool(read_card(self._path(number)) == self._identity)
        except (OSError, ValueError):
            return False

    def put(self, number: int, arrays: Arrays) -> None:
        """Keep a chunk; StorageError where it cannot be written."""
        make_folder(self.folder)
        try:
            write_atomically(self._path(number), pack(arrays, self._identity))
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be written ({error.strerror}); free some space") from None

    def clear(self) -> None:
        """Remove everything that is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may keep their chunks beside
            self.folder.parent.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.safetensors"


def compute(
    task: Task,
    num_items: int,
    chunk_size: int,
    store: ChunkStore,
    runner: Runner = as_it_stands,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Arrays]:
    """Yield the arrays of items 0 .. num_items - 1, a canonical chunk at a time and in order, the padding cut off.

    Chunks that the store holds undamaged are not computed again. `progress` is told how many items are there.
    """
    chunks = chunks_of(num_items, chunk_size)
    missing = {number: indices for number, indices in enumerate(chunks) if not store.holds(number)}
    done = len(chunks) - len(missing)
    for number, arrays in runner(task, missing):
        store.put(number, arrays)
        done += 1
        if progress is not None:
            progress(min(done * chunk_size, num_items))
    for number, indices in enumerate(chunks):
        kept = store.get(number)
        if kept is None and number not in missing:  # it was there, and is damaged
            for _, arrays in runner(task, {number: indices}):
                store.put(number, arrays)
            kept = store.get(number)
        if kept is None:
            raise StorageError(f"{store.folder}: chunk {number} was written and cannot be read back; check the disk")
        yield {name: array[: num_items - indices.start] for name, array in kept.items()}
