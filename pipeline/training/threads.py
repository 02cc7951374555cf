"""Arithmetic whose result does not depend on the number of threads: each operation on one, independent parts on several at a time.

Sums end in other last bits when more threads share them. What profiles have in common (a fitted classifier, features of real images, the
metrics themselves) must not depend on the profile, the machine's cores or OMP_NUM_THREADS, so each operation has one thread: the only
number that no machine lacks, no OpenMP setting lowers, and no core waits for. The cores are used all the same, by computing several
batches, subsets or blocks at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

THREADS = 1
"""Threads of each operation. Part of the key of all that is kept for several profiles."""

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Give each operation of torch one thread, in this thread of Python's; usable as a decorator, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(function: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    """Return `function` of each part, in order, each computed as under `one_thread`; as many at a time as torch has threads here."""
    at_once, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def compute(part: T) -> R:
        with torch.inference_mode(inference):  # which threads do not inherit
            return function(part)

    with one_thread():
        if at_once == 1:
            return [function(part) for part in parts]
        with ThreadPoolExecutor(at_once, "arithmetic", torch.set_num_threads, (THREADS,)) as threads:
            return list(threads.map(compute, parts))
