"""The nodes of this process's cluster: which there are, which will be taken away, and which answer."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pipeline.planning.capacity import Node

ANSWER_S = 10.0  # a worker process starts in two or three seconds


def nodes(without: Collection[str] = ()) -> list[Node]:
    """Return the nodes that are alive and will stay, except some. What they have free may be a second old."""
    import ray
    from ray._private.state import available_resources_per_node

    leaving, free = draining(), available_resources_per_node()
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and node["NodeID"] not in without
    ]


def head_answers(timeout_s: float = 2.0) -> bool:
    """Whether the head of this process's cluster accepts connections. Connects to its port, because Ray itself would wait a minute."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError:
        return False
    return True


def draining() -> set[str]:
    """Return the nodes that Ray reports as draining (spot machines, maintenance): Ray places nothing new on them."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def answers(
    questions: Mapping[str, Callable[[], Any]],
    timeout_s: float = ANSWER_S,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Call a function on each node, all at once, and yield (node, answer) in the order of arrival until the time is over.

    A node that does not answer may be lost: Ray notices a lost machine after half a minute, and waits for it until then. `environment`
    holds variables for the process there whose values are secret. They are sent as arguments, which Ray does not show, unlike functions.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ask, secret = _asking(), dict(environment or {})
    waiting = {
        ask.options(scheduling_strategy=On(node, soft=False)).remote(question, secret): node
        for node, question in questions.items()
    }
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone, or its process was killed
            yield waiting.pop(ready[0]), ray.get(ready[0])
    for task in waiting:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(task, force=True)


def on_each(asked: Collection[str], question: Callable[[], Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Call a function on each node, and return by node the answers that came in time."""
    return dict(answers(dict.fromkeys(asked, question), timeout_s))


@functools.cache  # sent to the cluster once: Ray warns about a function that is sent for each of many nodes
def _asking() -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(_answer)


def _answer(question: Callable[[], Any], environment: Mapping[str, str]) -> Any:
    os.environ.update(environment)
    return question()


@contextlib.contextmanager
def wanted() -> Iterator[Callable[[dict[str, float], int], None]]:
    """Yield a function that requests bundles of resources from an autoscaling cluster. The request is withdrawn at the end."""
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

            with contextlib.suppress(Exception):  # a cluster that ends forgets its requests
                request_resources(bundles=[])


def this_node() -> Any:
    """Return the scheduling strategy that places an actor on the node of this process, so that it is not lost with another machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    return On(ray.get_runtime_context().get_node_id(), soft=False)


def resource_of_this_node() -> str:
    """Return the name of the resource that only this node has, for what can be placed by resources alone."""
    import ray

    return f"node:{ray.util.get_node_ip_address()}"
