"""Wait until a cluster has room for the workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Sequence

from pipeline.cluster import nodes as cluster_nodes
from pipeline.config.cluster_profile import Profile
from pipeline.console import PLAIN_EVERY_S, Console, duration
from pipeline.errors import ClusterError, InterruptedRunError
from pipeline.planning.capacity import largest, needs, shortage
from pipeline.signals import Signals

LOOK_S = 0.5
GRACE_S = 20.0  # Ray takes some seconds to free what dead workers held, and to count a node that has just started
STEADY_S = 3.0  # fewer workers than the most are taken once nothing has changed for so long
ASK_AGAIN_S = 5.0  # a worker process starts in two or three seconds, and Ctrl-C waits for the answer


def gather(
    counts: Sequence[int],
    profile: Profile,
    console: Console,
    signals: Signals,
    lost: Collection[str],
    want: Callable[[dict[str, float], int], None],
    again: str,
) -> int:
    """Return how many workers the next attempt takes: the largest of the counts that fits the cluster now, without `lost` nodes.

    Waits for the smallest count as long as the profile says. Meanwhile it prints what is missing, and calls `want`, which requests it from
    an autoscaling cluster. Lost nodes that answer again are used if nothing fits without them: one may have been too busy to answer.

    Raises:
        ClusterError: the wait is over.
        InterruptedRunError: a signal. The message of both ends with the command to type `again`.
    """
    if not profile.is_remote:  # `require_resources` has checked this machine
        return counts[0]
    begin = changed = time.monotonic()
    spoke = begin - PLAIN_EVERY_S
    found: int | None = None
    limit = max(profile.wait_for_resources_s, GRACE_S)
    away = set(lost)
    while True:
        nodes, now = cluster_nodes.nodes(away), time.monotonic()
        before, found = found, largest(counts, nodes, profile)
        changed = now if found != before else changed
        if found != counts[0]:
            want(needs(profile, counts[0]), counts[0])
        if found == counts[0] or (found is not None and now - changed >= STEADY_S):
            return found
        if signals.first is not None:
            raise InterruptedRunError(
                f"stopped while waiting for the cluster; resume with: {again}",
                130 if signals.first == signal.SIGINT else 75,
            )
        if found is None:
            missing = shortage(counts[-1], nodes, profile)
            if now - begin > limit:
                raise ClusterError(
                    f"profile {profile.name!r} wants {missing}; add nodes or lower workers (wait_for_resources_s waits "
                    f"longer than {duration(limit)}), then: {again}"
                )
            if now - spoke >= PLAIN_EVERY_S:
                spoke = now
                console.say(f"waiting for {missing}; {duration(limit - (now - begin))} left")
            if away:
                away -= cluster_nodes.on_each(away, os.getpid, ASK_AGAIN_S).keys()
        time.sleep(LOOK_S)
