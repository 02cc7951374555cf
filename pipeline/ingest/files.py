"""Find the files of a path, folder, glob or URI, local or in an object store, through pyarrow's filesystems and fsspec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.data.shards_format import reason_of
from pipeline.errors import DataError
from pipeline.ingest.layout import is_litter

_PYARROW_SCHEMES = {"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"}
_WILDCARD = re.compile(r"[*\[]")


@dataclass(frozen=True)
class StoredFile:
    """One file of a source.

    Attributes:
        filesystem: the pyarrow filesystem that opens `path`.
        path: path in that filesystem.
        name: path relative to the source, which may name a split.
        num_bytes: size.
        modified: changes with the file; used instead of a hash for remote files.
    """

    filesystem: Any
    path: str
    name: str
    num_bytes: int
    modified: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)


def find_files(source: str, suffix: str) -> list[StoredFile]:
    """Return the files of `source`, sorted by path: one file, those below a folder that end in `suffix`, or the matches of a glob.

    As in a shell, `*` stays within one folder and `**` crosses folders. In folders, names that begin with a dot or an underscore, and
    files that operating systems create, are skipped.

    Raises:
        DataError: there is no such file, or the place cannot be listed.
    """
    shown = without_credentials(source)
    base, pattern = _cut_at_wildcard(source)
    try:
        filesystem, root = _filesystem(base)
        infos = _list(filesystem, root, recursive=pattern is not None)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise DataError(
            f"{shown} cannot be listed ({reason_of(error)}): check its name and your access to it"
        ) from None
    if infos is None:
        raise DataError(f"{shown} does not exist: check its name")
    files = []
    for info in sorted(infos, key=lambda info: info.path):
        name = info.path.removeprefix(root).lstrip("/") or info.base_name
        chosen = _in_glob(name, pattern) if pattern is not None else info.path == root or _in_folder(name, suffix)
        if info.type == fs.FileType.File and chosen:
            files.append(StoredFile(filesystem, info.path, name, info.size or 0, f"{info.size} {info.mtime_ns}"))
    if not files:
        raise DataError(f"{shown} has no {suffix} file: give a file, a folder of them, or a glob")
    return files


def without_credentials(uri: str) -> str:
    """Return a URI without user, password and query, which may contain secrets; a path is returned unchanged."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _cut_at_wildcard(source: str) -> tuple[str, str | None]:
    """Return the folder before the first wildcard, and the pattern below it; (source, None) without a wildcard."""
    path, mark, query = source.partition("?") if "://" in source else (source, "", "")
    match = _WILDCARD.search(path)
    if match is None or ("://" not in source and Path(source).exists()):
        return source, None
    folder, _, first = path[: match.start()].rpartition("/")
    return (folder or ("/" if path.startswith("/") else ".")) + mark + query, first + path[match.start() :]


def _filesystem(source: str) -> tuple[Any, str]:
    scheme = urlsplit(source).scheme if "://" in source else ""
    if not scheme:
        return fs.LocalFileSystem(), str(Path(source).absolute())
    filesystem, path = fs.FileSystem.from_uri(source if scheme in _PYARROW_SCHEMES else f"fsspec+{source}")
    return filesystem, path.rstrip("/")


def _list(filesystem: Any, root: str, recursive: bool) -> list[Any] | None:
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        return None
    if info.type == fs.FileType.Directory:
        found: list[Any] = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        return found
    return [] if recursive else [info]


def _in_folder(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not any(part.startswith("_") or is_litter(part) for part in name.split("/"))


def _in_glob(name: str, pattern: str) -> bool:
    if "**" in pattern:
        return fnmatchcase(name, pattern.replace("**/", "*"))
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
