"""Images that a job makes where the storage is an object store: its folder goes with it, so they are sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.cluster_profile import Profile
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.remote import RemoteFolder
from tests.kit import trainer


@pytest.fixture
def asked(bucket: str, home: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """A trained run in a store: the address of its samples, and the command that makes some."""
    storage = f"{bucket}/ddpm"
    run = trainer.make_run(home, profile=Profile(threads_per_worker=1, storage=storage))
    trainer.train_in_store(str(home), run.id, storage, {}, None)
    profile = tmp_path / "store.yaml"
    profile.write_text(yaml.safe_dump({"threads_per_worker": 1, "storage": storage}))
    command = ["sample", run.id, "-n", "4", "--steps", "2", "--cluster", str(profile), "--json"]
    return f"{storage}/runs/{run.id}/samples", command


@pytest.mark.slow
def test_what_a_job_makes_is_found_in_the_store(typed, asked, monkeypatch, tmp_path):
    samples, command = asked
    monkeypatch.setenv(JOB_VARIABLE, "ddpm-k7m2")
    files = {}
    for machine in ("1", "2"):  # each job begins with a folder of its own
        code, out, err = typed(*command, env={"DDPM_PIPE_HOME": str(tmp_path / machine)})
        assert code == 0, err
        place = RemoteFolder(samples).child(machine)
        assert json.loads(out)["written"] == [f"{place}/grid.png", f"{place}/samples.json"]
        files[machine] = place.read("grid.png")
    assert files["1"] == files["2"] == (tmp_path / "1" / "runs").glob("*/samples/1/grid.png").__next__().read_bytes()


@pytest.mark.slow
def test_what_is_made_here_stays_here(typed, asked, home):
    samples, command = asked
    code, out, err = typed(*command)
    assert code == 0, err
    written = [Path(path) for path in json.loads(out)["written"]]
    assert [(path.name, path.is_file()) for path in written] == [("grid.png", True), ("samples.json", True)]
    assert RemoteFolder(samples).objects() == []


@pytest.mark.slow
def test_an_address_is_no_folder(typed, asked, home):
    _, command = asked
    code, _, err = typed(*command, "--out", "s3://bucket/x")
    assert code == 2
    assert "--out s3://bucket/x: images are written into a folder, not to an address" in err
    assert not (home / "s3:").exists()
