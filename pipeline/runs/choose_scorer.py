"""What judges the images of a run: its dataset, an extractor, and the reference."""

from __future__ import annotations

import shlex

from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import EvaluationConfig, Experiment
from pipeline.console import Bar, Console
from pipeline.data.image_set import Progress
from pipeline.data.shards import Dataset
from pipeline.errors import DataError
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics.metric_identity import recorded_split
from pipeline.metrics.scoring import Scorer, scorer_of
from pipeline.storage.home import datasets_dir
from pipeline.storage.next_command import typeable
from pipeline.storage.remote import is_remote
from pipeline.storage.runs import Run
from pipeline.training.device import sampling_compute, workers_device
from pipeline.training.trained import experiment_of, not_trained, profile_of


def not_scorable(run: Run) -> str:
    """Return why a run cannot be scored, "" if it can."""
    return not_trained(run) or ("" if run.record.dataset["path"] else "imported without images")


def choose_scorer(
    run: Run,
    asked: EvaluationConfig,
    profile: Profile,
    console: Console,
    *,
    download: bool,
    split: str | None = None,
) -> Scorer:
    """Return extractor and reference for a run's own images, or the reference of another split of their source.

    Features are taken over the workers of a profile.

    DataError or RefusedError says why there is none.
    """
    return scorer_of(
        open_images(run, "to compare with"),
        asked,
        run.home,
        split=own_split(experiment_of(run), split),
        against=None if split is None else open_split(run, split, console),
        download=download,
        device=sampling_compute(profile, here=False).device,
        computed_on=workers_device(profile),
        runner=runner_of(profile),
        progress=progress_on(console),
    )


def open_images(run: Run, purpose: str) -> Dataset:
    """Open the images that a run was trained on; DataError, naming what they are wanted for, where it was imported without any."""
    path = run.record.dataset["path"]
    if not path:
        raise DataError(
            f"run {run.id} was imported without images {purpose}; import it again with: "
            f"{typeable(f'import {shlex.quote(run.record.imported_from)} --data SOURCE')}"
        )
    return Dataset.open(path, profile_of(run).cache)


def own_split(experiment: Experiment, asked: str | None = None) -> str:
    """Return which part of their source images are recorded as: the one asked for, or else that of the experiment's."""
    return recorded_split(experiment.data.split if asked is None else asked)


def open_split(run: Run, split: str, console: Console) -> Dataset:
    """Open another split of a run's source, ingested as its images were; UsageError or DataError where there is none."""
    profile, data = profile_of(run), experiment_of(run).data
    datasets = profile.datasets() if is_remote(profile.storage) else datasets_dir(run.home)
    return ensure_ingested(data.model_copy(update={"split": split}), datasets, console.say, cache=profile.cache)


def progress_on(console: Console) -> Progress:
    """Return a callback that shows a progress line for each thing that is done."""
    rates: dict[str, Bar] = {}

    def show(what: str, done: int, total: int) -> None:
        rates.setdefault(what, Bar(console, what, total))(done)

    return show
