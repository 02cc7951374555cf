"""What more workers cost and gain, predicted: the time of a step, its efficiency, work lost to failures, the interval of checkpoints.

    t_step(n) = max(t_compute + t_exposed + t_jitter, t_data)

Gradients are averaged bucket by bucket while the backward pass still runs (PyTorch DDP, arXiv:2006.15704); what the network has not
sent by its end is exposed. docs/scaling.md holds the model against published measurements and says what is assumed. Standard library
only; times in seconds, rates in units per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20
BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * MIB, MIB  # DistributedDataParallel's own
BACKWARD_SHARE = 2 / 3  # of a step's arithmetic: what communication can hide behind
JITTER = 0.01  # assumed: standard deviation of one worker's compute time, relative
GPU_HOURS_PER_FAILURE = (
    8090  # Meta, "Revisiting Reliability in Large-Scale ML Clusters": 7.9 h between failures on 1024 GPUs
)
RESTART_S = 120.0  # assumed: noticing a failure, starting workers, reading the checkpoint


@dataclass(frozen=True)
class Link:
    """The slowest link of a ring of workers: bus bandwidth as nccl-tests counts it, and the latency of one hop."""

    bytes_per_s: float
    latency_s: float = 6e-6  # small messages among 16 GPUs in 50 us, two passes of four hops (dstackai/dstack#3961)

    def all_reduce_s(self, num_bytes: float, num_workers: int) -> float:
        """Return the time in which `num_workers` add up `num_bytes` each (nccl-tests, doc/PERFORMANCE.md; latency of a tree)."""
        if num_workers == 1:
            return 0.0
        passes = 2 * (num_workers - 1) / num_workers
        return passes * num_bytes / self.bytes_per_s + 2 * self.latency_s * math.ceil(math.log2(num_workers))


@dataclass(frozen=True)
class Network:
    """How workers are joined: `within` a node of `workers_per_node`, and `between` nodes."""

    workers_per_node: int
    within: Link
    between: Link

    def link(self, num_workers: int) -> Link:
        """Return the link that a ring of so many workers waits for."""
        return self.within if num_workers <= self.workers_per_node else self.between


# Assumed where nothing was measured: eight GPUs joined by NVSwitch and 400 Gb/s for each; CPU workers on one machine and on 10 Gb/s.
GPU_NETWORK = Network(8, Link(300e9), Link(50e9))
CPU_NETWORK = Network(1, Link(2e9, 1e-4), Link(1.25e9, 1e-4))


@dataclass(frozen=True)
class Work:
    """What one worker does in a step: `fixed_s` whatever its batch (the optimizer), and `image_s` for each image."""

    num_parameters: int
    image_s: float
    fixed_s: float = 0.0
    gradient_bytes_per_parameter: int = 4
    jitter: float = JITTER
    data_images_per_s: float | None = None  # what one worker's reader gives; None: never the limit

    def compute_s(self, batch: float) -> float:
        """Return the arithmetic's time for a worker's `batch` images."""
        return self.fixed_s + batch * self.image_s


def buckets(num_bytes: float) -> list[float]:
    """Return the sizes in which DDP sends gradients: 1 MiB first, so that sending starts early, then 25 MiB each, then the rest."""
    sizes = [min(num_bytes, FIRST_BUCKET_BYTES)]
    left = num_bytes - sizes[0]
    while left > 0:
        sizes.append(min(left, BUCKET_BYTES))
        left -= sizes[-1]
    return sizes


def step_s(work: Work, batch: float, num_workers: int, network: Network) -> float:
    """Return the time of a step of `num_workers` with `batch` images each."""
    compute = work.compute_s(batch)
    data = 0.0 if work.data_images_per_s is None else batch / work.data_images_per_s
    if num_workers == 1:
        return max(compute, data)
    link, sizes = network.link(num_workers), buckets(work.num_parameters * work.gradient_bytes_per_parameter)
    times = [link.all_reduce_s(size, num_workers) for size in sizes]
    hidden = BACKWARD_SHARE * compute * (len(sizes) - 1) / len(sizes)
    exposed = max(0.0, sum(times[:-1]) - hidden) + times[-1]
    jitter = (
        work.jitter * compute * math.sqrt(2 * math.log(num_workers))
    )  # the slowest of n: expected maximum of n normals
    return max(compute + exposed + jitter, data)


def speedup(work: Work, global_batch: int, num_workers: int, network: Network) -> float:
    """Return how much faster than on one node `num_workers` do a step of one global batch (strong scaling)."""
    node = min(num_workers, network.workers_per_node)
    alone = step_s(work, global_batch / node, node, network)
    return alone / step_s(work, global_batch / num_workers, num_workers, network)


def efficiency(work: Work, global_batch: int, num_workers: int, network: Network) -> float:
    """Return the share of the added nodes' work that is not lost: the speed-up over one node, by the number of nodes."""
    node = min(num_workers, network.workers_per_node)
    return speedup(work, global_batch, num_workers, network) * node / num_workers


def weak_efficiency(work: Work, batch: int, num_workers: int, network: Network) -> float:
    """Return a node's speed among `num_workers` with `batch` images each, relative to the node alone."""
    node = min(num_workers, network.workers_per_node)
    return step_s(work, batch, node, network) / step_s(work, batch, num_workers, network)


# -- failures -------------------------------------------------------------------------------------------------------------------


def mean_time_to_failure_s(num_workers: int, gpu_hours: float = GPU_HOURS_PER_FAILURE) -> float:
    """Return the expected time until one of `num_workers` fails."""
    return gpu_hours * 3600 / num_workers


def checkpoint_interval_s(checkpoint_s: float, failure_s: float) -> float:
    """Return Young's interval T* = sqrt(2 C M) for a checkpoint that stops training for C and failures M apart."""
    return math.sqrt(2 * checkpoint_s * failure_s)


def lost_share(checkpoint_s: float, interval_s: float, failure_s: float, restart_s: float = RESTART_S) -> float:
    """Return the share of time lost: C/T to saving, T/(2M) to steps done again, R/M to restarts; at most 1."""
    return min(1.0, checkpoint_s / interval_s + interval_s / (2 * failure_s) + restart_s / failure_s)


# -- sampling -------------------------------------------------------------------------------------------------------------------


def sampling_s(num_images: int, network_calls: int, calls_per_s: float, num_workers: int) -> float:
    """Return the time in which workers that share nothing draw `num_images`, each by `network_calls` calls of `calls_per_s`."""
    return math.ceil(num_images / num_workers) * network_calls / calls_per_s
