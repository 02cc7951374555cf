"""What the attempts of a run did, by its log: where each started, and the steps that it made.

Training is deterministic: an attempt that ignores every checkpoint ends with the same bytes, so a test of a resume counts the steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

START = re.compile(r"attempt \d+ starts at step (\d+) ")
LINE = re.compile(r"attempt (\d+) starts at step (\d+) |step (\d+)/\d+  loss ")


@dataclass
class Attempt:
    """One attempt: the step that it started at, and the steps that it logged."""

    number: int
    start: int
    steps: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The last step that it made."""
        return self.steps[-1] if self.steps else self.start


def attempts_of(log: str) -> list[Attempt]:
    """Return the attempts of a run that logs each step; each made one step after another from the one that it started at."""
    found: list[Attempt] = []
    for match in LINE.finditer(log):
        number, start, step = match.groups()
        if step is None:
            found.append(Attempt(int(number), int(start)))
        else:
            found[-1].steps.append(int(step))
    for attempt in found:
        assert attempt.steps == list(range(attempt.start + 1, attempt.end + 1)), attempt
    return found


def starts_of(log: str) -> list[int]:
    """Return the step that each attempt of a run started at."""
    return [int(step) for step in START.findall(log)]


def require_resume(before: Attempt, after: Attempt, every_steps: int) -> None:
    """Require that an attempt after a kill started at a checkpoint and lost no step but those since the newest one."""
    # a step is logged before it is saved
    assert after.start in (before.end, (before.end - 1) // every_steps * every_steps), (before, after)
    assert after.start % every_steps == 0, after
    assert after.start > 0, after
