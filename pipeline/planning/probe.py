"""A few real training steps, timed: the experiment's network, optimizer, precision and batch, on random images of the right shape.

The speed of a step does not depend on the content of the images. A batch that would take too long is measured in smaller ones: a step takes
a fixed time (the optimizer, the average) and a time for each image, and two batch sizes give both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.errors import StorageError
from pipeline.planning.footprint import NUM_CLASSES
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.remote import is_remote
from pipeline.storage.remote_run import own_folder
from pipeline.training.batches import Batch
from pipeline.training.device import Compute, sampling_compute, training_compute
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import Shape, build_model, build_objective
from pipeline.training.randomness import training_draws
from pipeline.training.team import Team

PROBE_S = 6.0
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's own
ALL_REDUCES = 6  # the first of which makes the connections
MOST_STEPS = 20  # timed at one batch size
TRIED_BYTES = 100_000_000  # of a checkpoint: what a larger one takes is worked out


@dataclass(frozen=True)
class Probe:
    """One worker's measurements, in seconds. A step of b images takes `fixed_s + b * image_s` before gradients are exchanged."""

    image_s: float
    fixed_s: float
    step_s: float  # of the worker's whole part of the batch, gradients exchanged
    measured_batch: int  # the largest one that was timed; a step of a larger one is extrapolated
    batch: int  # the worker's part
    checkpoint_s: float | None  # None: not tried, or it could not be written
    device: str
    peak_bytes: int | None = None  # of this process, with `measured_batch` images at once or a micro-batch


