"""The batches of a training: one worker's rows of every step, from memory or window by window from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.data.order import Order, Segment

if TYPE_CHECKING:
    from pipeline.data.shards import Dataset
    from pipeline.data.shards_format import Stored

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

MEMORY_BUDGET_BYTES = 2 * 2**30
_ROWS_AT_ONCE = 64  # of a stream


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
    """Yield, without end, the batches of one worker's streams from `start_step` on: rows of its first stream, its second, ...

    A dataset whose decoded images fit into `memory_budget_bytes` is kept in memory; any other is read window by window. The batches
    are equal.

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
    count = order.rows_per_stream
    num_steps = max(1, _ROWS_AT_ONCE // count)  # at once, since going over the streams costs more than reading
    by_stream = [_rows(order, stream, step, num_steps * count) for stream in streams]
    while True:
        values = np.stack([next(rows) for rows in by_stream]).reshape(len(streams), num_steps, count)
        for rows in values.swapaxes(0, 1).reshape(num_steps, -1):
            yield RawBatch(step, dataset.read(rows), dataset.labels(rows), rows)
            step += 1


def _rows(order: Order, stream: int, step: int, count: int) -> Iterator[Ints]:
    """Yield the rows of a stream, `count` at a time."""
    rows = np.empty(0, dtype=np.int64)
    for part in order.parts(stream, step):
        rows = np.concatenate([rows, order.rows_of(part)])
        while len(rows) >= count:
            yield rows[:count]
            rows = rows[count:]


def _from_disk(dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> Iterator[RawBatch]:
    windows = _Windows(dataset, order, streams, step)
    count, size = order.rows_per_stream, order.rows_per_stream * len(streams)
    while True:
        rows, labels = np.empty((2, size), dtype=np.int64)
        images = np.empty((size, *dataset.manifest.shape), dtype=np.uint8)
        for stream, start in zip(streams, range(0, size, count), strict=True):
            own = slice(start, start + count)
            windows.read(stream, images[own], labels[own], rows[own])
        yield RawBatch(step, images, labels if dataset.manifest.has_labels else None, rows)
        step += 1


@dataclass
class _Loaded:
    """The rows of a segment that are still to be read, and their places in stored images and labels, which other streams may share."""

    rows: Ints
    places: Ints
    images: Stored
    labels: Ints


class _Windows:
    """The stored form of the rows in the current window of each of a worker's streams.

    A window is read once for all streams that enter it now or next. If windows are larger than slices, reading it once per stream would
    read the dataset as many times as there are streams. Its memory is freed when the last of these streams leaves it.
    """

    def __init__(self, dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> None:
        self._dataset, self._order = dataset, order
        self._parts = {stream: order.parts(stream, step) for stream in streams}
        self._upcoming = {stream: next(parts) for stream, parts in self._parts.items()}
        self._current: dict[int, _Loaded] = {}
        self._ready: dict[tuple[int, Segment], _Loaded] = {}

    def read(self, stream: int, images: Pixels, labels: Ints, rows: Ints) -> None:
        """Write a stream's next images, labels and rows, as many as there is room for."""
        done = 0
        while done < len(rows):
            if stream not in self._current:
                self._current[stream] = self._enter(stream)
            part = self._current[stream]
            count = min(len(rows) - done, len(part.rows))
            out, places = slice(done, done + count), part.places[:count]
            rows[out], labels[out] = part.rows[:count], part.labels[places]
            self._dataset.decode(part.images, places, rows[out], images[out])
            part.rows, part.places = part.rows[count:], part.places[count:]
            if not len(part.rows):
                del self._current[stream], part  # freed before the next window is read
            done += count

    def _enter(self, stream: int) -> _Loaded:
        """Return the stream's next segment; read its window from disk unless that was done for another stream."""
        part = self._upcoming[stream]
        self._upcoming[stream] = next(self._parts[stream])
        if (stream, part) not in self._ready:
            others = [
                entry for entry in self._upcoming.items() if entry[1][:2] == part[:2] and entry not in self._ready
            ]
            self._load([(stream, part), *others])
        return self._ready.pop((stream, part))

    def _load(self, wanted: list[tuple[int, Segment]]) -> None:
        rows = [self._order.rows_of(part) for _, part in wanted]
        together = np.concatenate(rows)
        images, labels = self._dataset.storage(len(together)), np.empty(len(together), dtype=np.int64)
        places = self._dataset.load(together, images, labels)
        for part in self._upcoming.values():  # download their shards while these rows are used
            self._dataset.expect(partial(self._order.rows_of, part))
        ends = np.cumsum([len(own) for own in rows])[:-1]
        for key, own, at in zip(wanted, rows, np.split(places, ends), strict=True):
            self._ready[key] = _Loaded(own, at, images, labels)
