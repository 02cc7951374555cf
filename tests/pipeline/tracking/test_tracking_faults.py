"""Killed processes, locked stores and servers that are away: nothing is lost, nothing doubled, nobody waits."""

from __future__ import annotations

import random
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline.errors import TrackingError
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import Tracker, TrackingSettings, sync
from tests.kit.commands import python
from tests.kit.tracking import Gate, client_of, forget_receipts, history, runs_in

TRAIN = """
import sys, time
from pathlib import Path
from pipeline.tracking.tracker import Tracker, TrackingSettings
folder, uri, artifacts, begin, end = sys.argv[1:]
settings = TrackingSettings(uri, "ddpm", Path(artifacts), batch_interval_s=0.003)
tracker = Tracker(Path(folder), settings)
if begin == "0":
    tracker.start("killed", {}, {"training.steps": 300}, "killed now and then")
    tracker.flush(60)
for step in range(int(begin) + 1, int(end) + 1):
    values = {"loss": 1 / step, "learning_rate": step * 1e-6}
    if step % 7 == 0:
        values["rare"] = float(step)
    tracker.metrics(step, values)
    print(step, flush=True)
    time.sleep(0.004)
tracker.finish("FINISHED")
print("delivered", tracker.close(60), flush=True)
"""
HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""
STEPS = 300
WAITS = {f"socket.{call}" for call in ("connect", "connect_ex", "send", "sendall", "recv", "recv_into")} | {
    *("sleep", "getaddrinfo", "select", "poll.poll", "Connection.execute", "Cursor.execute")
}


def start(run: Run, settings: TrackingSettings) -> Tracker:
    tracker = Tracker(run.folder, settings)
    tracker.start("faulty", {}, {"training.steps": 100}, "")
    return tracker


@pytest.mark.promise("P4")
@pytest.mark.slow
def test_killed_at_random_steps_and_resumed_every_step_is_there_once(run: Run, store: TrackingSettings) -> None:
    rng = random.Random(7)
    begin, kills = 0, 0
    while True:
        limit = begin + rng.randint(40, 90)
        with python(TRAIN, run.folder, store.uri, store.artifacts, begin, STEPS) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("delivered") or int(line) >= limit:
                    break
            else:
                raise AssertionError(process.stderr.read() if process.stderr else "")
            if line.startswith("delivered"):
                assert line == "delivered True\n"
                break
            process.send_signal(signal.SIGKILL)
        kills += 1
        begin = int(line) // 25 * 25  # training goes on from its newest checkpoint
    assert kills >= 3
    (found,) = runs_in(store)
    assert found.info.status == "FINISHED"
    steps = range(1, STEPS + 1)
    assert history(store, found.info.run_id, "train/loss") == [(step, 1 / step) for step in steps]
    assert history(store, found.info.run_id, "train/learning_rate") == [(step, step * 1e-6) for step in steps]
    assert history(store, found.info.run_id, "train/rare") == [(step, float(step)) for step in steps if step % 7 == 0]


@pytest.mark.promise("P4")
def test_killed_between_the_store_and_the_receipt(run: Run, store: TrackingSettings) -> None:
    tracker = start(run, store)
    assert tracker.flush()
    for step in range(1, 61):
        tracker.metrics(step, {"loss": 1 / step})
        if step % 20 == 0:
            assert tracker.close()
            forget_receipts(run.folder, last=1)  # the store has the record, the spool does not say so
            tracker = Tracker(run.folder, store)
    assert tracker.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 61)]


@pytest.mark.promise("P4")
def test_a_process_that_ends_without_closing_loses_nothing(run: Run, store: TrackingSettings) -> None:
    code = TRAIN.partition("tracker.finish")[0].replace("tracker.flush(60)", "").replace("time.sleep(0.004)", "")
    with python(code, run.folder, store.uri, store.artifacts, 0, 50) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split()[-1], err) == (0, "50", "")
    assert sync(run.folder, store) > 0
    assert history(store, runs_in(store)[0].info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 51)]


@pytest.mark.fault(15)
@pytest.mark.promise("P4")
def test_a_store_locked_by_a_process_that_is_killed(run: Run, store: TrackingSettings, home: Path) -> None:
    tracker = start(run, store)
    assert tracker.flush()
    with python(HOLD, home / "mlflow.db", 600) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for step in range(1, 201):
            tracker.metrics(step, {"loss": 1 / step})
        with (
            closing(sqlite3.connect(home / "mlflow.db", timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("BEGIN IMMEDIATE")
        assert len(tracker.undelivered()) > 1  # recording did not wait for the lock, which is held all the while
        holder.send_signal(signal.SIGKILL)
    assert tracker.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 201)]


@pytest.mark.fault(15)
@pytest.mark.promise("P4")
@pytest.mark.slow
def test_a_store_locked_for_longer_than_mlflow_waits(run: Run, store: TrackingSettings, home: Path) -> None:
    tracker = start(run, store)
    assert tracker.flush()
    with python(HOLD, home / "mlflow.db", 21.5) as holder:  # MLflow gives up after 20 s
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for step in range(1, 201):
            tracker.metrics(step, {"loss": 1 / step})
        holder.wait(60)
    assert tracker.flush(60, patient=True)
    assert tracker.close()
    assert history(store, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 201)]


