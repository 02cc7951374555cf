"""Real MLflow stores for the tracking tests: SQLite files with the tables already made, a server, and a way to cut it off."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs import Run
from pipeline.tracking import TrackingSettings
from pipeline.tracking_writer import prepare_environment
from tests.pipeline.tracking.stores import Gate, free_port


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store whose tables are made; making them takes seconds, copying the file none."""
    prepare_environment()
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(home: Path, migrated_database: Path) -> TrackingSettings:
    """The default store of an empty home folder, delivered to without delay."""
    shutil.copy(migrated_database, home / "mlflow.db")
    return replace(TrackingSettings.resolve(home), batch_interval_s=0.01)


@pytest.fixture
def new_run(home: Path) -> Callable[..., Run]:
    """Make a run folder: new_run(name="x")."""

    def make(**changes: Any) -> Run:
        content: dict[str, Any] = {
            "name": "test",
            "experiment": {"training": {"steps": 100}, "diffusion": {"schedule": "cosine", "num_timesteps": 50}},
            "config_hash": "0123456789abcdef",
            "dataset": {"path": "/data/digits", "fingerprint": "ab" * 32, "name": "digits"},
            "profile": {"name": "local"},
            "command": ["ddpm-pipe", "train", "--preset", "digits"],
        }
        return Run.create(home, **{**content, **changes})

    return make


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    """A fresh run folder."""
    return new_run()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[int]:
    """The port of a real `mlflow server` on loopback."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(migrated_database, folder / "mlflow.db")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def gate(server: int) -> Iterator[Gate]:
    """The relay, shut at first."""
    gate = Gate(server)
    yield gate
    gate.close()


@pytest.fixture
def remote(home: Path, gate: Gate, request: pytest.FixtureRequest) -> TrackingSettings:
    """Settings for the real server through the gate, in an experiment of the test's own."""
    uri = f"http://127.0.0.1:{gate.port}"
    return replace(TrackingSettings.resolve(home, uri, experiment=request.node.name), batch_interval_s=0.01)
