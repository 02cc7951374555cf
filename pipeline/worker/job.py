"""What the workers of one attempt get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.tracking.tracker import TrackingSettings


@dataclass(frozen=True)
class Allowance:
    """What a sweep's trial may spend, and where it is judged on the way.

    Attributes:
        seconds: of training, after which the step that is being done is the last; None: the experiment's steps decide.
        rungs: shares of the whole, ascending, at each of which a KID of few images is taken.
        rung_images: how many.
    """

    seconds: float | None = None
    rungs: tuple[float, ...] = ()
    rung_images: int = 256

    def share(self, step: int, steps: int, elapsed_s: float) -> float:
        """Return how much of the whole is spent after a step, 1 for all of it."""
        return step / steps if self.seconds is None else max(elapsed_s / self.seconds, step / steps)


@dataclass(frozen=True)
class Job:
    """What the workers of one attempt get: plain data, the same for all of them.

    `run_folder` is the driver's; `run_address` is where the run lasts if that is an object store.
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
    allowance: Allowance = Allowance()
