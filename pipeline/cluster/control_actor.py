"""Between the driver and its workers: the control actor in the cluster, and what Ray Train starts in each worker.

Ray's own processes import this module to know the two by name, so it imports nothing heavy: the control actor starts in a moment and costs
little memory, and torch is loaded by the workers alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.training.stacks import Stacks
    from pipeline.worker.job import Job

NAMESPACE = "ddpm-pipe"


def actor_name(run_id: str, attempt: int) -> str:
    """Return the name under which an attempt's control is found in the cluster."""
    return f"control-{run_id}-{attempt}"


@dataclass(frozen=True)
class WorkerInfo:
    """A worker of an attempt: where it runs, what Ray reserved for it and its peers, and how often memory had run out there before."""

    rank: int
    node: str
    node_name: str
    placement_group: str | None
    oom_kills: int

    @classmethod
    def of_this_process(cls) -> WorkerInfo:
        """Return what this worker is."""
        import ray
        import ray.train
        from ray.util import get_current_placement_group

        from pipeline.planning.memory import oom_kills

        group = get_current_placement_group()
        return cls(
            ray.train.get_context().get_world_rank(),
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            None if group is None else group.id.hex(),
            oom_kills(),
        )


class ControlActor:
    """The control actor: workers write how far they are, the driver writes that they should stop.

    An actor in the cluster, or an object of this process where the worker is here, too.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._progress: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._error: PipelineError | None = None
        self._outcome: str | None = None
        self._judgements: list[dict[str, Any]] = []
        self._members: dict[int, WorkerInfo] = {}
        self._worker_failed = False
        self._stop = ""

    def environment(self) -> dict[str, str]:
        """Return variables for the workers that are secret: what Ray itself is told, it shows to anybody let in."""
        return self._environment

    def join(self, member: WorkerInfo) -> None:
        """Note a worker that has come up."""
        self._members[member.rank] = member

    def publish(self, progress: dict[str, Any]) -> bool:
        """Take rank 0's progress, a warning, or what a score on the way was; return whether the workers should stop."""
        if "warning" in progress:
            self._warnings.append(progress["warning"])
        elif "judgement" in progress:
            self._judgements.append(progress["judgement"])
        else:
            self._progress = progress
        return bool(self._stop)

    def fail(self, error: PipelineError) -> None:
        """Keep the first error that a worker raised on purpose."""
        self._error = self._error or error
        self._worker_failed = True

    def worker_failed(self) -> None:
        """Note that a worker ended with an error, whatever it was: its peers may wait for it until their patience ends."""
        self._worker_failed = True

    def finish(self, outcome: str) -> None:
        """Keep how training ended."""
        self._outcome = outcome

    def stop(self, reason: str = "asked to stop") -> None:
        """Ask the workers to save and stop; the first reason is kept."""
        self._stop = self._stop or reason

    def read(self) -> dict[str, Any]:
        """Return everything, and forget the warnings; where the worker is in this process, it may add one meanwhile."""
        warnings = [self._warnings.pop(0) for _ in range(len(self._warnings))]
        return {
            "progress": self._progress,
            "warnings": warnings,
            "judgements": list(self._judgements),
            "members": dict(self._members),
            "error": self._error,
            "outcome": self._outcome,
            "worker_failed": self._worker_failed,
            "stop": self._stop,
        }


class ActorLink:
    """A worker's line to the control actor. The answer to one message is read when the next one is due, so that nobody waits."""

    def __init__(self, control: Any, stacks: Stacks) -> None:
        self._control, self._stacks = control, stacks
        self._answer: Any = None
        self._stop = False

    def publish(self, progress: dict[str, Any]) -> None:
        """Send progress or a warning."""
        self.stop_requested()
        self._answer = self._control.publish.remote(progress)

    def stop_requested(self) -> bool:
        """Return whether an answer that has arrived said to stop. Every worker asks once a step."""
        import ray

        self._stacks.step()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        return self._stop


def run_worker(config: dict[str, Any]) -> None:
    """Be one worker of an attempt: what Ray Train calls in each of its processes."""
    import ray
    import ray.train.torch

    from pipeline.training.stacks import Stacks, path_of
    from pipeline.training.team import Team
    from pipeline.worker.worker import Worker

    control = ray.get_actor(config["control"], namespace=NAMESPACE)
    os.environ.update(ray.get(control.environment.remote()))
    control.join.remote(WorkerInfo.of_this_process())
    try:
        job: Job = config["job"]
        collective_s = job.profile["timeouts"]["collective_s"]
        team = Team.join(collective_s)
        gpu = ray.train.torch.get_device().index or 0  # of those that this process sees; 0 where it has none
        path = path_of(Path(job.run_folder), job.attempt, team.rank)
        with Stacks(path, collective_s) as stacks:
            worker = Worker(job, team, ActorLink(control, stacks), gpu)
            outcome = worker.work()
    except PipelineError as error:
        ray.get(control.fail.remote(error))
        raise
    except BaseException:
        control.worker_failed.remote()
        raise
    if team.is_main:
        ray.get(control.finish.remote(outcome))


def measure_in_worker(config: dict[str, Any]) -> Any:
    """Return what the function of a probe finds in one worker: what Ray Train calls in each of its processes."""
    import ray

    from pipeline.import_path import allow_modules_in
    from pipeline.training.team import Team

    control = ray.get_actor(config["control"], namespace=NAMESPACE)
    os.environ.update(ray.get(control.environment.remote()))
    allow_modules_in(config["code_folder"])
    try:
        return config["function"](Team.join(config["collective_s"]), *config["arguments"])
    except PipelineError as error:
        ray.get(control.fail.remote(error))
        raise
