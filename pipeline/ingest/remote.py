"""Write datasets to an object store: shard by shard, with the manifest last, so that a dataset is complete or absent."""

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
    """Whether a folder of a store is a dataset; DataError if the store does not answer."""
    try:
        return folder.read(MANIFEST_FILE) is not None
    except StorageError as error:
        raise DataError(str(error)) from None


def contents(folder: RemoteFolder) -> list[str]:
    """Return the names of the objects in a folder of a store, except for its lease."""
    return [entry.name for entry in folder.objects() if not entry.name.startswith(f"{_LEASE}/")]


@contextmanager
def sole_remote_writer(dest: RemoteFolder, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lease on `dest`. If another process holds it, call `waiting` and wait; without `waiting`, raise RunLockedError.

    Raises:
        StorageError: the store refuses.
    """
    announced = False
    while True:
        lease = Lease(dest.child(_LEASE), f"dataset {dest}")
        try:
            with lease.hold():
                yield
            return
        except RunLockedError:
            if waiting is None or lease.was_held:
                raise
        if not announced:
            waiting()
            announced = True
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def new_remote_folder(dest: RemoteFolder) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield a local folder to fill and a function that uploads a finished shard and removes it locally.

    The manifest is uploaded when the block ends. If it raises, everything is removed, locally and in the store.
    """
    folder = Path(tempfile.mkdtemp(dir=own_folder("ingest")))

    def send(shard: Path) -> None:
        dest.upload(shard.name, shard)
        shard.unlink()

    try:
        for name in contents(dest):  # left by a killed process
            dest.delete(name)
        yield folder, send
        dest.write(MANIFEST_FILE, (folder / MANIFEST_FILE).read_bytes())
    except BaseException:
        for name in contents(dest):
            dest.delete(name)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
