"""Ctrl-C and SIGTERM as state to be read by work that must end in good order.

In a job of Slurm SIGUSR1 asks to save and stop, too: Slurm sends it ahead of the time limit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

NEAR_LIMIT = "stopped, because the time limit of the job is near: raise slurm.time, or run the same command again"
Handler = Callable[[int, FrameType | None], Any] | int | None


class Terminated(BaseException):
    """SIGTERM, or SIGUSR1 of Slurm, outside `listening`.

    Like KeyboardInterrupt, it is no Exception, so that handlers of errors do not catch it. Its message, if any, is for the user.
    """


class StoppedAtOnce(BaseException):
    """A second signal during work in the main thread, which ends at once."""


@dataclass
class Signals:
    """The signals since the context began: SIGINT, SIGTERM, and in a job of Slurm SIGUSR1."""

    received: list[int]
    overdue: bool = False  # the next signal ends the work at once
    _ends_at_once: bool = False

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Let a second signal raise StoppedAtOnce in the main thread, which works here and checks for the first only from time to time."""
        self._ends_at_once = True
        try:
            if self.again:
                raise StoppedAtOnce
            yield
        finally:
            self._ends_at_once = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Record a signal. This is its handler."""
        self.received.append(number)
        if self._ends_at_once and self.again:
            raise StoppedAtOnce

    @property
    def first(self) -> int | None:
        """The first signal, which asks to save and stop; a second one stops at once."""
        return self.received[0] if self.received else None

    @property
    def again(self) -> bool:
        """Whether there was a second signal. SIGUSR1 is none: a job's script sends it beside what Slurm itself sends."""
        return self.overdue or sum(number != signal.SIGUSR1 for number in self.received) > 1


def in_slurm_job() -> bool:
    """Whether this process runs in a job of Slurm."""
    return "SLURM_JOB_ID" in os.environ


@contextmanager
def listening(*others: int) -> Iterator[Signals]:
    """Collect SIGINT, SIGTERM and others instead of ending the process. Only the main thread receives them."""
    signals = Signals([])
    with _handling(signals.note, signal.SIGINT, *_requests_to_stop(), *others):
        yield signals


@contextmanager
def raising() -> Iterator[None]:
    """Let SIGTERM, and Slurm's SIGUSR1, raise Terminated instead of ending the process. Inside, `listening` takes precedence."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(*[NEAR_LIMIT] * (number == signal.SIGUSR1))

    with _handling(end, *_requests_to_stop()):
        yield


def _requests_to_stop() -> tuple[int, ...]:
    return (signal.SIGTERM, signal.SIGUSR1) if in_slurm_job() else (signal.SIGTERM,)


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
