"""Notices of how runs end: what a receiver gets, and that one that hangs, fails or is away costs a run nothing."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ddpm import UNet
from pipeline.config.cluster_profile import Profile
from pipeline.config.yaml_files import validate
from pipeline.errors import UsageError
from pipeline.redaction import redact
from pipeline.storage.runs import Run
from pipeline.tracking import notices
from pipeline.tracking.spool import Spool
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.waiting import wait_for

SECRET = "services/T0123456789/abcdefghijkl"


@pytest.fixture(autouse=True)
def senders_end() -> Iterator[None]:
    yield
    for sender in notices._senders:
        sender.wait(60)
    notices._senders.clear()


def listing(home: Path) -> str:
    """Return a command that adds each message to `told`, a line each."""
    (home / "tell.py").write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    return f"{sys.executable} tell.py {home / 'told'}"


def told(home: Path, count: int) -> list[dict[str, Any]]:
    path = home / "told"
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) == count)
    return [json.loads(line) for line in path.read_text().splitlines()]


def undelivered(home: Path) -> list[dict[str, Any]]:
    return [event["message"] for event in Spool(Run.find(home, "latest").folder / "notices").pending()]


def test_a_command_is_told_how_a_run_failed_and_that_it_finished(
    home: Path, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 6}, checkpoint={"every_steps": 2}))
    write_yaml(home / "told.yaml", {"notify": {"command": listing(home)}})
    forward = UNet.forward

    def fail(self: UNet, *args: Any, **kwargs: Any) -> Any:
        if self.training and (home / "runs").exists() and Run.find(home, "latest").state().step == 2:
            raise ValueError("password=hunter2hunter2")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", fail)
    assert typed("train", "tiny.yaml", "--cluster", "told.yaml")[0] == 8
    monkeypatch.setattr(UNet, "forward", forward)
    assert typed("resume", "latest")[0] == 0
    first, last = told(home, 2)
    run = Run.find(home, "latest")
    assert {key: first[key] for key in ("event", "kind", "id", "name", "step")} == {
        "event": "failed", "kind": "run", "id": run.id, "name": "tiny", "step": 2,
    }  # fmt: skip
    assert "failed after step 2" in first["reason"]
    assert first["reason"] in first["text"]
    assert "hunter2" not in (home / "told").read_text()
    assert (last["event"], last["step"], last["reason"]) == ("finished", 6, "")
    assert set(last) == {"event", "kind", "id", "name", "reason", "time", "host", "text", "step", "summary"}
    wait_for(lambda: not undelivered(home))


def test_an_interruption_is_told_before_a_job_ends_the_sender(
    home: Path, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 6}, checkpoint={"every_steps": 2}))
    monkeypatch.setenv(notices.COMMAND_VARIABLE, listing(home))
    monkeypatch.setattr(notices, "IN_A_JOB", {notices.COMMAND_VARIABLE})
    monkeypatch.setattr(notices, "JOB_WAITS_S", 60.0)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(UNet, "forward", stop)
    assert typed("train", "tiny.yaml")[0] == 130
    assert [sender.returncode for sender in notices._senders] == [0]
    (message,) = told(home, 1)
    assert (message["event"], message["reason"]) == ("interrupted", "stopped by the user")


def test_a_webhook_that_hangs_costs_a_run_nothing_and_its_message_is_kept(
    home: Path, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 2}))
    hangs = socket.create_server(("127.0.0.1", 0))  # takes connections, and never answers
    address = f"http://127.0.0.1:{hangs.getsockname()[1]}/{SECRET}"
    monkeypatch.setenv(notices.WEBHOOK_VARIABLE, address)
    assert typed("train", "tiny.yaml")[0] == 0
    assert [sender.poll() for sender in notices._senders] == [None]  # still waits for an answer: the command did not
    assert [message["event"] for message in undelivered(home)] == ["finished"]
    hangs.accept()[0].close()
    hangs.close()
    senders_log = Run.find(home, "latest").log_path
    wait_for(lambda: "a notice was not taken" in senders_log.read_text())
    for file in home.rglob("*"):  # the address is recorded nowhere
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in redact(f"posted to {address}")

    got: list[bytes] = []

    class Takes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Takes) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        monkeypatch.setenv(notices.WEBHOOK_VARIABLE, f"http://127.0.0.1:{server.server_address[1]}/{SECRET}")
        assert typed("sync", "latest")[0] == 0
        wait_for(lambda: not undelivered(home))
        server.shutdown()
        serving.join()
    assert [json.loads(message)["event"] for message in got] == ["finished"]


def test_an_address_of_another_kind_is_refused_without_repeating_it() -> None:
    with pytest.raises(UsageError, match=r"notify\.webhook: got another address, expected http") as refused:
        validate(Profile, {"notify": {"webhook": f"ftp://host/{SECRET}"}}, "profile")
    assert SECRET not in str(refused.value)
