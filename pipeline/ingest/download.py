"""Published files: found in the downloads folder, else downloaded and checked."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from pipeline.errors import DataError
from pipeline.storage.durable import storage_errors, write_atomically

_TIMEOUT_S = 30


@dataclass(frozen=True)
class Archive:
    """A published file: URL, path in the downloads folder, size and sha256."""

    url: str
    file: str
    num_bytes: int
    sha256: str


def fetch(archive: Archive, downloads: Path, offline: bool, say: Callable[[str], None]) -> Path:
    """Return the path of the file; download and check it if it is missing.

    Raises:
        DataError: it is missing and `offline`, the server cannot be reached or does not answer, or the sha256 differs.
        StorageError: the downloads folder cannot be written.
    """
    here = find(archive, downloads)
    if here is not None:
        return here
    path = downloads / archive.file
    by_hand = f"put the file from {archive.url} at {path}"
    if offline:
        raise DataError(f"{archive.file} is not in {downloads} and downloads are off: allow them, or {by_hand}")
    say(f"downloading {archive.url} ({archive.num_bytes / 1e6:.1f} MB)")
    try:
        with urllib.request.urlopen(archive.url, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read(archive.num_bytes + 1)
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise DataError(f"{archive.url} cannot be downloaded ({reason}): check the network, or {by_hand}") from None
    if hashlib.sha256(data).hexdigest() != archive.sha256:
        raise DataError(f"{archive.url} sent another file than was published (sha256 differs): try again, or {by_hand}")
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return path


def find(archive: Archive, downloads: Path) -> Path | None:
    """Return the path of the file, as published or unpacked (as torchvision leaves it); None if it is missing."""
    published = downloads / archive.file
    unpacked = downloads / archive.file.removesuffix(".gz") if not archive.file.endswith(".tar.gz") else None
    return next((path for path in (published, unpacked) if path is not None and path.is_file()), None)
