"""What a run costs beside its training: the whole worker (tracking, spool, checkpoints, decisions) against its bare loop.

The worker is the one that `ddpm-pipe train` runs in its own process. It trains digits with a network whose step takes about 100 ms on
two cores, logs every ten steps and saves once in five seconds.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.rounds import Case, Measure
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import DataConfig, experiment_from
from pipeline.data.order import Order
from pipeline.data.shards import Dataset
from pipeline.ingest.ingest import ensure_ingested
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.batches import Prefetch, training_batches
from pipeline.training.device import training_compute
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_model, build_objective
from pipeline.training.team import Team
from pipeline.worker.job import Job
from pipeline.worker.worker import Worker

STEPS, STREAMS = 100, 16
EXPERIMENT = experiment_from(
    {
        "name": "frame",
        "model": {"channels": 64, "channel_multipliers": [1, 2], "num_res_blocks": 1, "attention_resolutions": []},
        "training": {"steps": STEPS, "batch_size": 96, "precision": "mixed", "warmup_steps": 0},
        "checkpoint": {"every_steps": 50, "every_minutes": None},
        "logging": {"every_steps": 10, "grid_every_steps": None},
    }
)


def cases() -> list[Case]:
    figures = {"frame_share": lambda measured: 1 - measured["worker"] / measured["bare loop"]}
    return [Case("frame of a training", "steps/s", _contestants, figures, rounds=7)]


class Steps:
    """A link to nobody that notes when each step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def publish(self, progress: dict[str, Any]) -> None:
        pass

    def stop_requested(self) -> bool:
        self.ended.append(time.perf_counter())
        return False

    def rate(self) -> float:
        """Steps per second, the first apart."""
        return (len(self.ended) - 1) / (self.ended[-1] - self.ended[0])


def _contestants(stack: ExitStack) -> dict[str, Measure]:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frame-")))
    dataset = ensure_ingested(DataConfig(), home / "datasets")
    return {"worker": lambda: _worker(home, dataset), "bare loop": lambda: _bare_loop(dataset)}


def _worker(home: Path, dataset: Dataset) -> float:
    run = Run.create(
        home,
        name=EXPERIMENT.name,
        experiment=EXPERIMENT.to_dict(),
        config_hash=EXPERIMENT.hash(""),
        dataset={"path": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "name": "digits"},
        profile=Profile().to_dict(),
        command=["benchmark"],
    )
    job = Job(
        run_folder=str(run.folder),
        dataset_folder=str(dataset.folder),
        experiment=EXPERIMENT.to_dict(),
        profile=Profile().to_dict(),
        num_workers=1,
        num_streams=STREAMS,
        attempt=run.next_attempt(),
        code_folder=str(home),
        tracking=TrackingSettings.resolve(home, experiment="benchmarks"),
    )
    Tracker(run.folder, job.tracking, later=True).start(run.id, {}, {}, "")
    steps = Steps()
    Worker(job, Team(), steps).work()
    return steps.rate()


def _bare_loop(dataset: Dataset) -> float:
    training, seed = EXPERIMENT.training, EXPERIMENT.seed
    compute = training_compute(EXPERIMENT, Profile(), 1, dataset.manifest.shape)
    compute.start()
    model = compute.place(build_model(EXPERIMENT, dataset.manifest.shape)).train()
    state = TrainState.create(model, training, EXPERIMENT.diffusion.num_timesteps, compute)
    order = Order(dataset.manifest.row_groups, seed, STREAMS, training.batch_size, EXPERIMENT.data.shuffle_window)
    steps = Steps()
    with Prefetch(training_batches(dataset, order, range(STREAMS), 0, seed)) as batches:
        loop = fit(state, model, build_objective(EXPERIMENT), batches, training, compute, seed=seed)
        for _ in islice(loop, STEPS):
            steps.stop_requested()
    return steps.rate()
