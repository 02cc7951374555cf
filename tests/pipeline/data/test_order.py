"""The order of rows, against its definition written out a second time and against what is promised of it."""

from __future__ import annotations

import hashlib
import pickle
from itertools import islice, pairwise, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Order, Segment, default_num_streams, streams_of_worker
from pipeline.errors import UsageError
from tests.kit.data import rows_for


@st.composite
def orders(draw: st.DrawFn) -> Order:
    row_groups = tuple(draw(st.lists(st.integers(1, 9), min_size=4, max_size=12)))
    num_streams = draw(st.sampled_from([1, 2, 3, 4]))
    per_stream = draw(st.integers(1, max(1, sum(row_groups) // num_streams)))
    seed = draw(st.integers(-5, 2**70))
    window = draw(st.integers(1, 60))
    return Order(row_groups, seed, num_streams, num_streams * per_stream, window)


def stream_rows(order: Order, stream: int, num_steps: int) -> list[int]:
    return [int(row) for step in range(num_steps) for row in rows_for(order, step, stream)]


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counters from 1 on."""
    mask, words, counter = 2**64 - 1, list[int](), 0
    while len(words) < count:
        counter += 1
        c, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


def shuffled(items: list[int], *purpose: object) -> list[int]:
    digest = hashlib.sha256("|".join(map(str, ("ddpm-pipe order 1", *purpose))).encode()).digest()
    words = philox_words((int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")), len(items))
    return [item for _, item in sorted(zip(words, items, strict=True), key=lambda pair: pair[0])]


def epoch_by_definition(order: Order, epoch: int) -> list[list[int]]:
    """Windows of one epoch, from docs/data.md's words: another program for the same order."""
    starts = [sum(order.row_groups[:g]) for g in range(len(order.row_groups))]
    windows: list[list[int]] = [[]]
    for group in shuffled(list(range(len(order.row_groups))), "row groups", order.seed, epoch):
        if len(windows[-1]) >= order.window:
            windows.append([])
        windows[-1] += range(starts[group], starts[group] + order.row_groups[group])
    return [shuffled(window, "rows", order.seed, epoch, i) for i, window in enumerate(windows)]


@given(orders())
def test_the_order_is_its_definition(order: Order) -> None:
    epochs = [[row for window in epoch_by_definition(order, epoch) for row in window] for epoch in range(3)]
    n, num_streams = order.num_rows, order.num_streams
    for k in range(num_streams):
        expected = [row for epoch in epochs for row in epoch[k * n // num_streams : (k + 1) * n // num_streams]]
        steps = len(expected) // order.rows_per_stream
        assert stream_rows(order, k, steps) == expected[: steps * order.rows_per_stream]


@pytest.mark.promise("P3")
@given(orders())
def test_every_row_comes_exactly_once_in_each_epoch(order: Order) -> None:
    for epoch in range(3):
        seen: list[int] = []
        for k in range(order.num_streams):
            first, last = order.slice_of(k)
            length = last - first
            rows = stream_rows(order, k, -(-3 * length // order.rows_per_stream))
            seen += rows[epoch * length : (epoch + 1) * length]
        assert sorted(seen) == list(range(order.num_rows))


@pytest.mark.promise("P3")
@given(orders(), st.integers(0, 40))
def test_a_step_is_found_without_the_steps_before_it(order: Order, step: int) -> None:
    fresh = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert fresh == order
    expected = [stream_rows(order, k, step + 1)[-order.rows_per_stream :] for k in range(order.num_streams)]
    assert [list(rows_for(fresh, step, k)) for k in range(order.num_streams)] == expected


@given(orders())
def test_windows_are_whole_row_groups_and_no_larger_than_needed(order: Order) -> None:
    whole = Order(order.row_groups, order.seed, 1, 1, order.window)  # one stream, so that its parts are the windows
    ends = np.cumsum(order.row_groups)
    windows = [whole.rows_of(part) for part in takewhile(lambda part: part.epoch == 0, whole.parts(0))]
    for rows in windows:
        groups = np.unique(np.searchsorted(ends, rows, side="right"))
        assert sum(order.row_groups[g] for g in groups) == len(rows)  # every row of every group it touches
    assert sum(map(len, windows)) == order.num_rows
    assert all(len(rows) >= order.window for rows in windows[:-1])
    assert all(len(rows) < order.window + max(order.row_groups) for rows in windows)


@given(orders(), st.integers(0, 30))
def test_parts_are_the_same_rows_window_by_window(order: Order, step: int) -> None:
    for k in range(order.num_streams):
        wanted = 20 * order.rows_per_stream
        parts: list[int] = []
        for part in order.parts(k, step):
            parts += order.rows_of(part).tolist()
            if len(parts) >= wanted:
                break
        assert parts[:wanted] == [int(row) for s in range(step, step + 20) for row in rows_for(order, s, k)]


def test_slices_differ_by_one_row_at_most() -> None:
    order = Order((7, 9, 13), seed=0, num_streams=4, batch_size=8, window=10)
    bounds = [order.slice_of(k) for k in range(4)]
    assert [b for _, b in bounds[:-1]] == [a for a, _ in bounds[1:]]
    assert (bounds[0][0], bounds[-1][1]) == (0, 29)
    assert {b - a for a, b in bounds} == {7, 8}


def test_seeds_and_epochs_give_other_orders() -> None:
    def epoch(seed: int, number: int, window: int = 10**6) -> list[int]:
        return list(Order((50, 50, 50, 50), seed, 1, 1, window).rows_of(Segment(number, 0, 0, 200)))

    drawn = [epoch(seed, number) for seed in range(20) for number in range(20)]
    assert len({tuple(rows) for rows in drawn}) == 400
    # Were two of them alike in part, rows would stay in place more often than the one in 200 that chance allows.
    fixed = np.mean([np.mean(np.equal(a, b)) for a, b in pairwise(drawn)])
    assert fixed == pytest.approx(1 / 200, rel=0.2)  # 399 * 200 trials: 4 standard deviations are 20 %


def test_rows_may_be_written_to_without_changing_the_order() -> None:
    order = Order((8, 8), seed=1, num_streams=2, batch_size=4, window=16)
    before = rows_for(order, 0, 0).copy()
    rows_for(order, 0, 0)[:] = -1
    assert list(rows_for(order, 0, 0)) == list(before)


def test_what_is_kept_cannot_be_written_to() -> None:
    order = Order((8, 8), seed=1, num_streams=2, batch_size=4, window=16)
    with pytest.raises(ValueError, match="read-only"):
        order.rows_of(next(order.parts(0)))[:] = 0


@pytest.mark.parametrize(("num_streams", "window"), [(1, 8), (4, 8), (4, 10**6), (8, 33)])
def test_each_window_is_permuted_once_and_few_are_kept(num_streams: int, window: int) -> None:
    """Step after step through two epochs: two windows for each stream at most, and no more than two epochs have."""
    order = Order((8,) * 16, seed=1, num_streams=num_streams, batch_size=8, window=window)
    asked = set()
    for step in range(2 * 16):
        for stream in range(num_streams):
            asked |= {part[:2] for part in islice(order.parts(stream, step), 1)}
            rows_for(order, step, stream)
    found = order._permuted.cache_info()  # type: ignore[attr-defined]
    windows = len({number for epoch, number in asked if epoch == 0})
    assert found.misses == len(asked) == 2 * windows
    assert found.maxsize <= min(2 * num_streams, 2 * (128 // window + 1))
    assert order._plan.cache_info().misses == 2  # type: ignore[attr-defined]


def test_workers_share_the_streams() -> None:
    for world in (1, 2, 4, 8):
        owned = [list(streams_of_worker(rank, world, 8)) for rank in range(world)]
        assert sorted(k for streams in owned for k in streams) == list(range(8))
        assert owned[0] == list(range(0, 8, world))


def test_defaults() -> None:
    assert [default_num_streams(b) for b in (128, 96, 16, 12, 6, 7, 1)] == [16, 16, 16, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 33}, "batch_size = 33 is larger than the dataset's 32 rows: use a batch_size of at most 32"),
        ({"num_streams": 3}, "num_streams = 3 does not divide batch_size = 8: use 1, 2, 4 or 8"),
        ({"num_streams": 0}, "num_streams = 0 is not a positive whole number"),
        ({"window": 0}, "window = 0 is not a positive whole number"),
        ({"batch_size": -8}, "batch_size = -8 is not a positive whole number"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Order(**{"row_groups": (16, 16), "seed": 0, "num_streams": 2, "batch_size": 8, "window": 4, **changes})  # type: ignore[arg-type]
    assert str(error.value) == message


def test_workers_that_do_not_divide_the_streams_are_refused() -> None:
    with pytest.raises(UsageError, match=r"3 workers cannot share num_streams = 8 evenly: use 1, 2, 4 or 8 workers"):
        streams_of_worker(0, 3, 8)
    with pytest.raises(ValueError, match="rank 4 is outside"):
        streams_of_worker(4, 4, 8)
    with pytest.raises(ValueError, match="stream 2 is outside"):
        rows_for(Order((8,), 0, 2, 4, 8), 0, 2)
