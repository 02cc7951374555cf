"""Real Ray clusters on loopback: a head with token authentication and its dashboard, and further nodes, as separate processes.

with ray_cluster(tmp_path, num_cpus=2) as cluster:
    cluster.dashboard, cluster.gcs, cluster.token      "http://127.0.0.2:PORT", "127.0.0.2:PORT", the token
    cluster.environment                                 what a client's process needs to be let in
    node = cluster.add_node(num_cpus=1); cluster.remove(node)        a second node, killed as a machine is that loses power
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.watchdog import end_all
from tests.kit.ports import free_ports
from tests.kit.retries import note_retry
from tests.kit.waiting import wait_for

# Ray takes 127.0.0.1 for a mistake and puts the machine's address in its place; another address of loopback it leaves alone.
LOOPBACK = "127.0.0.2"
START_TIMEOUT_S = 90.0
STARTS = 3  # Ray gives a node half a minute to come up, which on a busy machine may be too little


@dataclass
class Node:
    """One node: `ray start --block` in a session of its own; all its processes belong to its group or descend from it."""

    process: subprocess.Popen[bytes]
    id: str = ""

    def kill(self) -> None:
        """End all its processes at once."""
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        end_all(below)
        self.process.wait(timeout=30)


@dataclass
class RayCluster:
    """A head and its nodes; `token` is None where the cluster lets anybody in."""

    token: str | None
    gcs: str
    dashboard: str
    folder: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What the environment of a client's or node's process holds: the mode, and the token where there is one."""
        common = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # a job's `python` is found there
            "RAY_USAGE_STATS_REPORT_URL": "disabled",  # the dashboard reports even that statistics are off
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # the 0 of tests/kit/environment.py forbids clusters of several nodes
        }
        if self.token is None:
            return common | {"RAY_AUTH_MODE": "disabled"}
        return common | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def add_node(
        self, *, num_cpus: int = 1, resources: dict[str, float] | None = None, env: dict[str, str] | None = None
    ) -> Node:
        """Start another node and wait until the cluster counts it."""
        before = self.alive()
        for _ in range(STARTS):
            agent, agent_grpc, runtime_env, metrics = free_ports(4, LOOPBACK)
            node = self._start(
                f"--address={self.gcs}",
                *_ports(agent, agent_grpc, runtime_env, metrics),
                f"--num-cpus={num_cpus}",
                f"--resources={json.dumps(resources or {})}",
                f"--temp-dir={self.folder / f'n{agent}'}",  # in a shared one, a node that joins removes what a job has just unpacked
                env=env,
            )
            if self._joined(node, before):
                return node
            note_retry("the start of a node")
            self.remove(node)
        raise AssertionError(self.log())

    def _joined(self, node: Node, before: set[str]) -> bool:
        """Wait until the cluster counts a node that was not there before; False where it ended instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (new := self.alive() - before):  # one that was just killed may still be counted
            if node.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        (node.id,) = new
        return True

    def remove(self, node: Node) -> None:
        """Kill a node as a machine dies that loses power; the cluster notices it by itself, after some seconds."""
        node.kill()
        self.nodes.remove(node)

    def num_alive(self) -> int:
        """Return how many nodes the cluster counts as alive."""
        return len(self.alive())

    def alive(self) -> set[str]:
        """Return the nodes that the cluster counts as alive, by Ray's names for them."""
        status, body = self.get("/nodes?view=summary")
        assert status == 200, body
        summary = json.loads(body)["data"]["summary"]
        return {node["raylet"]["nodeId"] for node in summary if node["raylet"].get("state") == "ALIVE"}

    def wait_for_nodes(self, count: int) -> None:
        """Wait until the cluster counts this many nodes as alive."""
        wait_for(
            lambda: self.num_alive() == count,
            START_TIMEOUT_S,
            pause_s=0.3,
            explain=lambda: f"{self.num_alive()} nodes instead of {count}",
        )

    def get(self, path: str, token: str | None = "") -> tuple[int, str]:
        """Return status and body of a request to the dashboard; with the cluster's own token unless told otherwise."""
        bearer = self.token if token == "" else token
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        connection = http.client.HTTPConnection(self.dashboard.removeprefix("http://"), timeout=20)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def log(self) -> str:
        """Return what the nodes' processes printed."""
        return (self.folder / "nodes.log").read_text(errors="replace")

    def _start(self, *arguments: str, env: dict[str, str] | None = None) -> Node:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            *arguments,
            f"--node-ip-address={LOOPBACK}",
            "--object-store-memory=150000000",
            "--include-log-monitor=false",  # no driver of ours asks for the workers' output
            "--disable-usage-stats",
            "--block",
        ]
        with (self.folder / "nodes.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | self.environment | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(process)
        self.nodes.append(node)
        return node


@contextlib.contextmanager
def ray_cluster(
    *,
    num_cpus: int = 2,
    authenticated: bool = True,
    resources: dict[str, float] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[RayCluster]:
    """Start a head with its dashboard on loopback for the time of the context; its nodes are killed at the end, whatever happened."""
    with contextlib.ExitStack() as stack:
        for _ in range(STARTS):
            cluster = stack.enter_context(_head(num_cpus, authenticated, resources, env))
            if _is_ready(cluster):
                break
            note_retry("the start of a head")
            said = cluster.log()
            stack.close()
        else:
            raise AssertionError(said)
        yield cluster


@contextlib.contextmanager
def _head(
    num_cpus: int, authenticated: bool, resources: dict[str, float] | None, env: dict[str, str] | None
) -> Iterator[RayCluster]:
    """Start the processes of a head; all nodes are killed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: its path goes into names of sockets
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics = free_ports(6, LOOPBACK)
    token = secrets.token_hex(16) if authenticated else None
    cluster = RayCluster(token, f"{LOOPBACK}:{gcs}", f"http://{LOOPBACK}:{dashboard}", folder)
    try:
        cluster._start(
            "--head",
            f"--port={gcs}",
            f"--dashboard-host={LOOPBACK}",
            f"--dashboard-port={dashboard}",
            *_ports(agent, agent_grpc, runtime_env, metrics),
            "--include-dashboard=true",
            "--no-monitor",  # nothing scales
            f"--num-cpus={num_cpus}",
            f"--resources={json.dumps(resources or {})}",
            f"--temp-dir={folder / 'ray'}",
            env=env,
        )
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _ports(agent: int, agent_grpc: int, runtime_env: int, metrics: int) -> list[str]:
    # each has a fixed default, or a random one that another cluster of this machine may hold
    return [
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}",
    ]


def _is_ready(cluster: RayCluster) -> bool:
    """Wait until the dashboard answers and has an agent that takes jobs; False where the head ended instead."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while cluster.nodes[0].process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, KeyError, ValueError):
            status, _ = cluster.get("/api/jobs/")
            if status == 200 and cluster.num_alive() == 1:
                return True
        time.sleep(0.3)
    return False
