"""The driver of a sweep's trials: what the ledger lacks is run, each trial in a run folder of its own, in a Ray that all share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from pipeline.cluster.session import Session
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.errors import PipelineError
from pipeline.planning.plan import make_plan
from pipeline.settings import presets
from pipeline.settings.cluster_profile import Profile
from pipeline.settings.config import Experiment
from pipeline.storage.runs import Run, normalise_name
from pipeline.sweeps.config import Sweep, trial_experiment
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.halving import Halving
from pipeline.sweeps.plan import Request, SweepPlan, require_equal_calls
from pipeline.sweeps.points import Point, key_of, title
from pipeline.sweeps.record import Trial
from pipeline.sweeps.search import TPE, Listed, Next, Source, Trials
from pipeline.sweeps.trial import ForTrials
from pipeline.sweeps.tune import ENVIRONMENT, Work, run_trials
from pipeline.training.job import Allowance


def run_missing(
    folder: SweepFolder,
    asked: Request,
    plan: SweepPlan,
    profile: Profile,
    dataset: Dataset,
    parent: str | None,
    for_trials: ForTrials,
    console: Console,
) -> None:
    """Start Ray and run the trials, unless the ledger holds them all."""
    sweep, num_workers = asked.sweep, plan.trial.num_workers
    trials = Trials(sweep, _source(asked, plan))
    entries = [entry for entry in folder.ledger.entries().values() if entry.status != "failed"]
    if sweep.search == "tpe":
        trials.known(entries)
    halving = None
    if sweep.early_stopping is not None:
        halving = Halving(sweep.early_stopping.reduction_factor)
        for entry in entries:
            halving.take(entry.rungs, entry.key)
    begun = folder.trials()

    def settled(following: Next) -> tuple[Experiment, str]:
        experiment = trial_experiment(sweep, asked.base, following.point, following.seed)
        return experiment, key_of(sweep, experiment, dataset.manifest.fingerprint, for_trials.judged_by)

    def begin(following: Next) -> tuple[str, Run]:
        experiment, key = settled(following)
        if key not in begun:
            begun[key] = _trial_run(folder, asked, following, experiment, key, profile, dataset, parent)
        return key, begun[key]

    known = folder.ledger.entries()
    missing = [
        following
        for following in _all_trials(sweep, plan.checked.points)
        if (key := settled(following)[1]) not in known or known[key].status == "failed"
    ]
    if sweep.search != "tpe" and not missing:
        return
    total = None if sweep.search == "tpe" or sweep.early_stopping else len(missing)
    work = Work(folder, for_trials, trials, begin, console, halving, total)
    os.environ.update(ENVIRONMENT)  # before Ray starts: its processes read it
    with Session(profile, num_workers * plan.max_concurrent) as session:
        session.ensure()
        run_trials(work, _room(profile, num_workers, plan.max_concurrent), profile.timeouts.stop_s)


def _all_trials(sweep: Sweep, points: Sequence[Point]) -> list[Next]:
    return [Next(point, seed) for seed in range(sweep.seeds) for point in points]


def _source(asked: Request, plan: SweepPlan) -> Source:
    sweep = asked.sweep
    if sweep.search != "tpe":
        return Listed(plan.checked.points)

    def refuses(point: Point) -> str | None:
        try:
            experiment = trial_experiment(sweep, asked.base, point, 0)
            make_plan(experiment, asked.profile, plan.trial.num_workers, data="", num_rows=None, shape=plan.trial.shape)
            require_equal_calls(sweep, asked.base, experiment)
        except PipelineError as error:
            return str(error)
        return None

    assert sweep.num_points is not None
    return TPE(sweep.space, sweep.num_points, asked.base.seed, refuses)


def _room(profile: Profile, num_workers: int, wanted: int) -> int:
    """Return how many trials the Ray that is up has room for, at most as many as wanted."""
    import ray

    have = ray.cluster_resources()
    room = have.get("CPU", 0.0) / (profile.cpus_per_worker(num_workers) * num_workers)
    if profile.use_gpu:
        room = min(room, have.get("GPU", 0.0) / (profile.resources_per_worker.GPU * num_workers))
    return max(1, min(wanted, int(room + 1e-9)))


def _trial_run(
    folder: SweepFolder,
    asked: Request,
    following: Next,
    experiment: Experiment,
    key: str,
    profile: Profile,
    dataset: Dataset,
    parent: str | None,
) -> Run:
    """Make the run folder of a trial."""
    sweep = asked.sweep
    early = sweep.early_stopping
    competes = early is not None and following.seed == 0
    allowance = Allowance(
        seconds=None if sweep.budget.minutes is None else sweep.budget.minutes * 60,
        rungs=early.shares if early is not None and competes else (),
        rung_images=early.num_images if early is not None else Allowance().rung_images,
    )
    trial = Trial(folder.id, key, following.point, title(following.point), following.seed, allowance, parent)
    settings = {**sweep.overrides, **following.point, "seed": experiment.seed}
    if sweep.budget.minutes is None:  # else the clock says how many, and no number of steps is true beforehand
        settings["training.steps"] = experiment.training.steps
    base = ["--preset", sweep.base] if sweep.base in presets.names("experiments") else [sweep.base]
    words = ["ddpm-pipe", "train", *base]
    for name, value in settings.items():
        words += ["-s", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return Run.create(
        asked.profile.home(),
        name=normalise_name(trial.name.replace(" = ", "").replace(", ", "-").replace(" ", "")),
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(),
        dataset=folder.record.dataset,
        profile=profile.to_dict(),
        command=words,
        trial=trial.to_json(),
    )
