"""The driver of a sweep: it runs the trials that the ledger lacks, each in its own run folder, in one Ray that all of them share."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.session import Session
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.planning.capacity import needs
from pipeline.runs.record import Trial, trial_of
from pipeline.storage.runs import Run, normalise_name
from pipeline.sweeps.config import Sweep, trial_experiment
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.halving import Halving
from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.plan import SweepPlan, SweepRequest, drawing
from pipeline.sweeps.points import Point, key_of, title
from pipeline.sweeps.search import Listed, Next, Trials
from pipeline.sweeps.trial import ForTrials
from pipeline.sweeps.tune import ENVIRONMENT, RunningSweep, run_trials
from pipeline.training.judgements import values_by_rung
from pipeline.worker.job import Allowance

LOOK_S = 5.0


def run_missing(
    folder: SweepFolder,
    asked: SweepRequest,
    plan: SweepPlan,
    dataset: Dataset,
    parent: str | None,
    for_trials: ForTrials,
    console: Console,
) -> None:
    """Start Ray and run the trials, unless the ledger has all of them."""
    sweep, profile, num_workers = asked.sweep, for_trials.profile, plan.trial.num_workers
    known, begun = folder.ledger.entries(), folder.trials()
    trials = trials_left(asked, plan, known, begun)
    halving = None if sweep.early_stopping is None else Halving(sweep.early_stopping.reduction_factor)
    if halving is not None:
        _take_up(halving, known, begun)

    def settled(following: Next) -> tuple[Experiment, str]:
        experiment = trial_experiment(sweep, asked.base, following.point, following.seed)
        return experiment, key_of(sweep, experiment, dataset.manifest.fingerprint, for_trials.judged_by)

    def key(following: Next) -> str:
        return settled(following)[1]

    def begin(following: Next) -> Run:
        experiment, word = settled(following)
        if word not in begun:
            begun[word] = _trial_run(folder, asked, following, experiment, word, profile, dataset, parent)
        return begun[word]

    missing = [
        following
        for following in _all_trials(sweep, plan.checked.points)
        if (word := key(following)) not in known or known[word].status == "failed"
    ]
    if not (trials.has_next() if sweep.search == "tpe" else missing):
        return
    total = None if sweep.search == "tpe" or sweep.early_stopping else len(missing)
    room = Room(profile, num_workers, plan.max_concurrent)
    work = RunningSweep(folder, for_trials, trials, key, begin, console, halving, total, room)
    os.environ.update(ENVIRONMENT)  # before Ray starts: its processes read it
    with Session(profile, num_workers * plan.max_concurrent) as session:
        session.ensure()
        with room:
            run_trials(work, plan.max_concurrent, profile.timeouts.stop_s)


def _all_trials(sweep: Sweep, points: Sequence[Point]) -> list[Next]:
    return [Next(point, seed) for seed in range(sweep.seeds) for point in points]


def trials_left(
    asked: SweepRequest, plan: SweepPlan, known: Mapping[str, LedgerEntry], begun: Mapping[str, Run]
) -> Trials:
    """Return the trials to run. A search that draws its points continues with what earlier drivers finished or left."""
    if asked.sweep.search != "tpe":
        return Trials(asked.sweep, Listed(plan.checked.points))
    trials = Trials(asked.sweep, drawing(asked, plan.trial, plan.checked))
    trials.known(known.values(), [trial.point for run in begun.values() if (trial := trial_of(run.record)) is not None])
    return trials


def _take_up(halving: Halving, known: Mapping[str, LedgerEntry], begun: Mapping[str, Run]) -> None:
    """Give early stopping the KIDs of trials that earlier drivers ran."""
    for key, entry in known.items():
        if entry.status != "failed":
            halving.take(entry.rungs, key)
    for key, run in begun.items():
        halving.take(values_by_rung(run.folder), key)


class Room:
    """How many trials fit into the running Ray: at most `wanted`, at least one, which waits for its workers itself.

    The answer is renewed every few seconds. A cluster that scales itself may begin with no workers; it is asked for the missing ones.
    """

    def __init__(self, profile: Profile, num_workers: int, wanted: int) -> None:
        self._profile, self._num_workers, self._wanted = profile, num_workers, wanted
        self._found, self._looked_at, self._asked = 1, -math.inf, False

    def __call__(self) -> int:
        if time.monotonic() - self._looked_at < LOOK_S:
            return self._found
        import ray

        self._looked_at, have = time.monotonic(), ray.cluster_resources()
        one = needs(self._profile, self._num_workers)
        fit = min(have.get(name, 0.0) / (amount * self._num_workers) for name, amount in one.items())
        self._found = max(1, min(self._wanted, int(fit + 1e-9)))
        if self._profile.is_remote and self._found < self._wanted:
            from ray.autoscaler.sdk import request_resources

            # each time, because a trial that waits for its own workers replaces the request, and takes it back
            request_resources(bundles=[one] * (self._num_workers * self._wanted))
            self._asked = True
        return self._found

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._asked and cluster_nodes.head_answers():
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[])


def _trial_run(
    folder: SweepFolder,
    asked: SweepRequest,
    following: Next,
    experiment: Experiment,
    key: str,
    profile: Profile,
    dataset: Dataset,
    parent: str | None,
) -> Run:
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
    settings |= {"evaluation.metrics": list(experiment.evaluation.metrics), "evaluation.enabled": True}
    if sweep.budget.minutes is None:  # else the clock decides, and the number of steps is not known beforehand
        settings["training.steps"] = experiment.training.steps
    base = ["--preset", sweep.base] if sweep.base in presets.names("experiments") else [sweep.base]
    words = ["ddpm-pipe", "train", *base]
    for name, value in settings.items():
        words += ["-s", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return Run.create(
        asked.profile.home(),
        name=normalise_name(trial.name.replace(" = ", "").replace(", ", "-").replace(" ", "")),
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(folder.record.dataset["fingerprint"]),
        dataset=folder.record.dataset,
        profile=profile.to_dict(),
        command=words,
        trial=trial.to_json(),
    )
