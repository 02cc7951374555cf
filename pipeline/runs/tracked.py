"""A training as MLflow shows it: its tags, parameters, description and dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.data.shards import Dataset
from pipeline.planning.plan import Plan
from pipeline.runs.record import Trial, trial_of
from pipeline.storage.provenance import of_submission
from pipeline.storage.runs import Run
from pipeline.tracking.text import describe
from pipeline.tracking.tracker import TrackedDataset, Tracker, TrackingSettings
from pipeline.training.models import build_diffusion, has_process


@contextmanager
def open_tracking(
    run: Run, checked: Plan, dataset: Dataset, settings: TrackingSettings, overrides: Sequence[str]
) -> Iterator[Tracker]:
    """Record the overrides and open the MLflow run, or leave that in the spool until the store answers; nothing waits for it.

    Where this process trains, the worker begins the delivery, after its first step.
    """
    if overrides:
        run.update(overrides=[*run.state().overrides, *overrides])
    experiment, manifest = checked.experiment, dataset.manifest
    tracker = Tracker(run.folder, settings, later=checked.profile.trains_here(checked.num_workers))
    trial = trial_of(run.record)
    tracker.start(
        settings.experiment,
        f"{run.record.name} {run.id}" if trial is None else trial.name,
        tags={
            **({} if trial is None else trial.tags),
            **_origin_tags(run),
            "dataset": manifest.name,
            "model": experiment.model.type,
            **_process_tags(experiment),
            "profile": checked.profile.name,
            "num_workers": str(checked.num_workers),
            "code_version": run.record.code_version,
            **of_submission(),
            "checkpoints": str(run.checkpoints if run.remote is None else run.remote.folder.child("checkpoints")),
        },
        params={
            **_recorded_settings(experiment, trial),
            "num_parameters": checked.num_parameters,
            "num_streams": checked.num_streams,
        },
        description=describe(run, {}),
        dataset=TrackedDataset(manifest.name, manifest.fingerprint, dataset.location),
    )
    try:
        yield tracker
    finally:
        tracker.close(timeout=10.0)


def _recorded_settings(experiment: Experiment, trial: Trial | None) -> dict[str, Any]:
    """Return the settings by name; without the number of steps where the clock ends a trial, for none would be true beforehand."""
    timed = trial is not None and trial.allowance.seconds is not None
    return {key: value for key, value in experiment.flat().items() if not (timed and key == "training.steps")}


def _origin_tags(run: Run) -> dict[str, str]:
    """Return the tags that link a run to the run or sweep it comes from; {} if it comes from none."""
    origin = run.record.origin
    if origin is None:
        return {}
    linked = {"ddpm_pipe.origin_mlflow_run": origin["mlflow_run_id"]} if origin["mlflow_run_id"] else {}
    return {"ddpm_pipe.origin": origin["what"], **linked}


def _process_tags(experiment: Experiment) -> dict[str, str]:
    """Return the tags of the diffusion process; {} for a model without one."""
    if not has_process(experiment):
        return {}
    settings = experiment.diffusion
    degenerate = {"degenerate_schedule": "true"} if build_diffusion(experiment).schedule.is_degenerate else {}
    return {"schedule": settings.schedule, "num_timesteps": str(settings.num_timesteps), **degenerate}
