"""Which checkpoints of a run are kept. It loads no torch, since experiments name it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.storage.judgements import best_first

LAST = "last"  # how a checkpoint was chosen: the newest, or one whose step was named, and not by scores
BEST = "best"
Which = int | Literal["best"] | None  # a checkpoint: of a step, the best by the scores while training, or the newest


def read_which(text: str) -> Which:
    """Read what a user names a checkpoint by; ValueError if it is neither a step nor `latest` or `best`."""
    if text == BEST:
        return "best"
    if text != "latest" and int(text) < 0:
        raise ValueError(text)
    return None if text == "latest" else int(text)


@dataclass(frozen=True)
class Retention:
    """Checkpoints that are kept: the newest, those of named steps, and the best by a score recorded while training.

    A step is scored right after it was saved, before a newer one is: what waits for its score is among the newest.
    """

    newest: int
    milestones: Collection[int] = ()
    best: int = 0
    metric: str = "kid"

    @property
    def most(self) -> int:
        """How many checkpoints are kept at most."""
        return self.newest + len(self.milestones) + self.best

    def pinned(self, run_folder: Path, attempt: int) -> set[str]:
        """Return the names of the checkpoints of a run's attempts that are kept whatever their age; some may not be there."""
        from pipeline.storage.checkpoint import name_of

        milestones = {name_of(step, number) for step in self.milestones for number in range(attempt + 1)}
        return milestones | {scored.checkpoint for scored in best_first(run_folder, self.metric)[: self.best]}
