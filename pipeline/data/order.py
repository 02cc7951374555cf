"""The order in which training reads the rows of a dataset: pure functions without state; any step is computed directly.

    epoch      one permutation of the dataset's rows, a pure function of (row groups, seed, epoch, window):
               the row groups are permuted, their concatenation is cut into windows of consecutive whole row groups
               holding at least `window` rows (the last may hold fewer), and rows are permuted inside each window
    stream k   of S reads slice [k N // S, (k + 1) N // S) of epoch 0, then the same slice of epoch 1, and so on
    step s     the next batch_size / S rows of each stream, streams in order: the batch does not depend on the workers
    worker r   of R owns the streams r, r + R, r + 2 R, ...

A stream touches the row groups of one window at a time, so a worker that reads from disk holds a bounded part of the
dataset; the order is the same if all of it is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import UsageError

Rows = npt.NDArray[np.int64]

# Part of every draw; a changed permutation algorithm must change the tag.
_TAG = "ddpm-pipe order 1"


class Segment(NamedTuple):
    """Positions [start, stop) inside one window of one epoch."""

    epoch: int
    window: int
    start: int
    stop: int


class _Plan(NamedTuple):
    """One epoch: its row groups in permuted order, and where each window begins, counted in groups and in rows."""

    groups: Rows
    first_group: Rows  # [num_windows + 1]
    first_row: Rows  # [num_windows + 1]


@dataclass(frozen=True)
class Order:
    """The rows that every step of a training reads.

    Args:
        row_groups: rows of every row group of the dataset, in the manifest's order.
        seed: any integer; another seed is another order.
        num_streams: slices of an epoch that advance side by side; divides `batch_size`.
        batch_size: rows of one step over all workers; at most the number of rows.
        window: minimum number of rows shuffled together; the number of rows or more shuffles all of them.

    Raises:
        UsageError: a value is out of range.
    """

    row_groups: tuple[int, ...]
    seed: int
    num_streams: int
    batch_size: int
    window: int
    # Derived and cached; neither compared nor pickled.
    _group_starts: Rows = field(init=False, repr=False, compare=False)
    _plan: Callable[[int], _Plan] = field(init=False, repr=False, compare=False)
    _permuted: Callable[[int, int], Rows] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_group_starts", _starts(np.asarray(self.row_groups, dtype=np.int64)))
        _check(self)
        windows_in_use = min(2 * self.num_streams, 2 * (self.num_rows // self.window + 1))
        object.__setattr__(self, "_plan", lru_cache(maxsize=4)(self._make_plan))
        object.__setattr__(self, "_permuted", lru_cache(maxsize=windows_in_use)(self._permute_window))

    def __reduce__(self) -> tuple[type[Order], tuple[tuple[int, ...], int, int, int, int]]:
        return Order, (self.row_groups, self.seed, self.num_streams, self.batch_size, self.window)

    @property
    def num_rows(self) -> int:
        return int(self._group_starts[-1])

    @property
    def rows_per_stream(self) -> int:
        """Rows that each stream contributes to each step."""
        return self.batch_size // self.num_streams

    @property
    def steps_per_epoch(self) -> float:
        """Steps per epoch, num_rows / batch_size; rarely a whole number."""
        return self.num_rows / self.batch_size

    def parts(self, stream: int, step: int = 0) -> Iterator[Segment]:
        """Yield, without end, the segments that `stream` reads from `step` on, each inside one window."""
        first, last = self.slice_of(stream)
        epoch, offset = divmod(step * self.rows_per_stream, last - first)
        while True:
            starts = self._plan(epoch).first_row
            position = first + offset
            window = int(np.searchsorted(starts, position, side="right")) - 1
            while position < last:
                begin, end = int(starts[window]), int(starts[window + 1])
                yield Segment(epoch, window, position - begin, min(last, end) - begin)
                position, window = end, window + 1
            epoch, offset = epoch + 1, 0

    def rows_of(self, part: Segment) -> Rows:
        """Return the dataset rows of a segment in shuffled order, int64, read-only."""
        return self._permuted(part.epoch, part.window)[part.start : part.stop]

    def slice_of(self, stream: int) -> tuple[int, int]:
        """Return the positions [first, last) of each epoch that belong to `stream`."""
        if not 0 <= stream < self.num_streams:
            raise ValueError(f"stream {stream} is outside 0..{self.num_streams - 1}")
        return stream * self.num_rows // self.num_streams, (stream + 1) * self.num_rows // self.num_streams

    def _make_plan(self, epoch: int) -> _Plan:
        sizes = np.asarray(self.row_groups, dtype=np.int64)
        groups = _permutation(len(sizes), "row groups", self.seed, epoch)
        starts = _starts(sizes[groups])
        first_group = [0]
        while first_group[-1] < len(sizes):  # the fewest further groups that fill a window, or all that are left
            full = np.searchsorted(starts, starts[first_group[-1]] + self.window, side="left")
            first_group.append(min(int(full), len(sizes)))
        edges = np.asarray(first_group, dtype=np.int64)
        return _Plan(groups, edges, starts[edges])

    def _permute_window(self, epoch: int, window: int) -> Rows:
        plan = self._plan(epoch)
        groups = plan.groups[plan.first_group[window] : plan.first_group[window + 1]]
        rows = np.concatenate([np.arange(self._group_starts[g], self._group_starts[g + 1]) for g in groups])
        permuted = rows[_permutation(len(rows), "rows", self.seed, epoch, window)]
        permuted.setflags(write=False)
        return permuted


def default_num_streams(batch_size: int) -> int:
    """Return the largest power of two up to 16 that divides `batch_size`."""
    return next(n for n in (16, 8, 4, 2, 1) if batch_size % n == 0)


def streams_of_worker(rank: int, world: int, num_streams: int) -> range:
    """Return the streams that worker `rank` of `world` owns.

    Raises:
        UsageError: `world` does not divide `num_streams`.
    """
    if num_streams % world:
        raise UsageError(
            f"{world} workers cannot share num_streams = {num_streams} evenly: use {_divisors(num_streams)} workers, "
            "or another num_streams"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside 0..{world - 1}")
    return range(rank, num_streams, world)


def _check(order: Order) -> None:
    if not order.row_groups or min(order.row_groups) < 1:
        raise ValueError(f"row_groups must be a non-empty tuple of positive counts, not {order.row_groups!r}")
    for name in ("num_streams", "batch_size", "window"):
        if getattr(order, name) < 1:
            raise UsageError(f"{name} = {getattr(order, name)} is not a positive whole number")
    if order.batch_size > order.num_rows:
        raise UsageError(
            f"batch_size = {order.batch_size} is larger than the dataset's {order.num_rows} rows: "
            f"use a batch_size of at most {order.num_rows}"
        )
    if order.batch_size % order.num_streams:
        raise UsageError(
            f"num_streams = {order.num_streams} does not divide batch_size = {order.batch_size}: "
            f"use {_divisors(order.batch_size)}"
        )


def _divisors(n: int) -> str:
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def _starts(sizes: Rows) -> Rows:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])


def _permutation(n: int, *purpose: str | int) -> Rows:
    """Return a permutation of range(n) seeded by `purpose`, equal on every machine and numpy release.

    The raw output of a counter-based generator and a stable sort are fixed by definition; `Generator.permutation` may change
    between releases of numpy (NEP 19).
    """
    name = "|".join(map(str, (_TAG, *purpose)))
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
