"""The batches of a training: a worker's rows of every step, read from memory or window by window from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.order import Order

if TYPE_CHECKING:
    from pipeline.shards import Dataset

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
    while True:
        parts = [part for reader in readers for part in reader.take(step)]
        images, labels, rows = zip(*parts, strict=True)
        joined = np.concatenate(labels) if dataset.manifest.has_labels else None
        yield RawBatch(step, np.concatenate(images), joined, np.concatenate(rows))
        step += 1


class _DiskStream:
    """One stream read window by window: holds, as stored, the rows that it still needs of its current window."""

    def __init__(self, dataset: Dataset, order: Order, stream: int) -> None:
        self._dataset, self._order, self._stream = dataset, order, stream
        self._at: tuple[int, int, int] | None = None  # epoch, window, first position held

    def take(self, step: int) -> Iterator[tuple[Pixels, Ints | None, Ints]]:
        for epoch, window, start, stop in self._order.segments(step, self._stream):
            if self._at is None or self._at[:2] != (epoch, window):
                self._load(epoch, window, start)
            assert self._at is not None
            part = slice(start - self._at[2], stop - self._at[2])
            rows = self._rows[part]
            labels = None if self._labels is None else self._labels[part]
            yield self._dataset.decode(self._encoded[part], rows), labels, rows

    def _load(self, epoch: int, window: int, start: int) -> None:
        begin, end = self._order.window_bounds(epoch, window)
        stop = min(end, self._order.slice_of(self._stream)[1]) - begin
        self._encoded = []  # let go of the last window before the next is read
        self._rows = self._order.window_rows(epoch, window)[start:stop]
        self._encoded, self._labels = self._dataset.gather(self._rows)
        self._at = epoch, window, start
