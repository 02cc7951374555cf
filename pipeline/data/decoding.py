"""Which row a process is decoding, kept where that outlives it: a decoder that crashes takes the process along, and its word with it."""

from __future__ import annotations

import contextlib
import mmap
import struct
import threading
from itertools import count
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.storage.remote_run import own_folder

THREADS = 8  # that decode at once in one process; more would share places
_PLACES = struct.Struct(f"{THREADS}q")


class Decoding:
    """A process's note of the rows that its threads decode; a context. Its file stays only if the process ends inside.

    It is a page of memory that lies in a file of this machine: writing to it takes no system call, and a crash leaves it as it was.
    """

    def __init__(self, run_id: str, attempt: int, rank: int) -> None:
        self._name = f"{_prefix(run_id, attempt)}{rank}"
        self._path: Path | None = None
        self._threads, self._mine = count(), threading.local()

    def __enter__(self) -> Decoding:
        with contextlib.suppress(OSError, PipelineError):  # training does not need it
            path = own_folder("decoding") / self._name
            with path.open("w+b") as file:
                file.write(bytes(_PLACES.size))
                file.flush()
                self._page = mmap.mmap(file.fileno(), _PLACES.size)
            self._path = path
        return self

    def __exit__(self, *exc: object) -> None:
        if self._path is not None:
            path, self._path = self._path, None
            path.unlink(missing_ok=True)

    def begins(self, row: int) -> None:
        """Note that this thread decodes a row from now on."""
        self._write(row + 1)

    def ended(self) -> None:
        """Note that this thread decodes none any more."""
        self._write(0)

    def _write(self, value: int) -> None:
        if self._path is None:
            return
        place: int | None = getattr(self._mine, "place", None)
        if place is None:
            place = self._mine.place = next(self._threads) % THREADS * 8
        struct.pack_into("q", self._page, place, value)


def rows_left(run_id: str, attempt: int) -> frozenset[int]:
    """Return the rows that processes of an attempt were decoding on this machine when they died, and forget them."""
    rows: set[int] = set()
    with contextlib.suppress(OSError, PipelineError):
        for path in own_folder("decoding").glob(f"{_prefix(run_id, attempt)}*"):
            content = path.read_bytes()
            path.unlink()
            if len(content) == _PLACES.size:
                rows.update(value - 1 for value in _PLACES.unpack(content) if value)
    return frozenset(rows)


def _prefix(run_id: str, attempt: int) -> str:
    return f"{run_id}-{attempt}-"
