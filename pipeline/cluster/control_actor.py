"""The control actor between the driver and its workers, and the functions that Ray Train calls in each worker.

Ray's own processes import this module to find both by name. So it imports nothing heavy: the control actor starts at once and takes little
memory, and only the workers load torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.training.stacks import Stacks
    from pipeline.worker.job import Job

NAMESPACE = "ddpm-pipe"


def actor_name(run_id: str, attempt: int) -> str:
    """Return the name of an attempt's control actor in the cluster."""
    return f"control-{run_id}-{attempt}"


@dataclass(frozen=True)
class WorkerInfo:
    """A worker of an attempt: the node where it runs, and how many processes the kernel had killed there for lack of memory."""

    rank: int
    node: str
    node_name: str
    oom_kills: int

    @classmethod
    def of_this_process(cls) -> WorkerInfo:
        import ray
        import ray.train

        from pipeline.planning.memory import oom_kills

        return cls(
            ray.train.get_context().get_world_rank(),
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            oom_kills(),
        )


class ControlActor:
    """Workers write their progress, the driver writes that they should stop.

    It is an actor in the cluster, or an object of this process if the worker runs in this process.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._warnings: list[str] = []
        self._judgements: list[dict[str, Any]] = []
        self._members: dict[int, WorkerInfo] = {}
        self._state: dict[str, Any] = {
            "progress": {},
            "error": None,
            "outcome": None,
            "worker_failed": False,
            "stop": "",
        }

    def environment(self) -> dict[str, str]:
        """Return secret variables for the workers. Ray would show a runtime environment to every client."""
        return self._environment

    def join(self, member: WorkerInfo) -> None:
        """Record a worker that has started."""
        self._members[member.rank] = member

    def publish(self, progress: dict[str, Any]) -> bool:
        """Record rank 0's progress, a warning or an early score; return whether the workers should stop."""
        if "warning" in progress:
            self._warnings.append(progress["warning"])
        elif "judgement" in progress:
            self._judgements.append(progress["judgement"])
        else:
            self._state["progress"] = progress
        return bool(self._state["stop"])

    def fail(self, error: PipelineError) -> None:
        """Keep the first error that a worker raised on purpose."""
        self._state["error"] = self._state["error"] or error
        self._state["worker_failed"] = True

    def worker_failed(self) -> None:
        """Record that a worker ended with any error: its peers may wait for it until their collective operation times out."""
        self._state["worker_failed"] = True

    def finish(self, outcome: str) -> None:
        self._state["outcome"] = outcome

    def stop(self, reason: str) -> None:
        """Ask the workers to save and stop; the first reason is kept."""
        self._state["stop"] = self._state["stop"] or reason

    def read(self) -> dict[str, Any]:
        """Return everything, and clear the warnings."""
        # one by one: a worker in this process may add a warning meanwhile
        warnings = [self._warnings.pop(0) for _ in range(len(self._warnings))]
        return {
            **self._state,
            "warnings": warnings,
            "judgements": list(self._judgements),
            "members": dict(self._members),
        }


class ActorLink:
    """A worker's link to the control actor. It reads the answer to a message only when the next one is due, and so never waits."""

    def __init__(self, control: Any, stacks: Stacks) -> None:
        self._control, self._stacks = control, stacks
        self._answer: Any = None
        self._stop = False

    def publish(self, progress: dict[str, Any]) -> None:
        """Send progress or a warning."""
        self.stop_requested()
        self._answer = self._control.publish.remote(progress)

    def stop_requested(self) -> bool:
        """Return whether the actor has answered that the workers should stop. Each worker calls this once a step."""
        import ray

        self._stacks.step()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        return self._stop


def run_worker(config: dict[str, Any]) -> None:
    """Train as one worker of an attempt. Ray Train calls this in each of its processes."""
    import ray
    import ray.train.torch

    from pipeline.training.stacks import Stacks, path_of
    from pipeline.training.team import Team
    from pipeline.worker.worker import Worker

    with _reporting_to(config["control"]) as control:
        control.join.remote(WorkerInfo.of_this_process())
        job: Job = config["job"]
        collective_s = job.profile["timeouts"]["collective_s"]
        team = Team.join(collective_s)
        gpu = ray.train.torch.get_device().index or 0  # of the GPUs that this process sees; 0 on a CPU
        path = path_of(Path(job.run_folder), job.attempt, team.rank)
        with Stacks(path, collective_s) as stacks:
            worker = Worker(job, team, ActorLink(control, stacks), gpu)
            outcome = worker.work()
    if team.is_main:
        ray.get(control.finish.remote(outcome))


def measure_in_worker(config: dict[str, Any]) -> Any:
    """Return the result of a probe's function in one worker. Ray Train calls this in each of its processes."""
    from pipeline.import_path import allow_modules_in
    from pipeline.training.team import Team

    with _reporting_to(config["control"]):
        allow_modules_in(config["code_folder"])
        return config["function"](Team.join(config["collective_s"]), *config["arguments"])


@contextmanager
def _reporting_to(name: str) -> Iterator[Any]:
    """Set the secret variables that the control actor has, and report an error of this worker to it."""
    import ray

    control = ray.get_actor(name, namespace=NAMESPACE)
    os.environ.update(ray.get(control.environment.remote()))
    try:
        yield control
    except PipelineError as error:
        ray.get(control.fail.remote(error))
        raise
    except BaseException:
        control.worker_failed.remote()
        raise
