"""Ctrl-C and SIGTERM as state to be read by work that must end in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


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
    with _handling(signals.note, signal.SIGINT, signal.SIGTERM, *others):
        yield signals


@contextmanager
def raising() -> Iterator[None]:
    """Let SIGTERM raise Terminated instead of ending the process. Inside, `listening` takes precedence."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handling(end, signal.SIGTERM):
        yield


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM during calls that set their own, as Ray's start does: that one ends the process without a message."""
    with _handling(signal.getsignal(signal.SIGTERM), signal.SIGTERM):
        try:
            yield
        except SystemExit:  # raised by Ray's handler, if the signal comes before the old one is set again
            raise Terminated from None


@contextmanager
def _handling(handler: Handler, *numbers: int) -> Iterator[None]:
    """Handle signals for the time of the context. Only the main thread can; in another thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
