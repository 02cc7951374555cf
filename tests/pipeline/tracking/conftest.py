"""Real MLflow stores for the tracking tests: SQLite files with the tables already made, and a server that can be cut off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.tracking.tracker import TrackingSettings
from tests.kit.tracking import Gate


@pytest.fixture
def store(home: Path, migrated_database: Path) -> TrackingSettings:
    """The default store of an empty home folder, delivered to without delay."""
    shutil.copy(migrated_database, home / "mlflow.db")
    return replace(TrackingSettings.resolve(home), batch_interval_s=0.01)


@pytest.fixture
def gate(mlflow_server: str) -> Iterator[Gate]:
    """The relay, shut at first."""
    gate = Gate(int(mlflow_server.rpartition(":")[2]))
    yield gate
    gate.close()


@pytest.fixture
def remote(home: Path, gate: Gate, request: pytest.FixtureRequest) -> TrackingSettings:
    """Settings for the real server through the gate, in an experiment of the test's own."""
    uri = f"http://127.0.0.1:{gate.port}"
    return replace(TrackingSettings.resolve(home, uri, experiment=request.node.name), batch_interval_s=0.01)
