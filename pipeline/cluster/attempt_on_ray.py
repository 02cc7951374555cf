"""An attempt in workers of Ray Train: a `fit()` in a thread, which this thread watches, and the reason why it ended."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.attempt import Attempt, Ended, Observer
from pipeline.cluster.causes import cause_of, starved
from pipeline.cluster.control_actor import NAMESPACE, ControlActor, actor_name, run_worker
from pipeline.cluster.placement import mark_of, release
from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.console import Console
from pipeline.planning.capacity import Growth, needs
from pipeline.planning.memory import oom_kills
from pipeline.signals import Signals
from pipeline.storage.remote import RemoteFolder
from pipeline.training.device import backend_of
from pipeline.training.stacks import STACKS, forget_empty
from pipeline.worker.job import Job

END_S = 30.0  # for Ray Train to end an attempt whose workers have been ended
PEERS_S = 5.0  # for Ray Train to end the peers of a worker that failed; it would wait half a minute for one that hangs
SILENCE_HERE_S = 5.0
SILENCE_S = 30.0  # for a head that restarts; after a minute Ray ends the driver's process without a message
# reasons of the driver's own to ask the workers to save and stop, in order to start them again
DRAINED = "a node is about to be taken away"
GROWN = "the cluster has room for more workers"
CLUSTER_GONE = "the cluster's head did not answer"


class AttemptOnRay(Attempt):
    """Trains in the Ray that this process is part of."""

    def __init__(self, job: Job, profile: Profile, console: Console, signals: Signals, counts: Sequence[int]) -> None:
        super().__init__(job, profile, console, signals)
        self.run_id = Path(job.run_folder).name
        self.name = actor_name(self.run_id, job.attempt)
        # a single machine neither grows nor leaves its own driver
        watches = profile.is_remote
        self.growth = Growth(counts, job.num_workers, profile) if watches else None
        self.drains = watches and profile.preemption.watch
        self.looked_at = self.heard_at = time.monotonic()
        self.failed_at: float | None = None

    def run(self, observe: Observer) -> Ended:
        self.control = start_control(self.name, self.profile)
        trainer = trainer_of(
            run_worker, {"job": self.job, "control": self.name}, self.profile, self.job.num_workers,
            run_id=self.run_id, name=f"attempt-{self.job.attempt}", storage=_ray_storage(self.job, self.profile),
        )  # fmt: skip
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # handled by the watching thread
                failure.append(error)

        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()

        def ended(timeout_s: float) -> bool:
            thread.join(timeout_s)
            return not thread.is_alive()

        self._watch(ended, observe)
        if self._is_lost():
            return Ended(None, CLUSTER_GONE)
        if thread.is_alive():  # a stop that took too long, or a second signal
            self._end_at_once(thread)
            return Ended(None, "stopped at once")
        self._hear()
        if self.seen.get("error") is not None:
            raise self.seen["error"]
        if failure:
            return self._why(failure[0])
        return Ended(self.seen.get("outcome"), "the cluster went away", self.planned)

    def _is_lost(self) -> bool:
        """Whether the cluster's head has accepted no connection for long. A head on this machine does not restart."""
        if cluster_nodes.head_answers():
            self.heard_at = time.monotonic()
        return time.monotonic() - self.heard_at > (SILENCE_HERE_S if not self.profile.is_remote else SILENCE_S)

    def _end_peers(self) -> None:
        """End the other workers if one failed some seconds ago: one of them may hang."""
        now = time.monotonic()
        if self.seen.get("worker_failed") and self.failed_at is None:
            self.failed_at = now
        if self.failed_at is not None and now - self.failed_at > PEERS_S:
            self.failed_at = now
            release(self.run_id)

    def _look_around(self) -> None:
        """End workers that wait for one that failed. Ask for a stop if a node will be taken away, or if more workers fit."""
        self._end_peers()
        now = time.monotonic()
        if self.asked_at is not None or self.begin is None:
            return  # workers that are not training yet have nothing to save
        if now - self.looked_at < self.profile.preemption.poll_s or not cluster_nodes.head_answers():
            return  # without a head, the calls below would wait for a minute
        self.looked_at = now
        mine = {member.node: member for member in self.seen["members"].values()}
        with contextlib.suppress(Exception):  # the cluster does not answer: if that lasts, the attempt fails
            if self.drains:
                leaving = cluster_nodes.draining() & mine.keys()
                if leaving:
                    names = ", ".join(sorted({mine[node].node_name for node in leaving}))
                    self._ask(DRAINED, f"node {names} is about to be taken away: saving, to continue elsewhere")
                    return
            if self.growth is not None:
                count = self.growth.after(cluster_nodes.nodes(), set(mine), self._time_left(), now)
                if count is not None:
                    self._ask(GROWN, f"the cluster has room for {count} workers now: saving, to continue with them")

    def _stop(self) -> None:
        self.control.stop.remote(self.planned or "asked to stop")

    def _read(self) -> dict[str, Any]:
        """Return the state of the control actor; {} if it is gone with its cluster: then `fit()` raises the cause."""
        import ray

        try:
            seen: dict[str, Any] = ray.get(self.control.read.remote(), timeout=5)
        except ray.exceptions.RayError:
            return {}
        return seen

    def _end_at_once(self, thread: threading.Thread) -> None:
        """End the workers, whatever they are doing. On this machine alone, shutting down Ray does that."""
        if self.profile.is_remote:
            release(self.run_id)
            thread.join(END_S)

    def _why(self, error: BaseException) -> Ended:
        """Return why the attempt failed, by the error and by the state of its workers' nodes; release what it held."""
        while not cluster_nodes.head_answers():
            if self._is_lost():
                return Ended(None, CLUSTER_GONE)
            time.sleep(1.0)
        members = self.seen.get("members", {}).values()
        mine = {member.node for member in members}
        try:
            release(self.run_id)
            # this machine is not asked: if it is busy and Ray's process answers late, it would count as lost
            here = not self.profile.is_remote
            answers = dict.fromkeys(mine, oom_kills()) if here else cluster_nodes.on_each(mine, oom_kills)
        except Exception:  # the cluster ends
            return Ended(None, cause_of(error))
        lost = frozenset(mine - answers.keys())
        for member in members:
            if member.node in lost:
                cause = f"worker {member.rank}: its node {member.node_name} was lost"
                return Ended(None, cause, lost=lost)
        cause = cause_of(error)
        if any(answers[member.node] > member.oom_kills for member in members):
            cause = starved(cause)
        stacks = Path(self.job.run_folder) / STACKS
        forget_empty(stacks)
        if stacks.is_dir():
            cause += f" (what its threads were doing: {stacks})"
        return Ended(None, cause, lost=lost)


