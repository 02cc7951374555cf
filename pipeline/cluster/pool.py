"""Chunks over the workers of a Ray cluster: each worker takes the next missing chunk, so that a slow worker does not delay the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.gather import gather
from pipeline.cluster.session import Session, is_up
from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.console import Console
from pipeline.errors import ClusterError, PipelineError
from pipeline.import_path import allow_modules_in
from pipeline.planning.capacity import held_here
from pipeline.signals import Signals
from pipeline.storage.tensor_file import Arrays
from pipeline.training.chunks import Runner, Task, in_process
from pipeline.training.device import sampling_compute


class ChunkWorker:
    """One worker of the pool.

    It prepares the task at the first call, not in its constructor: Ray reports an error in a constructor like a killed process.
    """

    def __init__(self, profile: Profile, code_folder: str, secrets: dict[str, str], task: list[Any]) -> None:
        self._profile, self._code_folder, self._secrets, self._sent = profile, code_folder, secrets, task

    @cached_property
    def _task(self) -> Task:
        import ray

        os.environ.update(self._secrets)
        allow_modules_in(self._code_folder)  # before the task is unpickled: its network may be the user's own
        task: Task = ray.get(self._sent[0])
        here = sampling_compute(self._profile, self._profile.most_workers)
        here.start()
        task.start(here)
        return task

    def ready(self) -> None:
        """Return once the task is ready."""
        assert self._task

    def compute(self, indices: range) -> Arrays:
        """Return one chunk."""
        return self._task(indices)


def runner_of(profile: Profile) -> Runner:
    """Return what computes chunks: this process if the profile names one worker on this machine, else workers of Ray.

    If Ray is up, this process is a sweep's trial, one of several: it holds no GPU, and Ray knows which GPU is free.
    """
    if not profile.is_remote and profile.most_workers == 1 and not (profile.use_gpu and is_up()):
        return in_process(sampling_compute(profile))
    return lambda task, chunks: _over_workers(task, chunks, profile)


def _over_workers(task: Task, chunks: Mapping[int, range], profile: Profile) -> Iterator[tuple[int, Arrays]]:
    if not chunks:
        return
    most = profile.most_workers
    if not profile.is_remote:
        most = max(held_here(range(profile.least_workers, most + 1), profile), default=most)
    count = min(most, len(chunks))
    inside = is_up()  # in a sweep's trial, which waits until Ray has room
    with Session(profile, count) as session:
        session.ensure()
        if profile.is_remote and not inside:
            _wait_for_room(count, profile)
        import ray

        shared = [ray.put(task)]
        retries = profile.retries.max_attempts - 1
        remote = ray.remote(ChunkWorker).options(
            num_cpus=profile.cpus_per_worker(profile.most_workers),
            num_gpus=profile.gpus_per_worker,
            max_restarts=retries,
            max_task_retries=retries,
        )
        workers = [remote.remote(profile, os.getcwd(), forwarded(profile), shared) for _ in range(count)]
        try:
            yield from _dealt(chunks, workers)
        finally:
            for worker in workers:  # otherwise each would take seconds to end, and might hang
                ray.kill(worker)


def _wait_for_room(count: int, profile: Profile) -> None:
    """Wait until the cluster has room for one worker. Raises ClusterError in the end; Ray itself would wait for ever."""
    with cluster_nodes.wanted() as want:
        gather(range(count, 0, -1), profile, Console(), Signals([]), (), want, "the same command")


def _dealt(chunks: Mapping[int, range], workers: list[Any]) -> Iterator[tuple[int, Arrays]]:
    """Deal chunks to workers as each is free, and return them as they are done."""
    import ray

    waiting, to_come = list(chunks.items())[::-1], len(chunks)
    # a worker gets work once it is up: one for which the cluster has no room does not delay the others
    running: dict[Any, tuple[int | None, Any]] = {worker.ready.remote(): (None, worker) for worker in workers}
    try:
        while to_come:
            ended, _ = ray.wait(list(running), num_returns=1)
            number, worker = running.pop(ended[0])
            result = _result(ended[0])
            if waiting:
                following, indices = waiting.pop()
                running[worker.compute.remote(indices)] = (following, worker)
            if number is not None:
                to_come -= 1
                yield number, result
    finally:
        # otherwise Ray prints to stdout that it will repeat what a worker was doing
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Arrays:
    """Return a computed chunk. Raises a worker's own error, and ClusterError if the worker died."""
    import ray

    try:
        arrays: Arrays = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"a worker died more often than the profile's retries allow ({reason}); what was computed is kept: run the same command again"
        ) from None
    return arrays
