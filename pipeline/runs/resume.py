"""`ddpm-pipe resume`: continue a run from its newest checkpoint, or fork a new run from its weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from pipeline.config.cluster_profile import use_variables
from pipeline.config.context import Context
from pipeline.config.experiment import differences, with_overrides
from pipeline.data.labels import ClassNames, class_names_of
from pipeline.data.shards import Dataset
from pipeline.errors import CheckpointError, UsageError
from pipeline.ingest.ingest import ensure_ingested
from pipeline.ingest.resolve import absolute_source
from pipeline.planning.plan import Plan
from pipeline.runs.conclude import Outcome
from pipeline.runs.record import create_run, origin_of
from pipeline.runs.train_run import dataset_of, plan_of, train_run, with_dataset
from pipeline.storage.folder import RunStatus
from pipeline.storage.next_command import typeable
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.opened import checked_run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.trained import experiment_of, not_trained, profile_of


@dataclass(frozen=True)
class ResumeRequest:
    """How to continue a run.

    Attributes:
        overrides: settings that do not decide the weights, unless the run is forked.
        fork: whether to start a new run from the averaged weights.
        data: other images, for a fork.
        isolated: whether a single worker, too, is a process of its own.
    """

    overrides: tuple[str, ...] = ()
    fork: bool = False
    data: str | None = None
    isolated: bool = False


def resume_training(context: Context, reference: str, asked: ResumeRequest) -> Outcome:
    """Continue a run from its newest checkpoint that verifies, or fork it."""
    if asked.fork and (begun := Run.begun(context.home, context.store)) is not None:
        reference, asked = begun.id, ResumeRequest(isolated=asked.isolated)
    run = Run.find(context.home, reference, context.store, lambda run: _cannot_go_on(run, asked))
    if not asked.fork and asked.data is not None:
        raise UsageError(f"--data: run {run.id} goes on with its own images; train on others as a new run with --fork")
    if not asked.fork and run.record.imported_from:
        raise UsageError(f"run {run.id} was imported, not trained here; fine-tune it as a new run with --fork")
    old = experiment_of(run)
    new = with_overrides(old, asked.overrides)
    profile = profile_of(run, context.named)
    if asked.isolated:
        profile = profile.isolating()
    use_variables(profile)
    holdout = new.validation.holdout
    if asked.data is None and (not asked.fork or holdout == old.validation.holdout):
        dataset = dataset_of(run, profile)
    else:
        if asked.data is not None:
            source = absolute_source(asked.data)
            new = new.model_copy(update={"data": new.data.model_copy(update={"source": source})})
        say = context.console.say
        dataset = ensure_ingested(new.data, profile.datasets(), say, holdout=holdout, cache=profile.cache)
    plan = with_dataset(plan_of(new, profile), dataset)
    ours = None if asked.fork else run.id
    tracking = checked_run(TrackingSettings.of_profile(profile.home(), profile), ours, context.console.say)
    if asked.fork:
        return _fork(context, run, plan, dataset, tracking)
    if changed := differences(old, new):
        raise CheckpointError(
            f"run {run.id} cannot go on with other settings ({'; '.join(changed)}); leave them, or start a new run from its "
            "weights with --fork"
        )
    state = run.state()
    if state.status is RunStatus.FINISHED and state.step >= new.training.steps:
        raise UsageError(
            f"run {run.id} is finished at step {state.step}; train longer with -s training.steps={2 * state.step}, "
            f"or see: {typeable(f'evaluate {run.id}')}"
        )
    return train_run(run, plan, dataset, tracking, context.console, asked.overrides)


def _cannot_go_on(run: Run, asked: ResumeRequest) -> str:
    """Return why `latest` is not this run, "" if it may be."""
    if asked.fork:
        return not_trained(run)
    if run.record.imported_from:
        return "imported"
    if run.is_locked():
        return "running"
    return "finished" if run.state().status is RunStatus.FINISHED and not asked.overrides else ""


def _fork(context: Context, run: Run, plan: Plan, dataset: Dataset, tracking: TrackingSettings) -> Outcome:
    """Train a new run that starts from a run's averaged weights."""
    saved = RunCheckpoints(run)
    checkpoint = saved.newest_verified().checkpoint
    if checkpoint is None:
        raise CheckpointError(f"run {run.id} has no checkpoint to fork from; {typeable(f'resume {run.id}')} first")
    if plan.experiment.model.class_conditional:
        _require_same_classes(run, ClassNames.from_state(checkpoint.state()), dataset)
    words = f"from the averaged weights of step {checkpoint.step} of"
    origin = origin_of(f"run {run.id}", words, run.mlflow_run_id)
    forked = create_run(
        plan.experiment,
        dataset,
        plan.profile,
        context.command,
        initial_weights=saved.name_of(checkpoint),
        origin=origin,
    )
    context.console.say(f"run {forked.id} starts from the averaged weights of run {run.id} at step {checkpoint.step}")
    return train_run(forked, plan, dataset, tracking, context.console)


def _require_same_classes(run: Run, known: ClassNames, dataset: Dataset) -> None:
    """Refuse images whose labels are not the classes that a run's weights know by these numbers (UsageError)."""
    found = class_names_of(dataset)
    for number, (old, new) in enumerate(zip_longest(known, found)):
        if known and old != new:
            raise UsageError(
                f"class {number} of run {run.id} is {old!r}, of the images of {dataset.manifest.name} it is {new!r}: its weights "
                "would take one class for another; give images with its classes in its order, or train a new model on these"
            )
