"""What an MLflow store has of a run that is to be removed: its entry, its artifacts and its models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import TrackingError
from pipeline.redaction import one_line, public_uri
from pipeline.storage.durable import storage_errors
from pipeline.tracking.run import get_run, prepare_store
from pipeline.tracking.tracker import TrackingSettings
from pipeline.tracking.writer import prepare_environment


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run: `versions` of registered models that are its model, its logged `models`, `folders` of artifacts on this machine."""

    settings: TrackingSettings
    run_id: str
    is_deleted: bool
    versions: tuple[str, ...]
    models: tuple[str, ...]
    folders: tuple[Path, ...]

    def remove(self) -> None:
        """Delete the run and its models in MLflow, and its artifacts on this machine. A second call changes nothing."""
        with _client(self.settings) as client:
            for model in self.models:
                client.delete_logged_model(model)
            for folder in self.folders:
                with storage_errors(folder):
                    shutil.rmtree(folder)
            if not self.is_deleted:
                client.delete_run(self.run_id)


def tracked_run(settings: TrackingSettings, run_id: str | None) -> TrackedRun | None:
    """Return what the store has of an MLflow run; None if it has none of that id. Raises TrackingError if the store does not answer."""
    if run_id is None:
        return None
    with _client(settings) as client:
        run = get_run(client, run_id)
        if run is None:
            return None
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    places = [(run_id, run.info.artifact_uri), *((model.model_id, model.artifact_location) for model in models)]
    return TrackedRun(
        settings,
        run_id,
        run.info.lifecycle_stage == "deleted",
        tuple(f"version {version.version} of {version.name}" for version in versions),
        tuple(model.model_id for model in models),
        tuple(folder for name, uri in places if (folder := _own_folder(name, uri)) is not None),
    )


def _own_folder(name: str, uri: str) -> Path | None:
    """Return the folder `<name>/` on this machine that holds `<name>/artifacts`; None if the artifacts are elsewhere."""
    parts = urlsplit(uri)
    folder = Path(unquote(parts.path)).parent
    return folder if parts.scheme in ("", "file") and folder.name == name and folder.is_dir() else None


@contextmanager
def _client(settings: TrackingSettings) -> Iterator[Any]:
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with prepare_store(settings.uri):
            client = MlflowClient(settings.uri, settings.uri)
        yield client
    except (MlflowException, SQLAlchemyError) as error:
        raise TrackingError(
            f"tracking: {public_uri(settings.uri)} cannot be used ({one_line(error)}), and it may have a registered model of the run. "
            "Try again when it answers, or name a profile with another address by --cluster."
        ) from error
