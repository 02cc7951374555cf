"""Ctrl-C and SIGTERM as something to be read, while work goes on that has to be ended in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Terminated(BaseException):
    """SIGTERM where nobody reads signals: as Ctrl-C's KeyboardInterrupt does, it passes what handles errors, up to who ends the work."""


class StoppedAtOnce(BaseException):
    """A second signal, where work goes on in the main thread: what it is doing is left as it is."""


@dataclass
class Signals:
    """What the user or the system has asked for since the context began: SIGINT or SIGTERM, and how often."""

    received: list[int]
    _ends_at_once: bool = False

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Let a second signal raise StoppedAtOnce in the main thread, which is busy here and looks at the first only now and then."""
        self._ends_at_once = True
        try:
            if len(self.received) > 1:
                raise StoppedAtOnce
            yield
        finally:
            self._ends_at_once = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: its handler."""
        self.received.append(number)
        if self._ends_at_once and len(self.received) > 1:
            raise StoppedAtOnce

    @property
    def first(self) -> int | None:
        """The first signal, which asks for saving and stopping; a second one stops at once."""
        return self.received[0] if self.received else None


@contextmanager
def listening(*others: int) -> Iterator[Signals]:
    """Collect SIGINT, SIGTERM and others instead of ending by them. They reach a process's main thread; another thread gets none."""
    signals = Signals([])
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM, *others)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[None]:
    """Let SIGTERM raise Terminated instead of ending the process; `listening` goes before, for its time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM through what sets one of its own, as Ray's start does: that ends the process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # by Ray's handler, which has been there for a moment
        raise Terminated from None
    finally:
        signal.signal(signal.SIGTERM, before)
