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
    walks = [_Walk(order, stream, step) for stream in streams]
    while True:
        for rows in _next_steps(walks, order):
            yield RawBatch(step, dataset.read(rows), dataset.labels(rows), rows)
            step += 1


def _from_disk(dataset: Dataset, order: Order, streams: Sequence[int], step: int) -> Iterator[RawBatch]:
    buffer = _WindowBuffer(dataset, order, len(streams))
    buffer.walks = walks = [_WalkOnDisk(order, stream, step, buffer) for stream in streams]
    while True:
        for places in _next_steps(walks, order):
            yield buffer.batch(step, places)
            step += 1


def _next_steps(walks: Sequence[_Walk], order: Order) -> Ints:
    """Return the values of several steps at once, [steps, b], since a call per step would cost more than the reading."""
    count = order.rows_per_stream
    steps = _steps_at_once(order)
    values = np.empty((len(walks), steps * count), dtype=np.int64)
    for walk, own in zip(walks, values, strict=True):
        walk.read(own)
    return values.reshape(len(walks), steps, count).swapaxes(0, 1).reshape(steps, len(walks) * count)


def _steps_at_once(order: Order) -> int:
    return max(1, _ROWS_AT_ONCE // order.rows_per_stream)


class _Walk:
    """One stream, segment by segment: `values` are the rows of the current segment, `upcoming` is the next segment."""

    def __init__(self, order: Order, stream: int, step: int) -> None:
        self.stream = stream
        self._order, self._parts = order, order.parts(stream, step)
        self.upcoming = next(self._parts)
        self.values = np.empty(0, dtype=np.int64)
        self._next = 0

    def read(self, out: Ints) -> None:
        """Write the stream's next values."""
        done = 0
        while done < len(out):
            if self._next == len(self.values):
                part, self.upcoming = self.upcoming, next(self._parts)
                self._next = 0
                self.enter(part, out[:done])
            taken = min(len(out) - done, len(self.values) - self._next)
            out[done : done + taken] = self.values[self._next : self._next + taken]
            self._next, done = self._next + taken, done + taken

    def enter(self, part: Segment, written: Ints) -> None:
        """Set `values` to those of this segment; `written` are values of the previous one that the reader has not used yet."""
        self.values = self._order.rows_of(part)


class _WalkOnDisk(_Walk):
    """A walk whose values are places in the buffer instead of rows."""

    def __init__(self, order: Order, stream: int, step: int, buffer: _WindowBuffer) -> None:
        super().__init__(order, stream, step)
        self._buffer = buffer
        self._span: _Span | None = None

    def enter(self, part: Segment, written: Ints) -> None:
        if self._span is not None:  # released before the next rows are read, which take its place
            self._buffer.keep(self, written)
            self._buffer.release(self._span)
        self.values, self._span = self._buffer.take(self.stream, part)


@dataclass
class _Span:
    """A range of the buffer, and the number of streams that still need it."""

    start: int
    size: int
    users: int


class _WindowBuffer:
    """Keeps the stored form of the rows in the current windows of a worker's streams.

    A window is read once for all streams that enter it now or next. If windows are larger than slices, reading it once per stream would
    read the dataset as many times as there are streams. One array has the rows of all streams, so a batch is one gather. Its first places
    keep rows whose window is left before their batch is complete.
    """

    def __init__(self, dataset: Dataset, order: Order, num_streams: int) -> None:
        self.walks: list[_WalkOnDisk] = []
        self._dataset, self._order = dataset, order
        self._ready: dict[tuple[int, Segment], tuple[Ints, _Span]] = {}
        slice_rows = order.num_rows // order.num_streams + 1
        part_rows = min(slice_rows, order.window + max(order.row_groups))
        self._aside = _steps_at_once(order) * order.rows_per_stream  # places of one stream
        first = num_streams * self._aside
        size = first + num_streams * part_rows
        self._images = dataset.storage(size)
        self._rows = np.empty(size, dtype=np.int64)
        self._labels = np.empty(size, dtype=np.int64)
        self._gaps = [(first, size)]  # free ranges (start, end)

    def batch(self, step: int, places: Ints) -> RawBatch:
        """Return the batch of the rows at these places."""
        rows = self._rows[places]
        images = np.empty((len(places), *self._dataset.manifest.shape), dtype=np.uint8)
        self._dataset.decode(self._images, places, rows, images)
        return RawBatch(step, images, self._labels[places] if self._dataset.manifest.has_labels else None, rows)

    def keep(self, walk: _WalkOnDisk, places: Ints) -> None:
        """Copy unused rows of a finished segment to the reserved places, and update `places`."""
        start = self.walks.index(walk) * self._aside
        for array in (self._images, self._rows, self._labels):
            array[start : start + len(places)] = array[places]
        places[:] = np.arange(start, start + len(places))

    def take(self, stream: int, part: Segment) -> tuple[Ints, _Span]:
        """Return the places of a segment's rows; read them from disk unless another stream has."""
        if (stream, part) not in self._ready:
            together = {walk.stream: walk.upcoming for walk in self.walks if walk.upcoming[:2] == part[:2]}
            self._read([(stream, part), *together.items()])
        return self._ready.pop((stream, part))

    def release(self, span: _Span) -> None:
        """Note that one stream no longer needs the span."""
        span.users -= 1
        if span.users:
            return
        end = span.start + span.size
        if self._images.dtype == object:
            self._images[span.start : end] = None  # free the files
        merged: list[tuple[int, int]] = []
        for begin, stop in sorted([*self._gaps, (span.start, end)]):
            if merged and merged[-1][1] == begin:
                begin = merged.pop()[0]
            merged.append((begin, stop))
        self._gaps = merged

    def _read(self, wanted: list[tuple[int, Segment]]) -> None:
        rows = [self._order.rows_of(part) for _, part in wanted]
        together = np.concatenate(rows)
        span = self._reserve(len(together), len(wanted))
        stretch = slice(span.start, span.start + span.size)
        places = span.start + self._dataset.load(together, self._images[stretch], self._labels[stretch])
        self._rows[places] = together
        for walk in self.walks:  # fetch their next segments while these rows are used
            self._dataset.expect(partial(self._order.rows_of, walk.upcoming))
        for key, own in zip(wanted, np.split(places, np.cumsum([len(r) for r in rows])[:-1]), strict=True):
            self._ready[key] = own, span

    def _reserve(self, size: int, users: int) -> _Span:
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[i : i + 1] = [(start + size, end)] if start + size < end else []
                return _Span(start, size, users)
        start, capacity = len(self._rows), max(len(self._rows) + size, len(self._rows) * 5 // 4)
        if capacity > start + size:
            self._gaps.append((start + size, capacity))
        for name in ("_images", "_rows", "_labels"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[:start] = old
            setattr(self, name, new)
        return _Span(start, size, users)
