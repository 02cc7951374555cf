"""The one way in which tests wait: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE_S = (
    480.0  # a restart of Ray takes fifteen seconds on a machine that does nothing else, and minutes on a busy one
)


def wait_for(
    condition: Callable[[], Found],
    timeout_s: float = PATIENCE_S,
    *,
    pause_s: float = 0.05,
    explain: Callable[[], object] | None = None,
) -> Found:
    """Wait until `condition()` is true and return its value; after `timeout_s` fail with what `explain()` says then."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, explain() if explain is not None else f"waited {timeout_s:g} s for nothing"
        time.sleep(pause_s)
    return found
