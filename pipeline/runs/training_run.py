"""A training from its command line to its scores: prepare, record, train in attempts, evaluate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from pipeline.cluster.session import require_resources
from pipeline.cluster.train import run_attempts
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile, home_of, load_profile, storage_of, use_variables
from pipeline.config.experiment import (
    DEFAULT_PRESET,
    Experiment,
    differences,
    load_experiment,
    with_overrides,
)
from pipeline.console import Console
from pipeline.data.labels import NO_CLASSES, ClassNames, class_names_of
from pipeline.data.shards import Dataset
from pipeline.errors import CheckpointError, DataError, InterruptedRunError, RefusedError, StorageError, UsageError
from pipeline.import_path import allow_modules_in
from pipeline.ingest.ingest import availability, ensure_ingested, ingest_options
from pipeline.ingest.resolve import absolute_source
from pipeline.metrics.classifier_store import Recipe
from pipeline.planning.plan import Plan, choose_workers, make_plan
from pipeline.runs.conclude import Outcome, conclude
from pipeline.runs.record import Trial, allowance_of, trial_of
from pipeline.signals import Terminated
from pipeline.storage.home import datasets_dir
from pipeline.storage.provenance import JOB_VARIABLE, of_submission
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run, RunStatus
from pipeline.tracking.opened import checked_run
from pipeline.tracking.text import describe
from pipeline.tracking.tracker import TrackedDataset, Tracker, TrackingSettings
from pipeline.training.combinations import check_labels
from pipeline.training.models import build_diffusion, has_process
from pipeline.training.trained import experiment_of, profile_of
from pipeline.worker.job import Job

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked to train, and where; `origin` as in a run's record."""

    experiment: Experiment
    profile: Profile
    origin: dict[str, str] | None = None


def train_request(
    experiment: str | None,
    preset: str | None,
    data: str | None,
    cluster: str | None,
    overrides: Sequence[str],
) -> TrainRequest:
    """Read experiment and profile; UsageError where they are wrong."""
    if experiment is not None and preset is not None:
        raise UsageError(f"got both the file {experiment} and --preset {preset}; give one of them")
    path = presets.find("experiments", experiment or preset or DEFAULT_PRESET)
    if data is not None:
        data = absolute_source(data)
    allow_modules_in(os.getcwd())
    return TrainRequest(load_experiment(path, overrides, data), load_profile(cluster))


def plan_training(asked: TrainRequest) -> Plan:
    """Work out and check a training without downloading, ingesting or writing anything.

    Away from a profile's cluster neither it nor its storage is asked, which may answer to its nodes alone: the source tells of the images.
    """
    num_workers = choose_workers(asked.experiment, asked.profile)
    away = asked.profile.kind == "job" and JOB_VARIABLE not in os.environ
    if not away:
        require_resources(asked.profile, num_workers)
    source, options = asked.experiment.data.source, ingest_options(asked.experiment.data)
    datasets = datasets_dir(asked.profile.home()) if away else asked.profile.datasets()
    found = availability(source, options, datasets)
    return make_plan(
        asked.experiment,
        asked.profile,
        num_workers,
        data=f"{source}; what the cluster has of it was not looked at" if away else found.text,
        num_rows=found.num_rows,
        shape=found.shape,
        num_classes=found.num_classes,
    )


def start_training(asked: TrainRequest, command: Sequence[str], console: Console | None = None) -> Outcome:
    """Train a new run to its end and evaluate it."""
    console = console or Console()
    num_workers = choose_workers(asked.experiment, asked.profile)
    require_resources(asked.profile, num_workers)
    tracking = checked_run(TrackingSettings.of_profile(asked.profile.home(), asked.profile), None, console.say)
    # what can be refused without the images is refused before they are fetched
    make_plan(asked.experiment, asked.profile, num_workers, data="", num_rows=None, shape=None)
    dataset = ensure_ingested(
        asked.experiment.data.source,
        ingest_options(asked.experiment.data),
        asked.profile.datasets(),
        console.say,
        cache=asked.profile.cache,
    )
    checked = _plan_for(asked.experiment, asked.profile, num_workers, dataset)
    if unscored := _cannot_be_scored(asked.experiment, dataset):
        console.say(f"warning: the images will not be scored: {unscored}")
    run = _create(checked, dataset, command, origin=asked.origin)
    return _carry_out(run, checked, dataset, console, tracking=tracking)


