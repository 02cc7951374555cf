"""What this process's cluster consists of: its nodes, those that are about to be taken away, those that answer, and what they reserve."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pipeline.planning.capacity import Node

ANSWER_S = 10.0  # a worker process starts in two or three seconds
REMOVAL_S = 10.0


def nodes(without: Collection[str] = ()) -> list[Node]:
    """Return the nodes that are alive and stay, but for some; what they have free may be a second old."""
    import ray
    from ray._private.state import available_resources_per_node

    leaving, free = draining(), available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and node["NodeID"] not in without
    ]


def head_answers(timeout_s: float = 2.0) -> bool:
    """Whether the head of this process's cluster takes connections. Asks its port: Ray itself would wait for it a minute."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError:
        return False
    return True


def draining() -> set[str]:
    """Return the nodes that Ray says will be taken away (spot machines, maintenance): nothing new is placed on them."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def on_each(asked: Collection[str], question: Callable[[], Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Call a function on each node, and return the answers that came in time by node.

    A node that does not answer may be lost: Ray notices that of a machine after half a minute, and waits for it until then.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ask = ray.remote(num_cpus=0, max_retries=0)(question)
    waiting = {ask.options(scheduling_strategy=On(node, soft=False)).remote(): node for node in asked}
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s) if waiting else ([], [])
    answers = {}
    for answer in ready:
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone, or its process was killed
            answers[waiting[answer]] = ray.get(answer)
    for task in late:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(task, force=True)
    return answers


@contextlib.contextmanager
def wanted() -> Iterator[Callable[[dict[str, float], int], None]]:
    """Give a function that asks a cluster which scales itself for so many bundles of resources; taken back at the end."""
    asked: list[tuple[dict[str, float], int]] = []

    def want(bundle: dict[str, float], count: int) -> None:
        from ray.autoscaler.sdk import request_resources

        if (bundle, count) not in asked:
            asked.append((bundle, count))
            request_resources(bundles=[bundle] * count)

    try:
        yield want
    finally:
        if asked and head_answers():
            from ray.autoscaler.sdk import request_resources

            with contextlib.suppress(Exception):  # a cluster that is going takes its wishes with it
                request_resources(bundles=[])


def this_node() -> Any:
    """Return the placement of what must not be lost with another machine: the node where this process runs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    return On(ray.get_runtime_context().get_node_id(), soft=False)


def release(placement_group: str | None) -> None:
    """End a placement group with everything in it, and wait until its resources are free: Ray forgets it when its controller dies."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if placement_group is None:
        return
    group = PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group)))
    deadline = time.monotonic() + REMOVAL_S
    with contextlib.suppress(ray.exceptions.RayError):
        while placement_group_table(group).get("state") not in (None, "REMOVED") and time.monotonic() < deadline:
            remove_placement_group(group)
            time.sleep(0.1)
