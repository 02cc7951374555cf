"""Join a Ray cluster that others started, from one of its nodes, by token."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.token import admission, probe_store
from pipeline.config.cluster_profile import Profile
from pipeline.errors import ClusterError, UsageError
from pipeline.planning.capacity import needs, room, shortage
from pipeline.signals import keeping_sigterm
from pipeline.storage.provenance import JOB_VARIABLE

SETTLING_S = 4.0
# gloo and NCCL would otherwise listen on the network card
LOOPBACK_SOCKETS = dict.fromkeys(
    ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo"
)
# Ray reads these when it is first imported or started
SETTINGS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that calls Ray after its end would start another one, open to the outside
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # a process that other drivers could read
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextlib.contextmanager
def joined_ray(profile: Profile) -> Iterator[None]:
    """Be a driver of the profile's cluster for the time of the context.

    Raises:
        UsageError: the cluster requires no token, or refuses ours.
        ClusterError: the cluster does not answer, or this machine is not one of its nodes.
    """
    if profile.kind == "job" and JOB_VARIABLE not in os.environ:
        raise UsageError(
            f"profile {profile.name!r} is of kind job, and this command runs here; name it with --cluster, and the command is sent there"
        )
    address = store_address(profile)
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}  # then certificates control access
    token = None if tls else admission(profile, address, probe_store)
    os.environ.update(SETTINGS)
    if "ray" not in sys.modules:  # afterwards Ray keeps what it has read
        os.environ["RAY_AUTH_MODE"] = "token" if token else os.environ.get("RAY_AUTH_MODE", "disabled")
        if token:
            os.environ["RAY_AUTH_TOKEN"] = token
    _init(profile, address)
    try:
        yield
    finally:
        shut_down()


def start_ray(folder: str | Path, **settings: Any) -> None:
    """Call `ray.init` in a folder without modules, because Ray puts the current folder first on its workers' import path."""
    import ray

    with keeping_sigterm(), contextlib.chdir(folder):
        ray.init(log_to_driver=False, configure_logging=True, logging_level="ERROR", **settings)


def shut_down() -> None:
    """Leave Ray, and keep the handler of SIGTERM, which Ray would replace by one that ends this process without a message."""
    import ray

    with keeping_sigterm():
        ray.shutdown()


def store_address(profile: Profile) -> str:
    """Return HOST:PORT of the control store: the profile's, or that of the cluster of this machine."""
    if profile.kind == "connect" and profile.address not in {None, "auto"}:
        return str(profile.address)
    named = os.environ.get("RAY_ADDRESS", "")
    if ":" in named and "://" not in named:
        return named
    file = _folder_of_ray() / "ray_current_cluster"
    try:
        return file.read_text().strip()
    except OSError:
        raise ClusterError(
            f"profile {profile.name!r}: address auto, but this machine is no node of a Ray cluster (no {file}, no RAY_ADDRESS); "
            "start one with: RAY_USAGE_STATS_REPORT_URL=disabled ray start --head --disable-usage-stats, or give the address"
        ) from None


def _folder_of_ray() -> Path:
    """Return where a node's Ray keeps its files by default, by the same variables as Ray."""
    of_system = os.environ.get("TMPDIR") if sys.platform == "linux" else None
    return Path(os.environ.get("RAY_TMPDIR") or of_system or "/tmp") / "ray"


def _init(profile: Profile, address: str) -> None:
    env = {} if JOB_VARIABLE in os.environ else dict(profile.env)  # a job has its own from the start
    if address.startswith("127."):
        env = LOOPBACK_SOCKETS | env
    try:
        with tempfile.TemporaryDirectory() as empty:
            start_ray(empty, address=address, runtime_env={"env_vars": env} if env else None)
    except Exception as error:  # Ray raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"profile {profile.name!r}: cannot join the cluster at {address}: {reason}; kind connect runs on one of its nodes, "
            "from elsewhere use kind job"
        ) from None


def require_room(profile: Profile, num_workers: int) -> None:
    """Raise ClusterError if the workers would not fit the joined cluster even if it were idle. Waits for nodes that are just joining."""
    need = needs(profile, num_workers)
    deadline = time.monotonic() + SETTLING_S
    while True:
        nodes = cluster_nodes.nodes()
        fit = room(nodes, need, profile.placement, of_all=True)
        if fit >= num_workers:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    remedy = f"set workers to {fit}" if fit else "ask less in resources_per_worker"
    raise ClusterError(
        f"profile {profile.name!r} wants {shortage(num_workers, nodes, profile)}; {remedy}, add nodes, or set wait_for_resources_s "
        "for a cluster that grows"
    )
