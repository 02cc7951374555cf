"""Files that survive a crash at any moment, locks between processes, and one-line errors for places that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a write fails with one of these if the disk is full


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically; NaN is allowed, because metrics may be NaN."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def checked_line(content: dict[str, Any]) -> bytes:
    """Return a line of JSON that ends with its own checksum, for files that grow line by line."""
    return json.dumps({**content, "crc32": _crc(content)}).encode() + b"\n"


def read_line(line: bytes) -> dict[str, Any]:
    """Return what `checked_line` was given; ValueError if the line is damaged."""
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(content, dict) or content.pop("crc32", None) != _crc(content):
        raise ValueError("its checksum differs")
    return content


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file. A reader, or a crash, sees the old content or the new one, which is on disk when this returns.

    Raises StorageError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with storage_errors(path):  # measures the free space before the temporary file is removed
            write_flushed(temporary, content)
            temporary.replace(path)
            flush_folder(path.parent)
    except StorageError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one thread of one process at a time into the context, for work of a short time. StorageError if the folder cannot be opened."""
    with storage_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn the operating system's errors about a place that is written into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        raise storage_error(place, error) from None


def storage_error(place: Path, error: OSError) -> StorageError:
    """Return the error for a place that cannot be written."""
    if error.errno not in FULL:
        return StorageError(
            f"{place}: cannot be written ({error.strerror}); make the folder writable or choose another"
        )
    there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    figures = os.statvfs(there)
    no_inodes = figures.f_files > 0 and figures.f_favail == 0
    left = "no inodes" if no_inodes else f"{shutil.disk_usage(there).free / 1e6:.1f} MB"
    return StorageError(
        f"storage full: {left} left at {place}; {'remove some files' if no_inodes else 'free some space'}"
    )


def fault_of_storage(error: OSError) -> StorageError | None:
    """Return the StorageError for an OSError that says that a disk is full or read-only; None for any other OSError."""
    if error.errno not in {*FULL, errno.EROFS}:
        return None
    if error.filename is None:
        return StorageError(f"a file cannot be written ({error.strerror}); free some space")
    return storage_error(Path(os.fsdecode(error.filename)), error)
