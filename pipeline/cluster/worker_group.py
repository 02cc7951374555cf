"""A group of workers as training has them, for short work that Ray Train's start would dwarf: measuring, checking.

Each is an actor with the profile's resources and placement, and a member of one torch process group of the profile's backend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.errors import ClusterError
from pipeline.planning.capacity import needs

T = TypeVar("T")
START_S = 30.0  # workers load torch while they start


class GroupWorker:
    """One worker: `call` runs a function in its process, as `function(team, *arguments)`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def address(self) -> tuple[str, int]:
        """Return where the group's members can find this one: the node's address, and a port that was free a moment ago."""
        import socket

        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.bind((host, 0))
            return host, listener.getsockname()[1]

    def node(self) -> str:
        """Return the id of the node that this worker is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def take(self, environment: dict[str, str]) -> None:
        """Set variables whose values are secret: an argument of a call, which Ray shows nobody."""
        os.environ.update(environment)

    def join(self, rank: int, size: int, master: tuple[str, int], backend: str) -> None:
        """Become one of the group; all of them at once."""
        from pipeline.training.team import init_process_group

        init_process_group(rank, size, master, backend, self._timeout_s)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function returns here."""
        from pipeline.training.team import Team

        return function(Team.join(self._timeout_s), *arguments)


class Group:
    """The workers together."""

    def __init__(self, members: list[Any], num_nodes: int) -> None:
        self._members = members
        self.num_nodes = num_nodes

    def run(self, function: Callable[..., T], *arguments: Any, timeout_s: float) -> list[T]:
        """Call `function(team, *arguments)` in every worker at once; results by rank. ClusterError where one is not done in time."""
        return _together([member.call.remote(function, *arguments) for member in self._members], timeout_s)


@contextlib.contextmanager
def worker_group(
    profile: Profile, num_workers: int, start_s: float = START_S, collective_s: float = 20.0
) -> Iterator[Group]:
    """Start the workers in the cluster that this process is connected to, and end them with the context.

    They have the variables that the profile forwards. ClusterError where the cluster does not hold them or they do not find each other
    within `start_s`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from pipeline.training.device import backend_of

    bundle = needs(profile, num_workers)
    place = placement_group([bundle] * num_workers, strategy=profile.placement.upper())
    try:
        if not place.wait(start_s):
            raise ClusterError(
                f"{num_workers} workers with {', '.join(f'{v:g} {k}s' for k, v in bundle.items())} each found no room within "
                f"{start_s:g} s (placement: {profile.placement}); see what else runs with: ray status"
            )
        actor = ray.remote(GroupWorker)
        members = [
            actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=index),
            ).remote(collective_s)
            for index in range(num_workers)
        ]
        secret = forwarded(profile)
        if secret:
            _together([member.take.remote(secret) for member in members], start_s)
        if num_workers > 1:
            (master,) = _together([members[0].address.remote()], start_s)
            backend = backend_of(profile)
            _together([m.join.remote(r, num_workers, master, backend) for r, m in enumerate(members)], start_s)
        nodes = _together([member.node.remote() for member in members], start_s)
        yield Group(members, len(set(nodes)))
    finally:
        remove_placement_group(place)  # with the actors in it


def _together(answers: list[Any], timeout_s: float) -> list[Any]:
    import ray

    try:
        found: list[Any] = ray.get(answers, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"the workers did not answer within {timeout_s:g} s") from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise cause from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a worker was lost: {' '.join(str(error).split())[:200]}") from None
    return found
