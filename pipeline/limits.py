"""Work with a time limit: in a daemon thread, which is left alone once the limit is over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> Callable[[float], T | None]:
    """Start work in a daemon thread. The returned function waits some seconds for its result, and returns None if it is not ready.

    It also raises the exception of the work, if there was one.
    """
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()

    def wait(seconds: float) -> T | None:
        thread.join(seconds)
        if failed:
            raise failed[0]
        return done[0] if done else None

    return wait
