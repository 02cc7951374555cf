"""Removing a run or a sweep: a kill at any moment leaves a home and a store that every command reads.

It disappears in one step: its folder gets the name `.removed-<id>`, and the object store loses its status, without which it is not listed.
Its files go afterwards. `left_over` finds those that a kill left.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.durable import flush_folder, storage_errors
from pipeline.storage.folder import STATUS, Folder
from pipeline.storage.local import LocalFolder
from pipeline.storage.remote import RemoteFolder, is_remote

HIDDEN = ".removed-"


@dataclass(frozen=True)
class Remains:
    """The files of what has disappeared: those in the home, those in its object store."""

    kind: str
    id: str
    here: Path
    there: RemoteFolder | None

    def places(self) -> list[tuple[str, int]]:
        """Return each place with files, and their bytes."""
        found = [(str(self.here), num_bytes(self.here))] if self.here.exists() else []
        if self.there is not None and (objects := self.there.objects()):
            found.append((str(self.there), sum(entry.num_bytes for entry in objects)))
        return found

    def erase(self) -> None:
        """Remove the files."""
        if self.there is not None:
            self.there.delete_all("")
        if self.here.exists():
            with storage_errors(self.here):
                shutil.rmtree(self.here)


def hide(folder: Folder) -> Remains:
    """Let a run or sweep disappear. The caller holds its lock, and erases the files after releasing it."""
    hidden = folder.folder.with_name(HIDDEN + folder.id)
    remote = folder.remote  # which its record names
    with storage_errors(folder.folder):
        shutil.rmtree(hidden, ignore_errors=True)  # of a removal that was killed before it reached the store
        folder.folder.rename(hidden)
        flush_folder(hidden.parent)
    if remote is not None:
        remote.folder.delete(STATUS)
    return Remains(folder.KIND, folder.id, hidden, None if remote is None else remote.folder)


def left_over(kind: type[Folder], home: Path, storage: str | None) -> Iterator[Remains]:
    """Yield what removals that were killed have left of runs or sweeps, in a home and in a profile's storage."""
    root = kind.all_in(home)
    ids = {path.name.removeprefix(HIDDEN) for path in root.glob(f"{HIDDEN}*")}
    stored: dict[str, set[str]] = {}
    there = RemoteFolder(storage).child(f"{kind.KIND}s") if storage is not None and is_remote(storage) else None
    for entry in [] if there is None else there.objects():
        name, _, file = entry.name.partition("/")
        stored.setdefault(name, set()).add(file)
    gone = {name for name, files in stored.items() if STATUS not in files}  # in a new folder it is the first
    for name in sorted(ids | gone):
        yield Remains(kind.KIND, name, root / f"{HIDDEN}{name}", there.child(name) if there and name in gone else None)


def num_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(entry.num_bytes for entry in LocalFolder(path).objects())
