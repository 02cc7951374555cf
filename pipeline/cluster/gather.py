"""Waiting for the room that a cluster has yet to have for what is to run on it."""

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
GRACE_S = 20.0  # what dead workers held is free after some seconds, and a node that has just started takes as long to be counted
STEADY_S = 3.0  # fewer workers than could be are taken once nothing has changed for so long
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
    """Return how many workers the next attempt takes: the largest of the counts that the cluster holds now, without `lost` nodes.

    Waits for the smallest of them as long as the profile says, says what is missing meanwhile, and tells a cluster that scales itself
    what to `want`; ClusterError after that, InterruptedRunError on a signal, both with what to type `again`. Lost nodes that answer again
    are taken back where nothing fits without them: one may have been too busy to answer in time.
    """
    if profile.kind == "local":  # this machine was looked at before Ray was started on it
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