@pytest.fixture
def waits() -> Iterator[list[str]]:
    """The calls of this thread, from here on, that wait for somebody else: those of sockets and databases, and sleeping itself."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__qualname__ in WAITS:
            seen.append(argument.__qualname__)

    sys.setprofile(profile)
    yield seen
    sys.setprofile(None)


@pytest.mark.fault(14)
@pytest.mark.promise("P4")
@pytest.mark.slow
@pytest.mark.parametrize("state", ["refusing", "hanging"])
def test_training_makes_no_call_to_a_server_that_is_away_for_ever_and_nothing_is_lost(
    state: str,
    run: Run,
    remote: TrackingSettings,
    gate: Gate,
    waits: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # whoever waited for a call would wait for ever
    gate.set(state)
    driver = start(run, remote)
    assert waits == []
    assert not driver.close()
    assert set(waits) == {"sleep"}  # it looks now and then at how far the other thread has come
    waits.clear()
    worker = Tracker(run.folder, remote)
    for step in range(1, 501):
        worker.metrics(step, {"loss": 1 / step})
    assert len(worker.undelivered()) == 501  # as a checkpoint asks
    assert waits == []
    assert not worker.close()
    if state == "hanging":  # nobody has waited even for the first call to time out
        assert driver.problem is None
        assert worker.problem is None
        assert gate.requests <= 2
    else:
        assert "Connection refused" in (driver.problem or "")
    driver.finish("FINISHED")
    assert not driver.close()
    assert f"ddpm-pipe sync {run.id}" in caplog.text
    assert len(worker.undelivered()) == 502
    gate.set("refusing")
    with pytest.raises(TrackingError, match="cannot be used"):
        sync(run.folder, replace(remote, uri="http://127.0.0.1:9"))
    gate.set("open")
    assert sync(run.folder, remote) == 502
    (found,) = [item for item in runs_in(remote) if item.data.tags["ddpm_pipe.run_id"] == run.id]
    assert found.info.status == "FINISHED"
    assert history(remote, found.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 501)]


@pytest.mark.fault(13)
@pytest.mark.promise("P4")
def test_a_server_that_comes_and_goes_gets_every_step_once(run: Run, remote: TrackingSettings, gate: Gate) -> None:
    tracker = start(run, remote)  # the run is made late: nobody listens yet
    states = iter(["open", "refusing", "open", "hanging", "open"])
    for step in range(1, 251):
        tracker.metrics(step, {"loss": 1 / step, "nan": float("nan")})
        if step % 50 == 1:
            state = next(states)
            gate.set(state)
            if state == "open":
                assert tracker.flush(60, patient=True)
    tracker.finish("FINISHED")
    assert tracker.flush(60, patient=True)
    assert tracker.close()
    (found,) = [item for item in runs_in(remote) if item.data.tags["ddpm_pipe.run_id"] == run.id]
    assert history(remote, found.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 251)]
    assert len(history(remote, found.info.run_id, "train/nan")) == 250


def test_pictures_files_and_models_go_through_a_server(run: Run, remote: TrackingSettings, gate: Gate) -> None:
    from PIL import Image

    gate.set("open")
    tracker = start(run, remote)
    Image.new("L", (8, 8), 200).save(run.folder / "s.png")
    tracker.image("samples", 0, run.folder / "s.png")
    (run.folder / "fid.json").write_text('{"fid": 1.5}')
    tracker.artifact(run.folder / "fid.json", "fid")
    assert tracker.close()
    client = client_of(remote)
    assert len(client.list_artifacts(run.mlflow_run_id, "images")) == 2
    stored = client.download_artifacts(run.mlflow_run_id, "fid/fid.json")
    assert Path(stored).read_text() == '{"fid": 1.5}'


@pytest.mark.fault(14)
def test_strict_stops_at_the_start_and_at_the_end(run: Run, remote: TrackingSettings, gate: Gate) -> None:
    strict = replace(remote, strict=True, start_timeout_s=2.0)
    with pytest.raises(TrackingError, match=r"does not accept the run.*ddpm-pipe sync") as caught:
        Tracker(run.folder, strict).start("y", {}, {}, "")
    assert caught.value.exit_code == 7
    gate.set("open")
    tracker = start(run, replace(strict, start_timeout_s=60.0))  # a busy machine may take its time
    gate.set("refusing")
    tracker.metrics(1, {"loss": 1.0})
    with pytest.raises(TrackingError, match="has not received everything"):
        tracker.close()
