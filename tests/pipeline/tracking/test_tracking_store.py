"""What reaches a SQLite store: everything, once, in order, without secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.cluster_profile import Profile
from pipeline.errors import TrackingError, UsageError
from pipeline.storage.runs import Run
from pipeline.sweeps.config import plain_base, sweep_from
from pipeline.sweeps.folder import SweepFolder
from pipeline.tracking.opened import checked_run
from pipeline.tracking.tracker import TrackedDataset, Tracker, TrackingSettings, sync
from tests.kit.commands import Typed
from tests.kit.tracking import client_of, forget_receipts, history, runs_in

FINGERPRINT = "c0ffee" * 10 + "abcd"


def started(run: Run, settings: TrackingSettings, **changes: object) -> Tracker:
    tracker = Tracker(run.folder, settings)
    content: dict[str, object] = {
        "tags": {"schedule": "cosine"},
        "params": {"training.steps": 100, "data.source": "digits", "model.dropout": 0.1},
        "description": "# what it was",
        "dataset": TrackedDataset("digits", FINGERPRINT, "/data/digits"),
    }
    tracker.start("first try", **{**content, **changes})  # type: ignore[arg-type]
    return tracker


def picture(path: Path, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(path)
    return path


def test_a_run_arrives_with_all_that_was_said_of_it(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    tracker.tags({"workers": "2"})
    tracker.metrics(1, {"loss": 0.5, "odd name?": 1.0})
    tracker.describe("# what came out")
    tracker.finish("FINISHED")
    assert tracker.close()
    (found,) = runs_in(store)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first try"
    assert found.data.params == {"training.steps": "100", "data.source": "digits", "model.dropout": "0.1"}
    assert found.data.metrics == {"train/loss": 0.5, "train/odd name_": 1.0}
    wanted = {
        "schedule": "cosine",
        "workers": "2",
        "ddpm_pipe.run_id": run.id,
        "mlflow.note.content": "# what came out",
    }
    assert wanted.items() <= found.data.tags.items()
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", FINGERPRINT[:36])
    assert json.loads(dataset.dataset.source) == {"uri": "/data/digits"}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    assert run.mlflow_run_id == tracker.mlflow_run_id == found.info.run_id
    assert found.info.artifact_uri.startswith((run.folder.parent.parent / "mlartifacts").as_uri())


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_files_follow_the_users_umask(run: Run, home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        settings = TrackingSettings.resolve(home)  # no tables yet: this run makes them
        assert started(run, settings).close()
    finally:
        os.umask(before)
    written = [home / "mlflow.db", *(path for path in (run.folder / "spool").rglob("*") if path.is_file())]
    assert len(written) > 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}
    assert len(runs_in(settings)) == 1


def test_many_metrics_arrive_in_batches_complete_and_in_order(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, replace(store, batch_interval_s=60.0))
    for step in range(1, 1201):
        tracker.metrics(step, {f"m{k}": step + k / 10 for k in range(7)})
    assert tracker.close()
    for k in range(7):
        assert history(store, run.mlflow_run_id, f"train/m{k}") == [(step, step + k / 10) for step in range(1, 1201)]


def test_the_columns_of_mlflows_list_are_filled(run: Run, store: TrackingSettings) -> None:
    commit = "504fc822fd5fa0d0d09eb4ba7dd7212d1c355e99"
    tracker = started(run, store, tags={"code_version": f"0.1.0+{commit}-dirty"})
    tracker.metrics(1, {"loss": 0.5, "nonsense": "much"})  # type: ignore[dict-item]
    assert tracker.close()
    (found,) = runs_in(store)
    assert found.data.tags["mlflow.source.name"] == "ddpm-pipe"
    assert found.data.tags["mlflow.source.git.commit"] == commit
    assert found.data.metrics == {"train/loss": 0.5}


def test_not_a_number_and_a_record_above_the_batch_limit_arrive(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    tracker.metrics(1, {"loss": float("nan")})
    tracker.metrics(2, {f"k{n}": float(n) for n in range(1500)})
    assert tracker.close()
    ((step, value),) = history(store, run.mlflow_run_id, "train/loss")
    assert step == 1
    assert value != value
    metrics = runs_in(store)[0].data.metrics
    assert all(metrics[f"train/k{n}"] == n for n in range(1500))


def test_steps_repeated_after_a_resume_are_logged_once(run: Run, store: TrackingSettings) -> None:
    first = started(run, store)
    for step in range(1, 31):
        first.metrics(step, {"loss": 1 / step})
        if step % 10 == 0:
            first.metrics(step, {"loss_of_quartile": 2 / step})  # another record of the same step
    first.flush()
    for step in range(31, 41):
        first.metrics(step, {"loss": 1 / step})  # perhaps not delivered before the process ends
    second = Tracker(run.folder, store)
    for step in range(21, 51):
        second.metrics(step, {"loss": 1 / step})
        if step % 10 == 0:
            second.metrics(step, {"loss_of_quartile": 2 / step})
    assert second.close()
    first.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 51)]
    assert history(store, run.mlflow_run_id, "train/loss_of_quartile") == [
        (step, 2 / step) for step in range(10, 51, 10)
    ]


def test_lost_receipts_make_everything_be_sent_again_and_changes_nothing(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    for step in range(1, 20):
        tracker.metrics(step, {"loss": 1 / step, "grad_norm": float("nan")})
    tracker.metrics(19, {"fid": 12.5}, "score")
    tracker.image("samples", 19, picture(run.folder / "pictures" / "s.png"))
    (run.folder / "fid.json").write_text("{}")
    tracker.artifact(run.folder / "fid.json", "fid")
    tracker.finish("FINISHED")
    assert tracker.close()

    def content() -> object:
        (found,) = runs_in(store)
        client = client_of(store)
        files = sorted(item.path for item in client.list_artifacts(found.info.run_id, "images"))
        metrics = {key: len(history(store, found.info.run_id, key)) for key in found.data.metrics}
        return found.info.status, found.data.params, found.data.tags, len(found.inputs.dataset_inputs), metrics, files

    before = content()
    forget_receipts(run.folder)
    (run.folder / "spool" / "mlflow.json").unlink()
    assert sync(run.folder, store) == 24
    assert content() == before
    assert sync(run.folder, store) == 0


def test_a_result_measured_again_is_kept_only_if_it_differs(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    for value in (12.5, 12.5, 11.0):
        tracker.metrics(100, {"fid": value}, "score")
    assert tracker.close()
    assert sorted(value for _, value in history(store, run.mlflow_run_id, "score/fid")) == [11.0, 12.5]


def test_a_grouped_metric_is_found_and_sorted_by_as_docs_tracking_says(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    tracker.metrics(100, {"fid_classifier_n559": 0.5}, "score")
    assert tracker.close()
    client, name = client_of(store), "metrics.`score/fid_classifier_n559`"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = [len(client.search_runs(experiments, f"{name} < {at}", order_by=[f"{name} ASC"])) for at in (0.4, 0.6)]
    assert found == [0, 1]


def test_undelivered_events_travel_in_a_checkpoint_to_another_machine(
    run: Run, store: TrackingSettings, home: Path
) -> None:
    here = started(run, replace(store, uri="http://127.0.0.1:9"))  # this machine never reaches the store
    for step in range(1, 6):
        here.metrics(step, {"loss": float(step)})
    checkpoint = json.loads(json.dumps(here.undelivered()))
    for step in range(6, 9):
        here.metrics(step, {"loss": float(step)})  # after the checkpoint: lost with the machine
    here.close()
    there = home / "node" / run.id
    tracker = Tracker(there, store)
    tracker.restore(checkpoint)
    tracker.restore(checkpoint)
    for step in range(6, 11):
        tracker.metrics(step, {"loss": float(step)})
    assert tracker.close()
    (found,) = runs_in(store)
    assert found.data.params["training.steps"] == "100"
    assert history(store, found.info.run_id, "train/loss") == [(step, float(step)) for step in range(1, 11)]


def test_a_machine_that_starts_with_an_empty_spool_continues_the_same_run(
    run: Run, store: TrackingSettings, home: Path
) -> None:
    here = started(run, store)
    for step in range(1, 8):
        here.metrics(step, {"loss": float(step)})
    assert here.flush()
    checkpoint = here.undelivered()  # all is delivered, but another machine must learn what the run is
    here.metrics(8, {"loss": 8.0})
    here.finish("FINISHED")
    assert here.close()
    tracker = Tracker(home / "node" / run.id, store)
    tracker.restore(checkpoint)
    for step in range(6, 11):
        tracker.metrics(step, {"loss": float(step)})
    assert tracker.close()
    (found,) = runs_in(store)
    assert found.info.status == "FINISHED"  # what was restored opens nothing again
    assert history(store, found.info.run_id, "train/loss") == [(step, float(step)) for step in range(1, 11)]


def test_pictures_have_a_step_slider_and_come_once(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    for step in (0, 50, 100, 50):
        tracker.image("samples/ema", step, picture(run.folder / "pictures" / f"{step}.png", step))
    assert tracker.close()
    client = client_of(store)
    names = [Path(item.path).name for item in client.list_artifacts(run.mlflow_run_id, "images")]
    steps = sorted(name.split("+")[2] for name in names if name.endswith(".png"))
    assert steps == ["0", "100", "50"]
    assert sum("compressed" in name for name in names) == 3
    assert runs_in(store)[0].data.tags["mlflow.loggedImages"] == "True"
    stored = client.download_artifacts(
        run.mlflow_run_id, f"images/{next(n for n in names if '+50+' in n and 'png' in n)}"
    )
    assert np.asarray(Image.open(stored)).tolist() == np.full((16, 16, 3), 50).tolist()


def test_a_picture_that_is_gone_or_damaged_is_set_aside_and_holds_up_nothing(
    run: Run, store: TrackingSettings, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = started(run, store)
    (run.folder / "bad.png").write_bytes(b"not a picture")
    tracker.image("samples", 1, run.folder / "gone.png")
    tracker.image("samples", 2, run.folder / "bad.png")
    tracker.metrics(3, {"loss": 1.0})
    assert tracker.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(3, 1.0)]
    lines = map(json.loads, (run.folder / "spool" / "events.jsonl").read_text().splitlines())
    refused = [line["refused"] for line in lines if "refused" in line]
    assert ["gone.png" in refused[0], "bad.png" in refused[1]] == [True, True]
    assert "refused" in caplog.text


def test_files_that_cannot_be_stored_now_wait_while_metrics_are_sent(
    run: Run, store: TrackingSettings, home: Path
) -> None:
    (home / "mlartifacts").write_text("in the way")  # a plain file where the folder should be
    tracker = started(run, store)
    tracker.image("samples", 0, picture(run.folder / "s.png"))
    for step in range(1, 56):
        tracker.metrics(step, {"loss": 1 / step, "filler": 0.0})
        tracker.tags({"padding": "x" * 20_000})  # more than the writer reads at once
    tracker.finish("FINISHED")
    assert not tracker.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 56)]
    assert runs_in(store)[0].info.status == "FINISHED"
    assert [event["kind"] for event in Tracker(run.folder, store).undelivered()] == ["start", "image"]
    with pytest.raises(TrackingError, match=rf"ddpm-pipe sync {run.id}"):
        sync(run.folder, store)
    (home / "mlartifacts").unlink()
    assert sync(run.folder, store) == 1
    assert len(client_of(store).list_artifacts(run.mlflow_run_id, "images")) == 2


def test_artifacts_keep_their_folder_and_moved_run_folders_their_files(
    run: Run, store: TrackingSettings, home: Path
) -> None:
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "moments.bin").write_bytes(bytes(range(256)))
    offline = started(run, replace(store, uri="http://127.0.0.1:9"))
    offline.artifact(run.folder / "evaluation" / "moments.bin", "fid/real")
    offline.artifact(run.folder / "evaluation")
    offline.close()
    moved = home / "moved" / run.id
    moved.parent.mkdir()
    shutil.move(run.folder, moved)
    assert sync(moved, store) == 3
    client = client_of(store)
    (found,) = runs_in(store)
    assert [item.path for item in client.list_artifacts(found.info.run_id)] == ["fid", "moments.bin"]
    stored = client.download_artifacts(found.info.run_id, "fid/real/moments.bin")
    assert Path(stored).read_bytes() == bytes(range(256))


def test_no_secret_reaches_the_store(
    run: Run, store: TrackingSettings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_SECRET", "s3cr3t-of-the-env")
    planted = [
        "AKIAQWERTYUIOPASDFGH",
        "hf_plantedplantedplantedplantedplanted1"[:37],
        "pa55w0rd!",
        "s3cr3t-of-the-env",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    ]
    tracker = started(
        run,
        store,
        tags={"note": planted[0], "remote": "https://me:pa55w0rd!@git.example/x"},
        params={
            "data.source": "s3://id:pa55w0rd!@bucket/x",
            "hub.token": "short-one",
            "a": planted[1],
            "b": planted[4],
        },
        description=f"uses {planted[3]} and {planted[0]}",
        dataset=TrackedDataset("digits", FINGERPRINT, "https://me:pa55w0rd!@host/data"),
    )
    (run.folder / "evaluations" / "deep").mkdir(parents=True)
    for config in (run.folder / "config.json", run.folder / "evaluations" / "deep" / "config.json"):
        config.write_text(json.dumps({"url": "https://me:pa55w0rd!@host", "key": planted[1], "password": "short-one"}))
    tracker.artifact(run.folder / "config.json")
    tracker.artifact(run.folder / "evaluations", "all")
    tracker.tags({"later": planted[4]})
    assert tracker.close()
    (run.folder / "config.json").unlink()
    shutil.rmtree(run.folder / "evaluations")
    written = [path for path in home.rglob("*") if path.is_file()]
    assert sum(path.name == "config.json" for path in written) == 2
    for path in written:
        content = path.read_bytes()
        for secret in [*planted, "short-one"]:
            assert secret.encode() not in content, (path, secret)
    params = runs_in(store)[0].data.params
    assert params["data.source"] == "s3://bucket/x"
    assert params["hub.token"] == params["a"] == "<redacted>"
    assert runs_in(store)[0].inputs.dataset_inputs[0].dataset.digest == FINGERPRINT[:36]  # hashes are no secrets


def test_the_password_of_a_tracking_server_is_said_nowhere(
    run: Run, store: TrackingSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(store, uri="http://me:pa55w0rd@127.0.0.1:9")
    tracker = started(run, settings)
    assert not tracker.close()
    with pytest.raises(TrackingError) as caught:
        sync(run.folder, settings)
    assert "http://127.0.0.1:9" in str(caught.value)
    for text in (str(caught.value), caplog.text, str(tracker.problem), *map(str, tracker.undelivered())):
        assert "pa55w0rd" not in text
    assert all(b"pa55w0rd" not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def test_a_long_parameter_says_that_it_was_cut(run: Run, store: TrackingSettings) -> None:
    value = [f"value {n}" for n in range(2000)]
    assert started(run, store, params={"model.arguments": value, "many": "x"}).close()
    stored = runs_in(store)[0].data.params["model.arguments"]
    assert len(stored) == 6000
    assert stored.startswith('["value 0", "value 1"')
    assert stored.endswith(f"({len(json.dumps(value))} characters; the whole value is in the run's experiment file)")


def test_more_parameters_than_one_call_takes(run: Run, store: TrackingSettings) -> None:
    params = {f"p.{n}": n for n in range(250)}
    assert started(run, store, params=params).close()
    assert runs_in(store)[0].data.params == {name: str(value) for name, value in params.items()}


def test_the_run_that_mlflow_opened_is_the_run_used(
    run: Run, store: TrackingSettings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(store)
    opened = client.create_run("0", run_name="capable-ox-1")
    client.log_param(opened.info.run_id, "training.steps", "from MLproject")
    client.log_param(opened.info.run_id, "data.source", "digits")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    settings = TrackingSettings.resolve(home, "https://profile.example")  # the opened run's store wins
    assert settings.uri == store.uri
    assert "MLFLOW_RUN_ID" not in os.environ
    assert started(run, settings).close()
    (found,) = runs_in(store)
    assert found.info.run_id == opened.info.run_id == run.mlflow_run_id
    assert found.data.params == {
        "training.steps": "from MLproject",
        "data.source": "digits",
        "model.dropout": "0.1",
    }
    assert found.data.tags["ddpm_pipe.run_id"] == run.id
    assert found.data.tags["current.training.steps"] == "100"


def test_variables_of_mlflow_left_in_the_shell_are_used_or_named(
    run: Run, store: TrackingSettings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert started(run, store).close()
    assert checked_run(store, None, said.append) == store
    taken = replace(store, mlflow_run_id=run.mlflow_run_id)
    with pytest.raises(UsageError, match=f"MLFLOW_RUN_ID: run {run.mlflow_run_id} belongs to {run.id}, expected"):
        checked_run(taken, None, said.append)
    assert checked_run(taken, run.id, said.append) == taken
    fresh = replace(store, mlflow_run_id=client_of(store).create_run("0").info.run_id)
    assert checked_run(fresh, None, said.append) == fresh
    away = replace(taken, uri="http://127.0.0.1:9")
    assert checked_run(away, None, said.append) == away
    assert said == []
    for wrong in ("0" * 32, "no id at all"):
        assert checked_run(replace(store, mlflow_run_id=wrong), None, said.append) == store
        assert f"has no run {wrong}; recording in a new one" in said.pop()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    assert checked_run(store, None, said.append) == store
    assert said == [
        "warning: MLFLOW_EXPERIMENT_ID is not used; recording in experiment 'ddpm'; MLFLOW_EXPERIMENT_NAME chooses another"
    ]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert TrackingSettings.resolve(home).experiment == "mine"
    assert TrackingSettings.of_profile(home, Profile()).experiment == "mine"
    assert TrackingSettings.resolve(home, experiment="the profile's").experiment == "the profile's"


def test_a_resume_reopens_the_run_and_keeps_what_is_current_in_tags(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    tracker.finish("KILLED")
    assert tracker.close()
    assert runs_in(store)[0].info.status == "KILLED"
    again = started(run, store, params={"training.steps": 200, "data.source": "digits", "model.dropout": 0.1})
    assert again.flush()
    assert runs_in(store)[0].info.status == "RUNNING"
    again.finish("FINISHED")
    assert again.close()
    (found,) = runs_in(store)
    assert found.info.status == "FINISHED"
    for steps in (300, 100):  # a third value, and the first one again
        again = started(run, store, params={"training.steps": steps, "data.source": "digits"}, description=f"{steps}")
        assert again.close()
        (found,) = runs_in(store)
        assert found.data.params["training.steps"] == "100"  # what was true at the start
        assert {name: value for name, value in found.data.tags.items() if name.startswith("current.")} == {
            "current.training.steps": str(steps)
        }
        assert found.data.tags["mlflow.note.content"] == str(steps)


def test_a_run_deleted_by_its_owner_is_not_made_again(run: Run, store: TrackingSettings) -> None:
    tracker = started(run, store)
    assert tracker.flush()
    client_of(store).delete_run(tracker.mlflow_run_id)
    tracker.metrics(1, {"loss": 1.0})
    assert not tracker.close()
    with pytest.raises(TrackingError, match="was deleted"):
        sync(run.folder, store)
    client_of(store).restore_run(run.mlflow_run_id)
    assert sync(run.folder, store) == 1
    assert history(store, run.mlflow_run_id, "train/loss") == [(1, 1.0)]


def test_what_a_sweep_recorded_while_its_store_was_away_is_delivered_as_the_message_says(
    home: Path, store: TrackingSettings, typed: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    sweep = sweep_from({"space": {"model.dropout": [0, 0.1]}, "budget": {"steps": 5}})
    base = plain_base(sweep)
    about = {"path": "", "fingerprint": FINGERPRINT, "name": "digits"}
    folder = SweepFolder.create(home, sweep, base, base, about, Profile().to_dict(), ["ddpm-pipe", "sweep"])
    away = Tracker(folder.folder, replace(store, uri="http://127.0.0.1:9"))
    away.start("sweep of dropout", {"kind": "sweep"}, {}, "")
    away.finish("FINISHED")
    assert not away.close(timeout=1)
    (remedy,) = re.findall(r"`ddpm-pipe (sync \S+)`", caplog.text)
    code, out, err = typed(*remedy.split())
    assert code == 0, err
    assert out.startswith(f"sweep {folder.id}: delivered 2 records")
    (found,) = runs_in(store)
    assert (found.info.run_name, found.data.tags["kind"]) == ("sweep of dropout", "sweep")


def test_a_run_goes_to_another_store_whole(
    run: Run, store: TrackingSettings, home: Path, migrated_database: Path
) -> None:
    tracker = started(run, store)
    tracker.metrics(1, {"loss": 1.0})
    assert tracker.close()
    shutil.copy(migrated_database, home / "other.db")
    other = replace(store, uri=f"sqlite:///{home}/other.db")
    assert sync(run.folder, other) == 2
    assert runs_in(other)[0].data.params == runs_in(store)[0].data.params
    assert sync(run.folder, store) == 0  # and back: it is all there
    assert history(store, runs_in(store)[0].info.run_id, "train/loss") == [(1, 1.0)]


def test_two_runs_of_one_experiment_stay_apart(new_run: Callable[..., Run], store: TrackingSettings) -> None:
    trackers = [started(new_run(), store) for _ in range(3)]
    for n, tracker in enumerate(trackers):
        for step in range(1, 21):
            tracker.metrics(step, {"loss": n + step / 100})
    assert [tracker.close() for tracker in trackers] == [True] * 3
    for n, tracker in enumerate(trackers):
        assert history(store, tracker.mlflow_run_id, "train/loss") == [(step, n + step / 100) for step in range(1, 21)]


def test_driver_and_worker_may_record_at_the_same_time(run: Run, store: TrackingSettings) -> None:
    driver, worker = started(run, store), Tracker(run.folder, store)
    for step in range(1, 101):
        worker.metrics(step, {"loss": 1 / step})
        driver.metrics(step, {"driver": float(step)})
    assert worker.close()
    assert driver.close()
    assert len(runs_in(store)) == 1
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 101)]
    assert history(store, run.mlflow_run_id, "train/driver") == [(step, float(step)) for step in range(1, 101)]


def test_where_tracking_goes(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert TrackingSettings.resolve(home).uri == f"sqlite:///{home}/mlflow.db"
    assert TrackingSettings.resolve(home).artifacts == home / "mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert TrackingSettings.resolve(home).uri == f"sqlite:///{tmp_path}/here.db"
    profile = TrackingSettings.resolve(home, "https://mlflow.example")
    assert (profile.uri, profile.artifacts) == ("https://mlflow.example", None)
    for refused in ("./mlruns", "file:///x/mlruns", "mlruns"):
        with pytest.raises(UsageError, match="plain folders"):
            TrackingSettings.resolve(home, refused)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (
            "UPDATE alembic_version SET version_num = '7ac759974ad8'",
            "got schema 7ac759974ad8, .* mlflow db upgrade sqlite:///",
        ),
        ("DROP TABLE alembic_version", "got schema without a version, .* mlflow db upgrade sqlite:///"),
        (
            "UPDATE alembic_version SET version_num = 'of the future'",
            "got schema of the future, .* Use the newer MLflow",
        ),
    ],
)
def test_a_database_of_another_mlflow_is_named_before_anything_is_spent(
    store: TrackingSettings, home: Path, typed: Typed, version: str, told: str
) -> None:
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute(version)
    code, _, stderr = typed("train")
    assert (code, len(stderr.splitlines())) == (6, 1)
    assert re.search(told, stderr)
    assert not (home / "datasets").exists()
