"""A training that is planned and has its run folder: attempts, then the scores, under the run's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from pipeline.cluster.session import require_resources
from pipeline.cluster.train import run_attempts
from pipeline.config.cluster_profile import Profile, use_variables
from pipeline.config.experiment import Experiment
from pipeline.console import Console
from pipeline.data.labels import NO_CLASSES, class_names_of, model_labels
from pipeline.data.shards import Dataset
from pipeline.errors import CheckpointError, DataError, InterruptedRunError, StorageError, UsageError
from pipeline.ingest.ingest import held_out_location
from pipeline.planning.footprint import memory_advice, memory_warnings
from pipeline.planning.plan import Plan, choose_workers, make_plan
from pipeline.runs.choose_scorer import open_split
from pipeline.runs.conclude import Outcome, conclude
from pipeline.runs.record import allowance_of
from pipeline.runs.tracked import start_tracking
from pipeline.signals import Terminated
from pipeline.storage.folder import RunStatus
from pipeline.storage.next_command import typeable
from pipeline.storage.provenance import of_submission
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.notices import notify
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.combinations import check_labels
from pipeline.training.models import build_diffusion, has_process
from pipeline.training.trained import experiment_of
from pipeline.training.validation import rows_to_validate
from pipeline.worker.job import Job

Observer = Callable[[dict[str, Any]], None]


def train_trial(run: Run, profile: Profile, tracking: TrackingSettings, console: Console, observe: Observer) -> Outcome:
    """Train a sweep's trial as its record says, from its newest checkpoint that verifies; `observe` as for `run_attempts`."""
    experiment = experiment_of(run)
    use_variables(profile)
    dataset = dataset_of(run, profile)
    plan = make_plan(experiment, profile, choose_workers(experiment, profile))
    return train_run(run, with_dataset(plan, dataset), dataset, tracking, console, observe=observe)


def train_run(
    run: Run,
    plan: Plan,
    dataset: Dataset,
    tracking: TrackingSettings,
    console: Console,
    overrides: Sequence[str] = (),
    observe: Observer | None = None,
) -> Outcome:
    """Train and evaluate under the run's lock; the run's status says how it ended, also after an error."""
    profile = plan.profile
    job = Job(
        run_folder=str(run.folder),
        dataset_folder=dataset.location,
        experiment=plan.experiment.to_dict(),
        profile=profile.to_dict(),
        num_workers=plan.num_workers,
        num_streams=plan.num_streams,
        attempt=0,
        code_folder=os.getcwd(),
        tracking=replace(tracking, mlflow_run_id=None),
        initial_weights=run.record.initial_weights,
        allowance=allowance_of(run),
        run_address=None if run.remote is None else run.remote.folder.uri,
    )
    with run.lock(), _open_tracking(run, plan, dataset, tracking, overrides) as tracker:
        folder, missing = _validation_folder(run, plan.experiment, dataset, profile, console)
        job = replace(job, validation_folder=folder)
        missing = missing or (plan.validation.why_never if plan.validation else "")
        for warning in (*plan.warnings, *([f"no validation: {missing}"] if missing else [])):
            console.say(f"warning: {warning}")
            run.log(f"warning: {warning}")
        console.say(
            f"run {run.id}: {run.record.name}, {plan.experiment.training.steps} steps {plan.place}, in {run.folder}"
        )
        try:
            run_attempts(run, job, profile, console, observe, lambda: memory_advice(plan))
            _draw_schedule(run, plan.experiment, dataset, tracker)
            outcome = conclude(run, profile, tracking, console)
        except InterruptedRunError as error:
            _close(run, profile, tracking, RunStatus.INTERRUPTED, str(error))
            raise
        except (KeyboardInterrupt, Terminated) as stop:
            by_user = isinstance(stop, KeyboardInterrupt)
            _close(run, profile, tracking, RunStatus.INTERRUPTED, f"stopped by {'the user' if by_user else 'SIGTERM'}")
            code = 130 if by_user else 75 if RunCheckpoints(run).committed() else 143
            raise InterruptedRunError(f"stopped; resume with: {typeable(f'resume {run.id}')}", code) from None
        except Exception as error:
            _close(run, profile, tracking, RunStatus.FAILED, str(error))
            raise
        state = run.update(status=RunStatus.FINISHED, reason="", step=outcome.step)
        notify(run, profile, "finished", step=state.step, summary=state.summary)
    return outcome


