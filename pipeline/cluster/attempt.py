"""One attempt of a training, wherever it runs: it is watched until it ends or is asked to stop, and its end is described.

`attempt_here` trains in this process, `attempt_on_ray` in the workers of Ray Train.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.console import Bar, Console
from pipeline.signals import Signals
from pipeline.worker.job import Job

POLL_S = 0.2

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: `outcome`, or `cause` if it failed.

    `details` are for the run's log. `planned` is the driver's reason if it stopped the attempt in order to start the next one. `lost` are
    nodes that no longer answer.
    """

    outcome: str | None
    cause: str = ""
    planned: str = ""
    lost: frozenset[str] = frozenset()
    details: str = ""


class Attempt(ABC):
    """One attempt of a run, with the number of workers in its job."""

    def __init__(self, job: Job, profile: Profile, console: Console, signals: Signals) -> None:
        self.job, self.profile, self.console, self.signals = job, profile, console, signals
        self.seen: dict[str, Any] = {}  # what the control actor returned last
        self.begin: tuple[int, float] | None = None  # step and time of the first progress
        self.planned = ""
        self.asked_at: float | None = None

    @abstractmethod
    def run(self, observe: Observer) -> Ended:
        """Train until the end, a stop or a failure. Raises the PipelineError of a worker."""

    @abstractmethod
    def _read(self) -> dict[str, Any]:
        """Return the state of the control actor; {} if it does not answer."""

    @abstractmethod
    def _stop(self) -> None:
        """Ask the workers to save and stop."""

    def _is_lost(self) -> bool:
        """Whether the workers and their control actor are gone."""
        return False

    @abstractmethod
    def _look_around(self) -> None:
        """Do the periodic checks of this kind of attempt."""

    def _watch(self, ended: Callable[[float], bool], observe: Observer) -> None:
        """Show progress until `ended`, which waits for some seconds, returns True. Ask for a stop on a signal, return on a second one."""
        shown: dict[str, Any] = {}
        over = False
        bar = Bar(self.console, "training", self.job.experiment["training"]["steps"], "steps", quiet_s=0.0)
        while not over:
            over = ended(POLL_S)
            self._hear()
            if self._is_lost():
                break
            observe(self.seen)
            progress = self.seen.get("progress")
            if progress and progress != shown:
                shown = progress
                validation = progress.get("validation_loss")
                losses = f"loss {progress['loss']:.4f}" + ("" if validation is None else f", val loss {validation:.4f}")
                beside = f"{losses}, {progress['images_per_s']:,.0f} images/s"
                bar(progress["step"], beside, first=self.begin is None)
                self.begin = self.begin or (progress["step"], time.monotonic())
            bar.refresh()
            if self.signals.again or self._stop_is_overdue():
                break
            if self.signals.first is not None and (self.asked_at is None or self.planned):
                self._ask("", "stopping after this step, and saving; once more to stop at once")
            self._look_around()
        bar.close()

    def _hear(self) -> None:
        """Read the control actor, and print its warnings."""
        found = self._read()
        for warning in found.get("warnings", ()):
            self.console.say(f"warning: {warning}")
        self.seen = found or self.seen

    def _ask(self, planned: str, line: str) -> None:
        """Ask the workers to save and stop, and print a line."""
        self.asked_at = time.monotonic()
        self.planned = planned
        self.console.say(line)
        self._stop()

    def _stop_is_overdue(self) -> bool:
        """Whether a stop that a user or the system waits for takes too long. A planned one has no deadline."""
        if self.asked_at is None or self.planned:
            return False
        return time.monotonic() - self.asked_at > self.profile.timeouts.stop_s

    def _time_left(self) -> float | None:
        """Return the seconds to the last step, by the pace since the first progress; None before there is a pace."""
        progress = self.seen.get("progress")
        if not progress or self.begin is None or progress["step"] == self.begin[0]:
            return None
        pace = (time.monotonic() - self.begin[1]) / (progress["step"] - self.begin[0])
        left: float = (progress["steps"] - progress["step"]) * pace
        return left
