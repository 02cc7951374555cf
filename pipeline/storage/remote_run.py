"""A run in an object store: the same names as in its folder on disk, and the permanent copy.

    <storage>/runs/<id>/run.json, status.json, attempt     as on disk (pipeline/storage/runs.py)
    <storage>/runs/<id>/lease/                             who works on it (pipeline/storage/remote_lease.py)
    <storage>/runs/<id>/checkpoints/                       (pipeline/storage/checkpoint_store.py)
    <storage>/runs/<id>/files.json                         log, spool, pictures, scores: which there are, and who sent them
    <storage>/runs/<id>/log.txt, spool/, pictures/ ...     the files themselves
    <storage>/runs/<id>/samples/                           images that jobs made

A record in the store names what lies in the same store relative to it (`store:datasets/x`), so that a store can be copied or moved; a
machine's copy of the record has the addresses.

Every machine that works on the run has a folder of its own for it. It sends the files at each checkpoint and at the end. Files move one
way at a time, from the driver to rank 0 when an attempt begins and back when it ends, so that nothing has to be merged.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pipeline.errors import StorageError, UsageError
from pipeline.storage.durable import write_atomically
from pipeline.storage.remote import RemoteFolder, is_remote
from pipeline.storage.remote_lease import Lease

INDEX = "files.json"
IN_STORE = "store:"
_TYPED = {"command", "extensions"}
_NOT_FILES = {
    "attempt",
    "status.json",
    "run.json",
    "sweep.json",
    "tune",
    INDEX,
    "lock",
    "lease",
    "checkpoints",
    "ray",
    "samples",
}  # samples stay on the machine that made them; a job sends its own
_MLFLOW_RUN = "spool/mlflow.json"
_SENDER = ".sender"  # identifies this machine's folder of the run
_AT_ONCE = 4


class RemoteRun:
    """What a store has of one run or sweep (`kind`)."""

    def __init__(self, folder: RemoteFolder, kind: str = "run") -> None:
        self.folder = folder
        self.id = folder.prefix.rpartition("/")[2]
        self.root = folder.parent.parent
        self.lease = Lease(folder.child("lease"), f"{kind} {self.id}")
        self._record = f"{kind}.json"
        self._records = ("attempt", "status.json", self._record)

    @classmethod
    def of(cls, storage: str | None, kind: str, run_id: str) -> Self | None:
        """Return the one of that id in a profile's storage; None if that is no object store."""
        if storage is None or not is_remote(storage):
            return None
        return cls(RemoteFolder(storage).child(f"{kind}s/{run_id}"), kind)

    @classmethod
    def fetch_all_records(cls, storage: str, kind: str, here: Path) -> None:
        """Bring the records of all of a kind into a folder, if the storage is an object store."""
        if not is_remote(storage):
            return
        remote = RemoteFolder(storage).child(f"{kind}s")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: cls(remote.child(name), kind).fetch_records(here / name), remote.folders()))

    # -- records

    def fetch_records(self, local: Path) -> bool:
        """Bring the small files that describe it into a folder; False if there is no such run or sweep."""
        found = {}
        for name in ("status.json", self._record, "attempt", _MLFLOW_RUN):
            if self._is_known(name, local):
                continue
            content = self.folder.read(name)
            if content is not None:
                if name == self._record:
                    content = _change_places(content, lambda place: located_in_store(place, self.root))
                found[name] = content
            elif name in ("status.json", self._record):
                return False
        for name, content in found.items():
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(local / name, content)
        return True

    def send_records(self, local: Path, *names: str) -> None:
        """Send the small files, or those named. The record goes last: without it there is no run or sweep."""
        for name in names or self._records:
            if (local / name).is_file():
                content = (local / name).read_bytes()
                if name == self._record:
                    content = _change_places(content, lambda place: portable_in_store(place, self.root))
                self.folder.write(name, content)

    def _is_known(self, name: str, local: Path) -> bool:
        """Whether a folder has a file of this store that never changes. A sweep's record does change, when points are added."""
        if name != "run.json":
            return name == _MLFLOW_RUN and (local / name).is_file()
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((local / name).read_bytes())
            return portable_in_store(record["profile"]["storage"], self.root) == IN_STORE
        return False

    # -- files

    def push(self, local: Path) -> None:
        """Send the files that differ from those in the store, and the list of all of them last."""
        before = self._index()
        known = before.get("files", {})
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sent = pool.map(
                lambda item: (item[0], self._send(item[0], item[1], known.get(item[0]))), sorted(_files(local))
            )
            files = {name: sha256 for name, sha256 in sent if sha256 is not None}
        index = {"sender": _sender(local), "files": files}
        if index != before:
            self.folder.write(INDEX, json.dumps(index, indent=1).encode())
        for name in known:
            if name not in files:
                self.folder.delete(name)

    def pull(self, local: Path, below: str = "") -> None:
        """Bring the files that another machine sent and that differ from those here. Does nothing if this folder was the last to send.

        Files that are here alone stay: they were made without the lock, as an evaluation's are, and are sent with the rest.
        """
        index = self._index()
        if not index or index.get("sender") == _sender(local):
            return
        here = dict(_files(local))
        files = {name: sha256 for name, sha256 in index["files"].items() if name.startswith(below)}
        wanted = {name for name, sha256 in files.items() if name not in here or _sha256(here[name]) != sha256}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: self._fetch(name, local), sorted(wanted)))

    def samples(self) -> list[str]:
        """Return the names of the folders of samples that were sent."""
        return self.folder.child("samples").folders()

    def send_samples(self, folder: Path) -> None:
        """Send a folder of samples under its name, from a machine whose own folder of the run is temporary."""
        target = self.folder.child(f"samples/{folder.name}")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda path: target.upload(path.name, path), sorted(folder.iterdir())))

    def _send(self, name: str, path: Path, known: str | None) -> str | None:
        """Send a file unless the store has it (`known` is its SHA-256 there). Return its SHA-256, None if it has been removed."""
        try:
            return known if known == _sha256(path) else self.folder.upload(name, path)
        except FileNotFoundError:
            return None

    def _fetch(self, name: str, local: Path) -> None:
        path = local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            self.folder.download(name, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _index(self) -> dict[str, Any]:
        try:
            content = json.loads(self.folder.read(INDEX) or b"{}")
        except ValueError:
            return {}
        names = content.get("files") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(_is_inside(name) for name in names):
            return {}
        return dict(content)


def portable_in_store(place: str, root: RemoteFolder) -> str:
    """Return an address as records in a store keep it: `store:datasets/x` for one in the same store; any other text as it is."""
    if not is_remote(place):
        return place
    try:
        there = RemoteFolder(place)
    except UsageError:
        return place
    inside = there.bucket == root.bucket and f"{there.prefix}/".startswith(f"{root.prefix}/".lstrip("/"))
    return IN_STORE + there.prefix.removeprefix(root.prefix).lstrip("/") if inside else place


def located_in_store(place: str, root: RemoteFolder) -> str:
    """Return the address of a place in a record of a store."""
    name = place.removeprefix(IN_STORE)
    return place if name == place else root.child(name).uri if name else root.uri


def _change_places(content: bytes, change: Callable[[str], str]) -> bytes:
    """Change every text of a record, but for the commands as they were typed; a damaged record is left as it is."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item if name in _TYPED else changed(item) for name, item in value.items()}
        if isinstance(value, list):
            return [changed(item) for item in value]
        return change(value) if isinstance(value, str) else value

    try:
        return json.dumps(changed(json.loads(content)), indent=1).encode() + b"\n"
    except (ValueError, RecursionError):
        return content


def folder_here(folder: Path, uri: str) -> Path:
    """Return this machine's folder of a run in an object store: the driver's own if it is on this machine, else a temporary one."""
    if (folder / "run.json").is_file():
        return folder
    temporary = own_folder("runs") / folder.name
    remote = RemoteRun(RemoteFolder(uri))
    if not remote.fetch_records(temporary):
        raise StorageError(f"{remote.folder}: is no run; was it removed?")
    return temporary


def own_folder(name: str) -> Path:
    """Return this user's folder of a name below the machine's folder for temporary files. Other users cannot open it."""
    root = Path(tempfile.gettempdir()) / f"ddpm-pipe-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
        if status.st_uid != os.getuid() or root.is_symlink() or status.st_mode & 0o022:
            raise StorageError(
                f"{root}: belongs to another user or can be written by one; set TMPDIR to a folder of your own"
            )
        (root / name).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{root}: cannot be made ({error.strerror}); set TMPDIR to a folder that you can write"
        ) from None
    return root / name


def _sender(local: Path) -> str:
    """Return the random name that tells this folder of a run from those of other machines; the first call makes it."""
    path = local / _SENDER
    with suppress(FileNotFoundError):
        return path.read_text()
    write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text()


def _files(local: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a run that are sent, by name."""
    for top in sorted(local.iterdir()) if local.is_dir() else ():
        if top.name in _NOT_FILES or top.name.startswith(".") or top.is_symlink():
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            name = path.relative_to(local).as_posix()
            if path.is_file() and not path.is_symlink() and path.suffix != ".lock" and "/." not in name:
                yield name, path


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return (
        bool(parts[0])
        and parts[0] not in _NOT_FILES
        and not any(part in ("", "..") or part[0] == "." for part in parts)
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
