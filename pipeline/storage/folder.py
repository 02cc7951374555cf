"""What the folders of runs and sweeps have in common: a record, a status, a lock, a log, and a copy in an object store.

<home>/<kind>s/<id>/<kind>.json  the record (kind: run or sweep); a folder without it is ignored
<home>/<kind>s/<id>/status.json  progress and status; replaced as a whole at each change
<home>/<kind>s/<id>/lock         locked (flock) by the process that works on it; the kernel frees it when that process dies
<home>/<kind>s/<id>/log.txt, spool/ ...

If the profile's storage is an object store, all of it is kept there (pipeline/storage/remote_run.py), and the folder is this machine's
copy: fetched when it is found and when its lock is taken, sent when something changes and when the lock is released.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

from pipeline.console import Console
from pipeline.errors import RunLockedError, StorageError, UsageError, nearest
from pipeline.redaction import redact
from pipeline.storage.durable import locked, storage_errors, write_json
from pipeline.storage.home import located, make_folder, portable
from pipeline.storage.next_command import typeable
from pipeline.storage.remote_run import RemoteRun

T = TypeVar("T")
F = TypeVar("F", bound="Folder")
GONE = "its process is gone"  # it, or its machine, was killed or crashed
STATUS = "status.json"
MOST_NAMED = 5  # in a message
log = logging.getLogger(__name__)

ID_LENGTH = 8
LETTERS = "abcdefghjkmnpqrstuvwxyz"  # no i, l, o: they look like 1 and 0
DIGITS = "23456789"
ID_VARIABLE = (
    "DDPM_PIPE_RUN"  # the id of the run or sweep that a job of Slurm begins, and resumes when it is started again
)
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RunStatus(StrEnum):
    """Status of a run or sweep."""

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True)
class RunState:
    """Progress and status: `summary` holds the final metrics by name, `reason` explains the status.

    `overrides` are the `key=value` settings that resumes have changed since the record was written. `goodput` is how the time of a training
    that ended was spent (pipeline/runs/goodput.py).
    """

    status: RunStatus = RunStatus.CREATED
    step: int = 0
    attempt: int = 0
    reason: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    goodput: dict[str, float] = field(default_factory=dict)
    updated: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the records of runs and sweeps have in common.

    `dataset` holds at least `path` and `fingerprint`; `created` is UTC, ISO 8601; `command` is the command line as typed, secrets removed.
    """

    id: str
    name: str
    created: str
    dataset: dict[str, Any]
    profile: dict[str, Any]
    command: list[str]
    code_version: str

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.created)  # raises ValueError if the record is damaged


