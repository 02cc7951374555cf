"""One attempt of a training, wherever it runs: it is watched until it ends or is asked to stop, and says how it ended.

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
    """How an attempt ended: with an outcome, or with the cause of its failure.

    `details` are for the run's log. `planned` says why the driver stopped it in order to go on at once; `lost` are nodes that no longer
    answer.
    """

    outcome: str | None
    cause: str = ""
    planned: str = ""
    lost: frozenset[str] = frozenset()
    details: str = ""


class Attempt(ABC):
    """One attempt of a run, with the worker count that its job says."""

    def __init__(self, job: Job, profile: Profile, console: Console, signals: Signals) -> None:
        self.job, self.profile, self.console, self.signals = job, profile, console, signals
        self.planned = ""
        self.asked_at: float | None = None

    @abstractmethod
    def run(self, observe: Observer) -> Ended:
        """Train until the end, a stop or a failure; a PipelineError of a worker is raised here."""

    @abstractmethod
    def _read(self) -> dict[str, Any]:
        """Return what the control actor says; {} if it does not answer."""

    @abstractmethod
    def _stop(self) -> None:
        """Ask the workers to save and stop."""

    def _is_lost(self) -> bool:
        """Whether there is nobody left to watch."""
        return False

    @abstractmethod
    def _look_around(self, seen: dict[str, Any], begin: tuple[int, float] | None) -> None:
        """Do what else is to be done now and then; `begin` are the step and the time of the first progress."""

    def _watch(self, ended: Callable[[float], bool], observe: Observer) -> dict[str, Any]:
        """Show progress until `ended`, which waits for some seconds, returns True; ask for a stop on a signal, and leave on a second one.

        Returns what the control actor said last.
        """
        begin: tuple[int, float] | None = None
        shown: dict[str, Any] = {}
        seen: dict[str, Any] = {}
        over = False
        bar = Bar(self.console, "training", self.job.experiment["training"]["steps"], "steps", quiet_s=0.0)
        while not over:
            over = ended(POLL_S)
            seen = self._hear() or seen
            if self._is_lost():
                break
            observe(seen)
            progress = seen.get("progress")
            if progress and progress != shown:
                shown = progress
                beside = f"loss {progress['loss']:.4f}, {progress['images_per_s']:,.0f} images/s"
                bar(progress["step"], beside, first=begin is None)
                begin = begin or (progress["step"], time.monotonic())
            bar.refresh()
            if len(self.signals.received) > 1 or self._stop_is_overdue():
                break
            if self.signals.first is not None and (self.asked_at is None or self.planned):
                self._ask("", "stopping after this step, and saving; once more to stop at once")
            self._look_around(seen, begin)
        bar.close()
        return seen

    def _hear(self) -> dict[str, Any]:
        """Return what the control actor says, and print its warnings."""
        seen = self._read()
        for warning in seen.get("warnings", ()):
            self.console.say(f"warning: {warning}")
        return seen

    def _ask(self, planned: str, line: str) -> None:
        """Ask the workers to save and stop, and say so."""
        self.asked_at = time.monotonic()
        self.planned = planned
        self.console.say(line)
        self._stop()

    def _stop_is_overdue(self) -> bool:
        """Whether a stop that somebody waits for takes too long; what is planned may: it ends with the saving, or with its node."""
        if self.asked_at is None or self.planned:
            return False
        return time.monotonic() - self.asked_at > self.profile.timeouts.stop_s


def time_left(progress: dict[str, Any], begin: tuple[int, float]) -> float | None:
    """Return the seconds to the last step, by the pace since `begin`; None before there is a pace."""
    done = progress["step"] - begin[0]
    left: float | None = (progress["steps"] - progress["step"]) * (time.monotonic() - begin[1]) / done if done else None
    return left
