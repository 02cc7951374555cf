"""A training in a process of its own, without Ray: `python -m tests.pipeline.training.trainer RUN_FOLDER`.

The same worker that Ray starts; tests kill this process where they like, and start it again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.cluster_profile import Profile
from pipeline.config import experiment_from
from pipeline.home import default_tracking_uri
from pipeline.ingest import IngestOptions, ensure_ingested
from pipeline.runs import Run
from pipeline.team import Team
from pipeline.tracking import TrackingSettings
from pipeline.worker import Job, Worker

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "channels": 16,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "norm_groups": 4,
        "dropout": 0.2,
    },
    "training": {"steps": 30, "batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 4, "every_minutes": None},
    "logging": {"every_steps": 3, "grid_every_steps": None},
}


class Alone:
    """A link to nobody; prints each step so that a test can kill at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.step = stop_at, 0

    def publish(self, progress: dict[str, Any]) -> None:
        self.step = progress.get("step", self.step)

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.step >= self.stop_at


def make_run(home: Path, **changes: Any) -> Run:
    """Make a run of the tiny experiment; `changes` replace its sections."""
    experiment = experiment_from(SETTINGS | changes)
    dataset = ensure_ingested("digits", IngestOptions(), home / "datasets")
    return Run.create(
        home,
        name=experiment.name,
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(),
        dataset={"path": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "name": "digits"},
        profile=Profile(threads_per_worker=1).to_dict(),
        command=["test"],
    )


def job_of(run: Run) -> Job:
    """Return the job of the next attempt."""
    home = run.folder.parent.parent
    return Job(
        run_folder=str(run.folder),
        dataset_folder=run.record.dataset["path"],
        experiment=run.record.experiment,
        profile=run.record.profile,
        num_workers=1,
        num_streams=16,
        attempt=run.next_attempt(),
        code_folder=str(home),
        tracking=TrackingSettings(default_tracking_uri(home), artifacts=home / "mlartifacts"),
    )


if __name__ == "__main__":
    run = Run(Path(sys.argv[1]))
    print(Worker(job_of(run), Team(), Alone()).work())