def start_control(name: str, profile: Profile) -> Any:
    """Start the actor between this process and its workers on this node, with the variables that the profile forwards."""
    import ray

    return (
        ray.remote(ControlActor)
        .options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=cluster_nodes.this_node())
        .remote(forwarded(profile))
    )


def trainer_of(
    function: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    profile: Profile,
    num_workers: int,
    *,
    run_id: str,
    name: str,
    storage: dict[str, Any],
) -> Any:
    """Return the Ray Train run that calls `function(config)` in each worker, without Ray's own retries.

    `run_id` marks what the workers reserve; `storage` is where Ray keeps its own few files.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.cluster.rendezvous import Rendezvous

    # Ray Train reads these at each `fit()`, and passes them to its processes on other nodes
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{profile.timeouts.start_s:g}"
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{profile.timeouts.collective_s:g}"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # an actor that does what `_look_around` does
    return TorchTrainer(
        function,
        train_loop_config=config,
        torch_config=Rendezvous(backend=backend_of(profile), timeout_s=int(profile.timeouts.collective_s)),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=profile.use_gpu,
            resources_per_worker={**needs(profile, num_workers), "memory": mark_of(run_id)},
            placement_strategy=profile.placement.upper(),
        ),
        run_config=RunConfig(
            name=name,
            **storage,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )


def _ray_storage(job: Job, profile: Profile) -> dict[str, Any]:
    """Return where Ray keeps its own few files of an attempt; on a cluster every node must see that place."""
    if job.run_address is None or not profile.is_remote:
        return {"storage_path": str(Path(job.run_folder) / "ray")}
    folder = RemoteFolder(job.run_address).child("ray")
    return {"storage_path": f"{folder.bucket}/{folder.prefix}", "storage_filesystem": folder.for_ray()}
