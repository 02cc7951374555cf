"""Where state lives: one folder, `$DDPM_PIPE_HOME` or the current directory, as MLflow itself does; on a cluster its profile's storage.

    <home>/mlflow.db     runs, parameters, metrics     (a bare `mlflow ui` in the folder shows them)
    <home>/mlartifacts/  pictures, scores, models
    <home>/runs/<id>/    checkpoints, log, spool
    <home>/sweeps/<id>/  ledger and report of a sweep
    <home>/datasets/     ingested datasets

Every path and address is absolute: Ray's workers run in another directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import StorageError


def home(storage: str | None = None) -> Path:
    """Return the absolute folder that holds all state; it need not exist yet.

    `storage` is a profile's: where it is a folder it takes the place of `$DDPM_PIPE_HOME`; object storage (`s3://`) keeps a local
    home beside it. StorageError where this user has no home directory, which MLflow, Ray and matplotlib write to.
    """
    try:
        Path.home()
    except RuntimeError:
        raise StorageError(
            f"HOME: not set, and user {os.getuid()} has no passwd entry, expected a folder that can be written. Set HOME."
        ) from None
    if storage is not None and "://" not in storage:
        return Path(storage)
    return Path(os.environ.get("DDPM_PIPE_HOME") or ".").expanduser().absolute()


def runs_dir(root: Path) -> Path:
    """Return the folder of run folders."""
    return root / "runs"


def datasets_dir(root: Path) -> Path:
    """Return the folder of ingested datasets."""
    return root / "datasets"


def features_dir(root: Path) -> Path:
    """Return the folder of what is known of real images: it serves all runs of a home."""
    return datasets_dir(root) / "features"


def artifacts_dir(root: Path) -> Path:
    """Return the folder of the artifacts that go with the default tracking store."""
    return root / "mlartifacts"


def database_path(root: Path) -> Path:
    """Return the SQLite file of the default tracking store."""
    return root / "mlflow.db"


def default_tracking_uri(root: Path) -> str:
    """Return the address of the default tracking store, absolute: `sqlite:////home/mlflow.db`."""
    return f"sqlite:///{database_path(root).absolute().as_posix()}"


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, and return it; StorageError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be created ({error.strerror}); set DDPM_PIPE_HOME to a folder you can write"
        ) from error
    return folder
