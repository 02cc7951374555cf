"""How many workers fit on a cluster's nodes, what is missing for more, and when it is time to take more: arithmetic, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster.session import require_resources
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.config.yaml_files import validate
from pipeline.cpus import usable_cpus
from pipeline.errors import ClusterError, UsageError
from pipeline.planning.capacity import Growth, Node, fitting_counts, largest, room, shortage, whole_gpus

CPUS = usable_cpus()


def profile(workers: Any, **settings: Any) -> Profile:
    return validate(
        Profile,
        {
            "name": "far",
            "kind": "connect",
            "address": "auto",
            "storage": "/shared",
            "workers": workers,
            "resources_per_worker": {"CPU": 2},
        }
        | settings,
        "profile",
    )


def experiment(num_streams: int) -> Experiment:
    return experiment_from({"training": {"batch_size": 48, "num_streams": num_streams}})


def node(name: str, free: float, total: float | None = None, gpus: float = 0) -> Node:
    return Node(name, name, {"CPU": total or free, "GPU": gpus}, {"CPU": free, "GPU": gpus})


@pytest.mark.parametrize(
    ("workers", "streams", "counts"),
    [
        (3, 16, [3]),  # a fixed count is checked against the streams by the plan, which names the remedy
        ({"min": 1, "max": 8}, 16, [8, 4, 2, 1]),
        ({"min": 2, "max": 6}, 12, [6, 4, 3, 2]),
        ({"min": 5, "max": 8}, 16, [8]),
    ],
)
def test_the_counts_of_a_range_divide_the_streams_and_come_largest_first(workers, streams, counts) -> None:
    assert fitting_counts(experiment(streams), profile(workers)) == counts


def test_a_range_without_a_divisor_is_refused() -> None:
    with pytest.raises(UsageError, match=r"none of 5 \.\. 7 divides training.num_streams 16"):
        fitting_counts(experiment(16), profile({"min": 5, "max": 7}))


@pytest.mark.parametrize(
    ("cpus_each", "counts"),
    [
        (CPUS / 2, [2, 1]),
        (None, [4, 2, 1]),
        (2 * CPUS, [1]),
    ],  # no CPUs named: shared; the last is refused with what is missing
)
def test_on_this_machine_the_counts_are_those_that_it_holds(cpus_each, counts) -> None:
    here = {"kind": "local", "address": None, "storage": None, "resources_per_worker": {"CPU": cpus_each}}
    elastic = profile({"min": 1, "max": 4}, **here)
    assert fitting_counts(experiment(16), elastic) == counts
    if cpus_each == 2 * CPUS:
        with pytest.raises(ClusterError, match=r"got .* CPUs? on this machine, expected .* for 1 worker with "):
            require_resources(elastic, counts[0])
    else:
        require_resources(elastic, counts[0])


def test_workers_fit_on_single_nodes_not_on_their_sum() -> None:
    nodes = [node("a", 3), node("b", 3), node("c", 4, total=8)]
    assert room(nodes, {"CPU": 2}, "pack") == 1 + 1 + 2
    assert room(nodes, {"CPU": 2}, "pack", of_all=True) == 1 + 1 + 4
    assert room(nodes, {"CPU": 2}, "strict_spread") == 3
    assert room(nodes, {"CPU": 2, "GPU": 1}, "pack") == 0
    assert room([node("d", 64, gpus=8)], {"CPU": 2, "GPU": 1}, "pack") == 8  # the scarcer resource decides
    assert room([node("e", 0.3)], {"CPU": 0.1}, "pack") == 3  # in floating point 0.3 / 0.1 is below 3


@pytest.mark.parametrize(
    ("share", "gpus", "fitting"),
    [
        (0.6, 8, 8),  # one on each, though all the shares together are 4.8 of 8
        (0.5, 2, 4),
        (0.3, 2, 6),
        (0.1, 1, 10),
        (0.6, 7.4, 7),  # of eight, one of which has a worker
        (0.4, 1.5, 3),
        (1, 8, 8),
        (2, 7, 3),
    ],
)
def test_a_share_of_a_gpu_is_never_put_together_from_several(share: float, gpus: float, fitting: int) -> None:
    assert room([node("a", 64, gpus=gpus)], {"CPU": 1, "GPU": share}, "pack") == fitting


@pytest.mark.parametrize(
    ("workers", "share", "gpus"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (3, 0.6, 3), (13, 0.6, 13), (10, 0.1, 1), (3, 2, 6), (4, 0, 0)],
)
def test_ray_is_given_as_many_whole_gpus_as_the_workers_need(workers: int, share: float, gpus: int) -> None:
    assert whole_gpus(workers, share) == gpus


def test_the_largest_count_that_fits_is_taken() -> None:
    counts = [8, 4, 2]
    assert largest(counts, [node("a", 8), node("b", 4)], profile({"min": 2, "max": 8})) == 4
    assert largest(counts, [node("a", 3)], profile({"min": 2, "max": 8})) is None


def test_what_is_missing_is_said_in_numbers() -> None:
    said = shortage(4, [node("a", 2, total=4), node("b", 3)], profile(4, placement="strict_spread"))
    assert said == (
        "4 workers with 2 CPUs each, each on a node of its own (placement: strict_spread); "
        "the cluster has 5 of 7 CPUs free on 2 nodes, which holds 2"
    )


def grown(placement: str = "pack", **workers: Any) -> Growth:
    return Growth([4, 2, 1], 2, profile({"min": 1, "max": 4, "grow_after_s": 60} | workers, placement=placement))


MINE = {"a"}
FULL, ROOMY = [node("a", 0, total=4)], [node("a", 0, total=4), node("b", 4)]


def test_room_for_more_workers_must_stand_for_a_while() -> None:
    growth = grown()
    assert growth.after(FULL, MINE, 900, now=0) is None
    assert growth.after(ROOMY, MINE, 900, now=10) is None
    assert growth.after(ROOMY, MINE, 900, now=69) is None
    assert growth.after(ROOMY, MINE, 900, now=70) == 4


def test_a_node_that_comes_and_goes_begins_its_time_anew() -> None:
    growth = grown()
    growth.after(ROOMY, MINE, 900, now=0)
    growth.after(FULL, MINE, 900, now=50)
    assert growth.after(ROOMY, MINE, 900, now=61) is None
    assert growth.after(ROOMY, MINE, 900, now=121) == 4


def test_a_training_that_is_nearly_done_is_left_alone() -> None:
    growth = grown()
    growth.after(ROOMY, MINE, 59, now=0)
    assert growth.after(ROOMY, MINE, 59, now=1000) is None


def test_nothing_grows_past_its_bounds_or_onto_a_node_that_has_its_worker() -> None:
    for growth, nodes in (
        (Growth([2, 1], 2, profile({"min": 1, "max": 2, "grow_after_s": 1})), ROOMY),
        (Growth([2], 2, profile(2)), ROOMY),
        # the third and fourth worker need nodes of their own, and "a" has one already
        (grown("strict_spread", grow_after_s=1), [node("a", 4), node("b", 4)]),
    ):
        growth.after(nodes, MINE, 900, now=0)
        assert growth.after(nodes, MINE, 900, now=100) is None
