"""Arithmetic whose result does not depend on the number of threads: each operation on one, independent parts on several at a time.

Sums end in other last bits when more threads share them. What profiles have in common (a fitted classifier, features of real images, the
metrics themselves) must not depend on the profile, the machine's cores or OMP_NUM_THREADS, so each operation has one thread: the only
number that no machine lacks, no OpenMP setting lowers, and no core waits for. The cores are used all the same, by computing several
batches, subsets or blocks at once.

Generated images are computed side by side for speed: threads that share one operation wait for each other at its end, and far longer
where other processes use the cores.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

import torch

THREADS = 1
"""Threads of each operation. Part of the key of all that is kept for several profiles."""

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Give each operation of torch so many threads, in this thread of Python's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """`num_threads(THREADS)`; usable as a decorator, too."""
    with num_threads(THREADS):
        yield


def spread(function: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    """Return `function` of each part, in order, each computed as under `one_thread`; as many at a time as torch has threads here."""
    at_once = torch.get_num_threads()
    with one_thread():
        return list(side_by_side(function, parts, at_once, THREADS))


def side_by_side(function: Callable[[T], R], parts: Iterable[T], at_once: int, threads: int) -> Iterator[R]:
    """Yield `function` of each part, in order: `at_once` at a time, each with so many threads of torch's.

    A consumer that ends early, by an interruption too, ends them at their next `leave_if_ended`.
    """
    if at_once == 1:
        yield from map(function, parts)
        return
    before, inference, ended = torch.get_num_threads(), torch.is_inference_mode_enabled(), threading.Event()

    def begin() -> None:
        torch.set_num_threads(threads)
        _this_thread.ended = ended

    def compute(part: T) -> R:
        with torch.inference_mode(inference):  # which threads do not inherit
            return function(part)

    with ThreadPoolExecutor(at_once, "arithmetic", begin) as pool:
        try:
            yield from pool.map(compute, parts)
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # threads that begin later take the number that was set last, by any thread


_this_thread = threading.local()


def leave_if_ended() -> None:
    """Raise CancelledError in a thread of `side_by_side` whose results nobody waits for any more."""
    ended = getattr(_this_thread, "ended", None)
    if ended is not None and ended.is_set():
        raise CancelledError
