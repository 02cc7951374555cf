"""The driver of a training: attempts on Ray Train, each from the newest checkpoint, until the last step is done.

Ray's own retries are off. An attempt is a new `fit()` under a new name; our fencing number keeps a worker that was thought dead from
committing a checkpoint later. Errors of ours (damaged data, divergence, full storage) end the run at once: another attempt would meet
them again. Anything else, such as a killed worker, is tried again while attempts last and checkpoints advance.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import checkpoint as checkpoints
from pipeline.board import NAMESPACE, Board, board_name, run_worker
from pipeline.cluster import LocalSession
from pipeline.cluster_profile import Profile
from pipeline.console import Console, duration
from pipeline.device import backend_of
from pipeline.errors import ClusterError, InterruptedRunError
from pipeline.job import Job
from pipeline.runs import Run

POLL_S = 0.2


@dataclass
class Signals:
    """What the user or the system has asked for since the context began: SIGINT or SIGTERM, and how often."""

    received: list[int]

    @property
    def first(self) -> int | None:
        """The first signal, which asks for saving and stopping; a second one stops at once."""
        return self.received[0] if self.received else None


@contextmanager
def listening() -> Iterator[Signals]:
    """Collect SIGINT and SIGTERM instead of dying of them. They reach a process's main thread; another thread hears of none."""
    signals = Signals([])
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        signals.received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_attempts(
    run: Run, job: Job, profile: Profile, console: Console, observe: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Train a run to its last step, holding its lock, in the Ray that this process is part of or in one of its own.

    `observe` is given what the board says, each time it is read.

    Raises the worker's own error where there is one, ClusterError when attempts are exhausted or two in a row die without a new
    checkpoint, InterruptedRunError when the user or the system asked to stop.
    """
    causes: list[tuple[int, str]] = []
    with LocalSession(profile, job.num_workers) as session:
        for _ in range(profile.retries.max_attempts):
            session.ensure()
            attempt = run.next_attempt()
            run.update(status="RUNNING", reason="")
            with listening() as signals:
                ended = _attempt(run, replace(job, attempt=attempt), profile, console, signals, observe)
            if ended.outcome == "finished":
                return
            step = _newest_step(run)
            if signals.first is not None or ended.outcome == "stopped":
                raise _interrupted(run, signals, step, saved=ended.outcome == "stopped")
            run.log(f"attempt {attempt} failed: {ended.cause}")
            if causes and causes[-1][0] == step:
                raise ClusterError(
                    f"run {run.id} died twice after step {max(step, 0)} without a new checkpoint: {ended.cause}; "
                    f"see {run.log_path}, then: ddpm-pipe resume {run.id}"
                )
            causes.append((step, ended.cause))
            console.say(f"attempt {attempt} failed ({ended.cause}); going on from step {max(step, 0)}")
    raise ClusterError(
        f"run {run.id}: {profile.retries.max_attempts} attempts failed, the last one with: {causes[-1][1]}; "
        f"go on from step {max(causes[-1][0], 0)} with: ddpm-pipe resume {run.id}"
    )


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: with an outcome, or with the cause of its failure."""

    outcome: str | None
    cause: str = ""


def _attempt(
    run: Run,
    job: Job,
    profile: Profile,
    console: Console,
    signals: Signals,
    observe: Callable[[dict[str, Any]], None] | None,
) -> Ended:
    """Run one `fit()` in a thread, and watch it; a PipelineError of a worker is raised here."""
    import ray

    name = board_name(run.id, job.attempt)
    board = ray.remote(Board).options(name=name, namespace=NAMESPACE, num_cpus=0).remote()
    trainer = _trainer(job, profile, name, Path(job.run_folder) / "ray")
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # passed on to the watching thread, which tells one kind from another
            failure.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    _watch(thread, board, console, signals, profile, observe or (lambda seen: None))
    if thread.is_alive():  # a second signal, or a stop that took too long: ray.shutdown ends the workers
        return Ended(None, "stopped at once")
    seen = _read(board, console)
    if seen.get("error") is not None:
        raise seen["error"]
    if failure:
        return Ended(None, cause_of(failure[0]))
    return Ended(seen.get("outcome"), "the cluster went away")


def _read(board: Any, console: Console) -> dict[str, Any]:
    """Return what the board says, its warnings told; nothing where it is gone with its cluster, whose cause `fit()` tells."""
    import ray

    try:
        seen: dict[str, Any] = ray.get(board.read.remote(), timeout=5)
    except ray.exceptions.RayError:
        return {}
    for warning in seen["warnings"]:
        console.say(f"warning: {warning}")
    return seen


def _trainer(job: Job, profile: Profile, board: str, storage: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: dict[str, float] = {"CPU": profile.cpus_per_worker(job.num_workers)}
    if profile.use_gpu:
        resources["GPU"] = profile.resources_per_worker.GPU
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend=backend_of(profile), timeout_s=int(profile.timeouts.collective_s)),
        scaling_config=ScalingConfig(
            num_workers=job.num_workers, use_gpu=profile.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"attempt-{job.attempt}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=2),
        ),
    )


