"""A home that was moved or copied: its runs are found, and what is recorded goes where the home is now."""

from __future__ import annotations

import shutil

import pytest

from pipeline.cli import in_home_folder
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.errors import StorageError
from pipeline.storage.home import default_tracking_uri, home
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from tests.kit.commands import Shell


def made(root, **places):
    return Run.create(
        root, name="x", experiment=Experiment().to_dict(), config_hash="", profile={"storage": str(root)}, command=[], **places
    )  # fmt: skip


def test_what_lies_in_the_home_is_found_where_the_home_is_now(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    inside = made(old, dataset={"path": str(old / "datasets" / "x"), "fingerprint": ""}, initial_weights=str(old / "w"))
    outside = made(old, dataset={"path": "/data/x", "fingerprint": ""})
    in_store = made(old, dataset={"path": "s3://bucket/x", "fingerprint": ""})
    assert Run(inside.folder).record == inside.record
    assert str(old) not in (inside.folder / "run.json").read_text()
    old.rename(new)
    record = Run.find(new, inside.id).record
    assert record.dataset["path"] == str(new / "datasets" / "x")
    assert (record.initial_weights, record.profile["storage"]) == (str(new / "w"), str(new))
    assert Run.find(new, outside.id).record.dataset["path"] == "/data/x"
    assert Run.find(new, in_store.id).record.dataset["path"] == "s3://bucket/x"


def test_mlflow_follows_a_home_once_that_is_asked_for(tmp_path, migrated_database):
    from mlflow import MlflowClient

    old, new = tmp_path / "old", tmp_path / "a new place"
    old.mkdir()
    shutil.copy(migrated_database, old / "mlflow.db")
    client = MlflowClient(default_tracking_uri(old))
    run = client.create_run(client.create_experiment("ddpm", artifact_location=(old / "mlartifacts" / "ddpm").as_uri()))
    client.log_dict(run.info.run_id, {"a": 1}, "a.json")
    TrackingSettings.resolve(old)
    shutil.copytree(old, new)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"was moved or copied.*ddpm-pipe sync --moved"):
            TrackingSettings.resolve(new)
    shell = Shell(new)
    code, stdout, _ = shell.type("sync", "--moved")
    assert (code, stdout) == (0, f"{new}: corrected 2 paths of artifacts in mlflow.db\n")
    TrackingSettings.resolve(new)
    found = MlflowClient(default_tracking_uri(new)).get_run(run.info.run_id).info.artifact_uri
    assert found.startswith((new / "mlartifacts" / "ddpm").as_uri() + "/")
    TrackingSettings.resolve(old)
    assert shell.type("sync")[0] == shell.type("sync", "latest", "--moved")[0] == 2


def test_a_home_whose_name_no_address_of_a_database_can_hold_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_PIPE_HOME", str(tmp_path / "what?"))
    with pytest.raises(StorageError, match=r"what\?: got \?, which the address.*DDPM_PIPE_HOME"):
        home()
    monkeypatch.setenv("DDPM_PIPE_HOME", str(tmp_path / "caf\udce9"))
    with pytest.raises(StorageError, match=r"got a name that is not UTF-8, which"):
        home()


def test_the_users_home_directory_may_be_written_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["train", "~/e.yaml", "--data=~/x", "-s", "data.source=~/x", "note=a~/b", "~x"]
    assert [in_home_folder(word) for word in words] == [
        "train", "/home/me/e.yaml", "--data=/home/me/x", "-s", "data.source=/home/me/x", "note=a~/b", "~x",
    ]  # fmt: skip
    assert experiment_from({"data": {"source": "~/photos"}}).data.source == "/home/me/photos"
