"""The driver of a training: attempts, each from the newest checkpoint, until the last step is done.

One worker on this machine trains in this process, without Ray (attempt_here.py). A second attempt in the same process would fail in the
same way, so there is only one.

Others train on Ray Train (attempt_on_ray.py), whose own retries are off. An attempt is a new `fit()` under a new name, with as many workers
as the profile allows and the cluster has room for. The attempt's number keeps a worker of an older attempt from committing a checkpoint
later. Our own errors (damaged data, divergence, full storage) end the run at once, since another attempt would meet them again. After
anything else, such as a killed worker or a lost node, another attempt starts, while attempts are left and checkpoints advance. A node that
is taken away with notice, or a new one, is no failure.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection
from dataclasses import replace

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.attempt import Attempt, Observer
from pipeline.cluster.attempt_here import AttemptHere
from pipeline.cluster.attempt_on_ray import CLUSTER_GONE, AttemptOnRay
from pipeline.cluster.causes import STARVED
from pipeline.cluster.gather import gather
from pipeline.cluster.session import Session
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import experiment_from
from pipeline.console import Console
from pipeline.errors import ClusterError, InterruptedRunError
from pipeline.planning.capacity import fitting_counts
from pipeline.planning.memory import REMEDY
from pipeline.signals import Signals, listening
from pipeline.storage.next_command import typeable
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.notices import notify
from pipeline.worker.job import Job


def run_attempts(
    run: Run,
    job: Job,
    profile: Profile,
    console: Console,
    observe: Observer | None = None,
    advise: Callable[[], str] = lambda: REMEDY,
) -> None:
    """Train a run to its last step, under its lock: in this process, in the Ray that it is connected to, or in a new one.

    `observe` is called with the state of the control actor, each time it is read. `advise` says what to do where memory ran out.

    Raises:
        PipelineError: the worker's own, where it raised one.
        ClusterError: the attempt in this process failed, attempts are exhausted, two in a row died without a new checkpoint, or the
            cluster has no room for the workers.
        InterruptedRunError: a signal stopped it.
    """
    counts = fitting_counts(experiment_from(job.experiment), profile)
    again = typeable(f"resume {run.id}")
    causes: list[tuple[int, str]] = []
    lost: Collection[str] = ()
    in_process = profile.trains_here(job.num_workers)
    run.log("training begins")  # for pipeline/runs/goodput.py, too
    with contextlib.ExitStack() as open_until_the_end:
        session = None if in_process else open_until_the_end.enter_context(Session(profile, job.num_workers))
        want = open_until_the_end.enter_context(cluster_nodes.wanted())
        while len(causes) < profile.retries.max_attempts:
            if session is not None:
                session.ensure()
            with listening() as signals:
                num_workers = gather(counts, profile, console, signals, lost, want, again)
                attempt = run.next_attempt()
                run.update(status="RUNNING", reason="")
                here = replace(job, attempt=attempt, num_workers=num_workers)
                run.log(f"attempt {attempt}: {num_workers} worker{'s' * (num_workers != 1)}")
                run.send_files()
                this: Attempt
                if in_process:
                    this = AttemptHere(here, profile, console, signals)
                else:
                    this = AttemptOnRay(here, profile, console, signals, counts)
                try:
                    ended = this.run(observe or (lambda seen: None))
                    run.fetch_files()
                finally:  # for pipeline/runs/goodput.py
                    made = this.seen.get("progress", {}).get("step", 0)
                    run.log(f"attempt {attempt} ended at step {made}")
            if ended.outcome == "finished" and signals.first is None:
                return
            step, lost = _newest_step(run), ended.lost
            if STARVED in ended.cause:
                ended = replace(ended, cause=f"{ended.cause}; {advise()}")
            if ended.outcome == "stopped" and ended.planned and signals.first is None:
                run.log(f"attempt {attempt} stopped at step {step}: {ended.planned}")
                notify(run, profile, "restarted", ended.planned, step=max(step, 0))
                continue
            if ended.cause.startswith(CLUSTER_GONE):
                run.log(f"attempt {attempt} failed: {ended.cause}")
                once = "" if not profile.is_remote else " once the cluster is back"
                raise ClusterError(
                    f"run {run.id}: {ended.cause}; the newest checkpoint is of step {max(step, 0)}, resume{once} "
                    f"with: {again}"
                )
            if signals.first is not None or ended.outcome == "stopped":
                raise _interrupted(run, signals, step, saved=ended.outcome is not None)
            run.log("\n".join(filter(None, [f"attempt {attempt} failed: {ended.cause}", ended.details])))
            if in_process:
                fix = "" if STARVED in ended.cause else "fix it, "
                raise ClusterError(
                    f"run {run.id} failed after step {max(step, 0)}: {ended.cause}; its traceback is in {run.log_path}, "
                    f"{fix}then: {again}"
                )
            if causes and causes[-1][0] == step:
                raise ClusterError(
                    f"run {run.id} died twice after step {max(step, 0)} without a new checkpoint: {ended.cause}; "
                    f"see {run.log_path}, then: {again}"
                )
            causes.append((step, ended.cause))
            if len(causes) < profile.retries.max_attempts:
                notify(run, profile, "restarted", ended.cause, step=max(step, 0))
            console.say(f"attempt {attempt} failed ({ended.cause}); continuing from step {max(step, 0)}")
    raise ClusterError(
        f"run {run.id}: {profile.retries.max_attempts} attempts failed, the last one with: {causes[-1][1]}; "
        f"resume from step {max(causes[-1][0], 0)} with: {again}"
    )


def _newest_step(run: Run) -> int:
    committed = RunCheckpoints(run).committed()
    return committed[0].step if committed else -1


def _interrupted(run: Run, signals: Signals, step: int, *, saved: bool) -> InterruptedRunError:
    where = (
        f"saved at step {step}"
        if saved
        else f"the newest checkpoint is of step {step}"
        if step >= 0
        else "nothing was saved yet"
        if signals.first != signal.SIGUSR1
        else "nothing was saved yet, and the time limit of the job is near: raise slurm.time"
    )
    # without a signal here, another process has asked to stop
    code = 130 if signals.first == signal.SIGINT else 75 if step >= 0 else 143
    return InterruptedRunError(f"stopped, {where}; resume with: {typeable(f'resume {run.id}')}", code)
