"""A training over several nodes, each a real `ray start`: nodes that come late, die, come and are taken away; a hang; a lost head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kit.attempts import require_resume
from tests.kit.clusters import RayCluster, ray_cluster
from tests.kit.commands import told
from tests.kit.experiments import SAVED_EVERY, slow_experiment, write_yaml
from tests.kit.trainer import attempts, final_digests, newest_step, only_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


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
    return write_yaml(home / "far.yaml", content | settings)


def log_of(home: Path) -> str:
    logs = list(home.glob("runs/*/log.txt"))
    return logs[0].read_text() if logs else ""


def team_sizes(home: Path) -> list[int]:
    """Return the number of workers of each attempt."""
    return [int(count) for count in re.findall(r"attempt \d+: (\d+) worker", log_of(home))]


def losses(run: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in (run / "spool" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("kind") == "metrics" and "train/loss" in event["values"]:
            found[event["step"]] = event["values"]["train/loss"]
    return found


@pytest.mark.fault(4, 5)
@pytest.mark.promise("P2")
def test_a_lost_node_costs_an_attempt_and_after_a_lost_head_the_run_is_resumed_on_this_machine(home, typed, start):
    slow = slow_experiment(home)
    with ray_cluster(num_cpus=1) as cluster:
        node = cluster.add_node(num_cpus=1)
        far = profile(home, cluster, {"min": 1, "max": 2})
        training = start("train", slow, "--cluster", far, env=cluster.environment)
        training.wait_for(lambda: newest_step(home) >= 10)
        cluster.remove(node)
        training.wait_for(lambda: "attempt 2 starts at step" in log_of(home))
        reached = newest_step(home)
        training.wait_for(lambda: newest_step(home) > reached)
        cluster.nodes[0].kill()
        assert training.end()[0] == 8, training.stderr
    assert team_sizes(home) == [2, 1]
    assert re.search(r"attempt 1 failed \(worker \d: its node \S+ was lost\)", training.stderr)
    assert "head did not answer" in told(training.stderr)
    assert told(training.stderr).endswith(f"ddpm-pipe resume {only_run(home).id} --cluster {far}")
    saved = newest_step(home)
    (home / "here.yaml").write_text("threads_per_worker: 1\n")
    code, _, stderr = typed("resume", "latest", "--cluster", "here.yaml")
    assert code == 0, stderr
    first, second, third = attempts(home)
    require_resume(first, second, SAVED_EVERY)
    assert (third.start, third.end) == (saved, 40)


@pytest.mark.fault(4)
@pytest.mark.promise("P1", "P2")
@pytest.mark.all
def test_a_cluster_that_comes_late_and_loses_a_node_ends_with_the_bytes_of_one_machine(home, calm, start):
    slow = slow_experiment(home)
    with ray_cluster(num_cpus=1) as cluster:
        apart = profile(home, cluster, 2, placement="strict_spread", wait_for_resources_s=300)
        training = start("train", slow, "--cluster", apart, env=cluster.environment)
        training.wait_for(lambda: "waiting for 2 workers with 1 CPU each, each on a node of its own" in training.stderr)
        node = cluster.add_node(num_cpus=1)
        training.wait_for(lambda: newest_step(home) >= 10)
        cluster.remove(node)
        cluster.add_node(num_cpus=1)
        assert training.end()[0] == 0, training.stderr
    assert team_sizes(home) == [2, 2]
    require_resume(*attempts(home), SAVED_EVERY)
    assert re.search(r"attempt 1 failed \(worker \d: its node \S+ was lost\)", training.stderr)
    assert final_digests(only_run(home)) == calm(2)


@pytest.mark.fault(4)
@pytest.mark.promise("P2")
@pytest.mark.all
def test_elastic_training_continues_on_the_nodes_that_are_there_and_its_losses_stay_the_same(home, typed, start):
    """Four nodes, three, four again, three announced: 4, 2, 4 and 2 workers. One attempt may fail, so that only the loss can have."""
    slow = slow_experiment(home, steps=400, pause=0.1, dropout=0.0)
    with ray_cluster(num_cpus=1) as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        elastic = {"min": 1, "max": 4, "grow_after_s": 1}
        # the limit of a stop that somebody asks for: what is planned has none
        far = profile(home, cluster, elastic, retries={"max_attempts": 2}, timeouts={"stop_s": 0.1})
        training = start("train", slow, "--cluster", far, env=cluster.environment)
        training.wait_for(lambda: newest_step(home) >= 10)
        cluster.remove(nodes.pop())
        training.wait_for(lambda: "attempt 2 starts at step" in log_of(home))
        nodes.append(cluster.add_node(num_cpus=1, env={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"}))
        training.wait_for(lambda: "attempt 3 starts at step" in log_of(home))
        reached = newest_step(home)
        training.wait_for(lambda: newest_step(home) > reached)
        nodes[-1].process.terminate()  # as Kubernetes ends a pod: `ray start --block` announces it, and waits
        training.wait_for(lambda: "attempt 4 starts at step" in log_of(home))
        assert training.end()[0] == 0, training.stderr
    assert team_sizes(home) == [4, 2, 4, 2]
    first, second, third, fourth = attempts(home)
    require_resume(first, second, SAVED_EVERY)
    assert (second.end, third.end, fourth.end) == (third.start, fourth.start, 400)  # what was planned lost no step
    assert [int(step) for step in re.findall(r"stopped at step (\d+)", log_of(home))] == [second.end, third.end]
    apart = losses(only_run(home).folder)
    (home / "runs").rename(home / "elastic")
    code, _, stderr = typed("train", slow_experiment(home, steps=400, pause=0.0, dropout=0.0))  # on one worker
    assert code == 0, stderr
    together = losses(only_run(home).folder)
    assert apart.keys() == together.keys()
    for step, loss in together.items():
        assert apart[step] == pytest.approx(loss, rel=1e-4), step


@pytest.mark.fault(5, 25)
@pytest.mark.promise("P1", "P2")
@pytest.mark.all
def test_a_hang_ends_with_the_collective_timeout_and_a_lost_head_is_resumed_on_another_cluster(home, cli, calm, start):
    slow = slow_experiment(home)
    with ray_cluster(num_cpus=2) as cluster:
        far = profile(home, cluster, 2, timeouts={"collective_s": 8})
        training = start("train", slow, "--cluster", far, env=cluster.environment)
        training.wait_for(lambda: newest_step(home) >= 10)
        head = psutil.Process(cluster.nodes[0].process.pid)
        workers = [p for p in head.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        workers[-1].suspend()
        # Ray's own patience is ten minutes, torch's half an hour
        training.wait_for(lambda: "attempt 2 starts at step" in log_of(home))
        assert "did not answer within timeouts.collective_s" in training.stderr
        stacks = "".join(path.read_text() for path in only_run(home).folder.glob("stacks/attempt-1-worker-*.txt"))
        assert "loop.py" in stacks  # where the other one waited
        reached = newest_step(home)
        training.wait_for(lambda: newest_step(home) > reached)
        cluster.nodes[0].kill()
        assert training.end()[0] == 8, training.stderr
    last = told(training.stderr)
    assert "head did not answer" in last
    assert last.endswith(f"ddpm-pipe resume {only_run(home).id} --cluster {far}")
    with ray_cluster(num_cpus=2) as another:
        went_on = cli("resume", "latest", "--cluster", profile(home, another, 2), env=another.environment)
        assert went_on.code == 0, went_on.stderr
    assert final_digests(only_run(home)) == calm(2)
    first, second, third = attempts(home)
    require_resume(first, second, SAVED_EVERY)
    require_resume(second, third, SAVED_EVERY)