class Folder:
    """The folder of a run or a sweep."""

    KIND: ClassVar[str]
    PLACES: ClassVar[tuple[tuple[str, ...], ...]]  # keys of the record that hold paths or addresses

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    # -- create and find

    @classmethod
    def all_in(cls, home: Path) -> Path:
        """Return the folder of a home that holds them."""
        return home / f"{cls.KIND}s"

    @classmethod
    def new(cls, home: Path) -> Self:
        """Make a folder with a new id, or with that of $DDPM_PIPE_RUN. Raises StorageError if it cannot be written."""
        root = make_folder(cls.all_in(home))
        given = os.environ.pop(ID_VARIABLE, "")  # a sweep's trials get others
        while True:
            made = cls(root / (given or new_id()))
            with suppress(FileExistsError), storage_errors(root):
                made.folder.mkdir(exist_ok=bool(given))  # the job's script and log are in it
                return made

    @classmethod
    def begun(cls, home: Path, storage: str | None = None) -> Self | None:
        """Return the one that $DDPM_PIPE_RUN names, None if there is none yet: a job that Slurm starts again resumes it."""
        given = os.environ.get(ID_VARIABLE)
        if given is None:
            return None
        if not NAME.fullmatch(given):
            raise UsageError(f"{ID_VARIABLE}: got {given!r}, expected letters, digits, '.', '_' or '-'. Change it.")
        found = next((each for each in cls.all(home, storage) if each.id == given), None)
        if found is not None:
            del os.environ[ID_VARIABLE]
        return found

    def write_first(self, record: Record) -> None:
        """Write status and record into a new folder, and send them to its object store. If that fails, the folder is removed."""
        try:
            write_json(self.folder / STATUS, asdict(RunState(updated=record.created)))
            self._write_record(record)
            if self.remote is not None:
                self.remote.send_records(self.folder)
        except StorageError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _write_record(self, record: Record) -> None:
        content = asdict(record)
        self._change_places(content, portable)
        write_json(self.folder / f"{self.KIND}.json", content)

    def _change_places(self, content: Any, change: Callable[[str, Path], str]) -> None:
        for *outer, last in self.PLACES:
            inner = content
            for key in outer:
                inner = inner.get(key) if isinstance(inner, dict) else None
            if isinstance(inner, dict) and isinstance(inner.get(last), str):
                inner[last] = change(inner[last], self.home)

    @classmethod
    def all(cls, home: Path, storage: str | None = None) -> list[Self]:
        """Return all of them, oldest first, with those of an object store (a profile's `storage`).

        Links are not followed. A folder without a record, or one that is being removed, is ignored; one with a damaged record is
        reported and left out.
        """
        root = cls.all_in(home)
        if storage is not None:
            RemoteRun.fetch_all_records(storage, cls.KIND, root)
        if not root.is_dir():
            return []
        named = [entry for entry in root.iterdir() if NAME.fullmatch(entry.name) and not entry.name.startswith(".")]
        folders = [entry for entry in named if not entry.is_symlink()]
        found = [cls(folder) for folder in folders if (folder / f"{cls.KIND}.json").is_file()]
        return sorted((f for f in found if f._is_readable()), key=lambda f: (f.record.created, f.id))

    def _is_readable(self) -> bool:
        try:
            self.state()
            return bool(self.record.id)
        except StorageError as error:  # one damaged folder must not hide the others
            log.warning("%s", error)
            return False

    @classmethod
    def find(
        cls,
        home: Path,
        reference: str,
        storage: str | None = None,
        why_not: Callable[[Self], str] = lambda _: "",
    ) -> Self:
        """Return the one with our id or MLflow's id, or a unique prefix of either, or `latest`. Raises UsageError if there is none.

        `storage` as for `all`; a folder in an object store is brought up to date. `latest` is the newest one for which `why_not` returns
        "", or the newest of all if there is none; a line on stderr names it and the newer ones that were skipped.
        """
        kind = cls.KIND
        if not NAME.fullmatch(reference):
            lists = f"; `{typeable('runs')}` lists them" if kind == "run" else ""
            raise UsageError(f"{kind} {reference!r}: expected a {kind} id, a prefix of one, or 'latest'{lists}")
        there = cls.all(home, storage)
        if not there:
            begin = {"run": "train", "sweep": "sweep"}[kind]
            raise UsageError(
                f"{kind} {reference!r}: there are no {kind}s in {home}; run `{typeable(begin)}`, or set DDPM_PIPE_HOME"
            )
        if reference == "latest":
            return cls._latest(there, why_not)._refreshed()
        found = fitting(reference, there)
        if len(found) == 1:
            return found[0]._refreshed()
        if found:
            raise UsageError(f"{kind} {reference!r} is ambiguous: it fits {_listing(found)}; give more characters")
        hint = nearest(reference, [each.id for each in there])
        raise UsageError(f"{kind} {reference!r}: no such {kind} in {home}{hint}; there are {_listing(there[::-1])}")

    @classmethod
    def _latest(cls, oldest_first: Sequence[Self], why_not: Callable[[Self], str]) -> Self:
        chosen, skipped = oldest_first[-1], list[str]()
        for each in reversed(oldest_first):
            reason = why_not(each)
            if not reason:
                chosen = each
                break
            skipped.append(f"{each.id} ({reason})")
        else:
            skipped = []
        more = f", and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
        newer = f"; newer ones that were skipped: {', '.join(skipped[:MOST_NAMED])}{more}" if skipped else ""
        Console().say(f"latest: {cls.KIND} {chosen.id} ({chosen.record.name}){newer}")
        return chosen

    def is_called(self, reference: str) -> bool:
        """Whether a reference is a prefix of our id or of MLflow's."""
        return self.id.startswith(reference) or (self.mlflow_run_id or "").startswith(reference)

    def _refreshed(self) -> Self:
        if self.remote is not None and not self.remote.fetch_records(self.folder):
            raise UsageError(
                f"{self.KIND} {self.id}: is not in {self.remote.folder} any more; its copy here is {self.folder}, which "
                f"`{typeable(f'rm {self.id}')}` removes"
            )
        return self

    # -- record and state

    @property
    def home(self) -> Path:
        return self.folder.parent.parent

    @cached_property
    def remote(self) -> RemoteRun | None:
        """The same in its object store; None if it is on disk alone."""
        return RemoteRun.of(self.record.profile.get("storage"), self.KIND, self.id)

    @property
    def record(self) -> Record:
        raise NotImplementedError

    def state(self) -> RunState:
        """Return progress and status. A status RUNNING that no live process stands for is returned as INTERRUPTED."""
        state = self._read(STATUS, RunState)
        if state.status is RunStatus.RUNNING and not self.is_locked():
            return replace(state, status=RunStatus.INTERRUPTED, reason=state.reason or GONE)
        return state

    def update(self, **changes: Any) -> RunState:
        """Change fields of the state (see RunState). Raises StorageError if the file cannot be written."""
        with locked(self.folder):
            if self.remote is not None:  # a worker on another machine may have changed it
                self.remote.fetch_records(self.folder)
            state = replace(self._read(STATUS, RunState), **{**changes, "updated": now()})
            state = replace(state, status=RunStatus(state.status), reason=redact(state.reason))
            write_json(self.folder / STATUS, asdict(state))
            if self.remote is not None:
                self.remote.send_records(self.folder, STATUS)
        return state

    def _read(self, name: str, kind: type[T]) -> T:
        """Read one of the JSON files as a dataclass. Raises StorageError if it is damaged."""
        from pydantic import ValidationError

        path = self.folder / name
        try:
            content = json.loads(path.read_bytes())
            self._change_places(content, located)
            found: T = _reader(cast(Any, kind)).validate_python(content)
            return found
        except OSError as error:
            wrong = error.strerror or str(error)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            wrong = f"{place}: {first['msg']}" if place else first["msg"]
        except (ValueError, RecursionError) as error:
            wrong = f"no JSON: {error}"
        raise StorageError(f"{path}: cannot be read ({wrong}); restore it from a backup, or remove the folder")

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id for this run; None before the tracking server has made one."""
        try:
            delivered = json.loads((self.folder / "spool" / "mlflow.json").read_text())
        except (OSError, ValueError):
            return None
        found = delivered.get("mlflow_run_id") if isinstance(delivered, dict) else None
        return found if isinstance(found, str) else None

    @property
    def log_path(self) -> Path:
        return self.folder / "log.txt"

    def log(self, line: str) -> None:
        """Append one line with the time to the log, secrets removed. If the disk is full, the line is lost, and training continues."""
        with suppress(OSError), self.log_path.open("a", encoding="utf-8") as file:
            file.write(f"{now()} {redact(line)}\n")

    # -- lock and copies

    @contextmanager
    def lock(self, *, copies: bool = True) -> Iterator[None]:
        """Lock it for this process. Raises RunLockedError, which names the holder, at once if another process has locked it.

        Without `copies`, its files are neither fetched from its object store nor sent there.
        """
        path = self.folder / "lock"
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(descriptor):
                raise RunLockedError(
                    f"{self.KIND} {self.id} is being worked on by {_holder(path)}; wait for it, or stop that process first"
                )
            about = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now()})
            with suppress(OSError):  # the lock works without this note, which a full disk may not take
                os.ftruncate(descriptor, 0)
                os.write(descriptor, about.encode())
            try:
                with self._lock_in_store(copies=copies):
                    yield
            finally:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)  # frees the lock

    @contextmanager
    def _lock_in_store(self, *, copies: bool) -> Iterator[None]:
        """Lock it in its object store too. With `copies`, fetch its files at the beginning, and send them back at the end."""
        if self.remote is None:
            yield
            return
        with self.remote.lease.hold():
            if not copies:
                yield
                return
            self._refreshed()  # another process may have removed it
            self.remote.pull(self.folder)
            try:
                yield
            finally:
                self.remote.lease.require()  # a process that has taken it over writes the files
                self.send_files()

    def fetch_files(self, below: str = "") -> None:
        """Bring log, spool and pictures, or one folder of these, from the object store if another machine wrote them last."""
        if self.remote is not None:
            self.remote.fetch_records(self.folder)
            self.remote.pull(self.folder, below)

    def send_files(self) -> None:
        """Send log, spool and pictures to the object store, if there is one."""
        if self.remote is not None:
            self.remote.push(self.folder)

    def is_locked(self) -> bool:
        """Whether a live process has locked it, here or elsewhere. If a store does not answer, it counts as locked."""
        if self._is_locked_here() or self.remote is None:
            return self._is_locked_here()
        try:
            return self.remote.lease.holder() is not None
        except StorageError as error:
            log.warning("%s", error)
            return True

    def _is_locked_here(self) -> bool:
        try:
            file = (self.folder / "lock").open(encoding="utf-8")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False


def fitting(reference: str, known: Sequence[F]) -> list[F]:
    """Return those that a reference means: by a complete id, ours or MLflow's, else as `is_called` says."""
    called = [each for each in known if each.is_called(reference)]
    return [each for each in called if reference in (each.id, each.mlflow_run_id)] or called


@cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def new_id() -> str:
    """Return a new id: 8 characters, a letter first, none that looks like another."""
    source = random.SystemRandom()
    return source.choice(LETTERS) + "".join(source.choice(LETTERS + DIGITS) for _ in range(ID_LENGTH - 1))


def now() -> str:
    """Return the time in the format of records."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _try_lock(descriptor: int) -> bool:
    # a few tries, because `is_locked` in another process holds a shared lock for an instant
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _listing(found: list[Any]) -> str:
    shown = ", ".join(f"{each.id} ({each.record.name})" for each in found[:MOST_NAMED])
    return shown + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")
