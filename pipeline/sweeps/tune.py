"""The trials of a sweep under Ray Tune: what to try next, which trials to stop early, and the release of their workers.

Tune starts a process for each trial, which starts the trial's workers. Ledger and run folders hold everything that lasts. Tune's own
state is deleted with its folder; a sweep that is resumed gets a new Tuner for the trials that are left.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from typing import Any

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.control_actor import NAMESPACE, actor_name
from pipeline.cluster.session import Session
from pipeline.errors import ClusterError, InterruptedRunError
from pipeline.signals import Signals, listening
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import Run
from pipeline.sweeps.driver import SweepDriver
from pipeline.sweeps.trial import STOPPED_EARLY, run_trial, stop_early

POLL_S = 0.5
RESTARTS = 2  # of a trial whose process was killed
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_missing(driver: SweepDriver, num_workers: int) -> None:
    """Start Ray and run the trials until none are left, unless the ledger has all of them.

    InterruptedRunError if the user or the system asked to stop.
    """
    if not driver.trials.has_next():
        return
    os.environ.update(ENVIRONMENT)  # before Ray starts: its processes read it
    with Session(driver.for_trials.profile, num_workers * driver.max_concurrent) as session:
        session.ensure()
        with driver.room:
            _run_trials(driver)


def _run_trials(driver: SweepDriver) -> None:
    tuner, folder = _tuner(driver), driver.folder
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # raised by the watching thread
            failure.append(error)

    thread = threading.Thread(target=fit, name="tune", daemon=True)
    with listening() as signals:
        thread.start()
        _watch(thread, driver, signals)
    shutil.rmtree(folder.folder / "tune", ignore_errors=True)
    if signals.first is not None:
        raise InterruptedRunError(
            f"stopped, {len(folder.ledger.entries())} trials are done; resume with: {typeable(f'resume {folder.id}')}",
            130 if signals.first == 2 else 75,
        )
    if failure:
        raise ClusterError(
            f"sweep {folder.id}: {' '.join(str(failure[0]).split())[:300]}; finished trials are kept; resume with: "
            f"{typeable(f'resume {folder.id}')}"
        )


def _watch(thread: threading.Thread, driver: SweepDriver, signals: Signals) -> None:
    """Wait for the trials. A first signal lets each of them save and stop; a second one leaves at once."""
    stop_s, asked_at = driver.for_trials.profile.timeouts.stop_s, math.inf
    while thread.is_alive():
        thread.join(POLL_S)
        if signals.again or time.monotonic() - asked_at > stop_s:
            return
        if signals.first is not None and not driver.interrupted:
            asked_at = time.monotonic()
            driver.interrupted = True
            driver.console.say("stopping: trials that run save first; once more to stop at once")
            for _, _, run in list(driver.running.values()):
                stop_workers(run, "the sweep was asked to stop")


def stop_workers(run: Run, reason: str, control: str | None = None) -> None:
    """Ask a trial's workers, if it has any now, to save and stop."""
    import ray

    try:
        actor = ray.get_actor(control or actor_name(run.id, run.current_attempt()), namespace=NAMESPACE)
        actor.stop.remote(reason)
    except (ValueError, ray.exceptions.RayError):
        return  # it is scoring, or has ended


def _tuner(driver: SweepDriver) -> Any:
    from ray import tune

    trainable = tune.with_parameters(run_trial, setup=driver.for_trials)
    # no CPU: its workers need them; and on this node, where the run folders are
    needs = tune.PlacementGroupFactory([{"memory": 1, cluster_nodes.resource_of_this_node(): 0.001}])
    return tune.Tuner(
        tune.with_resources(trainable, needs),
        tune_config=tune.TuneConfig(
            search_alg=_search(driver),
            scheduler=_scheduler(driver),
            num_samples=1_000_000,  # the search says when it is done
            max_concurrent_trials=driver.max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(driver.folder.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )


def _search(driver: SweepDriver) -> Any:
    from ray.tune.search import Searcher

    class Suggestions(Searcher):  # type: ignore[misc]
        """Gives Tune the next trial, and records those that ended."""

        def suggest(self, trial_id: str) -> Any:
            run = driver.suggest(trial_id)
            if run is not None:
                return {"run": str(run.folder)}
            return None if driver.waits() else Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if trial_id in driver.running:
                died = "its process was killed (SIGKILL or out of memory)" if error or not result else None
                driver.end(trial_id, result or {}, died)

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: the ledger holds the state."""

        def restore(self, checkpoint_path: str) -> None:
            """Do nothing: the ledger holds the state."""

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Suggestions()


def _scheduler(driver: SweepDriver) -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Halt(FIFOScheduler):  # type: ignore[misc]
        """Stops trials that are not worth their budget, at a rung, by asking their workers to save.

        The trial then ends by itself and releases its resources.
        """

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if driver.halving is not None and "rung" in result and trial.trial_id in driver.running:
                _, key, run = driver.running[trial.trial_id]
                if not driver.halving.goes_on(result["rung"], key, result["value"]):
                    stop_early(run, result["rung"])
                    stop_workers(run, STOPPED_EARLY, result["control"])
            return str(TrialScheduler.CONTINUE)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Halt()
