"""The home, the one folder of all state: `$DDPM_PIPE_HOME` or the current directory; on a cluster its profile's storage.

    <home>/mlflow.db     runs, parameters, metrics     (a bare `mlflow ui` in the folder shows them)
    <home>/mlartifacts/  pictures, scores, models
    <home>/runs/<id>/    checkpoints, log, spool
    <home>/sweeps/<id>/  ledger and report of a sweep
    <home>/datasets/     ingested datasets

Every path and address that a process works with is absolute, because Ray's workers run in another directory. Records name a place in the
home relative to it (`home:datasets/x`), a place elsewhere by its absolute path, and a place in an object store by its address.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import StorageError

IN_HOME = "home:"


def home(storage: str | None = None) -> Path:
    """Return the absolute folder that holds all state; it need not exist yet.

    `storage` is a profile's: a folder replaces `$DDPM_PIPE_HOME`; with object storage (`s3://`) there is a local home, too. Raises
    StorageError if this user has no home directory, to which MLflow, Ray and matplotlib write.
    """
    try:
        Path.home()
    except RuntimeError:
        raise StorageError(
            f"HOME: not set, and user {os.getuid()} has no passwd entry, expected a folder that can be written. Set HOME."
        ) from None
    named = storage is not None and "://" not in storage
    found = Path(storage if named and storage else os.environ.get("DDPM_PIPE_HOME") or ".").expanduser().absolute()
    wrong = "?" if "?" in str(found) else "a name that is not UTF-8" if not is_text(str(found)) else ""
    if wrong:
        raise StorageError(
            f"{found}: got {wrong}, which the address of MLflow's database cannot hold, expected a path without it. Rename the folder, "
            f"or set {'storage' if named else 'DDPM_PIPE_HOME'} to another."
        )
    return found


def is_text(name: str) -> bool:
    """Whether a name from the file system or the command line is UTF-8."""
    return name.encode(errors="replace").decode() == name


def absolute_store(uri: str) -> str:
    """Return the address of a tracking store; the path of a SQLite file is made absolute."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute().as_posix()}"


def portable(place: str, root: Path) -> str:
    """Return a place in the form of records: `home:datasets/x` in the home, so that a home can be moved; others unchanged."""
    path = Path(place)
    return (
        f"{IN_HOME}{path.relative_to(root).as_posix()}" if path.is_absolute() and path.is_relative_to(root) else place
    )


def located(place: str, root: Path) -> str:
    """Return the path or address of a place in a record: the inverse of `portable`."""
    return str(root / place.removeprefix(IN_HOME)) if place.startswith(IN_HOME) else place


def datasets_dir(root: Path) -> Path:
    return root / "datasets"


def features_dir(root: Path) -> Path:
    """Return the folder of statistics and features of real images, which all runs of a home share."""
    return datasets_dir(root) / "features"


def artifacts_dir(root: Path) -> Path:
    """Return the folder of the default tracking store's artifacts."""
    return root / "mlartifacts"


def database_path(root: Path) -> Path:
    """Return the SQLite file of the default tracking store."""
    return root / "mlflow.db"


def default_tracking_uri(root: Path) -> str:
    """Return the address of the default tracking store, absolute: `sqlite:////home/mlflow.db`."""
    return f"sqlite:///{database_path(root).absolute().as_posix()}"


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, and return it. Raises StorageError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be created ({error.strerror}); set DDPM_PIPE_HOME to a folder you can write"
        ) from error
    return folder
