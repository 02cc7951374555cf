"""Copies of remote files on this machine's disk, shared by all its processes. Each is fetched once and verified.

    <folder>/<first two of sha256>/<sha256>                    a whole, verified file; its modification time is that of its last use
    <folder>/<first two of sha256>/<sha256>.<bytes>.part       a file that is being fetched, locked by the process that fetches it

A file is named by its content, so that equal shards of several datasets, runs and users of one folder are kept once. The least recently
used are removed first. A reader holds a shared lock on its file, and locked files are not removed. The kernel frees the locks of a process
that dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.errors import DataError, StorageError
from pipeline.storage.durable import locked

PART = ".part"


class NodeCache:
    """A folder of at most `max_bytes`, or more if more are in use at one time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes

    @contextmanager
    def use(self, sha256: str, num_bytes: int, where: str, fetch: Callable[[Path], str]) -> Iterator[Path]:
        """Yield the path of the file with that content, which is not removed during the context.

        Args:
            sha256, num_bytes: of its content.
            where: the file's place, for messages.
            fetch: writes it to a path and returns the SHA-256 of what it wrote.

        Raises:
            DataError: the file was fetched twice, and has other content.
            StorageError: the folder cannot be written, or is full.
        """
        path = self._path(sha256)
        file = self._opened(path)
        while file is None:
            self._get(path, num_bytes, where, fetch)
            file = self._opened(path)
        with file:  # and with it the lock
            yield path

    def has(self, sha256: str) -> bool:
        return self._path(sha256).is_file()

    def unused(self, idle_s: float) -> dict[Path, int]:
        """Return the files that no process has opened or fetched for so many seconds, and their bytes."""
        found: dict[Path, int] = {}
        for path in self.folder.glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if time.time() - status.st_mtime > idle_s:
                    found[path] = status.st_size
        return found

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files, but for those in use."""
        for path in paths:
            _remove_unused(path)

    def discard(self, sha256: str) -> None:
        """Remove a file that is damaged on this disk."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _opened(self, path: Path) -> IO[bytes] | None:
        """Open a file with a shared lock, and record its use; None if it is not here."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            os.utime(file.fileno())
            return file
        file.close()  # removed between opening and locking
        return None

    def _get(self, path: Path, num_bytes: int, where: str, fetch: Callable[[Path], str]) -> None:
        """Fetch a file, or wait if another process fetches it."""
        part = path.with_name(f"{path.name}.{num_bytes}{PART}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, part):  # while this one waited, the other process has fetched the file, or failed
                    return
                if path.exists():
                    part.unlink()
                    return
                self._make_room()
                try:
                    if not any(fetch(part) == path.name for _ in range(2)):
                        raise DataError(
                            f"{where} is damaged (its sha256 differs from the manifest's, fetched twice): restore it or ingest again"
                        )
                    with locked(self.folder):  # a process that counts meanwhile might see it under neither name
                        part.rename(path)
                except BaseException:
                    # before the rename the name is this process's; afterwards it may be another's
                    part.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise self._unusable(error) from None

    def _make_room(self) -> None:
        """Remove the least recently used files that are not in use until the files that are being fetched fit."""
        with locked(self.folder):
            whole, coming = self._contents()
            excess = sum(size for _, size, _ in whole) + coming - self._max_bytes
            for _, size, path in sorted(whole):
                if excess <= 0:
                    return
                if _remove_unused(path):
                    excess -= size

    def _contents(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Return (time of use, size, path) of the whole files, and the bytes of those that are being fetched, this process's included."""
        whole: list[tuple[int, int, Path]] = []
        coming = 0
        for folder in self.folder.iterdir():
            for path in folder.iterdir() if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    if path.suffix != PART:
                        status = path.stat()
                        whole.append((status.st_mtime_ns, status.st_size, path))
                    elif not _remove_unused(path):  # the process that fetches it is alive
                        coming += int(path.name.split(".")[1])
        return whole, coming

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.folder}: cannot hold copies of remote shards ({error.strerror}); free space, lower cache.max_gb, or set "
            "cache.folder to a folder on a disk of this machine"
        )


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has locked it; return whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):  # not another's new file of that name
                path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
