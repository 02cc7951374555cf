"""The MLflow run of a run folder: the known one, the one tagged with our id, or a new one."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import StorageError
from pipeline.storage.durable import locked
from pipeline.tracking.spool import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "ddpm_pipe.run_id"


class NoRunError(Exception):
    """There is no MLflow run to deliver to, and none can be created now."""


def find_or_make(
    client: MlflowClient, artifacts: Path | None, known: str | None, start: Event | None, our_id: str
) -> Run:
    """Return the MLflow run: the `known` one, the one tagged with our id, else one created from the start event.

    Raises NoRunError if it was deleted, or if there is no start event to create it from.
    """
    run = get_run(client, known)
    if run is None:
        if start is None:
            raise NoRunError("the spool has no start event; run sync on the machine where the training was started")
        experiment_id = make_experiment(client, artifacts, start["experiment"])
        run = get_run(client, start.get("mlflow_run_id")) or _tagged(client, experiment_id, our_id)
        if run is None:
            run = client.create_run(experiment_id, start["time"], {RUN_ID_TAG: our_id}, start["run_name"])
    if run.info.lifecycle_stage == "deleted":
        restore = f"mlflow runs restore --run-id {run.info.run_id}"
        raise NoRunError(f"MLflow run {run.info.run_id} was deleted; `{restore}` brings it back")
    return run


def get_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """Return the run with MLflow's id, also if it was deleted; None if the store has no such run."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def experiment_of_run(uri: str, run_id: str) -> str | None:
    """Return the name of a run's experiment; None if the store does not answer or has no such run."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    try:
        return str(client.get_experiment(client.get_run(run_id).info.experiment_id).name)
    except MlflowException:
        return None


def _tagged(client: MlflowClient, experiment_id: str, our_id: str) -> Run | None:
    found = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{our_id}'", max_results=1)
    return found[0] if found else None


def make_experiment(client: MlflowClient, artifacts: Path | None, name: str) -> str:
    """Return the experiment's id, created if missing. Sets the artifact folder of a local store; MLflow's default is the current folder."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        folder = re.sub(r"[^A-Za-z0-9._-]", "-", name)
        location = None if artifacts is None else (artifacts / folder).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has created it
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise NoRunError(f"experiment {name!r} was deleted in MLflow; restore it there (`mlflow experiments restore`)")
    return str(experiment.experiment_id)


def require_schema(uri: str) -> None:
    """Refuse a SQLite store that another MLflow made, whose tables this one does not understand (StorageError)."""
    path = sqlite_file(uri)
    if path is None or not path.is_file() or _schema_of(path) in (None, *_schemas()[-1:]):
        return
    with locked(path.parent):  # another process may be making the tables
        found = _schema_of(path)
    *older, newest = _schemas()
    if found in (None, newest):
        return
    remedy = f"Keep a copy of it, then: mlflow db upgrade {uri}"
    if found and found not in older:
        remedy = "Use the newer MLflow that made it, or set DDPM_PIPE_HOME to another folder."
    raise StorageError(
        f"{path}: made by another version of MLflow: got schema {found or 'without a version'}, expected {newest}. {remedy}"
    )


def _schema_of(path: Path) -> str | None:
    """Return the version of a store's tables: "" if they have none, None if there are no tables or it cannot be read now."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as store:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "alembic_version" not in tables:
                return "" if tables else None
            row = store.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(row[0]) if row else ""
    except sqlite3.Error:
        return None


@cache
def _schemas() -> list[str]:
    """Return the versions of MLflow's tables, the newest one last, which no other comes after. Importing MLflow would take seconds."""
    package = find_spec("mlflow")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0], "store", "db_migrations", "versions")
    texts = [file.read_text() for file in folder.glob("*.py")]
    followed = {name for text in texts for name in re.findall(r'^down_revision\b[^"]*"(\w+)"', text, re.MULTILINE)}
    known = {name for text in texts for name in re.findall(r'^revision\b[^"]*"(\w+)"', text, re.MULTILINE)}
    return sorted(known, key=lambda name: name not in followed)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store, None for another kind."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).split("?")[0]) if uri.startswith(prefix) else None


@contextmanager
def prepare_store(uri: str) -> Iterator[None]:
    """Create the file of a SQLite store under the umask, and let one process at a time create its tables."""
    # MLflow logs each error that it raises with a traceback; the writer logs one line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_file(uri)
    if path is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); make it writable, or set DDPM_PIPE_HOME"
        ) from error
    with locked(path.parent):
        yield
