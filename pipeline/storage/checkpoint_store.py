"""The checkpoints of one folder: on disk alone, or in an object store with this machine's copies on disk.

A checkpoint is saved on disk first (checkpoint.py), then sent to the store, if there is one, under the names that it has on disk, its
manifest last, by one request. Until its manifest is there, no reader sees it. Readers bring a checkpoint to their disk and verify every
byte. They skip a checkpoint that lacks a part or differs, and use the one before it; in a store they also mark it as damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage.checkpoint import MANIFEST, NAME, STATE, Checkpoint, Found, NewerFormatError, parse_manifest
from pipeline.storage.durable import locked, storage_errors, write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.local import LocalFolder
from pipeline.storage.remote import NotThereError, RemoteFolder

DAMAGED = "DAMAGED.json"
_AT_ONCE = 4


class CheckpointStore:
    """The checkpoints in the folder `local`. If `remote` is given, they are kept there, and `local` holds copies."""

    def __init__(self, local: Path, remote: RemoteFolder | None = None) -> None:
        self._local, self._remote = local, remote
        self._folder: RemoteFolder | LocalFolder = remote or LocalFolder(local)

    def committed(self) -> list[Checkpoint]:
        """Return the committed checkpoints that are not marked as damaged, newest first; their files may be in the store alone."""
        return _committed(self._local, self._sizes())

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

    def commit(
        self, checkpoint: Checkpoint, may_commit: Callable[[], bool], keep: int, pinned: Collection[str] = ()
    ) -> None:
        """Send a checkpoint that is committed on disk to the store, if there is one, and remove others as `prune` does."""
        if self._remote is not None:
            self.push(checkpoint, may_commit)
        self.prune(keep, pinned)
        if self._remote is not None:
            CheckpointStore(self._local).prune(keep, pinned)

    def push(self, checkpoint: Checkpoint, may_commit: Callable[[], bool]) -> None:
        """Send a checkpoint that is committed on disk, and commit it in the store.

        `may_commit` is called right before and right after the commit: a writer that a later attempt has replaced does not commit, or
        takes its commit back.

        Raises:
            CheckpointError: a later attempt has replaced this writer.
            StorageError: the store refuses. Older checkpoints are untouched.
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
        """Bring the newest checkpoint that verifies to this machine, and remove local copies of checkpoints that the store no longer has.

        Raises:
            NewerFormatError: a newer one is in a later format.
        """
        found = Found(None)
        committed = self.committed()
        for checkpoint in committed:
            try:
                found.checkpoint = self.verified(checkpoint)
                break
            except NewerFormatError:
                raise
            except CheckpointError as error:
                found.warnings.append(f"{error}; an older checkpoint is used")
                if self._remote is not None:
                    reason = json.dumps({"reason": str(error)}).encode()
                    self._remote.write(f"{checkpoint.folder.name}/{DAMAGED}", reason)
        if self._remote is not None:
            for copy in CheckpointStore(self._local).committed():
                if copy not in committed:
                    shutil.rmtree(copy.folder, ignore_errors=True)
        return found

    def verified(self, checkpoint: Checkpoint) -> Checkpoint:
        """Bring one of `committed` to this machine and verify every byte. Raises CheckpointError if it is damaged.

        A copy that differs from the manifest is fetched once more, since the download may have damaged it.
        """
        if self._remote is None:
            checkpoint.verify()
            return checkpoint
        there = self._remote.child(checkpoint.folder.name)
        committed = there.read(MANIFEST)
        if committed is None:
            raise CheckpointError(f"checkpoint {checkpoint.folder.name}: is not in {self._folder} any more")
        with locked(make_folder(self._local)):  # a second process waits for this one's copy
            if not self._is_here(checkpoint, committed):
                try:
                    self._fetch(checkpoint, there, committed)
                except CheckpointError:
                    self._fetch(checkpoint, there, committed)
        return checkpoint

    def prune(self, keep: int, pinned: Collection[str] = ()) -> None:
        """Remove what `unneeded` names."""
        names = self.unneeded(keep, pinned)
        if not names:
            return
        with locked(make_folder(self._local)):  # another process may be fetching a checkpoint
            for name in names:
                # without its manifest, the rest is no checkpoint, even if a kill comes next
                self._folder.delete(f"{name}/{MANIFEST}")
                self._folder.delete_all(name)

    def unneeded(self, keep: int, pinned: Collection[str] = ()) -> dict[str, int]:
        """Return names and bytes of all checkpoints but the newest `keep` and those `pinned` by name, and of the unfinished ones of older
        attempts; {} unless the newest is whole.
        """
        sizes = self._sizes()
        committed = _committed(self._local, sizes)
        if not committed or not self._is_whole(committed[0], sizes[committed[0].folder.name]):
            return {}
        kept = {checkpoint.folder.name for checkpoint in committed[:keep]} | set(pinned)
        found = {}
        for name, files in sizes.items():
            match = NAME.fullmatch(name)
            unfinished = MANIFEST not in files and match is not None and int(match[2]) >= committed[0].attempt
            if match is not None and name not in kept and not unfinished:
                found[name] = sum(files.values())
        return found

    # -- inner

    def _sizes(self) -> dict[str, dict[str, int]]:
        """Return the sizes of the files of every checkpoint."""
        sizes: dict[str, dict[str, int]] = {} if self._remote else {name: {} for name in self._folder.folders()}
        for entry in self._folder.objects():
            name, _, file = entry.name.partition("/")
            if file:
                sizes.setdefault(name, {})[file] = entry.num_bytes
        return sizes

    def _is_whole(self, checkpoint: Checkpoint, sizes: dict[str, int]) -> bool:
        """Whether every byte on this disk, or every size in the store, is the committed one. What was sent was hashed on its way."""
        try:
            if self._remote is None:
                checkpoint.verify()
            if self._remote is None or (checkpoint.folder / MANIFEST).exists():
                manifest = checkpoint.manifest()
            else:  # this machine has no copy
                content = self._folder.read(f"{checkpoint.folder.name}/{MANIFEST}")
                manifest = parse_manifest(content or b"", checkpoint.folder)
            return all(sizes.get(name) == entry["bytes"] for name, entry in manifest["files"].items())
        except CheckpointError:
            return False

    def _is_here(self, checkpoint: Checkpoint, committed: bytes) -> bool:
        try:
            if (checkpoint.folder / MANIFEST).read_bytes() != committed:
                return False
            checkpoint.verify()
        except (OSError, CheckpointError):
            return False
        return True

    @staticmethod
    def _fetch(checkpoint: Checkpoint, there: RemoteFolder, committed: bytes) -> None:
        """Copy a checkpoint from the store. The manifest is written last, once all files are verified, as `checkpoint.save` does."""
        folder, manifest = checkpoint.folder, parse_manifest(committed, checkpoint.folder)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with storage_errors(folder), ThreadPoolExecutor(_AT_ONCE) as pool:
                folder.mkdir()
                list(pool.map(lambda name: there.download(name, folder / name), manifest["files"]))
            checkpoint.verify(manifest)
            write_atomically(folder / MANIFEST, committed)
        except NotThereError as error:
            raise CheckpointError(f"checkpoint {folder.name}: {error}") from None
        finally:
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _committed(local: Path, sizes: dict[str, dict[str, int]]) -> list[Checkpoint]:
    found = []
    for name, files in sizes.items():
        match = NAME.fullmatch(name)
        if match and MANIFEST in files and DAMAGED not in files:
            found.append(Checkpoint(local / name, int(match[1]), int(match[2])))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt), reverse=True)