def resume_training(
    reference: str,
    cluster: str | None,
    overrides: Sequence[str],
    *,
    fork: bool,
    command: Sequence[str],
    data: str | None = None,
    isolated: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Go on with a run from its newest checkpoint that verifies, or fork a new run from its weights, on other `data` if given.

    `isolated` puts a single worker, too, into a process of its own.
    """
    console = console or Console()
    run = Run.find(home_of(cluster), reference, storage_of(cluster))
    allow_modules_in(os.getcwd())
    if not fork and data is not None:
        raise UsageError(f"--data: run {run.id} goes on with its own images; train on others as a new run with --fork")
    if not fork and run.record.imported_from:
        raise UsageError(f"run {run.id} was imported, not trained here; fine-tune it as a new run with --fork")
    old = experiment_of(run)
    new = with_overrides(old, overrides)
    profile = profile_of(run, cluster)
    if isolated:
        profile = profile.isolating()
    use_variables(profile)
    if data is None:
        dataset = _dataset_of(run, profile)
    else:
        source = absolute_source(data)
        new = new.model_copy(update={"data": new.data.model_copy(update={"source": source})})
        dataset = ensure_ingested(
            source, ingest_options(new.data), profile.datasets(), console.say, cache=profile.cache
        )
    num_workers = choose_workers(new, profile)
    require_resources(profile, num_workers)
    tracking = checked_run(TrackingSettings.of_profile(profile.home(), profile), None if fork else run.id, console.say)
    checked = _plan_for(new, profile, num_workers, dataset)
    if fork:
        saved = RunCheckpoints(run)
        origin = saved.newest_verified().checkpoint
        if origin is None:
            raise CheckpointError(f"run {run.id} has no checkpoint to fork from; ddpm-pipe resume {run.id} first")
        if new.model.class_conditional:
            _require_same_classes(run, ClassNames.from_state(origin.state()), dataset)
        comes_from = origin_of(
            f"run {run.id}", f"from the averaged weights of step {origin.step} of", run.mlflow_run_id
        )
        forked = _create(checked, dataset, command, initial_weights=saved.name_of(origin), origin=comes_from)
        console.say(f"run {forked.id} starts from the averaged weights of run {run.id} at step {origin.step}")
        return _carry_out(forked, checked, dataset, console, tracking=tracking)
    changed = differences(old, new)
    if changed:
        raise CheckpointError(
            f"run {run.id} cannot go on with other settings ({'; '.join(changed)}); leave them, or start a new run from its "
            "weights with --fork"
        )
    state = run.state()
    if state.status is RunStatus.FINISHED and state.step >= new.training.steps:
        raise UsageError(
            f"run {run.id} is finished at step {state.step}; train longer with -s training.steps={2 * state.step}, "
            f"or see: ddpm-pipe evaluate {run.id}"
        )
    return _carry_out(run, checked, dataset, console, overrides, tracking=tracking)


def carry_on(
    run: Run,
    console: Console,
    observe: Observer | None = None,
    tracking: TrackingSettings | None = None,
    profile: Profile | None = None,
) -> Outcome:
    """Train a run as its record says, from its newest checkpoint that verifies; `observe` as for `run_attempts`.

    `tracking` is where it is recorded, if its profile does not say: a sweep's trials are recorded where the sweep is. `profile` is what it
    takes, if that is not what it was begun with.
    """
    experiment, profile = experiment_of(run), profile or profile_of(run, None)
    use_variables(profile)
    dataset = _dataset_of(run, profile)
    checked = _plan_for(experiment, profile, choose_workers(experiment, profile), dataset)
    return _carry_out(run, checked, dataset, console, observe=observe, tracking=tracking)


def _carry_out(
    run: Run,
    checked: Plan,
    dataset: Dataset,
    console: Console,
    overrides: Sequence[str] = (),
    observe: Observer | None = None,
    tracking: TrackingSettings | None = None,
) -> Outcome:
    """Train and evaluate under the run's lock, and leave its status true whatever happens."""
    profile = checked.profile
    settings = tracking or TrackingSettings.of_profile(profile.home(), profile)
    job = Job(
        run_folder=str(run.folder),
        dataset_folder=dataset.location,
        experiment=checked.experiment.to_dict(),
        profile=profile.to_dict(),
        num_workers=checked.num_workers,
        num_streams=checked.num_streams,
        attempt=0,
        code_folder=os.getcwd(),
        tracking=replace(settings, mlflow_run_id=None),
        initial_weights=run.record.initial_weights,
        allowance=allowance_of(run),
        run_address=None if run.remote is None else run.remote.folder.uri,
    )
    with run.lock(), _open_tracking(run, checked, dataset, settings, overrides) as tracker:
        for warning in checked.warnings:
            console.say(f"warning: {warning}")
            run.log(f"warning: {warning}")
        console.say(
            f"run {run.id}: {run.record.name}, {checked.experiment.training.steps} steps {checked.place}, in {run.folder}"
        )
        try:
            run_attempts(run, job, profile, console, observe)
            _draw_schedule(run, checked.experiment, dataset, tracker)
            outcome = conclude(run, profile, settings, console)
        except InterruptedRunError as error:
            _close(run, settings, RunStatus.INTERRUPTED, str(error))
            raise
        except (KeyboardInterrupt, Terminated) as stop:
            by_user = isinstance(stop, KeyboardInterrupt)
            _close(run, settings, RunStatus.INTERRUPTED, f"stopped by {'the user' if by_user else 'SIGTERM'}")
            code = 130 if by_user else 75 if RunCheckpoints(run).committed() else 143
            raise InterruptedRunError(f"stopped; go on with: ddpm-pipe resume {run.id}", code) from None
        except Exception as error:
            _close(run, settings, RunStatus.FAILED, str(error))
            raise
        run.update(status=RunStatus.FINISHED, reason="", step=outcome.step)
    return outcome


@contextmanager
def _open_tracking(
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
        run.record.name if trial is None else trial.name,
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
            **_told_settings(experiment, trial),
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


def _draw_schedule(run: Run, experiment: Experiment, dataset: Dataset, tracker: Tracker) -> None:
    """Draw the noise schedule, unless a training of this run that ended before has."""
    from pipeline.pictures.schedule_picture import draw_schedules, example_of

    picture = run.folder / "pictures" / "schedule.png"
    if has_process(experiment) and not picture.exists():
        picture.parent.mkdir(exist_ok=True)
        draw_schedules([build_diffusion(experiment).schedule], *example_of(dataset), picture)
        tracker.artifact(picture, "pictures")


def origin_of(what: str, words: str, mlflow_run_id: str | None) -> dict[str, str]:
    """Return what a run's record says of the run or sweep it comes from; `words` go before its name."""
    return {"what": what, "words": words, "mlflow_run_id": mlflow_run_id or ""}


def _told_settings(experiment: Experiment, trial: Trial | None) -> dict[str, Any]:
    """Return the settings by name; without the number of steps where the clock ends a trial, for none would be true beforehand."""
    timed = trial is not None and trial.allowance.seconds is not None
    return {key: value for key, value in experiment.flat().items() if not (timed and key == "training.steps")}


def _origin_tags(run: Run) -> dict[str, str]:
    """Return what links a run to the one it comes from, in MLflow's search; nothing where it comes from none."""
    origin = run.record.origin
    if origin is None:
        return {}
    linked = {"ddpm_pipe.origin_mlflow_run": origin["mlflow_run_id"]} if origin["mlflow_run_id"] else {}
    return {"ddpm_pipe.origin": origin["what"], **linked}


def _process_tags(experiment: Experiment) -> dict[str, str]:
    """Return what a search for runs may ask of their process; nothing where there is none."""
    if not has_process(experiment):
        return {}
    settings = experiment.diffusion
    degenerate = {"degenerate_schedule": "true"} if build_diffusion(experiment).schedule.is_degenerate else {}
    return {"schedule": settings.schedule, "num_timesteps": str(settings.num_timesteps), **degenerate}


def _close(run: Run, settings: TrackingSettings, status: RunStatus, reason: str) -> None:
    with suppress(
        StorageError
    ):  # the reason is what the user must read; a run that is marked as running by nobody is INTERRUPTED
        run.update(status=status, reason=reason)
    tracker = Tracker(run.folder, settings)
    tracker.finish("FAILED" if status is RunStatus.FAILED else "KILLED")
    tracker.close(timeout=10.0)


def _create(
    checked: Plan,
    dataset: Dataset,
    command: Sequence[str],
    initial_weights: str | None = None,
    origin: dict[str, str] | None = None,
) -> Run:
    manifest = dataset.manifest
    about: dict[str, Any] = {"path": dataset.location, "fingerprint": manifest.fingerprint, "name": manifest.name}
    return Run.create(
        checked.profile.home(),
        name=checked.experiment.name,
        experiment=checked.experiment.to_dict(),
        config_hash=checked.experiment.hash(),
        dataset=about,
        profile=checked.profile.to_dict(),
        command=list(command),
        initial_weights=initial_weights,
        origin=origin,
    )


def _plan_for(experiment: Experiment, profile: Profile, num_workers: int, dataset: Dataset) -> Plan:
    manifest = dataset.manifest
    class_names = class_names_of(dataset) if experiment.model.class_conditional else NO_CLASSES
    check_labels(experiment, experiment.sampling, class_names)
    return make_plan(
        experiment,
        profile,
        num_workers,
        data=dataset.location,
        num_rows=manifest.num_rows,
        shape=manifest.shape,
        num_classes=len(class_names),
    )


def _cannot_be_scored(experiment: Experiment, dataset: Dataset) -> str:
    """Return why the classifier that an experiment asks for cannot judge these images, "" if it can: to be told before the training."""
    asked = experiment.evaluation
    if asked.enabled and asked.extractor == "classifier":
        try:
            Recipe.for_dataset(dataset)
        except RefusedError as error:
            return str(error)
    return ""


def _require_same_classes(run: Run, known: ClassNames, dataset: Dataset) -> None:
    """Refuse images whose labels are not the classes that a run's weights know by these numbers (UsageError)."""
    found = class_names_of(dataset)
    for number, (old, new) in enumerate(zip_longest(known, found)):
        if known and old != new:
            raise UsageError(
                f"class {number} of run {run.id} is {old!r}, of the images of {dataset.manifest.name} it is {new!r}: its weights "
                "would take one class for another; give images with its classes in its order, or train a new model on these"
            )


def _dataset_of(run: Run, profile: Profile) -> Dataset:
    """Open the dataset a run was started on; CheckpointError where it has become another one."""
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
