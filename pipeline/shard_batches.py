"""The batches of a training: a worker's rows of every step, read from memory or window by window from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.order import Order, Segment

if TYPE_CHECKING:
    from pipeline.shards import Dataset, StoredRows

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

MEMORY_BUDGET_BYTES = 2 * 2**30
_NO_IMAGES = np.empty((0, 0, 0, 0), dtype=np.uint8)


@dataclass(frozen=True)
class RawBatch:
    """One worker's part of a step: uint8 images [b, C, H, W], int64 labels [b] or None, int64 dataset rows [b]."""

    step: int
    images: Pixels
    labels: Ints | None
    rows: Ints


def read_batches(
    dataset: Dataset,
    order: Order,
    streams: Sequence[int],
    start_step: int = 0,
    *,
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES,
) -> Iterator[RawBatch]:
    """The batches of one worker's streams from `start_step` on, without end: rows of its first stream, its second, ...

    A dataset whose decoded images fit `memory_budget_bytes` is held in memory, any other is read window by window; the
    batches are the same.

    Raises:
        DataError: while iterating, when a row is damaged.
    """
    if order.row_groups != dataset.manifest.row_groups:
        raise ValueError("the order was made for a dataset with other row groups")
    if dataset.manifest.num_bytes_decoded <= memory_budget_bytes:
        dataset.hold_in_memory()
    reader = _from_memory if dataset.in_memory else _from_disk
    return reader(dataset, order, streams, start_step)


def _from_memory(dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> Iterator[RawBatch]:
    walks = [_Walk(order, stream, step) for stream in streams]
    count = order.rows_per_stream
    while True:
        rows = np.empty(len(walks) * count, dtype=np.int64)
        for i, walk in enumerate(walks):
            walk.read(RawBatch(step, _NO_IMAGES, None, rows), i * count, count)
        yield RawBatch(step, dataset.read(rows), dataset.labels(rows), rows)
        step += 1


def _from_disk(dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> Iterator[RawBatch]:
    reader = _WindowReader(dataset, order)
    reader.walks = walks = [_WalkOnDisk(order, stream, step, reader) for stream in streams]
    count = order.rows_per_stream
    size = len(walks) * count
    while True:
        labels = np.empty(size, dtype=np.int64) if dataset.manifest.has_labels else None
        images = np.empty((size, *dataset.manifest.shape), dtype=np.uint8)
        batch = RawBatch(step, images, labels, np.empty(size, dtype=np.int64))
        for i, walk in enumerate(walks):
            walk.read(batch, i * count, count)
        yield batch
        step += 1


class _Walk:
    """One stream, part by part; `rows` are those of the current part, `upcoming` is the part after it."""

    def __init__(self, order: Order, stream: int, step: int) -> None:
        self.stream = stream
        self._order, self._parts = order, order.parts(stream, step)
        self.upcoming = next(self._parts)
        self.rows = np.empty(0, dtype=np.int64)
        self._next = 0

    def read(self, batch: RawBatch, place: int, count: int) -> None:
        """Write the stream's next `count` rows to `batch`, from `place` on."""
        while count:
            if self._next == len(self.rows):
                part, self.upcoming = self.upcoming, next(self._parts)
                self.rows, self._next = self._order.rows_of(part), 0
                self.enter(part)
            taken = min(count, len(self.rows) - self._next)
            self.copy(slice(self._next, self._next + taken), batch, slice(place, place + taken))
            self._next, place, count = self._next + taken, place + taken, count - taken

    def enter(self, part: Segment) -> None:
        """Make ready what is needed of `rows`."""

    def copy(self, held: slice, batch: RawBatch, place: slice) -> None:
        """Write what is known of `rows[held]` to `place` of the batch."""
        batch.rows[place] = self.rows[held]


class _WalkOnDisk(_Walk):
    """Holds the current part's rows as they are stored."""

    stored: StoredRows

    def __init__(self, order: Order, stream: int, step: int, reader: _WindowReader) -> None:
        super().__init__(order, stream, step)
        self._reader = reader

    def enter(self, part: Segment) -> None:
        if hasattr(self, "stored"):
            self._reader.give_back(self.stored)
            del self.stored  # before the next rows are read, which take its place
        self.stored = self._reader.take(self.stream, part)

    def copy(self, held: slice, batch: RawBatch, place: slice) -> None:
        batch.rows[place] = self.rows[held]
        self.stored.decode(held, batch.images[place])
        if batch.labels is not None and self.stored.labels is not None:
            batch.labels[place] = self.stored.labels[held]


class _WindowReader:
    """Reads windows for the streams of one worker: once for all that enter one now or next.

    Streams enter a window together where it is larger than their slices: reading it for each would read the whole
    dataset as many times as there are streams.
    """

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.walks: list[_WalkOnDisk] = []
        self._dataset, self._order = dataset, order
        self._ready: dict[tuple[int, Segment], StoredRows] = {}
        self._users: dict[int, int] = {}  # streams that hold rows of an array of raw images, by its id
        self._free: list[Pixels] = []  # such arrays that nobody needs: new ones would cost the system's zeroing

    def take(self, stream: int, part: Segment) -> StoredRows:
        if (stream, part) not in self._ready:
            together = {walk.stream: walk.upcoming for walk in self.walks if walk.upcoming[:2] == part[:2]}
            self._read([(stream, part), *together.items()])
        return self._ready.pop((stream, part))

    def give_back(self, stored: StoredRows) -> None:
        images = stored.images
        if isinstance(images, np.ndarray):
            self._users[id(images)] -= 1
            if self._users[id(images)] == 0:
                del self._users[id(images)]
                self._free.append(images)

    def _read(self, wanted: list[tuple[int, Segment]]) -> None:
        rows = [self._order.rows_of(part) for _, part in wanted]
        stored = self._dataset.load(np.concatenate(rows), self._free.pop() if self._free else None)
        if isinstance(stored.images, np.ndarray):
            self._users[id(stored.images)] = len(wanted)
        end = 0
        for key, own in zip(wanted, rows, strict=True):
            begin, end = end, end + len(own)
            self._ready[key] = stored.part(slice(begin, end))
