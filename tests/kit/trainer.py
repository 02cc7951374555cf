"""A training in a process of its own, without Ray: the worker that Ray starts, in a process that tests may kill where they like."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import DataConfig, experiment_from
from pipeline.ingest.ingest import ensure_ingested
from pipeline.storage import remote
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.team import Team
from pipeline.worker.job import Job
from pipeline.worker.worker import Worker
from tests.kit.attempts import Attempt, attempts_of
from tests.kit.environment import forget_modules
from tests.kit.experiments import TINY, slow_model
from tests.kit.object_store import QUICK


class Alone:
    """A link to nobody: tells a pipe of each step, and asks for a stop after `stop_after` steps of this process."""

    def __init__(self, told: Connection | None = None, stop_after: int | None = None) -> None:
        self.told, self.stop_after, self.steps = told, stop_after, 0

    def publish(self, progress: dict[str, Any]) -> None:
        pass

    def stop_requested(self) -> bool:
        self.steps += 1
        if self.told is not None:
            self.told.send(self.steps)
        return self.stop_after is not None and self.steps >= self.stop_after


def make_run(
    home: Path,
    initial_weights: str | None = None,
    profile: Profile | None = None,
    datasets: Path | None = None,
    **changes: Any,
) -> Run:
    """Make a run of the tiny experiment; `changes` replace its sections. Forked where `initial_weights` says; one thread by default."""
    experiment = experiment_from(TINY | changes)
    dataset = ensure_ingested(DataConfig(), datasets or home / "datasets")
    return Run.create(
        home,
        name=experiment.name,
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(""),
        dataset={"path": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "name": "digits"},
        profile=(profile or Profile(threads_per_worker=1)).to_dict(),
        command=["test"],
        initial_weights=initial_weights,
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
        tracking=TrackingSettings("http://127.0.0.1:9"),  # nobody listens there: training must not care
        initial_weights=run.record.initial_weights,
        run_address=None if run.remote is None else run.remote.folder.uri,
    )


def train(folder: str, told: Connection | None = None, stop_after: int | None = None) -> str:
    """Be the worker of a run's next attempt, until the end, a stop or a kill."""
    run = Run(Path(folder))
    return work(run, job_of(run), Alone(told, stop_after))


def work(run: Run, job: Job, link: Alone) -> str:
    """Be the worker of an attempt that starts at the newest checkpoint and saves the last step that it makes.

    The steps are counted, because the result cannot show it: training is deterministic, so an attempt that ignores every checkpoint
    ends with the same bytes.
    """
    begin = verified_step(run)
    worker = Worker(job, Team(), link)
    outcome = worker.work()
    assert begin + link.steps == worker.train_state.step, f"made {link.steps} steps from step {begin}"
    assert verified_step(run) == worker.train_state.step
    return outcome


def trained_run(home: Path, **changes: Any) -> Run:
    """Return a run of the tiny experiment, trained to its end; `changes` replace sections of the experiment."""
    made = make_run(home, **changes)
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(home))
    try:
        assert train(str(made.folder)) == "finished"
    finally:
        sys.path[:] = path
        forget_modules(home, known)
    return made


def copied(run: Run, home: Path) -> Run:
    """Copy a run's home, with its dataset, to another one; return the run there."""
    before = run.folder.parent.parent
    shutil.copytree(before, home, dirs_exist_ok=True)
    record = home / "runs" / run.id / "run.json"
    record.write_text(record.read_text().replace(str(before), str(home)))
    return Run(record.parent)


def trained_held_sampler(home: Path, hold_after: int, **sampling: Any) -> Run:
    """Return a trained run whose network, a module in `home`, samples no more after so many calls while a file `hold` is beside it."""
    return trained_run(
        home,
        model=slow_model(home, hold_after=hold_after),
        training={"steps": 3, "batch_size": 16},
        sampling=sampling,
    )


def train_in_store(
    home: str,
    run_id: str,
    storage: str,
    environment: dict[str, str],
    elsewhere: str | None,
    told: Connection | None = None,
    stop_after: int | None = None,
) -> None:
    """Be driver and worker of the next attempt of a run in an object store; the worker has its own folder if `elsewhere` names one."""
    os.environ.update(environment)
    remote.RETRIES["backoff"] = QUICK
    run = Run.find(Path(home), run_id, storage)
    with run.lock():
        job = job_of(run)
        run.send_files()
        if elsewhere is not None:
            os.environ["TMPDIR"] = tempfile.tempdir = elsewhere
            job = replace(job, run_folder=f"/nowhere/{run.id}")
        work(run, job, Alone(told, stop_after))
        run.fetch_files()


def only_run(home: Path) -> Run:
    """Return the one run of a home."""
    (run,) = Run.all(home)
    return run


def newest_step(home: Path) -> int:
    """Return the step of the newest committed checkpoint of a home's runs; -1 if there is none."""
    steps = [c.step for folder in home.glob("runs/*/checkpoints") for c in CheckpointStore(folder).committed()]
    return max(steps, default=-1)


def verified_step(run: Run) -> int:
    """Return the step of the newest checkpoint of a run that verifies; 0 before the first."""
    checkpoint = RunCheckpoints(run).newest_verified().checkpoint
    return 0 if checkpoint is None else checkpoint.step


def attempts(home: Path) -> list[Attempt]:
    """Return what the attempts of a home's one run did, by its log; it must log each step."""
    return attempts_of(only_run(home).log_path.read_text())


def final_digests(run: Run) -> dict[str, str]:
    """Return the SHA-256 of the newest checkpoint's tensors, by group; it must be the last step's."""
    checkpoint = RunCheckpoints(run).newest_verified().checkpoint
    assert checkpoint is not None
    assert checkpoint.step == run.record.experiment["training"]["steps"]
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.folder.glob("*.safetensors"))
    }


def logged_losses(run: Run) -> dict[int, float]:
    """Return the recorded loss of each logged step, from the spool; two records of one step must agree."""
    losses: dict[int, float] = {}
    for line in (run.folder / "spool" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("kind") == "metrics" and "train/loss" in event["values"]:
            loss = event["values"]["train/loss"]
            assert losses.setdefault(event["step"], loss) == loss
    return losses
