"""Small files that survive a crash at any moment: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically; NaN is allowed, as figures may be."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


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
