"""A run as MLflow shows it: its tags, parameters, description and dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.data.shards import Dataset
from pipeline.runs.record import Trial, trial_of
from pipeline.storage.runs import Run
from pipeline.tracking.text import describe
from pipeline.tracking.tracker import TrackedDataset, Tracker
from pipeline.training.models import build_diffusion, has_process


def start_tracking(
    tracker: Tracker,
    run: Run,
    experiment: Experiment,
    dataset: Dataset | None,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> None:
    """Open the MLflow run, or leave that in the spool until the store answers; `tags` and `params` are further ones."""
    trial, tracked = trial_of(run.record), None
    if dataset is not None:
        tracked = TrackedDataset(dataset.manifest.name, dataset.manifest.fingerprint, dataset.location)
    tracker.start(
        f"{run.record.name} {run.id}" if trial is None else trial.name,
        tags={
            **({} if trial is None else trial.tags),
            **_origin_tags(run),
            "dataset": run.record.dataset["name"],
            "model": experiment.model.type,
            **_process_tags(experiment),
            "code_version": run.record.code_version,
            "checkpoints": str(run.checkpoints if run.remote is None else run.remote.folder.child("checkpoints")),
            **tags,
        },
        params={**_recorded_settings(experiment, trial), **params},
        description=describe(run, {}),
        dataset=tracked,
    )


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
