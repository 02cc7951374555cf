"""Small files that survive a crash at any moment, written beside, flushed to disk, then renamed into place; and what a full disk says."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a disk says that takes no more


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically; NaN is allowed, as figures may be."""
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
    """Replace a file; a reader, or a crash, sees the old content or the new one, which is on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); free space or make the folder writable"
        ) from error


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn what the operating system says about a place that is written into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        raise storage_error(place, error) from None


def storage_error(place: Path, error: OSError) -> StorageError:
    """Return what to tell a user of a place that could not be written."""
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
    """Return what to tell a user where a disk was full or read-only at a place that nobody looked at; None where it was neither."""
    if error.errno not in {*FULL, errno.EROFS}:
        return None
    if error.filename is None:
        return StorageError(f"a file cannot be written ({error.strerror}); free some space")
    return storage_error(Path(os.fsdecode(error.filename)), error)