def _watch(
    thread: threading.Thread,
    board: Any,
    console: Console,
    signals: Signals,
    profile: Profile,
    observe: Callable[[dict[str, Any]], None],
) -> None:
    """Show progress until the thread ends; pass a first signal on as a request to stop, and leave on a second."""
    asked_at: float | None = None
    begin: tuple[int, float] | None = None
    shown: dict[str, Any] = {}
    while thread.is_alive():
        thread.join(timeout=POLL_S)
        seen = _read(board, console)
        observe(seen)
        progress = seen.get("progress")
        if progress and progress != shown:
            shown = progress
            begin = begin or (progress["step"], time.monotonic())
            console.progress(progress_line(progress, begin), done=progress["step"] == progress["steps"])
        if len(signals.received) > 1 or (
            asked_at is not None and time.monotonic() - asked_at > profile.timeouts.stop_s
        ):
            return
        if signals.first is not None and asked_at is None:
            asked_at = time.monotonic()
            console.say("stopping after this step, and saving; once more to stop at once")
            board.stop.remote()


def progress_line(progress: dict[str, Any], begin: tuple[int, float]) -> str:
    """Return one line: steps, loss, images per second, time left (by the pace since `begin`)."""
    step, steps = progress["step"], progress["steps"]
    done = step - begin[0]
    left = duration((steps - step) * (time.monotonic() - begin[1]) / done) if done else "?"
    return f"step {step}/{steps}  loss {progress['loss']:.4f}  {progress['images_per_s']:.0f} images/s  {left} left"


def cause_of(error: BaseException) -> str:
    """Return one line for why an attempt failed: of several workers' errors the one that came first, not its echoes."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return _one_line(error)
    # a killed worker shows up as a failed health check; its peers only lose their connection to it
    ranks = sorted(
        failures, key=lambda r: ("HealthCheck" not in type(failures[r]).__name__, "Connection" in str(failures[r]), r)
    )
    return f"worker {ranks[0]}: {_one_line(failures[ranks[0]])}"


def _one_line(error: BaseException) -> str:
    if "worker process has died" in str(error):
        return "its process was killed, by hand or for want of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _newest_step(run: Run) -> int:
    committed = checkpoints.committed(run.checkpoints)
    return committed[0].step if committed else -1


def _interrupted(run: Run, signals: Signals, step: int, *, saved: bool) -> InterruptedRunError:
    where = (
        f"saved at step {step}"
        if saved
        else f"the newest checkpoint is of step {step}"
        if step >= 0
        else "nothing was saved yet"
    )
    code = 130 if signals.first == signal.SIGINT else 75 if saved else 143  # another process may have asked, too
    return InterruptedRunError(f"stopped, {where}; go on with: ddpm-pipe resume {run.id}", code)
