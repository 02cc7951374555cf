"""A training over several nodes, each a real `ray start`: nodes that come late, die, come and are taken away; a hang; a lost head."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ray.clusters import RayCluster, ray_cluster
from tests.ray.small import SLOW_NETWORK, TINY, Started, digests, newest_step, only_run, told

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 40
PATIENCE_S = 480  # a restart takes fifteen seconds on a machine that does nothing else


@pytest.fixture
def start(home: Path, user_environment: dict[str, str], ending: Any) -> Any:
    """`ddpm-pipe` in the background on a cluster; ended with the test."""

    def begin(cluster: RayCluster, *arguments: str) -> Started:
        with (home / "stderr.txt").open("w") as stderr:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ddpm-pipe")), *arguments],
                cwd=home,
                env=user_environment | cluster.environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        return Started(ending(process))

    return begin


def experiment(home: Path, *, steps: int = STEPS, pause: float = 0.15, dropout: float = 0.2) -> str:
    """Write the experiment: a network that is slow enough to act in the middle of its training. Return its file's name."""
    (home / "slow_network.py").write_text(SLOW_NETWORK.replace("Dropout(0.2)", f"Dropout({dropout})"))
    content = yaml.safe_load(TINY)
    content["model"] = {"type": "slow_network:Slow", "arguments": {"pause": pause}}
    content["training"]["steps"] = steps
    (home / "slow.yaml").write_text(yaml.safe_dump(content))
    return "slow.yaml"


def profile(home: Path, cluster: RayCluster, workers: Any, **settings: Any) -> str:
    """Write a profile that joins a cluster, with one CPU and thread for a worker. Return its file's name."""
    content = {
        "kind": "connect",
        "address": cluster.gcs,
        "storage": str(home),
        "workers": workers,
        "resources_per_worker": {"CPU": 1},
        "threads_per_worker": 1,
        "mlflow": {"tracking_uri": "http://127.0.0.1:9"},  # nobody listens there: training must not care
    }
    (home / "far.yaml").write_text(yaml.safe_dump(content | settings))
    return "far.yaml"


def log_of(home: Path) -> str:
    logs = list(home.glob("runs/*/log.txt"))
    return logs[0].read_text() if logs else ""


def attempts(home: Path) -> list[int]:
    """Return the number of workers of each attempt."""
    return [int(count) for count in re.findall(r"attempt \d+: (\d+) worker", log_of(home))]


def said(home: Path) -> str:
    return (home / "stderr.txt").read_text()


def losses(run: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in (run / "spool" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "metrics" and "loss" in event["values"]:
            found[event["step"]] = event["values"]["loss"]
    return found


def test_a_cluster_that_comes_late_and_loses_a_node_ends_with_the_bytes_of_one_machine(home, calm, start):
    slow = experiment(home)
    with ray_cluster(num_cpus=1) as cluster:
        apart = profile(home, cluster, 2, placement="strict_spread", wait_for_resources_s=300)
        training = start(cluster, "train", slow, "--cluster", apart)
        training.wait_for(
            lambda: "waiting for 2 workers with 1 CPUs each, each on a node of its own" in said(home), PATIENCE_S
        )
        node = cluster.add_node(num_cpus=1)
        training.wait_for(lambda: newest_step(home) >= 10, PATIENCE_S)
        cluster.remove(node)
        cluster.add_node(num_cpus=1)
        assert training.end()[0] == 0, said(home)
    assert attempts(home) == [2, 2]
    assert re.search(r"attempt 1 failed \(worker \d: its node \S+ was lost\)", said(home))
    assert digests(only_run(home)) == calm(2)


def test_elastic_training_goes_on_with_the_nodes_that_are_there_and_its_losses_stay_the_same(
    home, typed, ray_session, start
):
    """Four nodes, three, four again, three announced: 4, 2, 4 and 2 workers. One attempt may fail, so that only the loss can have."""
    slow = experiment(home, steps=400, pause=0.1, dropout=0.0)
    with ray_cluster(num_cpus=1) as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        elastic = {"min": 1, "max": 4, "grow_after_s": 1}
        # the limit of a stop that somebody asks for: what is planned has none
        far = profile(home, cluster, elastic, retries={"max_attempts": 2}, timeouts={"stop_s": 0.1})
        training = start(cluster, "train", slow, "--cluster", far)
        training.wait_for(lambda: newest_step(home) >= 10, PATIENCE_S)
        cluster.remove(nodes.pop())
        training.wait_for(lambda: "attempt 2 continues" in log_of(home), PATIENCE_S)
        nodes.append(cluster.add_node(num_cpus=1, env={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"}))
        training.wait_for(lambda: "attempt 3 continues" in log_of(home), PATIENCE_S)
        reached = newest_step(home)
        training.wait_for(lambda: newest_step(home) > reached, PATIENCE_S)
        nodes[-1].process.terminate()  # as Kubernetes ends a pod: `ray start --block` announces it, and waits
        training.wait_for(lambda: "attempt 4 continues" in log_of(home), PATIENCE_S)
        assert training.end()[0] == 0, said(home)
    assert attempts(home) == [4, 2, 4, 2]
    stopped, went_on = (re.findall(pattern, log_of(home)) for pattern in (r"stopped at step (\d+)", r"from step (\d+)"))
    assert stopped == went_on[1:]  # what was planned lost no step
    apart = losses(only_run(home))
    (home / "runs").rename(home / "elastic")
    code, _, stderr = typed("train", experiment(home, steps=400, pause=0.0, dropout=0.0))  # on one worker
    assert code == 0, stderr
    together = losses(only_run(home))
    assert apart.keys() == together.keys()
    for step, loss in together.items():
        assert apart[step] == pytest.approx(loss, rel=1e-4), step


def test_a_hang_ends_with_the_collective_timeout_and_a_lost_head_is_gone_on_from_on_another_cluster(
    home, cli, calm, start
):
    slow = experiment(home)
    with ray_cluster(num_cpus=2) as cluster:
        far = profile(home, cluster, 2, timeouts={"collective_s": 8})
        training = start(cluster, "train", slow, "--cluster", far)
        training.wait_for(lambda: newest_step(home) >= 10, PATIENCE_S)
        head = psutil.Process(cluster.nodes[0].process.pid)
        workers = [p for p in head.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        workers[-1].suspend()
        # Ray's own patience is ten minutes, torch's half an hour
        training.wait_for(lambda: "attempt 2 continues" in log_of(home), PATIENCE_S)
        assert "did not answer within timeouts.collective_s" in said(home)
        stacks = "".join(path.read_text() for path in only_run(home).glob("stacks/attempt-1-worker-*.txt"))
        assert "loop.py" in stacks  # where the other one waited
        reached = newest_step(home)
        training.wait_for(lambda: newest_step(home) > reached, PATIENCE_S)
        cluster.nodes[0].kill()
        assert training.end()[0] == 8, said(home)
    last = told(said(home))
    assert "head did not answer" in last
    assert last.endswith(f"ddpm-pipe resume {only_run(home).name}")
    with ray_cluster(num_cpus=2) as another:
        went_on = cli("resume", "latest", "--cluster", profile(home, another, 2), env=another.environment)
        assert went_on.code == 0, went_on.stderr
    assert digests(only_run(home)) == calm(2)
