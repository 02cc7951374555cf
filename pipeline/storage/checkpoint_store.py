"""The checkpoints of one folder: on disk alone, or in an object store with this machine's copies on disk.

A checkpoint is saved on disk first (checkpoint.py), then sent to the store, if there is one, under the names that it has on disk, its
manifest last, by one request. Until its manifest is there, no reader sees it. Readers bring a checkpoint to their disk and verify every
byte. One that misses a part, or differs, is skipped for the one before it; in a store it is also marked as damaged, for later readers.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage.checkpoint import MANIFEST, NAME, STATE, Checkpoint, Found, NewerFormatError
from pipeline.storage.durable import storage_errors
from pipeline.storage.local import LocalFolder
from pipeline.storage.remote import RemoteFolder

DAMAGED = "DAMAGED.json"
_AT_ONCE = 4
_FORGOTTEN_S = 24 * 3600


class CheckpointStore:
    """The checkpoints in the folder `local`, which holds copies if `remote` is given: then they last there."""

    def __init__(self, local: Path, remote: RemoteFolder | None = None) -> None:
        self._local, self._remote = local, remote
        self._folder: RemoteFolder | LocalFolder = remote or LocalFolder(local)

    def committed(self) -> list[Checkpoint]:
        """Return the committed checkpoints that are not known to be damaged, newest first; their files need not be here."""
        return [checkpoint for checkpoint, _ in self._committed(self._sizes())]

    def name_of(self, checkpoint: Checkpoint) -> str:
        """Return the path or address of a checkpoint, as `checkpoint_at` takes it."""
        there = self._folder.child(checkpoint.folder.name)
        return there.uri if isinstance(there, RemoteFolder) else str(there)

    def newest_state(self) -> dict[str, Any]:
        """Return the JSON state of the newest committed checkpoint, without reading its tensors; {} before the first."""
        for checkpoint in self.committed()[:1]:
            content = self._folder.read(f"{checkpoint.folder.name}/{STATE}")
            try:
                state: dict[str, Any] = json.loads(content or b"")
            except ValueError:
                raise CheckpointError(
                    f"checkpoint {checkpoint.folder.name}: {STATE} is missing or damaged in {self._folder}"
                ) from None
            return state
        return {}

    def commit(self, checkpoint: Checkpoint, may_commit: Callable[[], bool], keep: int) -> None:
        """Make a checkpoint that is committed on disk the newest one, and remove all but the newest `keep`."""
        if self._remote is not None:
            self.push(checkpoint, may_commit)
        self.prune(keep)
        if self._remote is not None:
            CheckpointStore(self._local).prune(keep)

    def push(self, checkpoint: Checkpoint, may_commit: Callable[[], bool]) -> None:
        """Send a checkpoint that is committed on disk, and commit it in the store.

        `may_commit` is asked right before and right after: a writer that a later attempt has replaced does not commit, or takes it
        back (CheckpointError). StorageError where the store refuses; what was there before is untouched.
        """
        assert self._remote is not None
        there = self._remote.child(checkpoint.folder.name)
        manifest = checkpoint.manifest()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sums = pool.map(lambda name: (name, there.upload(name, checkpoint.folder / name)), manifest["files"])
            for name, sha256 in sums:
                if sha256 != manifest["files"][name]["sha256"]:
                    raise StorageError(
                        f"{checkpoint.folder / name}: changed on this disk after it was written; check the disk"
                    )
        if may_commit():
            there.write(MANIFEST, (checkpoint.folder / MANIFEST).read_bytes())
            if may_commit():
                return
            there.delete(MANIFEST)
        raise CheckpointError(
            f"attempt {checkpoint.attempt} was replaced by a later one while it sent step {checkpoint.step}; nothing was committed"
        )

    def newest_verified(self) -> Found:
        """Bring the newest checkpoint that verifies to this machine, and remove copies of what is not in the store any more.

        Raises:
            NewerFormatError: a newer one is in a later format.
        """
        found = Found(None)
        committed = self._committed(self._sizes())
        for checkpoint, files in committed:
            try:
                found.checkpoint = self.verified(checkpoint, files)
                break
            except NewerFormatError:
                raise
            except CheckpointError as error:
                found.warnings.append(f"{error}; an older checkpoint is used")
                if self._remote is not None:
                    reason = json.dumps({"reason": str(error)}).encode()
                    self._remote.write(f"{checkpoint.folder.name}/{DAMAGED}", reason)
        if self._remote is not None:
            kept = {checkpoint.folder for checkpoint, _ in committed}
            for copy in CheckpointStore(self._local).committed():
                if copy.folder not in kept:
                    shutil.rmtree(copy.folder, ignore_errors=True)
        return found

    def verified(self, checkpoint: Checkpoint, files: dict[str, int] | None = None) -> Checkpoint:
        """Bring one of `committed` to this machine, every byte verified; CheckpointError if it is damaged.

        A damaged copy is fetched once more before that is believed. `files` are the sizes in the store, where known.
        """
        if self._remote is None:
            checkpoint.verify()
            return checkpoint
        there = self._remote.child(checkpoint.folder.name)
        committed = there.read(MANIFEST)
        if committed is None:
            raise CheckpointError(f"checkpoint {checkpoint.folder.name}: is not in {self._folder} any more")
        if self._is_here(checkpoint, committed):
            return checkpoint
        for last in (False, True):
            with self._partial(checkpoint) as partial:
                (partial.folder / MANIFEST).write_bytes(committed)
                self._require_all(checkpoint, partial, files)
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(
                        pool.map(lambda name: there.download(name, partial.folder / name), partial.manifest()["files"])
                    )
                try:
                    partial.verify()
                except CheckpointError:
                    if last:
                        raise
                    continue
                shutil.rmtree(checkpoint.folder, ignore_errors=True)
                partial.folder.rename(checkpoint.folder)
                return checkpoint
        raise AssertionError("the last try returns or raises")

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints, once the newest is whole; and what older attempts left unfinished."""
        sizes = self._sizes()
        committed = self._committed(sizes)
        if not committed:
            return
        newest, files = committed[0]
        try:
            if self._remote is None:
                newest.verify()
            else:  # sent from here, with the right bytes
                self._require_all(newest, newest, files)
        except CheckpointError:
            return
        kept = {checkpoint.folder.name for checkpoint, _ in committed[:keep]}
        for name, files in sizes.items():
            match = NAME.fullmatch(name)
            unfinished = MANIFEST not in files and match is not None and int(match[2]) >= newest.attempt
            if match is None or name in kept or unfinished:
                continue
            self._folder.delete(f"{name}/{MANIFEST}")  # without it, it is no checkpoint any more, whatever happens next
            self._folder.delete_all(name)

    # -- inner

    def _sizes(self) -> dict[str, dict[str, int]]:
        """Return the objects of every checkpoint with their sizes."""
        sizes: dict[str, dict[str, int]] = {} if self._remote else {name: {} for name in self._folder.folders()}
        for entry in self._folder.objects():
            name, _, file = entry.name.partition("/")
            if file:
                sizes.setdefault(name, {})[file] = entry.num_bytes
        return sizes

    def _committed(self, sizes: dict[str, dict[str, int]]) -> list[tuple[Checkpoint, dict[str, int]]]:
        found = []
        for name, files in sizes.items():
            match = NAME.fullmatch(name)
            if match and MANIFEST in files and DAMAGED not in files:
                found.append((Checkpoint(self._local / name, int(match[1]), int(match[2])), files))
        return sorted(found, key=lambda item: (item[0].step, item[0].attempt), reverse=True)

    def _is_here(self, checkpoint: Checkpoint, committed: bytes) -> bool:
        try:
            if (checkpoint.folder / MANIFEST).read_bytes() != committed:
                return False
            checkpoint.verify()
        except (OSError, CheckpointError):
            return False
        return True

    @staticmethod
    def _require_all(checkpoint: Checkpoint, here: Checkpoint, files: dict[str, int] | None) -> None:
        """Refuse what misses a part in the store, or has one of another size, before anything is fetched (CheckpointError)."""
        if files is None:
            return
        for name, entry in here.manifest()["files"].items():
            size = files.get(name)
            if size != entry["bytes"]:
                has = "is missing" if size is None else f"has {size} bytes"
                raise CheckpointError(
                    f"checkpoint {checkpoint.folder.name}: {name} {has} in the store, {entry['bytes']} bytes were committed"
                )

    @contextmanager
    def _partial(self, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
        """Make a folder to fetch into, which no reader takes for a checkpoint, and which is gone afterwards."""
        for old in self._local.glob(".partial-*"):  # of processes that were killed
            if time.time() - old.stat().st_mtime > _FORGOTTEN_S:
                shutil.rmtree(old, ignore_errors=True)
        outer = self._local / f".partial-{os.getpid()}-{threading.get_ident()}"
        folder = outer / checkpoint.folder.name
        try:
            with storage_errors(self._local):
                folder.mkdir(parents=True)
                yield Checkpoint(folder, checkpoint.step, checkpoint.attempt)
        finally:
            shutil.rmtree(outer, ignore_errors=True)
