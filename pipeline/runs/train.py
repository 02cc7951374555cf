"""`ddpm-pipe train`: plan, record, train in attempts, evaluate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.cluster.session import require_resources
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.config.experiment import DEFAULT_PRESET, EvaluationConfig, Experiment, load_experiment
from pipeline.console import plural
from pipeline.data.shards import Dataset
from pipeline.errors import ClusterError, DataError, RefusedError, UsageError
from pipeline.ingest.ingest import availability, ensure_ingested
from pipeline.ingest.resolve import absolute_source
from pipeline.metrics.classifier_store import Recipe
from pipeline.metrics.inception import Inception
from pipeline.planning.plan import Plan, choose_workers, make_plan
from pipeline.runs.conclude import Outcome
from pipeline.runs.record import create_run
from pipeline.runs.resume import ResumeRequest, resume_training
from pipeline.runs.train_run import plan_of, train_run, with_dataset
from pipeline.signals import in_slurm_job
from pipeline.storage.home import datasets_dir
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.runs import Run
from pipeline.tracking.opened import checked_run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.models import Shape


@dataclass(frozen=True)
class TrainRequest:
    """What to train, and where; `origin` as in a run's record."""

    experiment: Experiment
    profile: Profile
    origin: dict[str, str] | None = None


def train_request(
    context: Context, experiment: str | None, preset: str | None, data: str | None, overrides: Sequence[str]
) -> TrainRequest:
    """Read the experiment; UsageError where it is wrong."""
    if experiment is not None and preset is not None:
        raise UsageError(f"got both the file {experiment} and --preset {preset}; give one of them")
    path = presets.find("experiments", experiment or preset or DEFAULT_PRESET)
    if data is not None:
        data = absolute_source(data)
    return TrainRequest(load_experiment(path, overrides, data), context.profile)


def plan_training(asked: TrainRequest) -> Plan:
    """Work out and check a training without downloading, ingesting or writing anything.

    Where the command is sent to a cluster, neither the cluster nor its storage is asked, since only its nodes may reach them: what is known
    of the images comes from the source alone.
    """
    num_workers = choose_workers(asked.experiment, asked.profile)
    kind = asked.profile.kind
    away = (kind == "job" and JOB_VARIABLE not in os.environ) or (kind == "slurm" and not in_slurm_job())
    missing = []
    if not away:
        try:
            require_resources(asked.profile, num_workers)
        except ClusterError as error:
            missing.append(str(error))
    source = asked.experiment.data.source
    datasets = datasets_dir(asked.profile.home()) if away else asked.profile.datasets()
    validation = asked.experiment.validation
    found = availability(asked.experiment.data, datasets, validation.holdout)
    if found.state == "missing" and not away:
        missing.append("the images")
    plan = make_plan(
        asked.experiment,
        asked.profile,
        num_workers,
        data=f"{source}; what the cluster has of it was not looked at" if away else found.text,
        num_rows=found.num_rows,
        shape=found.shape,
        num_classes=found.num_classes,
        missing=missing,
    )
    few = _too_few_images(asked.experiment.evaluation, found.num_rows, found.shape)
    plan = replace(plan, fingerprint=found.fingerprint)
    if validation.split is not None and not away:
        try:
            availability(asked.experiment.data.model_copy(update={"split": validation.split}), datasets)
        except (UsageError, DataError) as error:
            plan = replace(plan, no_validation=str(error))
    return replace(plan, warnings=(*plan.warnings, f"the images will not be scored: {few}")) if few else plan


def start_training(context: Context, asked: TrainRequest) -> Outcome:
    """Train a new run to its end and evaluate it; resume the run of $DDPM_PIPE_RUN if a job of Slurm has begun it."""
    profile, console = asked.profile, context.console
    if (begun := Run.begun(profile.home(), profile.storage)) is not None:
        return resume_training(context, begun.id, ResumeRequest(isolated=profile.isolated))
    # what can be refused without the images is refused before they are fetched
    plan = plan_of(asked.experiment, profile)
    tracking = checked_run(TrackingSettings.of_profile(profile.home(), profile), None, console.say)
    data, holdout = asked.experiment.data, asked.experiment.validation.holdout
    dataset = ensure_ingested(data, profile.datasets(), console.say, holdout=holdout, cache=profile.cache)
    plan = with_dataset(plan, dataset)
    if unscored := _cannot_be_scored(asked.experiment, dataset):
        console.say(f"warning: the images will not be scored: {unscored}")
    run = create_run(asked.experiment, dataset, profile, context.command, origin=asked.origin)
    return train_run(run, plan, dataset, tracking, console)


def _cannot_be_scored(experiment: Experiment, dataset: Dataset) -> str:
    """Return why the scores that an experiment asks for cannot be computed on these images, "" if they can."""
    asked = experiment.evaluation
    if asked.enabled and asked.extractor == "classifier":
        try:
            Recipe.for_dataset(dataset)
        except RefusedError as error:
            return str(error)
    return _too_few_images(asked, dataset.manifest.num_rows, dataset.manifest.shape)


def _too_few_images(asked: EvaluationConfig, num_rows: int | None, shape: Shape | None) -> str:
    """Return why scores by Inception's features would mean nothing, "" if they are not asked for or there may be enough images."""
    by_inception = asked.extractor == "inception" or (asked.extractor == "auto" and shape is not None and shape[0] == 3)
    if not asked.enabled or not by_inception or set(asked.metrics) <= {"bpd"}:
        return ""
    compared = asked.num_images if num_rows is None else min(asked.num_images, num_rows // 2)
    if compared >= Inception.min_images:
        return ""
    images = "" if num_rows is None else f" and half of {plural(num_rows, 'image')}"
    return (
        f"Inception's features need {Inception.min_images:,} images on each side of the comparison, and {asked.num_images:,} generated ones"
        f"{images} give {compared:,}; leave the scores out with -s evaluation.enabled=false"
    )
