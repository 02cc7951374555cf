"""What each node does for `ddpm-pipe doctor`: it reports its facts, writes and reads the storage, and reads a dataset.

Each function runs in a process of the cluster and returns errors as values, which `verdicts` judges.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.config.cluster_profile import Cache
from pipeline.doctor.verdicts import NodeFacts, Reading
from pipeline.errors import PipelineError
from pipeline.storage.local import LocalFolder
from pipeline.storage.remote import RemoteFolder, is_remote

TEST_BYTES = 8_000_000


def facts(name: str) -> NodeFacts:
    """Return this node's facts, without a look at any storage, which may hang."""
    from pipeline.storage.provenance import code_version, library_versions

    versions = library_versions() | {"ddpm-pipe": code_version()}
    return NodeFacts(name, versions, psutil.virtual_memory().available, os.getloadavg()[0] / (os.cpu_count() or 1))


def free_bytes(places: tuple[str, ...]) -> dict[str, int]:
    """Return the free space of folders, and of the one for temporary files."""
    folders = {tempfile.gettempdir(), *places}
    return {folder: shutil.disk_usage(existing(Path(folder))).free for folder in folders}


def clock() -> float:
    return time.time()


@dataclass(frozen=True)
class WriteTest:
    """The result of writing or reading on one node: the problem ("" if none), the SHA-256 of the content, the seconds."""

    problem: str = ""
    digest: str = ""
    seconds: float = 0.0


def write_test(place: str, name: str, *, make_folder: bool = False) -> WriteTest:
    """Write a file of random bytes called `name` to the storage; one process makes its folder, which the others must see."""
    content = os.urandom(TEST_BYTES)
    begin = time.perf_counter()
    try:
        if not is_remote(place):
            folder = (Path(place) / name).parent
            if make_folder:
                folder.mkdir(parents=True, exist_ok=True)
            else:
                _require_there(Path(place))
                _require_there(folder)
        store = _store(place)
        store.write(name, content)
        if isinstance(store, RemoteFolder) and store.create(name, content):
            return WriteTest(
                "the store ignores conditional writes (If-None-Match), so that two processes could work on one run; "
                "use a store, or a release of it, that honours them"
            )
    except (OSError, PipelineError) as error:
        return WriteTest(_message(error))
    return WriteTest("", hashlib.sha256(content).hexdigest(), time.perf_counter() - begin)


def _require_there(folder: Path) -> None:
    """Raise FileNotFoundError unless the folder exists. Tries to make it, since a network file system may answer a look from its cache."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    folder.rmdir()
    raise FileNotFoundError(errno.ENOENT, "the folder that another machine made is not there")


def read_tests(place: str, written: Mapping[str, str]) -> WriteTest:
    """Read what others wrote (SHA-256 by name)."""
    begin = time.perf_counter()
    for name, digest in written.items():
        try:
            content = _store(place).read(name)
        except (OSError, PipelineError) as error:
            return WriteTest(_message(error))
        if content is None:
            return WriteTest(f"what another machine wrote ({name}) is not there")
        if hashlib.sha256(content).hexdigest() != digest:
            return WriteTest(f"what another machine wrote ({name}) is read back differently")
    return WriteTest(seconds=time.perf_counter() - begin)


def remove_tests(place: str, folder: str) -> None:
    with contextlib.suppress(OSError, PipelineError):
        _store(place).delete_all(folder)


def read_dataset(location: str, cache: Cache, part: int, num_parts: int, seconds: float) -> Reading:
    """Read a part of the dataset's row groups, with all checks, for `seconds` at most; at least one row group."""
    from pipeline.data.shards import Dataset

    try:
        dataset = Dataset.open(location, cache)
        groups = dataset.manifest.row_groups
        starts = [sum(groups[:i]) for i in range(len(groups))]
        begin, images = time.perf_counter(), 0
        # of more nodes than row groups, several read the same one
        for start, rows in list(zip(starts, groups, strict=True))[part % len(groups) :: num_parts]:
            dataset.read(range(start, start + rows))
            images += rows
            if time.perf_counter() - begin > seconds:
                break
    except (OSError, PipelineError) as error:
        return Reading(problem=_message(error))
    return Reading(len(dataset), images, time.perf_counter() - begin)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _store(place: str) -> RemoteFolder | LocalFolder:
    return RemoteFolder(place) if is_remote(place) else LocalFolder(Path(place))


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}".strip()
    return str(error)
