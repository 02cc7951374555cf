"""Published files: found in the downloads folder, else downloaded and checked."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StorageError

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
        DataError: it is missing and `offline`, the server cannot be reached, or the sha256 differs.
    """
    here = find(archive, downloads)
    if here is not None:
        return here
    path = downloads / archive.file
    by_hand = f"put the file from {archive.url} at {path}"
    if offline:
        raise DataError(f"{archive.file} is not in {downloads} and downloads are off: allow them, or {by_hand}")
    say(f"downloading {archive.url} ({archive.num_bytes / 1e6:.1f} MB)")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            found = _download(archive, file)
        if found != archive.sha256:
            raise DataError(
                f"{archive.url} sent another file than was published (sha256 differs): try again, or {by_hand}"
            )
        partial.replace(path)
    except urllib.error.URLError as error:
        raise DataError(
            f"{archive.url} cannot be downloaded ({_said(error)}): check the network, or {by_hand}"
        ) from None
    except TimeoutError:
        raise DataError(
            f"{archive.url} does not answer within {_TIMEOUT_S} s: check the network, or {by_hand}"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}): free space or make it writable") from None
    finally:
        partial.unlink(missing_ok=True)
        for folder in made if not path.exists() else []:
            with suppress(OSError):
                folder.rmdir()
    return path


def _said(error: urllib.error.URLError) -> str:
    return getattr(error.reason, "strerror", None) or str(error.reason)


def _download(archive: Archive, file: Any) -> str:
    """Download to `file`, at most one byte more than published; return the sha256."""
    total, left = hashlib.sha256(), archive.num_bytes + 1
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT_S) as response:
        while left > 0 and (part := _receive(response, min(2**20, left), archive.url)):
            file.write(part)
            total.update(part)
            left -= len(part)
    return total.hexdigest()


def _receive(response: Any, count: int, url: str) -> bytes:
    try:
        part: bytes = response.read(count)
    except (OSError, ValueError) as error:  # of the network, not of the disk
        raise urllib.error.URLError(str(error)) from None
    return part


def find(archive: Archive, downloads: Path) -> Path | None:
    """Return the path of the file, as published or unpacked (as torchvision leaves it); None if it is missing."""
    published = downloads / archive.file
    unpacked = downloads / archive.file.removesuffix(".gz") if not archive.file.endswith(".tar.gz") else None
    return next((path for path in (published, unpacked) if path is not None and path.is_file()), None)