@contextmanager
def _open_tracking(
    run: Run, plan: Plan, dataset: Dataset, tracking: TrackingSettings, overrides: Sequence[str]
) -> Iterator[Tracker]:
    """Record the overrides, and open the MLflow run; nothing waits for it.

    Where this process trains, the worker begins the delivery, after its first step.
    """
    if overrides:
        run.update(overrides=[*run.state().overrides, *overrides])
    tracker = Tracker(run.folder, tracking, later=plan.profile.trains_here(plan.num_workers))
    tags = {"profile": plan.profile.name, "num_workers": str(plan.num_workers), **of_submission()}
    params = {"num_parameters": plan.num_parameters, "num_streams": plan.num_streams}
    start_tracking(tracker, run, plan.experiment, dataset, tags, params)
    try:
        yield tracker
    finally:
        tracker.close(timeout=10.0)


def _validation_folder(
    run: Run, experiment: Experiment, dataset: Dataset, profile: Profile, console: Console
) -> tuple[str | None, str]:
    """Return where the images that validate are, or None and why there are none, "" if none are asked for.

    Training goes on without them: they do not change its result.
    """
    settings, conditional = experiment.validation, experiment.model.class_conditional
    if settings.split is None and not settings.holdout:
        return None, ""
    try:
        if settings.split is None:
            found = Dataset.open(held_out_location(dataset.location), profile.cache)
        else:
            found = open_split(run, settings.split, console)
        if found.manifest.shape != dataset.manifest.shape:
            return None, f"its images are {found.manifest.shape}, those trained on {dataset.manifest.shape}"
        if conditional:
            rows = rows_to_validate(len(found), settings.num_images)
            model_labels(found, rows, class_names_of(dataset))
    except (UsageError, DataError) as error:
        return None, str(error)
    return found.location, ""


def _draw_schedule(run: Run, experiment: Experiment, dataset: Dataset, tracker: Tracker) -> None:
    """Draw the noise schedule, unless an earlier training of this run has."""
    from pipeline.pictures.schedule_picture import draw_schedules, example_of

    picture = run.folder / "pictures" / "schedule.png"
    if has_process(experiment) and not picture.exists():
        picture.parent.mkdir(exist_ok=True)
        draw_schedules([build_diffusion(experiment).schedule], *example_of(dataset), picture)
        tracker.artifact(picture, "pictures")


def _close(run: Run, profile: Profile, settings: TrackingSettings, status: RunStatus, reason: str) -> None:
    # the user must read the reason, not this error; a run that nobody holds counts as INTERRUPTED anyway
    with suppress(StorageError):
        run.update(status=status, reason=reason)
    notify(run, profile, "failed" if status is RunStatus.FAILED else "interrupted", reason, step=run.state().step)
    tracker = Tracker(run.folder, settings)
    tracker.finish("FAILED" if status is RunStatus.FAILED else "KILLED")
    tracker.close(timeout=10.0)


def plan_of(experiment: Experiment, profile: Profile) -> Plan:
    """Plan a training whose images are not here yet; UsageError or ClusterError where it cannot work."""
    num_workers = choose_workers(experiment, profile)
    require_resources(profile, num_workers)
    return make_plan(experiment, profile, num_workers)


def with_dataset(plan: Plan, dataset: Dataset) -> Plan:
    """Return the plan for the images of a dataset; UsageError where they do not fit."""
    experiment, manifest = plan.experiment, dataset.manifest
    class_names = class_names_of(dataset) if experiment.model.class_conditional else NO_CLASSES
    check_labels(experiment, experiment.sampling, class_names)
    fitted = plan.with_images(dataset.location, manifest.num_rows, manifest.shape, len(class_names))
    return replace(fitted, fingerprint=manifest.fingerprint, warnings=(*fitted.warnings, *memory_warnings(fitted)))


def dataset_of(run: Run, profile: Profile) -> Dataset:
    """Open the dataset that a run was started on. CheckpointError if its images have changed."""
    about = run.record.dataset
    if not about["path"]:
        raise DataError(f"run {run.id} was imported without images; name some with --fork --data SOURCE")
    dataset = Dataset.open(about["path"], profile.cache)
    if dataset.manifest.fingerprint != about["fingerprint"]:
        raise CheckpointError(
            f"run {run.id} was trained on other images: dataset.fingerprint: {about['fingerprint'][:12]} -> "
            f"{dataset.manifest.fingerprint[:12]} in {about['path']}; restore them, or start a new run"
        )
    return dataset
