"""Commands sent to a real cluster as jobs: what arrives, what is shown of it, what comes back, and how one is left, found and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.jobs.job_log import RESULT_MARK
from tests.kit.clusters import RayCluster, ray_cluster
from tests.kit.waiting import wait_for
from tests.pipeline.jobs.dashboard import TOKEN, answers, running_dashboard

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

SECRET = "correct-horse-battery-9"
NETWORK = """
import hashlib
import os
import time

import torch
from torch import nn

import pipeline

class Own(nn.Module):
    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)
        self.pause = pause

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.pause)
            key = os.environ.get("THE_KEY")
            assert key is None or hashlib.sha256(key.encode()).hexdigest().startswith("a8b2148fbf3ea38c")
            assert "working_dir_files" in pipeline.__file__  # the code that was sent, not what is installed there
        return self.net(x)
"""
EXPERIMENT = """
name: own
model: {type: "own:Own", arguments: {pause: %s}}
training: {steps: %d, batch_size: 16, warmup_steps: 1}
checkpoint: {every_steps: 5, every_minutes: null}
logging: {every_steps: 2, grid_every_steps: null}
sampling: {steps: 2}
evaluation: {enabled: false}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_cpus=2) as started:
        yield started


@pytest.fixture
def profile_of(home: Path, mlflow_server: str, tmp_path: Path, cluster: RayCluster) -> Callable[..., str]:
    """Write a profile that sends jobs to the cluster; return its path."""

    def write(**changes: Any) -> str:
        content = {
            "kind": "job",
            "address": cluster.dashboard,
            "resources_per_worker": {"CPU": 1},
            "threads_per_worker": 1,
            "storage": str(tmp_path / "shared"),
            "mlflow": {"tracking_uri": mlflow_server, "experiment": home.parent.name},
        }
        path = tmp_path / "there.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return str(path)

    return write


@pytest.fixture
def folder(home: Path) -> Path:
    """The user's folder: a network of their own, and what must not travel."""
    (home / "own.py").write_text(NETWORK)
    (home / ".env").write_text(f"KEY={SECRET}\n")
    (home / "big.npz").write_bytes(os.urandom(3_000_000))
    return home


@pytest.fixture
def outside(tmp_path: Path) -> Callable[[float, int], str]:
    """Write an experiment outside the user's folder; return its path."""

    def write(pause: float, steps: int) -> str:
        path = tmp_path / "elsewhere" / "an experiment.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(EXPERIMENT % (pause, steps))
        return str(path)

    return write


def log_of(cluster: RayCluster, job: str) -> tuple[list[str], list[str]]:
    """Return a job's results and the other lines of its log, as the dashboard gives the whole of it."""
    lines = json.loads(cluster.get(f"/api/jobs/{job}/logs")[1])["logs"].splitlines()
    results = [line.removeprefix(RESULT_MARK) for line in lines if line.startswith(RESULT_MARK)]
    ours = [line for line in lines if line.strip() and not line.startswith(RESULT_MARK)]
    noise = re.compile("Running entrypoint for job|INFO job_manager.py")
    return results, [line for line in ours if not noise.search(line)]


def test_the_dashboard_of_the_other_tests_answers_as_rays_own(cluster):
    assert cluster.token is not None
    with running_dashboard() as other:
        assert answers(other.url, TOKEN) == answers(cluster.dashboard, cluster.token)


def test_a_training_is_sent_followed_and_recorded(cli, cluster, profile_of, folder, outside, mlflow_server, tmp_path):
    environment = cluster.environment | {"THE_KEY": SECRET}
    profile = profile_of(forward_env=["THE_KEY"], env={"PLAIN": "a b"})
    trained = cli("train", outside(0.0, 6), "--cluster", profile, "--json", env=environment)
    assert trained.code == 0, trained.stderr
    assert json.loads(trained.stdout)["step"] == 6  # results alone on stdout, though Ray keeps one log
    assert "6 steps in 1 Ray worker on the cluster of profile " in trained.stderr
    (run,) = (tmp_path / "shared" / "runs").iterdir()

    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name(folder.parent.name)
    (recorded,) = client.search_runs([experiment.experiment_id])
    tags = recorded.data.tags
    assert recorded.info.status == "FINISHED"
    assert tags["profile"] == "there"
    assert tags["job"].startswith("ddpm-")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert revision.stdout.strip() in tags["code_version"]
    assert len(tags["lock_hash"]) == 64

    shown = cluster.get("/api/jobs/")[1]
    assert '"PLAIN": "a b"' in shown
    kept = [*run.rglob("*"), *(cluster.folder / "ray" / "session_latest").rglob("*")]
    for secret in (SECRET, cluster.token):
        assert secret not in shown
        assert secret not in json.dumps(recorded.to_dictionary())
        assert [path for path in kept if path.is_file() and secret.encode() in path.read_bytes()] == []
    unpacked = {path.name for path in (cluster.folder / "ray" / "session_latest").rglob("working_dir_files/*/*")}
    assert "own.py" in unpacked
    assert not unpacked & {".env", "big.npz", "runs"}

    listed = json.loads(cli("jobs", "list", "--cluster", profile, "--json", env=environment).stdout)
    assert (listed[0]["job"], listed[0]["status"], listed[0]["exit"]) == (tags["job"], "SUCCEEDED", 0)
    assert listed[0]["command"].startswith("ddpm-pipe train ")


