"""A home that was moved or copied: MLflow keeps absolute addresses of the artifacts in it, which are corrected here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import StorageError
from pipeline.storage.home import artifacts_dir, database_path, default_tracking_uri
from pipeline.storage.next_command import typeable

COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def require_unmoved(uri: str, home: Path) -> None:
    """Refuse a home whose database names another home's artifacts: what is recorded would go there (StorageError)."""
    old = next(iter(_others(home)), None) if uri == default_tracking_uri(home) else None
    if old is not None:
        raise StorageError(
            f"{home}: was moved or copied, and MLflow still looks for its artifacts in {old}. Correct that with: "
            f"{typeable('sync --moved')}"
        )


def correct_places(home: Path) -> int:
    """Let MLflow's database name the artifacts of this home instead of the one that it was; return how many places changed."""
    new, changed = artifacts_dir(home).as_uri() + "/", 0
    for other in _others(home):
        old = other.as_uri() + "/"
        with _database(home, "rw") as store, store:
            for table, column in COLUMNS:
                found = store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )
                changed += found.rowcount
    return changed


def _others(home: Path) -> list[Path]:
    """Return the folders of artifacts, of other homes, that experiments in this home's database name."""
    mine = artifacts_dir(home)
    try:
        with _database(home, "ro") as store:
            rows = store.execute("SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file:///%'")
            folders = {Path(unquote(urlsplit(place).path)).parent for (place,) in rows}
    except sqlite3.Error:  # there is none yet, or another process is making its tables
        return []
    return sorted(folder for folder in folders if folder.name == mine.name and not _is_same(folder, mine))


def _is_same(folder: Path, other: Path) -> bool:
    return folder == other or (folder.exists() and other.exists() and folder.samefile(other))


@contextmanager
def _database(home: Path, mode: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{database_path(home).as_uri()}?mode={mode}", uri=True, timeout=20)) as store:
        yield store
