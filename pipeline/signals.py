"""Ctrl-C and SIGTERM as state to be read by work that must end in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Terminated(BaseException):
    """SIGTERM outside `listening`. Like KeyboardInterrupt, it is no Exception, so that handlers of errors do not catch it."""


class StoppedAtOnce(BaseException):
    """A second signal during work in the main thread, which ends at once."""


@dataclass
class Signals:
    """The signals since the context began, SIGINT or SIGTERM."""

    received: list[int]
    _ends_at_once: bool = False

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Let a second signal raise StoppedAtOnce in the main thread, which works here and checks for the first only from time to time."""
        self._ends_at_once = True
        try:
            if len(self.received) > 1:
                raise StoppedAtOnce
            yield
        finally:
            self._ends_at_once = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Record a signal. This is its handler."""
        self.received.append(number)
        if self._ends_at_once and len(self.received) > 1:
            raise StoppedAtOnce

    @property
    def first(self) -> int | None:
        """The first signal, which asks to save and stop; a second one stops at once."""
        return self.received[0] if self.received else None


@contextmanager
def listening(*others: int) -> Iterator[Signals]:
    """Collect SIGINT, SIGTERM and others instead of ending the process. Only the main thread receives them."""
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
    """Let SIGTERM raise Terminated instead of ending the process. Inside, `listening` takes precedence."""
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
    """Keep the handler of SIGTERM during calls that set their own, as Ray's start does: that one ends the process without a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler, if the signal comes before the old one is set again
        raise Terminated from None
    finally:
        signal.signal(signal.SIGTERM, before)
