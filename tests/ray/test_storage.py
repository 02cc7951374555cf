"""`ddpm-pipe` with runs, sweeps and data in an object store, as a user types it: begun on one machine, gone on with on another."""

from __future__ import annotations

import json
import os
import re

import pytest

from pipeline.storage.checkpoint import MANIFEST
from tests.kit.experiments import SAVED_EVERY, tiny_experiment, write_yaml
from tests.kit.object_store import objects
from tests.kit.trainer import attempts

pytestmark = [pytest.mark.all, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.fault(2, 19)
def test_a_run_in_a_store_is_started_here_and_resumed_elsewhere(bucket, cli, start, home, tmp_path):
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 60}))
    (home / "store.yaml").write_text(
        f"workers: 2\nresources_per_worker: {{CPU: 1}}\nthreads_per_worker: 1\nstorage: {bucket}/ddpm\n"
        f"cache: {{folder: {tmp_path / 'cache'}, max_gb: 1}}\n"
    )
    profile = str(home / "store.yaml")
    data = f"{bucket}/data/digits"
    assert cli("ingest", "digits", data, env=environment).code == 0
    training = start("train", "tiny.yaml", "--cluster", profile, "--data", data, env=environment)
    saved = f"step-0000000010-1/{MANIFEST}"
    training.wait_for(lambda: any(name.endswith(saved) for name in objects(f"{bucket}/ddpm")))
    held = cli("resume", "latest", "--cluster", profile, env=environment)
    training.kill()  # the machine is gone, with all that it had
    assert held.code == 9, held
    assert f"process {training.pid}" in held.stderr

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = environment | {"DDPM_PIPE_HOME": str(elsewhere)}
    (row,) = json.loads(cli("runs", "--json", "--cluster", profile, cwd=elsewhere, env=there).stdout)
    assert row["status"] == "INTERRUPTED"
    manifests = [name for name in objects(f"{bucket}/ddpm/runs/{row['id']}") if name.endswith(MANIFEST)]
    reached = max(int(step) for name in manifests for step in re.findall(r"step-(\d+)-1/", name))
    went_on = cli("resume", row["id"][:4], "--cluster", profile, cwd=elsewhere, env=there)
    assert went_on.code == 0, went_on
    second = attempts(elsewhere)[-1]
    assert (second.number, second.end) == (2, 60)
    # a worker of the lost machine may have committed one more before it ended
    assert second.start >= reached >= 10
    assert second.start % SAVED_EVERY == 0
    third = environment | {"DDPM_PIPE_HOME": str(tmp_path / "third")}
    (row,) = json.loads(cli("runs", "--json", "--cluster", profile, cwd=elsewhere, env=third).stdout)
    assert (row["status"], row["steps"]) == ("FINISHED", "60/60")
    sampled = cli("sample", "latest", "-n", "4", "--cluster", profile, "--out", "images", cwd=elsewhere, env=third)
    assert sampled.code == 0, sampled
    names = objects(f"{bucket}/ddpm/runs/{row['id']}")
    assert {"run.json", "status.json", "log.txt", "pictures/schedule.png"} <= set(names)
    assert not any(name.startswith("lease/") for name in names)


def test_a_sweep_in_a_store_is_started_here_and_resumed_elsewhere(bucket, cli, start, home, tmp_path):
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    for place in (home, tmp_path):
        write_yaml(place / "tiny.yaml", tiny_experiment(training={"steps": 20}) | {"evaluation": {"num_images": 128}})
    profile = tmp_path / "store.yaml"
    profile.write_text(
        f"workers: 1\nresources_per_worker: {{CPU: 1}}\nthreads_per_worker: 1\nstorage: {bucket}/ddpm\n"
        f"cache: {{folder: {tmp_path / 'cache'}, max_gb: 1}}\n"
    )
    cluster = ("--cluster", str(profile))
    over = ("--over", "diffusion.schedule=linear,cosine", "--steps", "10", "--seeds", "1", "--max-concurrent", "1")
    sweep = start("sweep", "--base", "tiny.yaml", *over, *cluster, env=environment)
    sweep.wait_for(lambda: any(name.endswith("/ledger.jsonl") for name in objects(f"{bucket}/ddpm/sweeps")))
    sweep.kill()  # the machine is gone, with all that it had
    (done,) = (home / "sweeps").glob("*/ledger.jsonl")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = environment | {"DDPM_PIPE_HOME": str(elsewhere)}
    went_on = cli("resume", done.parent.name[:4], *cluster, "--json", cwd=tmp_path, env=there, timeout_s=600)
    assert went_on.code == 0, went_on
    result = json.loads(went_on.stdout)
    assert [point["status"] for point in result["points"]] == ["finished", "finished"]
    first, *others = (elsewhere / "sweeps" / result["sweep"] / "ledger.jsonl").read_text().splitlines(keepends=True)
    assert (first, len(others)) == (done.read_text(), 1)
    names = objects(f"{bucket}/ddpm/sweeps/{result['sweep']}")
    assert {"ledger.jsonl", "report/sweep-report.html", "report/samples.png"} <= set(names)
    assert not any(name.startswith(("lease/", "tune/")) for name in names)
    third = environment | {"DDPM_PIPE_HOME": str(tmp_path / "third")}
    planned = cli("train", "--from", result["sweep"], "--cluster", str(profile), "--dry-run", "--no-probe", env=third)
    assert planned.code == 0, planned
    assert str(result["best"]["point"]["diffusion.schedule"]) in planned.stdout