def probe_training(
    experiment: Experiment,
    shape: Shape,
    profile: Profile,
    num_workers: int,
    *,
    team: Team | None = None,
    budget_s: float = PROBE_S,
    folder: Path | None = None,
) -> Probe:
    """Time this worker's steps within about `budget_s`, and one checkpoint in a temporary folder below `folder`.

    On a cluster with object storage the checkpoint is written where training writes it first: in the node's own folder. All workers of a
    team call this together. Compiled trainings are measured without compilation, which alone would take longer.
    """
    team = team or Team()
    compute = training_compute(experiment, profile, num_workers, shape)
    with _threads_kept():
        compute.start()
        compute.forget_peak()
        steps = _Steps(experiment, shape, compute, team)
        return _probe(steps, experiment.training.batch_size // num_workers, budget_s, profile, folder)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Restore torch's number of threads, which the caller's process still needs."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _probe(steps: _Steps, batch: int, budget_s: float, profile: Profile, folder: Path | None) -> Probe:
    first_s = steps.time(1, 1)[0]  # kernels are chosen and memory is taken here
    large, alone_s, full_s = 1, first_s, first_s
    if first_s < budget_s:
        alone_s = full_s = steps.time(1, MOST_STEPS, within_s=budget_s / 12)[-1]
        while large < batch and full_s <= budget_s / 6:  # a larger one takes four times as long at most
            large = min(4 * large, batch)
            full_s = steps.time(large, 1)[0]
        full_s = statistics.median(steps.time(large, MOST_STEPS, within_s=budget_s / 3))
    shared_s = full_s
    if steps.team.size > 1:
        steps.share_gradients()
        shared_s = statistics.median(steps.time(large, MOST_STEPS, within_s=budget_s / 3))
    image_s, fixed_s = _line(alone_s, large, full_s)
    step_s = shared_s + (batch - large) * image_s
    peak = steps.compute.peak_bytes()
    saving_s = _checkpoint_s(steps.train_state, steps.team, profile, folder)
    return Probe(image_s, fixed_s, step_s, large, batch, saving_s, steps.compute.name, peak)


class _Steps:
    """Training steps of any batch size, one after another on the same network."""

    def __init__(self, experiment: Experiment, shape: Shape, compute: Compute, team: Team) -> None:
        self._experiment, self._shape, self.compute, self.team = experiment, shape, compute, team
        self._num_classes = NUM_CLASSES if experiment.model.class_conditional else None
        model = compute.place(build_model(experiment, shape, num_classes=self._num_classes))
        self._objective = build_objective(experiment)
        self.train_state = TrainState.create(model, experiment.training, self._objective.num_timesteps, compute)
        self._network = model

    def share_gradients(self) -> None:
        """Average gradients over the workers from now on."""
        self._network = self.team.share_gradients(self.train_state.model, self.compute)

    def time(self, batch: int, num_steps: int, within_s: float | None = None) -> list[float]:
        """Return the times of up to `num_steps` steps, fewer if rank 0's time is over; rank 0's times, on every worker.

        The first of several steps is slower, since it allocates memory for another batch size, and is left out.
        """
        steps = fit(
            self.train_state,
            self._network,
            self._objective,
            self._batches(batch),
            self._experiment.training,
            self.compute,
            seed=self._experiment.seed,
            rank=self.team.rank,
            horizontal_flip=self._experiment.data.horizontal_flip,
            null_class=self._num_classes,
        )
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < num_steps:
            before = time.perf_counter()
            next(steps)
            self.compute.wait()
            times.append(time.perf_counter() - before)
            if within_s is not None and self.team.decide(time.perf_counter() - begin > within_s)[0]:
                break
        taken: list[float] = self.team.broadcast(times)
        return taken[1:] or taken

    def _batches(self, size: int) -> Iterator[Batch]:
        images = torch.randint(0, 256, (size, *self._shape), dtype=torch.uint8)
        labels = torch.randint(0, NUM_CLASSES, (size,))
        draws = training_draws(self._experiment.seed, 0, self.team.rank, size, self._shape)
        while True:
            yield Batch(self.train_state.step, images, labels, torch.arange(size), draws)


def _line(one_s: float, large: int, large_s: float) -> tuple[float, float]:
    """Return the time for one more image and the fixed time, from noisy times of a step of one image and of `large` images."""
    image_s = (large_s - one_s) / (large - 1) if large > 1 else large_s
    if image_s <= 0:
        return large_s / large, 0.0
    fixed_s = max(0.0, large_s - large * image_s)
    return (large_s - fixed_s) / large, fixed_s


def _checkpoint_s(train_state: TrainState, team: Team, profile: Profile, folder: Path | None) -> float | None:
    """Write random bytes as training writes a checkpoint; return how long a whole one takes, on every worker."""
    taken: float | None = None
    if team.is_main and folder is not None:
        with suppress(OSError, StorageError):  # the steps are worth telling all the same
            in_store = profile.is_remote and is_remote(profile.storage)
            taken = _save_s(checkpoints.num_bytes(train_state.tensors()), own_folder("runs") if in_store else folder)
    shared: float | None = team.broadcast(taken)
    return shared


def _save_s(num_bytes: int, folder: Path) -> float:
    """Return how long a checkpoint of so many bytes takes; of a large one a part is written."""
    part = torch.randint(0, 256, (min(num_bytes, TRIED_BYTES),), dtype=torch.uint8)
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    temporary = Path(tempfile.mkdtemp(prefix=".ddpm-probe-", dir=there))
    try:
        begin = time.perf_counter()
        checkpoints.save(temporary, 0, 1, {"model": {"part": part}}, {}, may_commit=lambda: True)
        return (time.perf_counter() - begin) * num_bytes / len(part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class AllReduce:
    """One all-reduce of the team: whether the sum was right, and the median seconds."""

    num_bytes: int
    seconds: float
    right: bool


def probe_all_reduce(profile: Profile, team: Team) -> AllReduce:
    """All-reduce one of DDP's buckets over all workers, several times; all of them call this together."""
    compute = sampling_compute(profile, team.size)
    compute.start()
    numbers = torch.empty(BUCKET_BYTES // 4, device=compute.device)
    times = []
    for _ in range(ALL_REDUCES):
        numbers.fill_(team.rank + 1)
        compute.wait()
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        compute.wait()
        times.append(time.perf_counter() - begin)
    right = bool((numbers == team.size * (team.size + 1) / 2).all())
    return AllReduce(BUCKET_BYTES, statistics.median(times[1:]), right)
