"""How many workers fit on a cluster, and what more of them would need: arithmetic on its nodes, which `cluster/nodes` lists."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.config.cluster_profile import Profile, Workers
from pipeline.config.experiment import Experiment
from pipeline.console import plural
from pipeline.cpus import usable_cpus
from pipeline.data.order import default_num_streams
from pipeline.errors import UsageError
from pipeline.gpus import usable_gpus

EPSILON = 1e-6  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive and stays: all its resources, and the free ones."""

    id: str
    name: str
    total: dict[str, float]
    free: dict[str, float]


def fitting_counts(experiment: Experiment, profile: Profile) -> list[int]:
    """Return the worker counts that profile and experiment allow, largest first: one, or those of a range that divide the streams.

    With kind local only those that fit on this machine, or the smallest if none does. UsageError if the range has none.
    """
    if not isinstance(profile.workers, Workers):
        return [profile.least_workers]
    streams = experiment.training.num_streams or default_num_streams(experiment.training.batch_size)
    fitting = [n for n in range(min(profile.workers.max, streams), profile.workers.min - 1, -1) if streams % n == 0]
    if not fitting:
        raise UsageError(
            f"workers: none of {profile.workers.min} .. {profile.workers.max} divides training.num_streams {streams}; "
            "widen the profile's range"
        )
    if profile.is_remote:
        return fitting
    return held_here(fitting, profile) or fitting[-1:]  # the session reports what that one lacks


def held_here(counts: Sequence[int], profile: Profile) -> list[int]:
    """Return those of the counts that fit on this machine."""
    has = {"CPU": float(usable_cpus())}
    if profile.use_gpu:
        has["GPU"] = float(usable_gpus())
    here = [Node("here", "this machine", has, has)]
    return [n for n in counts if room(here, needs(profile, n), profile.placement) >= n]


def needs(profile: Profile, num_workers: int) -> dict[str, float]:
    """Return what Ray reserves for each of `num_workers` workers."""
    need = {"CPU": profile.cpus_per_worker(num_workers), "GPU": profile.gpus_per_worker}
    return {name: amount for name, amount in need.items() if amount > 0}


def room(nodes: Sequence[Node], need: dict[str, float], placement: str, *, of_all: bool = False) -> int:
    """Return how many workers fit beside what is running; with `of_all`, if nothing else ran."""
    each = [_room_on(node.total if of_all else node.free, need) for node in nodes]
    return sum(min(count, 1) for count in each) if placement == "strict_spread" else sum(each)


def largest(counts: Sequence[int], nodes: Sequence[Node], profile: Profile) -> int | None:
    """Return the first of the counts (largest first) that fits now; None if none does."""
    return next((n for n in counts if room(nodes, needs(profile, n), profile.placement) >= n), None)


def shortage(num_workers: int, nodes: Sequence[Node], profile: Profile) -> str:
    """Return what is missing for so many workers: what they need, what there is, and what of it is free."""
    need = needs(profile, num_workers)
    each = ", ".join(plural(amount, name) for name, amount in need.items())
    have = ", ".join(
        f"{sum(node.free.get(name, 0) for node in nodes):g} of {sum(node.total.get(name, 0) for node in nodes):g} {name}s free"
        for name in need
    )
    apart = ", each on a node of its own (placement: strict_spread)" if profile.placement == "strict_spread" else ""
    on = f"on {plural(len(nodes), 'node')}"
    fits = room(nodes, need, profile.placement)
    return f"{plural(num_workers, 'worker')} with {each} each{apart}; the cluster has {have} {on}, which holds {fits}"


def whole_gpus(num_workers: int, each: float) -> int:
    """Return how many GPUs so many workers need: Ray never splits a share of a GPU over two."""
    if 0 < each < 1:
        return math.ceil(num_workers / int((1 + EPSILON) / each))
    return round(num_workers * each)


def _room_on(resources: dict[str, float], need: dict[str, float]) -> int:
    return min(_times(name, resources.get(name, 0.0) + EPSILON, amount) for name, amount in need.items())


def _times(name: str, amount: float, each: float) -> int:
    if name != "GPU" or each >= 1:
        return int(amount / each)
    whole = int(amount)  # one worker's share comes from one GPU
    return whole * int((1 + EPSILON) / each) + int((amount - whole) / each)


class Growth:
    """Notices that more workers fit, and have done so for a while."""

    def __init__(self, counts: Sequence[int], num_workers: int, profile: Profile) -> None:
        self._larger = [n for n in counts if n > num_workers]
        self._num_workers, self._profile = num_workers, profile
        self._seen: tuple[int, float] | None = None

    def after(self, nodes: Sequence[Node], mine: Collection[str], left_s: float | None, now: float) -> int | None:
        """Return the worker count to start again with, if it has fitted for `grow_after_s` and is worth it; else None.

        `mine` are the nodes that have workers already, `left_s` is the time that training still takes as it is, `now` a clock's seconds.
        """
        workers = self._profile.workers
        if not isinstance(workers, Workers) or left_s is None or left_s < workers.grow_after_s:
            return None
        apart = self._profile.placement == "strict_spread"
        others = [node for node in nodes if not (apart and node.id in mine)]
        fits = (
            n
            for n in self._larger
            if self._num_workers + room(others, needs(self._profile, n), self._profile.placement) >= n
        )
        count = next(fits, None)
        if count is None:
            self._seen = None
        elif self._seen is None or count < self._seen[0]:
            self._seen = (count, now)
        if self._seen is None or now - self._seen[1] < workers.grow_after_s:
            return None
        return count