def test_arguments_arrive_as_they_were_typed_and_exit_codes_come_back(cli, cluster, profile_of, folder, tmp_path):
    canary = tmp_path / "canary"
    odd = f'it\'s "a" run; $(touch {canary}) `touch {canary}` && touch {canary} | x\n> {canary} -n 3 * ~ \\'
    refused = cli("sample", odd, "--cluster", profile_of(), env=cluster.environment)
    assert refused.code == 2, refused.stderr
    told = " ".join(f"ddpm-pipe: run {odd!r}: expected a run id".split())
    assert told in refused.stderr
    assert not canary.exists()


def test_a_job_is_left_alone_found_again_stopped_after_saving_and_resumed(
    cli, start, cluster, profile_of, folder, outside, tmp_path
):
    environment = cluster.environment
    profile = profile_of(timeouts={"stop_s": 20})
    sent = cli("train", outside(0.3, 400), "--cluster", profile, "--detach", env=environment)
    assert sent.code == 0, sent.stderr
    job = sent.stdout.strip()
    assert f"ddpm-pipe jobs follow {job} --cluster {profile}" in sent.stderr

    wait_for(
        lambda: list((tmp_path / "shared").glob("runs/*/checkpoints/*")),
        explain=lambda: cluster.get(f"/api/jobs/{job}/logs"),
    )
    following = start("jobs", "follow", job.removeprefix("ddpm-")[:5], "--cluster", profile, env=environment)
    following.wait_for(lambda: "\n" in following.stderr)  # the log is there
    following.send(signal.SIGINT)
    code, _, rest = following.end(60)
    assert code == 130, rest
    assert f"{job} goes on" in rest
    assert f"ddpm-pipe jobs stop {job} --cluster {profile}" in rest
    assert json.loads(cluster.get(f"/api/jobs/{job}")[1])["status"] == "RUNNING"

    stopped = cli("jobs", "stop", "latest", "--cluster", profile, env=environment)
    assert stopped.code == 0, stopped.stderr
    assert "saved at step" in stopped.stdout
    step = int(stopped.stdout.partition("saved at step ")[2].partition(";")[0])
    assert 5 <= step < 400
    again = cli("jobs", "follow", job, "--cluster", profile, env=environment)
    assert again.code == 75
    assert f"saved at step {step}" in again.stderr.splitlines()[-1]
    assert (again.stdout.splitlines(), again.stderr.splitlines()) == log_of(cluster, job)
    assert "had ended already" in cli("jobs", "stop", job, "--cluster", profile, env=environment).stdout

    (run,) = (tmp_path / "shared" / "runs").iterdir()
    resumed = cli("resume", run.name, "-s", f"training.steps={step + 2}", "--cluster", profile, env=environment)
    assert resumed.code == 0, resumed.stderr


class Way:
    """A way to the dashboard that can be cut: what is open on it ends, and new connections get through."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self._open = target, list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._target)
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def way(cluster: RayCluster) -> Iterator[Way]:
    host, _, port = cluster.dashboard.removeprefix("http://").partition(":")
    made = Way((host, int(port)))
    yield made
    made.close()


@pytest.mark.all
def test_following_is_resumed_where_the_connection_was_lost(cli, start, cluster, profile_of, folder, outside, way):
    environment = cluster.environment
    sent = cli(
        "train", outside(0.3, 400), "--cluster", profile_of(timeouts={"stop_s": 20}), "--detach", env=environment
    )
    assert sent.code == 0, sent.stderr
    profile = profile_of(address=way.url, timeouts={"stop_s": 20})
    following = start("jobs", "follow", "latest", "--cluster", profile, env=environment)
    following.wait_for(lambda: "\n" in following.stderr)  # the log is there
    way.cut()
    following.wait_for(lambda: "again\n" in following.stderr)
    stopped = cli("jobs", "stop", "latest", "--cluster", profile, env=environment)
    code, _, stderr = following.end(120)
    told = stderr.splitlines(keepends=True)
    assert stopped.code == 0, stopped.stderr
    assert code in (75, 143), told  # as far as it had come when it was stopped
    job = sent.stdout.strip()
    assert sum(f"lost the connection to {job}" in line for line in told) == 1
    assert sum(f"following {job} again" in line for line in told) == 1
    log = [line for line in stderr.splitlines() if f"lost the connection to {job}" not in line]
    log.remove(f"following {job} again")
    assert log == log_of(cluster, job)[1]  # every line once


def test_who_may_send(cli, cluster, profile_of, folder):
    wrong = cluster.environment | {"RAY_AUTH_TOKEN": "1" * 32}
    refused = cli("train", "--cluster", profile_of(), env=wrong)
    assert refused.code == 2
    assert "refuses the token of RAY_AUTH_TOKEN" in refused.stderr
    unknown = cli("jobs", "follow", "nosuchjob", "--cluster", profile_of(), env=cluster.environment)
    assert unknown.code == 2
    assert "no such job" in unknown.stderr


def test_secrets_are_looked_at_before_anything_is_sent(cli, cluster, profile_of, folder):
    refused = cli("train", "--data", "s3://key:word@bucket/x", "--cluster", profile_of(), env=cluster.environment)
    assert refused.code == 2
    assert "the command line: the address contains credentials" in refused.stderr
    refused = cli("train", "--cluster", profile_of(forward_env=["NOT_SET_HERE"]), env=cluster.environment)
    assert refused.code == 2
    assert "forward_env names NOT_SET_HERE, not set here" in refused.stderr
    assert "word" not in cluster.get("/api/jobs/")[1]
