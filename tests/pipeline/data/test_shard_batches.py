"""Batches in a training's order: the same from memory and from disk, for any number of workers, from any step."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.order import Order, streams_of_worker
from pipeline.data.shards import Dataset, RawBatch, read_batches
from tests.kit.data import dataset_of, rows_for, some_images

FROM_DISK = 0  # a memory budget that nothing fits


@pytest.fixture(scope="module", params=["raw", "png"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Raw images in row groups of 128 and two shards; PNG without labels in row groups of 64 and four shards."""
    shape, count = {"raw": ((64, 64, 3), 300), "png": ((72, 72, 3), 200)}[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "data"
    labels = np.arange(count) if request.param == "raw" else None
    return dataset_of(folder, some_images(count, shape), labels, rows_per_shard=128 if request.param == "raw" else 64)


def batches(dataset: Dataset, order: Order, streams: range, start: int, count: int, budget: int) -> list[RawBatch]:
    return list(islice(read_batches(dataset, order, streams, start, memory_budget_bytes=budget), count))


def assert_same(a: RawBatch, b: RawBatch) -> None:
    assert a.step == b.step
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.images, b.images)
    assert (a.labels is None) == (b.labels is None)
    if a.labels is not None and b.labels is not None:
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.slow
@pytest.mark.parametrize(("num_streams", "batch_size"), [(4, 12), (2, 200), (50, 50)])
@pytest.mark.parametrize("window", [1, 100, 10_000])
def test_memory_and_disk_give_the_same_batches(stored: Dataset, window: int, num_streams: int, batch_size: int) -> None:
    """Also where a step takes more rows of a stream than a window has, and where slices are shorter than windows."""
    order = Order(stored.manifest.row_groups, 5, num_streams, batch_size, window)
    num_steps = 2 * len(stored) // batch_size + 5  # into the third epoch
    held = Dataset.open(stored.folder)
    from_memory = batches(held, order, range(num_streams), 0, num_steps, 2**40)
    from_disk = batches(stored, order, range(num_streams), 0, num_steps, FROM_DISK)
    assert held.in_memory
    assert not stored.in_memory
    for a, b in zip(from_memory, from_disk, strict=True):
        assert_same(a, b)


def test_batches_are_the_rows_of_the_order(stored: Dataset) -> None:
    order = Order(stored.manifest.row_groups, 5, 4, 12, 100)
    for batch in batches(stored, order, range(4), 0, 30, FROM_DISK):
        np.testing.assert_array_equal(batch.rows, np.concatenate([rows_for(order, batch.step, k) for k in range(4)]))
        np.testing.assert_array_equal(batch.images, stored.read(batch.rows))
        if batch.labels is not None:
            np.testing.assert_array_equal(batch.labels, batch.rows)  # as they were ingested


@pytest.mark.promise("P3")
@pytest.mark.parametrize("budget", [FROM_DISK, 2**40], ids=["disk", "memory"])
def test_starting_later_gives_the_tail(stored: Dataset, budget: int) -> None:
    order = Order(stored.manifest.row_groups, 5, 2, 8, 100)
    whole = batches(Dataset.open(stored.folder), order, range(2), 0, 90, budget)
    for start in (1, 17, 38, 89):
        tail = batches(Dataset.open(stored.folder), order, range(2), start, 90 - start, budget)
        for a, b in zip(whole[start:], tail, strict=True):
            assert_same(a, b)


@pytest.mark.promise("P3")
@pytest.mark.parametrize("world", [2, 4])
def test_workers_together_read_what_one_reads(stored: Dataset, world: int) -> None:
    order = Order(stored.manifest.row_groups, 5, 8, 24, 100)
    alone = batches(stored, order, range(8), 0, 30, FROM_DISK)
    parts = [
        batches(Dataset.open(stored.folder), order, streams_of_worker(rank, world, 8), 0, 30, FROM_DISK)
        for rank in range(world)
    ]
    for step, batch in enumerate(alone):
        by_stream = {
            stream: (part[step].rows.reshape(-1, 3)[i], part[step].images.reshape(-1, 3, *stored.manifest.shape)[i])
            for rank, part in enumerate(parts)
            for i, stream in enumerate(streams_of_worker(rank, world, 8))
        }
        np.testing.assert_array_equal(np.concatenate([by_stream[k][0] for k in range(8)]), batch.rows)
        np.testing.assert_array_equal(np.concatenate([by_stream[k][1] for k in range(8)]), batch.images)


def test_a_worker_reads_only_the_row_groups_of_its_windows(tmp_path: Path) -> None:
    """All files but those that hold its first windows may be away."""
    dataset = dataset_of(tmp_path / "d", some_images(640, (72, 72, 3)), rows_per_shard=64)  # ten shards of one group
    order = Order(dataset.manifest.row_groups, 5, 2, 4, 128)  # windows of two groups, slices of two and a half windows
    reader = read_batches(dataset, order, [1], memory_budget_bytes=FROM_DISK)
    parts = list(islice(order.parts(1), 2))  # half a window and a whole one
    needed = {int(row) // 64 for part in parts for row in order.rows_of(part)}
    assert [part.stop - part.start for part in parts] == [64, 128]
    assert 3 <= len(needed) <= 4
    for shard in set(range(10)) - needed:
        (dataset.folder / f"shard-{shard:05d}.parquet").unlink()
    assert len(list(islice(reader, 40))) == 40


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
@pytest.mark.parametrize(("num_streams", "window", "most"), [(8, 10_000, 1.1), (5, 128, 2.1)])
def test_streams_that_share_a_window_read_it_once(tmp_path: Path, num_streams: int, window: int, most: float) -> None:
    """An epoch reads the dataset about once, not once for each stream; windows that slices cut are read twice."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    dataset = dataset_of(tmp_path / "d", some_images(1024, (64, 64, 3)))  # row groups of 128
    size = sum(shard.num_bytes for shard in dataset.manifest.shards)
    order = Order(dataset.manifest.row_groups, 5, num_streams, num_streams, window)
    reader = read_batches(dataset, order, range(num_streams), memory_budget_bytes=FROM_DISK)
    before = bytes_read()
    for _ in range(1024 // num_streams):
        next(reader)
    assert 0.99 * size < bytes_read() - before < most * size


def test_a_worker_holds_no_more_than_its_windows(tmp_path: Path) -> None:
    """One of eight streams, windows of 128 of 1,024 rows: an eighth of the images, the order's numbers and a batch."""
    dataset = dataset_of(tmp_path / "d", some_images(1024, (64, 64, 3)))
    order = Order(dataset.manifest.row_groups, 5, 8, 8, 128)
    tracemalloc.start()
    try:
        for batch in islice(read_batches(dataset, order, [3], memory_budget_bytes=FROM_DISK), 300):
            assert batch.images.shape == (1, 3, 64, 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.2 * dataset.manifest.num_bytes_decoded


def test_an_order_of_another_dataset_is_refused(stored: Dataset) -> None:
    with pytest.raises(ValueError, match="other row groups"):
        read_batches(stored, Order((8, 8), 0, 1, 4, 8), [0])
