"""The job of an attempt: the data that all its workers get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.tracking.tracker import TrackingSettings


@dataclass(frozen=True)
class Allowance:
    """The budget of a sweep's trial, and the points at which it gets an early score.

    Attributes:
        seconds: of training; the step during which they are over is the last. None: the experiment's steps end the trial.
        rungs: shares of the budget, ascending, at each of which a KID of few images is computed.
        rung_images: the number of these images.
    """

    seconds: float | None = None
    rungs: tuple[float, ...] = ()
    rung_images: int = 256

    def share(self, step: int, steps: int, elapsed_s: float) -> float:
        """Return the share of the budget that is spent after a step, 1 for all of it."""
        return step / steps if self.seconds is None else max(elapsed_s / self.seconds, step / steps)


@dataclass(frozen=True)
class Job:
    """Plain data, the same for all workers of an attempt.

    `run_folder` is the driver's; `run_address` is the run's address if it is kept in an object store. `validation_folder` holds the images
    that validate; None without any.
    """

    run_folder: str
    dataset_folder: str
    experiment: dict[str, Any]
    profile: dict[str, Any]
    num_workers: int
    num_streams: int
    attempt: int
    code_folder: str
    tracking: TrackingSettings
    initial_weights: str | None = None
    run_address: str | None = None
    validation_folder: str | None = None
    allowance: Allowance = Allowance()
