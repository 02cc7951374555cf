"""The batches of a training: a worker's rows of every step, read from memory or window by window from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.order import Order

if TYPE_CHECKING:
    from pipeline.shards import Dataset, StoredRows

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

MEMORY_BUDGET_BYTES = 2 * 2**30


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
    while True:
        rows = np.concatenate([order.rows_for(step, stream) for stream in streams])
        yield RawBatch(step, dataset.read(rows), dataset.labels(rows), rows)
        step += 1


def _from_disk(dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> Iterator[RawBatch]:
    readers = [_DiskStream(dataset, order, stream) for stream in streams]
    count = order.rows_per_stream
    while True:
        images = np.empty((len(streams) * count, *dataset.manifest.shape), dtype=np.uint8)
        rows = np.empty(len(images), dtype=np.int64)
        labels = np.empty(len(images), dtype=np.int64) if dataset.manifest.has_labels else None
        for i, reader in enumerate(readers):
            part = slice(i * count, (i + 1) * count)
            reader.fill(step, images[part], rows[part], None if labels is None else labels[part])
        yield RawBatch(step, images, labels, rows)
        step += 1


class _DiskStream:
    """One stream read window by window: holds, as stored, the rows that it still needs of its current window."""

    def __init__(self, dataset: Dataset, order: Order, stream: int) -> None:
        self._dataset, self._order, self._stream = dataset, order, stream
        self._held: StoredRows | None = None
        self._at = (-1, -1)  # epoch and window
        self._first = 0  # position in the window of the first row held

    def fill(self, step: int, images: Pixels, rows: Ints, labels: Ints | None) -> None:
        done = 0
        for epoch, window, start, stop in self._order.segments(step, self._stream):
            held = self._window(epoch, window, start)
            part = slice(start - self._first, stop - self._first)
            place = slice(done, done + stop - start)
            held.decode(part, images[place])
            rows[place] = held.rows[part]
            if labels is not None and held.labels is not None:
                labels[place] = held.labels[part]
            done = place.stop

    def _window(self, epoch: int, window: int, start: int) -> StoredRows:
        """Rows of a window from `start` to its end or that of the stream's slice."""
        if self._held is None or self._at != (epoch, window):
            begin, end = self._order.window_bounds(epoch, window)
            stop = min(end, self._order.slice_of(self._stream)[1]) - begin
            buffer = self._held.images if self._held is not None else None
            self._held = None  # lets go of PNG files before the next are read
            rows = self._order.window_rows(epoch, window)[start:stop]
            self._held = self._dataset.load(rows, buffer if isinstance(buffer, np.ndarray) else None)
            self._at, self._first = (epoch, window), start
        return self._held
