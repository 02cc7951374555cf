"""The driver of a sweep: which trials the ledger lacks, a run folder for each, how many fit at once, and what each ended with. No Tune."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.placement import release
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.console import Console, duration
from pipeline.planning.capacity import needs
from pipeline.runs.record import Trial, trial_of
from pipeline.storage.judgements import values_by_rung
from pipeline.storage.runs import Run, normalise_name
from pipeline.sweeps.config import trial_experiment
from pipeline.sweeps.entry import entry_of
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.halving import Halving
from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.plan import SweepPlan, SweepRequest, drawing
from pipeline.sweeps.points import key_of, title
from pipeline.sweeps.search import Next, Trials
from pipeline.sweeps.trial import ForTrials
from pipeline.worker.job import Allowance

LOOK_S = 5.0


class SweepDriver:
    """The state of a sweep while its trials run.

    `parent` is MLflow's id of the sweep's run. `running` are the trials that run, by Tune's id: which one, its key, its run folder.
    """

    def __init__(
        self,
        folder: SweepFolder,
        asked: SweepRequest,
        plan: SweepPlan,
        for_trials: ForTrials,
        parent: str | None,
        console: Console,
    ) -> None:
        self.folder, self.for_trials, self.max_concurrent = folder, for_trials, plan.max_concurrent
        self._asked, self._parent, self.console = asked, parent, console
        self._begun = folder.trials()
        known = folder.ledger.entries()
        self.halving = self._halving(known)
        self._num_missing = 0  # of a list of trials
        self.trials = self._drawn(plan, known) if asked.sweep.search == "tpe" else self._listed(plan, known)
        self.room = Room(for_trials.profile, plan.trial.num_workers, plan.max_concurrent)
        self.running: dict[str, tuple[Next, str, Run]] = {}
        self.interrupted = False
        self._ended: list[LedgerEntry] = []
        self._begun_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Return {}: Tune pickles this into its own state, which is not used; locks and connections belong to this process."""
        return {}

    def _halving(self, known: Mapping[str, LedgerEntry]) -> Halving | None:
        """Return early stopping, with the KIDs of trials that earlier drivers ran."""
        early = self._asked.sweep.early_stopping
        if early is None:
            return None
        halving = Halving(early.reduction_factor)
        for key, entry in known.items():
            if entry.status != "failed":
                halving.take(entry.rungs, key)
        for key, run in self._begun.items():
            halving.take(values_by_rung(run.folder), key)
        return halving

    def _listed(self, plan: SweepPlan, known: Mapping[str, LedgerEntry]) -> Trials:
        """Return the trials of listed points, without those that the ledger has; their run folders may be gone."""
        sweep, points = self._asked.sweep, plan.checked.points
        trials = Trials(sweep, points)
        for each in (Next(point, seed) for seed in range(sweep.seeds) for point in points):
            entry = known.get(self.key_of(each))
            if entry is not None and entry.status != "failed":
                trials.ended(each, entry.status, entry.value, entry.rungs)
            else:
                self._num_missing += 1
        return trials

    def _drawn(self, plan: SweepPlan, known: Mapping[str, LedgerEntry]) -> Trials:
        """Return the trials of a search that draws its points and continues with what earlier drivers finished or left."""
        trials = Trials(self._asked.sweep, tpe=drawing(self._asked.sweep, self._asked.base, plan.checked))
        begun = [trial.point for run in self._begun.values() if (trial := trial_of(run.record)) is not None]
        trials.known(known.values(), begun)
        return trials

    # -- what is next

    def suggest(self, trial_id: str) -> Run | None:
        """Return the run folder of the next trial that the ledger lacks; None if there is none, or none now (see `waits`)."""
        if self.interrupted or len(self.running) >= self.room():
            return None
        following = self.trials.next()
        if following is None:
            return None
        key = self.key_of(following)
        run = self._begin(following, key)
        self.running[trial_id] = (following, key, run)
        return run

    def waits(self) -> bool:
        """Whether there may be a trial later, when one that runs has ended."""
        return bool(self.running) and not self.interrupted

    def key_of(self, following: Next) -> str:
        """Return the trial's key in the ledger."""
        fingerprint = self.folder.record.dataset["fingerprint"]
        return key_of(self._asked.sweep, self._experiment(following), fingerprint, self.for_trials.judged_by)

    def _experiment(self, following: Next) -> Experiment:
        return trial_experiment(self._asked.sweep, self._asked.base, following.point, following.seed)

    def _begin(self, following: Next, key: str) -> Run:
        """Return the trial's run folder, made if there is none."""
        if key in self._begun:
            return self._begun[key]
        sweep, record, experiment = self._asked.sweep, self.folder.record, self._experiment(following)
        early, minutes = sweep.early_stopping, sweep.budget.minutes
        allowance = Allowance(
            seconds=None if minutes is None else minutes * 60,
            rungs=early.shares if early is not None and following.seed == 0 else (),
            rung_images=early.num_images if early is not None else Allowance().rung_images,
        )
        words = title(following.point)
        trial = Trial(self.folder.id, key, following.point, words, following.seed, allowance, self._parent)
        run = self._begun[key] = Run.create(
            self.folder.home,
            name=normalise_name(trial.name.replace(" = ", "").replace(", ", "-").replace(" ", "")),
            experiment=experiment.to_dict(),
            config_hash=experiment.hash(record.dataset["fingerprint"]),
            dataset=record.dataset,
            profile=self.for_trials.profile.to_dict(),
            command=self._command(following, experiment),
            trial=trial.to_json(),
        )
        return run

    def _command(self, following: Next, experiment: Experiment) -> list[str]:
        """Return the command that trains the same as the trial."""
        sweep = self._asked.sweep
        settings = {**sweep.overrides, **following.point, "seed": experiment.seed}
        settings |= {"evaluation.metrics": list(experiment.evaluation.metrics), "evaluation.enabled": True}
        if sweep.budget.minutes is None:  # else the clock decides, and the number of steps is not known beforehand
            settings["training.steps"] = experiment.training.steps
        base = ["--preset", sweep.base] if sweep.base in presets.names("experiments") else [sweep.base]
        words = ["ddpm-pipe", "train", *base]
        for name, value in settings.items():
            words += ["-s", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return words

    # -- what has ended

    def end(self, trial_id: str, result: dict[str, Any], died: str | None) -> None:
        """Write a trial that ended into the ledger, and print its line."""
        following, key, run = self.running.pop(trial_id)
        release(run.id)
        status: Literal["finished", "stopped", "failed", "interrupted"]
        status = "failed" if died is not None else result.get("status", "failed")
        reason = died or str(result.get("reason", ""))
        if status == "interrupted":
            if self.interrupted:
                return  # with the sweep; resuming it continues the trial
            status, reason = "failed", f"stopped alone: {reason}"
        rungs = {}
        if self.halving is not None:
            self.halving.take(values_by_rung(run.folder), key)  # a killed process may not have reported them
            rungs = self.halving.rungs_of(key)
        entry = entry_of(run, self.for_trials.metric, self.for_trials.judged_by, status, rungs, reason)
        self.folder.enter(entry)
        self._ended.append(entry)
        self.trials.ended(following, entry.status, entry.value, entry.rungs)
        self.console.say(self._line(entry))

    def _line(self, entry: LedgerEntry) -> str:
        what = f"{entry.metric} {entry.value:.4g}" if entry.value is not None else entry.reason or entry.status
        count, left = str(len(self._ended)), ""
        if self._num_missing and self.halving is None:
            num_left = self._num_missing - len(self._ended)
            count += f"/{self._num_missing}"
            if num_left > 0:
                half_done = len(self.running) / 2  # on average
                each = (time.monotonic() - self._begun_at) / (len(self._ended) + half_done)
                left = f"  about {duration(each * num_left)} left"
        return f"trial {count}  {entry.title}, seed {entry.seed}: {what}{left}"


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
