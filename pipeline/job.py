"""What the workers of one attempt are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.tracking import TrackingSettings


@dataclass(frozen=True)
class Job:
    """What the workers of one attempt are told: plain data, the same for all of them."""

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
