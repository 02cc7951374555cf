"""Decode images in a pool of processes, in order; small sources are decoded in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

from pipeline.cpus import usable_cpus
from pipeline.errors import DataError
from pipeline.ingest.rows import Item, Rows, Shape, Treatment, make_rows

_CHUNK_ROWS = 256
_CHUNK_BYTES = 4 * 2**20
_WORTH_A_POOL_BYTES = 64 * 2**20  # of encoded images: seconds of decoding; a pool takes one second to start
_MAX_WORKERS = 16


def default_num_workers(num_bytes: int) -> int:
    """Return the number of decoding processes: 1 (this process) for small sources, else one per core, at most 16."""
    if num_bytes < _WORTH_A_POOL_BYTES:
        return 1
    return min(_MAX_WORKERS, usable_cpus())


def all_rows(items: Iterable[Item], treatment: Treatment, num_workers: int) -> Iterator[Rows]:
    """Yield the rows of `items`, in the same order for any number of processes.

    Raises:
        DataError: an item is refused (the first one, in order), or a process died while decoding.
    """
    chunks = _in_chunks(items)
    first = None
    while first is None:
        opening = next(chunks, None)
        if opening is None:
            return
        head = make_rows(opening, treatment, None)
        yield head
        first = head.first
    if num_workers <= 1:
        yield from (make_rows(chunk, treatment, first) for chunk in chunks)
        return
    second = next(chunks, None)
    if second is not None:
        yield from _by_pool(chain([second], chunks), treatment, first, num_workers)


def _by_pool(
    chunks: Iterable[list[Item]], treatment: Treatment, first: tuple[str, Shape], num_workers: int
) -> Iterator[Rows]:
    # New interpreters: a fork of a process with threads (torch, pyarrow) may hang.
    spawn = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[Item], Future[Rows]]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_begin_worker) as pool:
        try:
            for chunk in chunks:
                with _without_main():
                    pending.append((chunk, pool.submit(make_rows, chunk, treatment, first)))
                if len(pending) > 2 * num_workers:
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import this program's main module: a script without the usual guard would run a second time, and one
    from standard input would fail."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _result(chunk: list[Item], future: Future[Rows]) -> Rows:
    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(
            f"a process died while decoding {chunk[0].where} to {chunk[-1].where}: "
            "decode in one process (--workers 1) to find out more"
        ) from None


def _begin_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    num_bytes = 0
    for item in items:
        chunk.append(item)
        num_bytes += _num_bytes(item)
        if len(chunk) == _CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _num_bytes(item: Item) -> int:
    if isinstance(item.image, Path):
        with suppress(OSError):  # reading it raises the error
            return item.image.stat().st_size
        return 0
    if isinstance(item.image, bytes):
        return len(item.image)
    return 0 if item.image is None else item.image.nbytes
