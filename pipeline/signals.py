"""Ctrl-C and SIGTERM as something to be read, while work goes on that has to be ended in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Signals:
    """What the user or the system has asked for since the context began: SIGINT or SIGTERM, and how often."""

    received: list[int]

    @property
    def first(self) -> int | None:
        """The first signal, which asks for saving and stopping; a second one stops at once."""
        return self.received[0] if self.received else None


@contextmanager
def listening() -> Iterator[Signals]:
    """Collect SIGINT and SIGTERM instead of dying of them. They reach a process's main thread; another thread hears of none."""
    signals = Signals([])
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        signals.received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
