"""Work that comes out the same however it is shared out: canonical chunks of items, each computed once and kept until all are there.

A task computes a chunk of consecutive indices; a runner computes the missing chunks, here or over the workers of a cluster, in any order;
`compute` stores each one as it comes, and yields all of them in canonical order. After a stop half-way the same call computes only those
that are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.errors import StorageError
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import Arrays, pack, read_card, unpack
from pipeline.training.device import Compute
from pipeline.training.threads import side_by_side


class Task(Protocol):
    """What is computed for a chunk. It must pickle: each worker has a copy."""

    def start(self, here: Compute) -> None:
        """Get ready, once, in the process that computes, on its device."""

    def __call__(self, indices: range, /) -> Arrays:
        """Return the arrays of a chunk, or of its first items; all have len(indices) rows or fewer, each row a function of its index."""

    def split_threads(self, num_chunks: int) -> tuple[int, int]:
        """Return how many of the chunks to compute at a time, and with how many threads each: one by one, unless a task overrides it."""
        return 1, torch.get_num_threads()


Runner = Callable[[Task, Mapping[int, range]], Iterator[tuple[int, Arrays]]]


def chunks_of(num_items: int, size: int) -> list[range]:
    """Return the canonical chunks of items 0 .. num_items - 1; of the last one, the items that are wanted."""
    return [range(begin, min(begin + size, num_items)) for begin in range(0, num_items, size)]


def as_it_stands(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
    """Compute chunks in this process with a task that is ready."""
    yield from zip(chunks, side_by_side(task, chunks.values(), *task.split_threads(len(chunks))), strict=True)


def in_process(here: Compute) -> Runner:
    """Return what computes chunks in this process."""

    def run(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
        if chunks:
            here.start()
            task.start(here)
        return as_it_stands(task, chunks)

    return run


class ChunkStore:
    """Computed chunks in a folder, each a file that notices damage. `identity` is all that their content depends on.

    A chunk that was computed for more items serves fewer.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self._identity = json.loads(json.dumps(identity))
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / digest

    def get(self, number: int, num_items: int) -> Arrays | None:
        """Return the arrays of a chunk's first items; None if they are missing or damaged."""
        try:
            card, arrays = unpack(self._path(number).read_bytes())
        except (OSError, ValueError):
            return None
        return {name: array[:num_items] for name, array in arrays.items()} if self._serves(card, num_items) else None

    def holds(self, number: int, num_items: int) -> bool:
        """Whether a chunk's first items are stored, by its header alone; only `get` detects damage to the arrays."""
        try:
            return self._serves(read_card(self._path(number)), num_items)
        except (OSError, ValueError):
            return False

    def put(self, number: int, num_items: int, arrays: Arrays) -> None:
        """Store a chunk's first items; raises StorageError if they cannot be written."""
        make_folder(self.folder)
        write_atomically(self._path(number), pack(arrays, self._identity | {"items": num_items}))

    def clear(self) -> None:
        """Remove everything that is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may keep their chunks beside
            self.folder.parent.rmdir()

    def _serves(self, card: dict[str, Any], num_items: int) -> bool:
        items = card.get("items")
        return isinstance(items, int) and items >= num_items and card == self._identity | {"items": items}

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
    """Yield the arrays of items 0 .. num_items - 1, a canonical chunk at a time and in order.

    Chunks that the store holds undamaged are not computed again. `progress` gets the number of items that are there.
    """
    chunks = chunks_of(num_items, chunk_size)
    missing = {number: indices for number, indices in enumerate(chunks) if not store.holds(number, len(indices))}
    done = len(chunks) - len(missing)
    for number, arrays in runner(task, missing):
        store.put(number, len(chunks[number]), arrays)
        done += 1
        if progress is not None:
            progress(min(done * chunk_size, num_items))
    for number, indices in enumerate(chunks):
        kept = store.get(number, len(indices))
        if kept is None and number not in missing:  # it was there, and is damaged
            for _, arrays in runner(task, {number: indices}):
                store.put(number, len(indices), arrays)
            kept = store.get(number, len(indices))
        if kept is None:
            raise StorageError(f"{store.folder}: chunk {number} was written and cannot be read back; check the disk")
        yield kept
