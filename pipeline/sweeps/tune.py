"""The trials of a sweep under Ray Tune: what to try next, which trials to stop early, and the release of their workers.

Tune starts a process for each trial, which starts the trial's workers. Ledger and run folders hold everything that lasts. Tune's own
state is deleted with its folder; a sweep that is resumed gets a new Tuner for the trials that are left.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.control_actor import NAMESPACE
from pipeline.cluster.placement import give_back
from pipeline.console import Console, duration
from pipeline.errors import ClusterError, InterruptedRunError
from pipeline.signals import Signals, listening
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import Run
from pipeline.sweeps.entry import entry_of
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.halving import Halving
from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.search import Next, Trials, _Done
from pipeline.sweeps.trial import STOPPED_EARLY, ForTrials, run_trial, stop_early
from pipeline.training.judgements import values_by_rung

POLL_S = 0.5
RESTARTS = 2  # of a trial whose process was killed
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class RunningSweep:
    """The state of the driver while trials run."""

    folder: SweepFolder
    for_trials: ForTrials
    trials: Trials
    key_of: Callable[[Next], str]
    begin: Callable[[Next], Run]  # the run folder of a trial, made if there is none
    console: Console
    halving: Halving | None
    total: int | None
    room: Callable[[], int]  # how many trials fit now
    running: dict[str, tuple[Next, str, Run]] = field(default_factory=dict)  # by Tune's id of the trial
    ended: list[LedgerEntry] = field(default_factory=list)
    interrupted: bool = False
    begun_at: float = field(default_factory=time.monotonic)

    def __getstate__(self) -> dict[str, Any]:
        """Return {}: Tune pickles this into its own state, which is not used; locks and connections belong to this process."""
        return {}

    def suggest(self, trial_id: str) -> Run | _Done | None:
        """Return the run folder of the next trial that the ledger lacks; None to wait."""
        if len(self.running) >= self.room():
            return None
        done = self.folder.ledger.entries()
        while not self.interrupted:
            following = self.trials.next()
            if isinstance(following, _Done):
                break
            if following is None:
                return None
            key = self.key_of(following)
            entry = done.get(key)
            if entry is not None and entry.status != "failed":  # whether its run folder is still there or not
                self.trials.ended(following, entry.status, entry.value, entry.rungs)
                continue
            run = self.begin(following)
            self.running[trial_id] = (following, key, run)
            return run
        return _Done()

    def end(self, trial_id: str, result: dict[str, Any], died: str | None) -> None:
        """Write a trial that ended into the ledger, and print its line."""
        following, key, run = self.running.pop(trial_id)
        give_back(run.id)
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
        self.ended.append(entry)
        self.trials.ended(following, entry.status, entry.value, entry.rungs)
        self.console.say(self._line(entry))

    def _line(self, entry: LedgerEntry) -> str:
        count = f"{len(self.ended)}/{self.total}" if self.total is not None else str(len(self.ended))
        what = f"{entry.metric} {entry.value:.4g}" if entry.value is not None else entry.reason or entry.status
        left = ""
        if self.total is not None and len(self.ended) < self.total:
            each = (time.monotonic() - self.begun_at) / (
                len(self.ended) + len(self.running) / 2
            )  # half done, on average
            left = f"  about {duration(each * (self.total - len(self.ended)))} left"
        return f"trial {count}  {entry.title}, seed {entry.seed}: {what}{left}"


def run_trials(
    work: RunningSweep,
    max_concurrent: int,
    stop_s: float,
) -> None:
    """Run trials until none are left, in the running Ray. InterruptedRunError if the user or the system asked to stop."""
    os.environ.update(ENVIRONMENT)
    tuner = _tuner(work, max_concurrent)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # raised by the watching thread
            failure.append(error)

    thread = threading.Thread(target=fit, name="tune", daemon=True)
    with listening() as signals:
        thread.start()
        _watch(thread, work, signals, stop_s)
    shutil.rmtree(work.folder.folder / "tune", ignore_errors=True)
    if signals.first is not None:
        raise InterruptedRunError(
            f"stopped, {len(work.folder.ledger.entries())} trials are done; resume with: {typeable(f'resume {work.folder.id}')}",
            130 if signals.first == 2 else 75,
        )
    if failure:
        raise ClusterError(
            f"sweep {work.folder.id}: {' '.join(str(failure[0]).split())[:300]}; what is done is kept; resume with: "
            f"{typeable(f'resume {work.folder.id}')}"
        )


def _watch(thread: threading.Thread, work: RunningSweep, signals: Signals, stop_s: float) -> None:
    """Wait for the trials. A first signal lets each of them save and stop; a second one leaves at once."""
    asked_at: float | None = None
    while thread.is_alive():
        thread.join(POLL_S)
        if len(signals.received) > 1 or (asked_at is not None and time.monotonic() - asked_at > stop_s):
            return
        if signals.first is not None and asked_at is None:
            asked_at = time.monotonic()
            work.interrupted = True
            work.console.say("stopping: trials that run save first; once more to stop at once")
            for _, _, run in list(work.running.values()):
                stop_workers(run, "the sweep was asked to stop")


def stop_workers(run: Run, reason: str, control: str | None = None) -> None:
    """Ask a trial's workers, if it has any now, to save and stop."""
    import ray

    from pipeline.cluster.control_actor import actor_name

    try:
        actor = ray.get_actor(control or actor_name(run.id, run.current_attempt()), namespace=NAMESPACE)
        actor.stop.remote(reason)
    except (ValueError, ray.exceptions.RayError):
        return  # it is scoring, or gone


def _tuner(work: RunningSweep, max_concurrent: int) -> Any:
    from ray import tune

    trainable = tune.with_parameters(run_trial, setup=work.for_trials)
    # no CPU: its workers need them; and on this node, where the run folders are
    needs = tune.PlacementGroupFactory([{"memory": 1, cluster_nodes.resource_of_this_node(): 0.001}])
    return tune.Tuner(
        tune.with_resources(trainable, needs),
        tune_config=tune.TuneConfig(
            search_alg=_search(work),
            scheduler=_scheduler(work),
            num_samples=1_000_000,  # the search says when it is done
            max_concurrent_trials=max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(work.folder.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )


def _search(work: RunningSweep) -> Any:
    from ray.tune.search import Searcher

    class Suggestions(Searcher):  # type: ignore[misc]
        """Gives Tune the next trial, and records those that ended."""

        def suggest(self, trial_id: str) -> Any:
            found = work.suggest(trial_id)
            if isinstance(found, _Done):
                return Searcher.FINISHED
            return None if found is None else {"run": str(found.folder)}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if trial_id in work.running:
                died = "its process was killed (SIGKILL or out of memory)" if error or not result else None
                work.end(trial_id, result or {}, died)

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: the ledger holds the state."""

        def restore(self, checkpoint_path: str) -> None:
            """Do nothing: the ledger holds the state."""

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Suggestions()


def _scheduler(work: RunningSweep) -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Halt(FIFOScheduler):  # type: ignore[misc]
        """Stops hopeless trials at each rung by asking their workers to save: the trial then ends by itself and releases its resources."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if work.halving is not None and "rung" in result and trial.trial_id in work.running:
                _, key, run = work.running[trial.trial_id]
                if not work.halving.goes_on(result["rung"], key, result["value"]):
                    stop_early(run, result["rung"])
                    stop_workers(run, STOPPED_EARLY, result["control"])
            return str(TrialScheduler.CONTINUE)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Halt()
