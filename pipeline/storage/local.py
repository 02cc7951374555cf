"""A folder on disk with the interface of a folder in an object store (remote.py)."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.storage.durable import storage_errors, write_flushed
from pipeline.storage.remote import StoredObject


class LocalFolder:
    """Files below `path`, by names with slashes. Raises StorageError if one cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> LocalFolder:
        """Return a folder below this one."""
        return LocalFolder(self.path / name)

    def objects(self, below: str = "") -> list[StoredObject]:
        """Return the files below this folder, or below a name in it, sorted by name."""
        found = []
        for path in (self.path / below).rglob("*"):
            with suppress(FileNotFoundError):  # removed since the listing
                if path.is_file():
                    found.append(StoredObject(path.relative_to(self.path).as_posix(), path.stat().st_size))
        return sorted(found, key=lambda entry: entry.name)

    def folders(self) -> list[str]:
        """Return the names of the folders directly below this one."""
        return sorted(path.name for path in self.path.iterdir() if path.is_dir()) if self.path.is_dir() else []

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.path / name}: cannot be read ({error.strerror})") from None

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file, flushed to the disk."""
        with storage_errors(self.path / name):
            write_flushed(self.path / name, content)

    def delete(self, name: str) -> None:
        """Remove a file, if there is one."""
        with storage_errors(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def delete_all(self, below: str) -> None:
        """Remove a folder below this one, as far as possible."""
        shutil.rmtree(self.path / below, ignore_errors=True)
