"""Checks in threads of their own, each with its limit: one that fails or hangs is a red finding, and never stops the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.doctor import verdicts as checks
from pipeline.doctor.verdicts import Finding
from pipeline.errors import PipelineError

T = TypeVar("T")


def limited(name: str, check: Callable[[], Finding], limit_s: float) -> Finding:
    """Return what a check finds; one that fails or does not end in time is red."""
    return begin(name, check, limit_s)()


def begin(name: str, check: Callable[[], Finding], limit_s: float) -> Callable[[], Finding]:
    """Start a check in a thread; what is returned waits for its finding, until the limit counted from now."""
    wait, begin = in_thread(check, f"doctor-{name}"), time.monotonic()

    def finding() -> Finding:
        try:
            found = wait(max(0.0, begin + limit_s - time.monotonic()))
        except PipelineError as error:
            return red_of(name, error)
        except Exception as error:  # a check's own failure is a finding too
            return checks.red(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "see the message")
        if found is None:
            remedy = "something hangs there: look at the network and the file system"
            return checks.red(name, f"no answer within {limit_s:.0f} s", remedy)
        return found

    return finding


def in_thread(work: Callable[[], T], name: str) -> Callable[[float], T | None]:
    """Start work in a thread of its own; what is returned waits for its result, and gives None where it is not done in time."""
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised where the result is waited for
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()

    def wait(seconds: float) -> T | None:
        thread.join(seconds)
        if failed:
            raise failed[0]
        return done[0] if done else None

    return wait


def red_of(name: str, error: PipelineError) -> Finding:
    """Return a finding from one of our errors, whose last part is what to do."""
    said, _, remedy = str(error).rpartition("; ")
    return checks.red(name, said or str(error), remedy if said else "see the message")
