"""`ddpm-pipe doctor` against healthy clusters, and against each fault it names, really made to happen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.cluster.probe_workers import on_workers
from pipeline.cluster.session import ray_of
from pipeline.config.cluster_profile import load_profile
from pipeline.errors import ClusterError
from pipeline.storage.remote import RemoteFolder
from tests.kit.clusters import RayCluster, ray_cluster
from tests.kit.commands import PROGRAM, Result
from tests.kit.commands import run_command as run
from tests.kit.forks import PROCESSES
from tests.kit.object_store import CREDENTIALS
from tests.kit.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ALL = ["cluster", "versions", "resources", "clocks", "disk", "storage", "dataset", "all-reduce", "step", "mlflow"]
MACHINE = {"resources", "disk"}  # yellow where the machine that tests run on is busy or small
# A node whose Python tells another time and has another torch: what its processes really see
OTHER_NODE = """
import time
_true = time.time
time.time = lambda: _true() + 300.0
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_cpus=1) as started:
        yield started


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (3000, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    assert run(["ingest", str(folder / "images.npz"), str(folder / "set")]) == 0
    return folder / "set"


@pytest.fixture
def profile(home: Path, mlflow_server: str, tmp_path: Path) -> Callable[..., str]:
    """Write a profile that joins a cluster; return its path."""

    def write(cluster: RayCluster, **changes: Any) -> str:
        content = {
            "kind": "connect",
            "address": cluster.gcs,
            "workers": 2,
            "resources_per_worker": {"CPU": 1},
            "threads_per_worker": 1,
            "storage": str(tmp_path / "shared"),
            "mlflow": {"tracking_uri": mlflow_server, "experiment": "doctor"},
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return str(path)

    return write


def found(result: Result) -> dict[str, dict[str, Any]]:
    assert "Traceback" not in result.stderr
    findings = json.loads(result.stdout)["checks"]
    assert sorted(finding["check"] for finding in findings) == sorted(ALL)
    return {finding["check"]: finding for finding in findings}


def reds(result: Result) -> set[str]:
    """Return the red checks, without those that this machine was too busy to answer in time."""
    seen = {name: finding for name, finding in found(result).items() if finding["verdict"] == "red"}
    return {name for name, finding in seen.items() if "no answer" not in finding["says"]}


def require_healthy(verdicts: dict[str, str], skipped: Iterable[str] = ()) -> None:
    """Require that every check is green, but for the skipped ones."""
    for name in ALL:
        allowed = {"skipped"} if name in skipped else {"green", "yellow"} if name in MACHINE else {"green"}
        assert verdicts[name] in allowed, (name, verdicts)


def verdicts(result: Result) -> dict[str, str]:
    return {name: finding["verdict"] for name, finding in found(result).items()}


@pytest.mark.all
def test_a_healthy_cluster_of_two_nodes(cli, cluster, profile, noise, tmp_path):
    node = cluster.add_node(num_cpus=1)
    try:
        result = cli(
            "doctor", "--cluster", profile(cluster, placement="strict_spread"), "--data", noise, "--json",
            env=cluster.environment,
        )  # fmt: skip
    finally:
        cluster.remove(node)
        cluster.wait_for_nodes(1)
    assert result.code == 0, result
    require_healthy(verdicts(result))
    seen = found(result)
    assert "2 nodes" in seen["versions"]["says"]
    assert "100% of 3,000 images" in seen["dataset"]["says"]
    assert seen["all-reduce"]["figures"]["bytes_per_s"] > 0
    assert seen["step"]["figures"]["batch"] == 32  # of 64, on two workers
    assert not (tmp_path / "shared").exists()


@pytest.mark.fault(9)
def test_another_clock_and_torch_on_a_node_too_few_cpus_a_damaged_dataset_and_a_dead_tracking_server(
    cli, cluster, profile, noise, tmp_path
):
    strange = tmp_path / "strange"
    (strange / "torch-9.9.9.dist-info").mkdir(parents=True)
    (strange / "torch-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    (strange / "sitecustomize.py").write_text(OTHER_NODE)
    damaged = tmp_path / "damaged"
    shutil.copytree(noise, damaged)
    (shard,) = damaged.glob("**/*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    path = profile(cluster, workers=4, mlflow={"tracking_uri": f"http://127.0.0.1:{free_port()}"})
    node = cluster.add_node(num_cpus=1, env={"PYTHONPATH": str(strange)})
    try:
        result = cli("doctor", "--cluster", path, "--data", damaged, "--json", env=cluster.environment)
    finally:
        cluster.remove(node)
        cluster.wait_for_nodes(1)
    assert result.code == 10, result
    assert reds(result) == {"versions", "resources", "clocks", "dataset", "mlflow"}
    seen = found(result)
    assert "torch 9.9.9" in seen["versions"]["says"]
    assert "300 s ahead" in seen["clocks"]["says"]
    assert "4 workers with 1 CPU each" in seen["resources"]["says"]
    assert shard.name in seen["dataset"]["says"]
    assert (seen["step"]["verdict"], seen["all-reduce"]["verdict"]) == ("skipped", "skipped")


@pytest.mark.all
def test_a_wrong_token_and_an_absent_cluster(cli, cluster, profile):
    result = cli("doctor", "--cluster", profile(cluster), env=cluster.environment | {"RAY_AUTH_TOKEN": "0" * 32})
    assert result.code == 10, result
    assert result.stdout.startswith("red     cluster")
    assert "token" in result.stdout.split("versions")[0]
    assert "skipped versions" in result.stdout
    absent = cli(
        "doctor", "--cluster", profile(cluster, address=f"127.0.0.1:{free_port()}"), "--json",
        env=cluster.environment,
    )  # fmt: skip
    assert absent.code == 10, absent
    assert reds(absent) == {"cluster"}
    assert found(absent)["mlflow"]["verdict"] == "green"


@pytest.mark.all
def test_a_cluster_that_jobs_are_sent_to(cli, cluster, profile):
    """The same command line goes there as a job, and looks at the cluster from inside."""
    path = profile(cluster, kind="job", address=cluster.dashboard, workers=1)
    wrong = cli("doctor", "--cluster", path, "--json", env=cluster.environment | {"RAY_AUTH_TOKEN": "1" * 32})
    assert wrong.code == 10, wrong
    assert reds(wrong) == {"cluster"}
    assert "refuses the token" in found(wrong)["cluster"]["says"]
    result = cli("doctor", "--cluster", path, "--json", env=cluster.environment)
    assert result.code == 0, result
    require_healthy(verdicts(result), skipped=["dataset"])


def test_this_machine_needs_no_profile_and_nothing_stays(cli, home):
    result = cli("doctor")
    assert result.code == 0, result
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [line[8:20].strip() for line in lines] == ALL
    require_healthy({line[8:20].strip(): line[:8].strip() for line in lines}, skipped=["dataset"])
    assert list(home.iterdir()) == []


@pytest.mark.all
def test_an_object_store_holds_runs_and_data(cli, home, bucket, noise):
    (home / "remote.yaml").write_text(f"storage: {bucket}\nresources_per_worker: {{CPU: 1}}\nthreads_per_worker: 1\n")
    images = noise.parent / "images.npz"
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert cli("ingest", images, f"{bucket}/set", env=environment).code == 0
    result = cli("doctor", "--cluster", "remote.yaml", "--data", f"{bucket}/set", "--json", env=environment)
    assert result.code == 0, result
    require_healthy(verdicts(result))
    seen = found(result)
    assert seen["storage"]["says"].startswith(bucket)
    assert "100% of 3,000 images" in seen["dataset"]["says"]
    assert {entry.name.split("/")[0] for entry in RemoteFolder(bucket).objects()} == {"set"}


@pytest.mark.all
def test_nodes_reach_the_store_by_what_the_profile_forwards_and_a_check_that_fails_leaves_nothing(
    cli, cluster, profile, bucket, noise, object_store, user_environment
):
    """The nodes have no credentials of their own, this process no address of the store."""
    variables = {"env": {"AWS_ENDPOINT_URL": object_store.url}, "forward_env": list(CREDENTIALS)}
    path = profile(cluster, workers=1, storage=bucket, **variables)
    for name in ("AWS_ENDPOINT_URL", *CREDENTIALS):  # `cli` makes its processes' environments of it
        user_environment.pop(name, None)
    environment = cluster.environment | CREDENTIALS
    assert (
        cli(
            "ingest",
            noise.parent / "images.npz",
            f"{bucket}/set",
            env=CREDENTIALS | {"AWS_ENDPOINT_URL": object_store.url},
        ).code
        == 0
    )
    result = cli("doctor", "--cluster", path, "--data", f"{bucket}/set", "--json", env=environment)
    assert result.code == 0, result
    require_healthy(verdicts(result))

    object_store.refuse = lambda method, path: method == "PUT" and ".doctor-" in path and not path.endswith("/driver")
    result = cli("doctor", "--cluster", path, "--json", env=environment)
    assert reds(result) == {"storage"}
    assert {entry.name.split("/")[0] for entry in RemoteFolder(bucket).objects()} == {"set"}


@pytest.mark.fault(6, 7)
@pytest.mark.all
def test_a_read_only_place_without_room(home, shell):
    """In a mount namespace of its own, where the storage is a small read-only file system."""
    place = home / "place"
    place.mkdir()
    (home / "there.yaml").write_text(f"storage: {place}\nresources_per_worker: {{CPU: 1}}\nthreads_per_worker: 1\n")
    script = f"mount -t tmpfs -o size=20m,ro tmpfs {place} && exec {PROGRAM} doctor --cluster there.yaml --json"
    alone = (
        ["unshare", "--mount", "sh", "-c"]
        if os.geteuid() == 0
        else ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    )
    if subprocess.run([*alone, f"mount -t tmpfs tmpfs {place}"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    result = shell.launch(*alone, script).end(300)
    assert result.code == 10, result
    assert reds(result) >= {"disk", "storage"}
    seen = found(result)
    assert "Read-only file system" in seen["storage"]["says"]
    assert str(place) in seen["disk"]["says"]


def ask_workers_that_are_late(home: str) -> None:
    os.environ["DDPM_PIPE_HOME"] = home
    os.chdir(home)
    profile = load_profile("local")
    with ray_of(profile, 1), suppress(ClusterError):
        on_workers(lambda team: time.sleep(60), (), profile, 1, timeout_s=2.0)
        raise AssertionError("not late")
    Path("ended").touch()


def test_workers_that_are_late_do_not_end_the_process_that_asks_them(home):
    """Ray ends a process that shuts it down while another thread waits inside it."""
    process = PROCESSES.Process(target=ask_workers_that_are_late, args=(str(home),))
    process.start()
    process.join()
    assert (process.exitcode, (home / "ended").exists()) == (0, True)


def test_a_dataset_that_hangs_is_red_and_ends_in_time(cli, home, tmp_path):
    """Reading a pipe that nobody writes to never ends: what a dead network file system does."""
    (tmp_path / "hanging").mkdir()
    os.mkfifo(tmp_path / "hanging" / "manifest.json")
    result = cli("doctor", "--data", tmp_path / "hanging", "--json", timeout_s=120)
    assert result.code == 10, result
    assert reds(result) == set()
    dataset = found(result)["dataset"]
    assert (dataset["verdict"], "no answer" in dataset["says"]) == ("red", True)
