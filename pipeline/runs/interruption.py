"""What a user reads who stops `sample` or `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import InterruptedRunError
from pipeline.signals import Terminated


@contextmanager
def kept_when_stopped() -> Iterator[None]:
    """Raise InterruptedRunError on Ctrl-C or SIGTERM: chunks that are computed are kept."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        raise InterruptedRunError(
            "stopped; what was computed so far is kept: the same command goes on from there",
            130 if isinstance(stop, KeyboardInterrupt) else 75,
        ) from None
