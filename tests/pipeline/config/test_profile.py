"""Cluster profiles: what each kind needs, and what each mistake is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import presets
from pipeline.config.cluster_profile import Profile, Workers, load_profile, settled
from pipeline.config.experiment import Precision
from pipeline.config.yaml_files import validate
from pipeline.errors import UsageError
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.runs import Run
from pipeline.training.trained import profile_of

JOB: dict[str, Any] = {
    "kind": "job",
    "address": "http://127.0.0.1:8265",
    "resources_per_worker": {"CPU": 1},
    "storage": "/mnt/ddpm",
    "mlflow": {"tracking_uri": "http://mlflow:5000"},
}
SLURM: dict[str, Any] = {"kind": "slurm", "resources_per_worker": {"CPU": 4}}
CONNECT = JOB | {"kind": "connect", "address": "auto"}


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_every_field_is_read(written):
    profile = load_profile(
        written(
            """
kind: job
address: https://ray.example:8265
workers: {min: 2, max: 8}
resources_per_worker: {CPU: 4, GPU: 0.5}
placement: spread
threads_per_worker: 3
precisions: [fp32, fp16]
compile: false
storage: s3://bucket/ddpm
cache: {folder: /nvme/ddpm, max_gb: 200}
mlflow: {tracking_uri: "https://mlflow.example", experiment: mine, strict: true}
retries: {max_attempts: 7}
price: {per_worker_hour: 1.25, currency: EUR}
runtime_env: {working_dir: false, py_modules: [networks], excludes: ["*.psd"], max_mb: 20}
env: {NCCL_DEBUG: WARN}
forward_env: [AWS_SECRET_ACCESS_KEY]
timeouts: {collective_s: 120, stop_s: 60, start_s: 90}
wait_for_resources_s: 600
insecure: true
"""
        )
    )
    assert (profile.name, profile.kind, profile.workers) == ("mine", "job", Workers(min=2, max=8))
    assert profile.precisions == (Precision.FP32, Precision.FP16)
    assert profile.runtime_env.py_modules == ("networks",)
    assert profile.use_gpu
    assert validate(Profile, profile.to_dict(), "again") == profile


@pytest.mark.parametrize("address", ["auto", "10.0.0.4:6379", "ray-head.cluster:6379", "[fd00::1]:6379"])
def test_connect_takes_the_heads_address(address):
    assert validate(Profile, CONNECT | {"address": address}, "p").address == address


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"kind": "cluster"}, "kind: got 'cluster'"),
        ({"adress": "auto"}, "did you mean 'address'"),
        ({"address": "auto"}, "kind local starts its own Ray"),
        (CONNECT | {"address": "ray://head:10001"}, "Ray Client (ray://) cannot run Ray Train"),
        (JOB | {"address": "ray://head:10001"}, "use kind: job with http://HEAD:8265"),
        (CONNECT | {"address": None}, "needs auto (this node's cluster) or the head's HOST:PORT"),
        (CONNECT | {"address": "http://head:8265"}, "needs auto"),
        (JOB | {"address": None}, "needs the dashboard's http(s) address"),
        (JOB | {"address": "head:8265"}, "needs the dashboard's http(s) address"),
        (JOB | {"address": "http://head:http"}, "needs the dashboard's http(s) address"),
        (JOB | {"storage": None}, "every node must see the runs"),
        ({"storage": "runs"}, "it must be absolute"),
        (JOB | {"storage": "gs://bucket/x"}, "expected an address such as s3://bucket/folder"),
        (JOB | {"storage": "s3://Bucket"}, "expected an absolute folder or s3://BUCKET/PREFIX"),
        ({"cache": {"folder": "cache"}}, "cache.folder: got 'cache'"),
        (JOB | {"mlflow": {"tracking_uri": "sqlite:////x/mlflow.db"}}, "give a server's http(s) address"),
        (CONNECT | {"mlflow": {"tracking_uri": "/x/mlruns"}}, "give a server's http(s) address"),
        (JOB | {"resources_per_worker": {"GPU": 1}}, "resources_per_worker.CPU is missing"),
        ({"resources_per_worker": {"CPU": 0}}, "resources_per_worker.CPU"),
        ({"resources_per_worker": {"GPU": 1.5}}, "gives out several only whole"),
        ({"workers": 2, "placement": "strict_spread"}, "kind local has one"),
        (JOB | {"isolated": True}, "with kind job every worker is a process of its own; leave it out"),
        ({"workers": {"min": 4, "max": 2}}, "min 4 is above max 2"),
        ({"workers": 0}, "workers: got 0"),
        ({"workers": {"min": 2}}, "workers.max is missing"),
        ({"workers": {"min": 2, "mx": 3}}, "did you mean 'max'"),
        ({"runtime_env": {"py_modules": ["x"]}}, "runtime_env is for kind job alone"),
        ({"slurm": {"partition": "gpu"}}, "slurm is for kind slurm alone: got kind local"),
        ({"kind": "slurm"}, "resources_per_worker.CPU is missing"),
        (SLURM | {"workers": "all"}, "workers: all and gpu are for kind local alone"),
        (SLURM | {"address": "auto"}, "kind slurm starts its own Ray"),
        (
            SLURM | {"workers": 6, "slurm": {"nodes": 4}},
            "slurm.nodes: got 4, expected a number that divides the 6 workers",
        ),
        (SLURM | {"slurm": {"time": "4 hours"}}, "slurm.time: got '4 hours'"),
        (
            SLURM | {"slurm": {"time": 14400}},
            "slurm.time: got 14400, which YAML reads as a number, expected text. Put it in quotes",
        ),
        (SLURM | {"slurm": {"partition": "a b"}}, "slurm.partition: got 'a b'"),
        (SLURM | {"slurm": {"options": ["mem=4G"]}}, "slurm.options"),
        (SLURM | {"slurm": {"setup": ["a\nb"]}}, "slurm.setup"),
        (SLURM | {"slurm": {"max_requeue": 3}}, "did you mean 'max_requeues'"),
        ({"env": {"HF_TOKEN": "hf_abcdef1234567890"}}, "name it in forward_env"),
        ({"env": {"NOT A NAME": "1"}}, "env"),
        ({"env": {"A": "1"}, "forward_env": ["A"]}, "also in forward_env"),
        ({"forward_env": ["A=B"]}, "forward_env"),
        ({"price": {"per_worker_hour": -1}}, "price.per_worker_hour: got -1"),
        ({"price": {"currency": "dollars"}}, "price.currency"),
        ({"name": "../x"}, "name: got '../x'"),
        ({"wait_for_resources_s": -1}, "wait_for_resources_s"),
        ({"workers": {"min": 1, "max": 2e9}}, "workers.max: got 2000000000.0, expected at most 100000"),
        (
            {"threads_per_worker": 10**30},
            "threads_per_worker: got 1000000000000000000000000000000, expected at most 100000",
        ),
        ({"name": "x" * 100_000}, "x..., expected"),
        ({"timeouts": {"stop_s": 1e308}}, "timeouts.stop_s: got 1e+308, expected at most 100000000"),
    ],
)
def test_mistakes_are_reported_in_one_line(content, told):
    with pytest.raises(UsageError) as error:
        validate(Profile, content, "p.yaml")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "num_workers", "here"),
    [
        ({}, 1, True),
        ({"resources_per_worker": {"GPU": 1}}, 1, True),
        ({"workers": {"min": 1, "max": 4}}, 1, True),
        ({"workers": {"min": 1, "max": 4}}, 2, False),
        ({"isolated": True}, 1, False),
        (CONNECT, 1, False),
        (JOB, 1, False),
    ],
)
def test_one_worker_on_this_machine_trains_here_unless_it_is_isolated(content, num_workers, here):
    profile = validate(Profile, content, "p.yaml")
    assert profile.trains_here(num_workers) is here
    assert not profile.isolating().trains_here(num_workers)
    assert validate(Profile, profile.isolating().to_dict(), "p.yaml") == profile.isolating()


def test_words_that_only_sound_secret_are_plain_values():
    env = {"TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray-token-1"}
    assert validate(Profile, {"env": env}, "p").env == env


@pytest.mark.parametrize(("uri", "fine"), [(None, False), ("sqlite:///mlflow.db", False), ("http://mlflow:5000", True)])
def test_a_cluster_records_on_a_server_of_the_profile_or_the_environment(written, monkeypatch, uri, fine):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    path = written("kind: connect\naddress: auto\nresources_per_worker: {CPU: 1}\nstorage: /mnt/ddpm\n")
    if fine:
        assert load_profile(path).kind == "connect"
    else:
        with pytest.raises(UsageError, match=r"mlflow\.tracking_uri: .*http\(s\) address"):
            load_profile(path)


@pytest.mark.parametrize(
    ("kind", "in_job", "here"),
    [("local", False, True), ("connect", False, True), ("job", False, False), ("job", True, True)],
)
def test_the_plain_variables_of_a_profile_hold_where_its_work_is_driven(written, monkeypatch, kind, in_job, here):
    """So that the driver reaches the object store and the tracking server that its workers reach."""
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", JOB_VARIABLE):
        monkeypatch.setenv(name, "of the shell")
    if not in_job:
        monkeypatch.delenv(JOB_VARIABLE)
    settings = {"local": {}, "connect": CONNECT, "job": JOB}[kind]
    variables = {"AWS_ENDPOINT_URL": "http://minio:9000", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    load_profile(written(yaml.safe_dump({**settings, "mlflow": {}, "env": variables})))
    assert (os.environ["AWS_ENDPOINT_URL"] == "http://minio:9000") == here
    assert (os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow:5000") == here


def test_state_lives_in_the_profiles_storage_where_that_is_a_folder(home):
    assert Profile().home() == home
    assert validate(Profile, {"storage": "/mnt/ddpm"}, "p").home() == Path("/mnt/ddpm")
    assert validate(Profile, JOB | {"storage": "s3://bucket/ddpm"}, "p").home() == home


def test_the_env_of_a_runs_recorded_profile_holds_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHOSEN", "OPEN"):
        monkeypatch.setenv(name, "here")
    monkeypatch.delenv("OPEN")
    profile = Profile(env={"CHOSEN": "recorded", "OPEN": "recorded"}).to_dict()
    run = Run.create(
        tmp_path, name="x", experiment={}, config_hash="", dataset={}, profile=profile, command=["ddpm-pipe"]
    )
    assert profile_of(run).env == profile["env"]
    assert (os.environ["CHOSEN"], os.environ["OPEN"]) == ("here", "recorded")


@pytest.mark.parametrize(
    ("asked", "gpus", "workers", "each"),
    [
        ({}, 0, 1, 0),
        ({}, 1, 1, 1),
        ({}, 8, 1, 1),
        ({"gpu": "never"}, 8, 1, 0),
        ({"resources_per_worker": {"GPU": 0}}, 8, 1, 0),
        ({"gpu": "required"}, 0, 1, 1),  # refused later, by what is missing
        ({"workers": 4}, 2, 4, 0.5),
        ({"workers": 3}, 2, 3, 0.5),
        ({"workers": 2}, 0, 2, 0),
        ({"workers": "all"}, 0, 1, 0),
        ({"workers": "all"}, 1, 1, 1),
        ({"workers": "all", "gpu": "required"}, 8, Workers(min=1, max=8), 1),
        ({"workers": "all", "resources_per_worker": {"GPU": 0.5}}, 2, Workers(min=1, max=4), 0.5),
        ({"workers": "all", "gpu": "never"}, 8, 1, 0),
        ({"resources_per_worker": {"GPU": 1}}, 0, 1, 0),
    ],
)
def test_gpus_of_this_machine_are_used_as_the_profile_says(asked, gpus, workers, each):
    profile = settled(validate(Profile, asked, "p"), lambda: gpus)
    assert (profile.workers, profile.gpus_per_worker, profile.use_gpu) == (workers, each, each > 0)
    # what is recorded is settled anew where a run is resumed, by the GPUs that are there
    assert settled(validate(Profile, profile.to_dict(), "again"), lambda: gpus) == profile


def test_a_run_on_the_cpu_stays_there_and_one_on_a_gpu_takes_what_there_is():
    assert not settled(settled(Profile(), lambda: 0), lambda: 1).use_gpu
    assert not settled(settled(Profile(), lambda: 1), lambda: 0).use_gpu


def test_a_cluster_says_itself_how_many_gpus_it_has():
    with pytest.raises(UsageError, match="for kind local alone"):
        validate(Profile, JOB | {"workers": "all"}, "p")
    with pytest.raises(UsageError, match="for kind local alone"):
        validate(Profile, JOB | {"gpu": "required"}, "p")
    with pytest.raises(UsageError, match=r"gpu: got never, but resources_per_worker\.GPU is 1; leave one of them out"):
        validate(Profile, {"gpu": "never", "resources_per_worker": {"GPU": 1}}, "p")


def test_a_shipped_file_is_found_by_its_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = load_profile("cluster/gpu.yaml")
    assert (profile.name, profile.gpu) == ("gpu", "required")
    assert presets.find("experiments", "experiments/mnist.yaml").is_file()
    with pytest.raises(UsageError, match="no such file"):
        load_profile("elsewhere/gpu.yaml")
