"""Datasets in an object store: written there shard by shard, the manifest last, so that a dataset is there as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.manifest import MANIFEST_FILE
from pipeline.errors import DataError, RunLockedError, StorageError
from pipeline.storage.remote import RemoteFolder
from pipeline.storage.remote_lease import Lease
from pipeline.storage.remote_run import own_folder

_LEASE = "lease"
_LOOK_EVERY_S = 1.0


def has_dataset(folder: RemoteFolder) -> bool:
    """Whether a folder of a store was written by ingest; DataError where the store does not answer."""
    try:
        return folder.stat(MANIFEST_FILE) is not None
    except StorageError as error:
        raise DataError(str(error)) from None


def is_empty(folder: RemoteFolder) -> bool:
    """Whether nothing is in a folder of a store, but for who is about to write it."""
    return all(entry.name.startswith(f"{_LEASE}/") for entry in folder.objects())


@contextmanager
def sole_remote_writer(dest: RemoteFolder, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the right to write `dest`; where another process has it, say so and wait, or refuse (RunLockedError).

    Raises:
        StorageError: the store refuses.
    """
    told = False
    while True:
        lease = Lease(dest.child(_LEASE), f"dataset {dest}")
        try:
            with lease.hold():
                yield
            return
        except RunLockedError:
            if waiting is None or lease.was_held:
                raise
        if not told:
            waiting()
            told = True
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def new_remote_folder(dest: RemoteFolder) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Give a folder here to fill, and what to call with each shard in it that is done: it is sent and removed here.

    The manifest is sent when the block ends. Nothing is left, here or there, when it raises.
    """
    folder = Path(tempfile.mkdtemp(dir=own_folder("ingest")))

    def send(shard: Path) -> None:
        dest.upload(shard.name, shard)
        shard.unlink()

    try:
        for entry in dest.objects():  # of a process that was killed
            if not entry.name.startswith(f"{_LEASE}/"):
                dest.delete(entry.name)
        yield folder, send
        dest.write(MANIFEST_FILE, (folder / MANIFEST_FILE).read_bytes())
    except BaseException:
        for entry in dest.objects():
            if not entry.name.startswith(f"{_LEASE}/"):
                dest.delete(entry.name)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
