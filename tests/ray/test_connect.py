"""Driving a cluster that others started, from one of its nodes: who is let in, what it must hold, and a training on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.cluster.token import admission, probe_dashboard, probe_store
from pipeline.config.cluster_profile import Profile
from pipeline.config.yaml_files import validate
from pipeline.errors import ClusterError, UsageError
from tests.kit.clusters import RayCluster, ray_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

SECRET = "correct-horse-battery"
NETWORK = f"""
import os
import torch
from torch import nn

class Trusted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert os.environ["THE_KEY"] == {SECRET!r}
        return self.net(x)
"""
SHORT = (
    "-s",
    "training.steps=6",
    "-s",
    "training.batch_size=16",
    "-s",
    "evaluation.enabled=false",
    "-s",
    "sampling.steps=2",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def open_cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_cpus=1, authenticated=False) as started:
        yield started


@pytest.fixture
def profile_of(home: Path, mlflow_server: str, tmp_path: Path) -> Callable[..., str]:
    """Write a profile that joins a cluster; return its path."""

    def write(cluster: RayCluster, **changes: Any) -> str:
        content = {
            "kind": "connect",
            "address": cluster.gcs,
            "resources_per_worker": {"CPU": 1},
            "threads_per_worker": 1,
            "storage": str(tmp_path / "shared"),
            "mlflow": {"tracking_uri": mlflow_server, "experiment": home.parent.name},
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return str(path)

    return write


def test_a_training_on_two_workers_is_recorded_on_the_server_and_lives_in_the_storage(
    cli, cluster, profile_of, home, tmp_path, mlflow_server
):
    (home / "trusted.py").write_text(NETWORK)
    profile = profile_of(cluster, workers=2, forward_env=["THE_KEY"])
    environment = cluster.environment | {"THE_KEY": SECRET}
    (home / "own.yaml").write_text("model: {type: 'trusted:Trusted'}\n")
    trained = cli("train", "own.yaml", "--cluster", profile, *SHORT, env=environment)
    assert trained.code == 0, trained.stderr
    (run,) = (tmp_path / "shared" / "runs").iterdir()
    assert not (home / "runs").exists()
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name(home.parent.name)
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["profile"] == "cluster"
    assert recorded.data.tags["num_workers"] == "2"
    for secret in (SECRET, cluster.token):
        places = [*run.rglob("*"), *(cluster.folder / "ray").rglob("*.log"), *(cluster.folder / "ray").rglob("*.out")]
        holding = [path for path in places if path.is_file() and secret.encode() in path.read_bytes()]
        assert holding == []
        assert secret not in cluster.get("/api/jobs/")[1]
        assert secret not in json.dumps(recorded.to_dictionary())
    listed = cli("runs", "--cluster", profile, "--json", env=environment)
    assert [row["id"] for row in json.loads(listed.stdout)] == [run.name]
    # images over as many of an elastic profile's workers as there is room for: the others hold nobody up, and change nothing
    files = {}
    for workers in (1, {"min": 1, "max": 4}):
        profile = profile_of(cluster, workers=workers, forward_env=["THE_KEY"])
        out = tmp_path / f"images{len(files)}"
        asked = ("sample", run.name, "-n", "350", "--format", "parquet", "--out", str(out), "--cluster", profile)
        sampled = cli(*asked, env=environment, timeout_s=120)
        assert sampled.code == 0, sampled.stderr
        files[out] = (out / "samples.parquet").read_bytes()
    assert len(set(files.values())) == 1
    # workers for which there is no room at all are not waited for without end
    profile = profile_of(cluster, resources_per_worker={"CPU": 3}, forward_env=["THE_KEY"])
    refused = cli("sample", run.name, "-n", "350", "--cluster", profile, env=environment, timeout_s=120)
    assert refused.code == 8, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("ddpm-pipe: ")]
    assert "wants 1 worker with 3 CPUs each; the cluster has 2 of 2 CPUs free on 1 node, which holds 0" in line
    assert line.endswith("then: the same command")


@pytest.mark.parametrize("where", ["store", "dashboard"])
def test_who_is_let_in(cluster, open_cluster, where, monkeypatch):
    def probing(at: RayCluster) -> tuple[str, Any]:
        return (at.gcs, probe_store) if where == "store" else (at.dashboard, probe_dashboard)

    strict, lenient = Profile(), validate(Profile, {"insecure": True}, "p")
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    assert admission(strict, *probing(cluster)) == cluster.token
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(UsageError, match="refuses the token of RAY_AUTH_TOKEN") as refused:
        admission(strict, *probing(cluster))
    assert "0" * 32 not in str(refused.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(UsageError, match="asks for a token, and there is none in /nowhere/token"):
        admission(lenient, *probing(cluster))
    with pytest.raises(UsageError, match="lets anybody run code on it"):
        admission(strict, *probing(open_cluster))
    assert admission(lenient, *probing(open_cluster)) is None


def test_a_token_may_stand_in_a_file(cluster, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{cluster.token}\n")
    assert admission(Profile(), cluster.gcs, probe_store) == cluster.token


def test_nobody_there_is_reported(monkeypatch):
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        admission(Profile(), "127.0.0.1:9", probe_store)
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        admission(Profile(), "http://127.0.0.1:9", probe_dashboard)


def test_a_server_that_is_not_rays_is_reported(mlflow_server):
    with pytest.raises(ClusterError, match="is the address right"):
        probe_dashboard(mlflow_server, None)


def test_an_open_cluster_is_refused_before_anything_is_made(cli, open_cluster, profile_of, tmp_path):
    refused = cli("train", "--cluster", profile_of(open_cluster), *SHORT, env=open_cluster.environment)
    assert refused.code == 2
    assert "lets anybody run code on it" in refused.stderr
    assert not (tmp_path / "shared").exists()


def test_more_than_the_cluster_holds_is_refused_at_once_and_says_what_is_missing(cli, cluster, profile_of, tmp_path):
    refused = cli("train", "--cluster", profile_of(cluster, workers=4), *SHORT, env=cluster.environment)
    assert refused.code == 8
    assert "waiting for" not in refused.stderr
    assert (
        "wants 4 workers with 1 CPU each; the cluster has 2 of 2 CPUs free on 1 node, which holds 2" in refused.stderr
    )
    assert "set workers to 2" in refused.stderr
    assert not (tmp_path / "shared" / "runs").exists()


@pytest.mark.all
def test_a_dry_run_measures_with_the_workers_that_a_training_would_begin_with(cli, cluster, profile_of, home):
    (home / "trusted.py").write_text(NETWORK)
    (home / "own.yaml").write_text("model: {type: 'trusted:Trusted'}\n")
    path = profile_of(cluster, workers={"min": 1, "max": 4}, forward_env=["THE_KEY"])
    environment = cluster.environment | {"THE_KEY": SECRET}
    planned = cli("train", "own.yaml", "--cluster", path, *SHORT, "--dry-run", "--json", env=environment)
    assert planned.code == 0, planned.stderr
    told = json.loads(planned.stdout)
    assert (told["num_workers"], told["probe"]["batch"]) == (2, 8)
    assert "room for 2 workers at the moment" in "\n".join(told["warnings"])  # this machine may be busy, too
    waiting = profile_of(cluster, workers=4, forward_env=["THE_KEY"], wait_for_resources_s=25)
    refused = cli("train", "own.yaml", "--cluster", waiting, *SHORT, "--dry-run", env=environment)
    assert refused.code == 8
    assert "waiting for 4 workers with 1 CPU each" in refused.stderr
    assert "wait_for_resources_s waits longer than 25 s), then: the same command" in refused.stderr


def test_a_cluster_that_grows_is_waited_for_with_progress(cli, cluster, profile_of, tmp_path):
    profile = profile_of(cluster, workers=4, wait_for_resources_s=8)
    refused = cli("train", "--cluster", profile, *SHORT, env=cluster.environment)
    assert refused.code == 8
    assert "waiting for 4 workers with 1 CPU each; the cluster has 2 of 2 CPUs free" in refused.stderr
    assert "wait_for_resources_s waits longer" in refused.stderr.splitlines()[-1]
