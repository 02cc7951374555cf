"""Checkpoints in an object store: under the names they have on disk, the manifest sent last by one request.

A checkpoint is saved on disk first (checkpoint.py), then sent. Until its manifest is there no reader sees it. Readers bring a
checkpoint to their disk and verify every byte; one that misses a part, or differs, is marked as damaged and passed over for the one
before it, by every later reader too.
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
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint import MANIFEST, STATE, Checkpoint, Found
from pipeline.storage.remote import RemoteFolder

DAMAGED = "DAMAGED.json"
_AT_ONCE = 4
_FORGOTTEN_S = 24 * 3600


class RemoteCheckpoints:
    """The checkpoints of a run in `folder`, whose copies on this machine are in `local`."""

    def __init__(self, folder: RemoteFolder, local: Path) -> None:
        self._folder, self._local = folder, local

    def committed(self) -> list[Checkpoint]:
        """Return the committed checkpoints that are not known to be damaged, newest first; their files need not be here."""
        return [checkpoint for checkpoint, _ in self._committed(self._sizes())]

    def uri_of(self, checkpoint: Checkpoint) -> str:
        """Return the address of a checkpoint."""
        return self._folder.child(checkpoint.folder.name).uri

    def state_of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the JSON state of a checkpoint as it is in the store."""
        content = self._folder.child(checkpoint.folder.name).read(STATE)
        if content is None:
            raise CheckpointError(f"checkpoint {checkpoint.folder.name}: {STATE} is missing in {self._folder}")
        state: dict[str, Any] = json.loads(content)
        return state

    def push(self, checkpoint: Checkpoint, may_commit: Callable[[], bool]) -> None:
        """Send a checkpoint that is committed on disk, and commit it in the store.

        `may_commit` is asked right before and right after: a writer that a later attempt has replaced does not commit, or takes it
        back (CheckpointError). StorageError where the store refuses; what was there before is untouched.
        """
        there = self._folder.child(checkpoint.folder.name)
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
        """Bring the newest checkpoint that verifies to this machine; what is here and not in the store is removed."""
        found, sizes = Found(None), self._sizes()
        committed = self._committed(sizes)
        for checkpoint, files in committed:
            try:
                found.checkpoint = self.fetch(checkpoint, files)
                break
            except CheckpointError as error:
                if isinstance(error, checkpoints.NewerFormatError):
                    raise
                found.warnings.append(f"{error}; an older checkpoint is used")
                self._mark_damaged(checkpoint, str(error))
        kept = {checkpoint.folder for checkpoint, _ in committed}
        for checkpoint in checkpoints.committed(self._local):
            if checkpoint.folder not in kept:
                shutil.rmtree(checkpoint.folder, ignore_errors=True)
        return found

    def fetch(self, checkpoint: Checkpoint, files: dict[str, int] | None = None) -> Checkpoint:
        """Bring a committed checkpoint to this machine, verified; CheckpointError where it is damaged in the store.

        A damaged copy is fetched once more before that is believed. `files` are the sizes in the store, where known.
        """
        there = self._folder.child(checkpoint.folder.name)
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
        """Remove all but the newest `keep` checkpoints, once the newest has all its parts; and what older attempts left unfinished."""
        sizes = self._sizes()
        committed = self._committed(sizes)
        if not committed:
            return
        newest, files = committed[0]
        try:
            self._require_all(newest, newest, files)
        except (CheckpointError, OSError):  # or its copy is not here to compare with
            return
        kept = {checkpoint.folder.name for checkpoint, _ in committed[:keep]}
        for name, files in sizes.items():
            match = checkpoints.NAME.fullmatch(name)
            unfinished = MANIFEST not in files and match is not None and int(match[2]) >= newest.attempt
            if match is None or name in kept or unfinished:
                continue
            self._folder.delete(f"{name}/{MANIFEST}")  # without it, it is no checkpoint any more, whatever happens next
            self._folder.delete_all(name)

    # -- inner

    def _sizes(self) -> dict[str, dict[str, int]]:
        """Return the objects of every checkpoint with their sizes."""
        sizes: dict[str, dict[str, int]] = {}
        for entry in self._folder.objects():
            name, _, file = entry.name.partition("/")
            sizes.setdefault(name, {})[file] = entry.num_bytes
        return sizes

    def _committed(self, sizes: dict[str, dict[str, int]]) -> list[tuple[Checkpoint, dict[str, int]]]:
        found = []
        for name, files in sizes.items():
            match = checkpoints.NAME.fullmatch(name)
            if match and MANIFEST in files and DAMAGED not in files:
                found.append((Checkpoint(self._local / name, int(match[1]), int(match[2])), files))
        return sorted(found, key=lambda item: (item[0].step, item[0].attempt), reverse=True)

    def _mark_damaged(self, checkpoint: Checkpoint, reason: str) -> None:
        self._folder.write(f"{checkpoint.folder.name}/{DAMAGED}", json.dumps({"reason": reason}).encode())

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
            folder.mkdir(parents=True)
            yield Checkpoint(folder, checkpoint.step, checkpoint.attempt)
        except OSError as error:
            raise StorageError(
                f"{self._local}: cannot be written ({error.strerror}); free space or make it writable"
            ) from None
        finally:
            shutil.rmtree(outer, ignore_errors=True)
