"""Run folders: what was asked for, how far it came, and who works on it now. They need no MLflow.

runs/<id>/run.json     what was asked for; written once
runs/<id>/status.json  how far it came; replaced as a whole at each change
runs/<id>/attempt      number of the newest attempt, which fences the writes of an older one
runs/<id>/lock         held (flock) by the process that works on the run; the kernel frees it when that process dies
runs/<id>/log.txt, checkpoints/, spool/ ...

Where the profile's storage is an object store, the run lasts there (pipeline/storage/remote_run.py) and the folder is this machine's copy:
brought when the run is found and when its lock is taken, sent when something changes and when the lock is let go.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import RunLockedError, StorageError, UsageError, nearest
from pipeline.redaction import redact
from pipeline.storage.durable import storage_errors, write_atomically, write_json
from pipeline.storage.home import make_folder, runs_dir
from pipeline.storage.remote_run import RemoteRun

T = TypeVar("T")
GONE = "its process is gone"  # killed or crashed, or its machine was
log = logging.getLogger(__name__)

ID_LENGTH = 8
LETTERS = "abcdefghjkmnpqrstuvwxyz"  # no i, l, o: they look like 1 and 0
DIGITS = "23456789"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RunStatus(StrEnum):
    """Where a run stands."""

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True)
class RunRecord:
    """What was asked for: written once, when the run is made.

    `dataset` holds at least `path` and `fingerprint`; `created` is UTC, ISO 8601; `command` is the command line as
    typed, secrets removed. `trial` says of which sweep the run is a trial, and which one (pipeline/runs/record.py).
    `origin` says which run or sweep this one comes from: `what` ("run k7m2abcd", "sweep ..."), `words`, `mlflow_run_id`.
    """

    id: str
    name: str
    created: str
    experiment: dict[str, Any]
    config_hash: str
    dataset: dict[str, Any]
    profile: dict[str, Any]
    command: list[str]
    code_version: str
    libraries: dict[str, str]
    initial_weights: str | None = None
    trial: dict[str, Any] | None = None
    imported_from: str = ""  # the folder that the weights of step 0 came from
    origin: dict[str, str] | None = None

    @property
    def seconds_allowed(self) -> float | None:
        """How long a sweep's trial trains, where its budget is time; None where the experiment's steps decide."""
        seconds: float | None = (self.trial or {}).get("allowance", {}).get("seconds")
        return seconds


@dataclass(frozen=True)
class RunState:
    """How far a run came: `summary` holds the final figures by name, `reason` why it ended as it did.

    `overrides` are the `key=value` settings that resumes have changed since the record was written.
    """

    status: RunStatus = RunStatus.CREATED
    step: int = 0
    attempt: int = 0
    reason: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    updated: str = ""


class Run:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    # -- making and finding

    @classmethod
    def create(
        cls,
        home: Path,
        *,
        name: str,
        experiment: dict[str, Any],
        config_hash: str,
        dataset: dict[str, Any],
        profile: dict[str, Any],
        command: list[str],
        initial_weights: str | None = None,
        imported_from: str = "",
        trial: dict[str, Any] | None = None,
        origin: dict[str, str] | None = None,
    ) -> Run:
        """Make a run folder with its record, status CREATED. StorageError where it cannot be written."""
        from pipeline.storage.provenance import code_version, library_versions

        # Asking git takes long beside making a folder: it goes first, so that a kill hardly ever leaves a folder that is no run.
        record = RunRecord(
            "", normalise_name(name), _now(), experiment, config_hash, dataset, profile,
            list(command), code_version(), library_versions(), initial_weights, trial,
            imported_from, origin,
        )  # fmt: skip
        root = make_folder(runs_dir(home))
        for _ in range(100):
            run = cls(root / new_id())
            try:
                run.folder.mkdir()
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise StorageError(
                    f"{root}: cannot be written ({error.strerror}); set DDPM_PIPE_HOME to a folder you can write"
                ) from error
        write_json(run.folder / "status.json", asdict(RunState(updated=record.created)))
        write_json(run.folder / "run.json", asdict(replace(record, id=run.id)))  # last: a folder without it is no run
        if run.remote is not None:
            run.remote.announce(run.folder)
        return run

    @classmethod
    def all(cls, home: Path, storage: str | None = None) -> list[Run]:
        """Return every run, oldest first, those of an object store (a profile's `storage`) too.

        Links are not followed, and folders without a record are no runs.
        """
        root = runs_dir(home)
        if storage is not None:
            RemoteRun.fetch_all_records(storage, root)
        if not root.is_dir():
            return []
        folders = [entry for entry in root.iterdir() if NAME.fullmatch(entry.name) and not entry.is_symlink()]
        runs = [cls(folder) for folder in folders if (folder / "run.json").is_file()]
        return sorted((run for run in runs if run._is_readable()), key=lambda run: (run.record.created, run.id))

    def _is_readable(self) -> bool:
        try:
            return bool(self.record.id)
        except StorageError as error:  # one damaged folder must not hide the others
            log.warning("%s", error)
            return False

    @classmethod
    def find(cls, home: Path, reference: str, storage: str | None = None) -> Run:
        """Return the run named by our id, MLflow's id, a unique prefix of either, or `latest`; UsageError otherwise.

        `storage` as for `all`. A run of an object store is brought up to date, whichever way it was found.
        """
        if not NAME.fullmatch(reference):
            raise UsageError(
                f"run {reference!r}: expected a run id, a prefix of one, or 'latest'; `ddpm-pipe runs` lists them"
            )
        runs = cls.all(home, storage)
        if not runs:
            raise UsageError(
                f"run {reference!r}: there are no runs in {home}; run `ddpm-pipe train`, or set DDPM_PIPE_HOME"
            )
        if reference == "latest":
            return runs[-1]._refreshed()
        exact = [run for run in runs if reference in {run.id, run.mlflow_run_id}]
        found = exact or [
            run for run in runs if run.id.startswith(reference) or (run.mlflow_run_id or "").startswith(reference)
        ]
        if len(found) == 1:
            return found[0]._refreshed()
        if found:
            raise UsageError(f"run {reference!r} is ambiguous: it fits {_listing(found)}; give more characters")
        hint = nearest(reference, [run.id for run in runs])
        raise UsageError(f"run {reference!r}: no such run in {home}{hint}; there are {_listing(runs[::-1])}")

    def _refreshed(self) -> Run:
        if self.remote is not None and not self.remote.fetch_records(self.folder):
            raise UsageError(f"run {self.id}: is not in {self.remote.folder} any more; its copy here is {self.folder}")
        return self

    # -- what is known

    @cached_property
    def remote(self) -> RemoteRun | None:
        """The run in its object store; None where this folder is all there is."""
        return RemoteRun.of(self.record.profile.get("storage"), self.id)

    @cached_property
    def record(self) -> RunRecord:
        """What was asked for."""
        return _built(RunRecord, self.folder / "run.json")

    def state(self) -> RunState:
        """Return how far the run came; one left RUNNING by a process that is gone is INTERRUPTED."""
        state = self._written_state()
        if state.status is RunStatus.RUNNING and not self.is_locked():
            return replace(state, status=RunStatus.INTERRUPTED, reason=state.reason or GONE)
        return state

    def update(self, **changes: Any) -> RunState:
        """Change fields of the state (see RunState), replacing the file as a whole; StorageError if it cannot be."""
        with self._folder_lock():
            if self.remote is not None:  # a worker elsewhere may have gone on since
                self.remote.fetch_records(self.folder)
            state = replace(self._written_state(), **{**changes, "updated": _now()})
            state = replace(state, status=RunStatus(state.status), reason=redact(state.reason))
            write_json(self.folder / "status.json", asdict(state))
            if self.remote is not None:
                self.remote.send_records(self.folder, "status.json")
        return state

    def _written_state(self) -> RunState:
        state = _built(RunState, self.folder / "status.json")
        return replace(state, status=RunStatus(state.status))

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id for this run, once the tracking server has made one."""
        try:
            delivered = json.loads((self.folder / "spool" / "mlflow.json").read_text())
        except (OSError, ValueError):
            return None
        found = delivered.get("mlflow_run_id") if isinstance(delivered, dict) else None
        return found if isinstance(found, str) else None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def log_path(self) -> Path:
        """File of the run's log lines."""
        return self.folder / "log.txt"

    def log(self, line: str) -> None:
        """Append one line with the time to the run's log, secrets removed. A disk that is full costs the line, not the training."""
        with suppress(OSError), self.log_path.open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {redact(line)}\n")

    # -- who works on it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; RunLockedError (naming the holder) at once where another one holds it."""
        with storage_errors(self.folder):
            opened = (self.folder / "lock").open("a+", encoding="utf-8")
        with opened as file:
            if not _try_lock(file.fileno()):
                raise RunLockedError(
                    f"run {self.id} is being worked on by {_holder(file)}; wait for it, or stop that process first"
                )
            with storage_errors(self.folder):
                file.truncate(0)
                file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}))
                file.flush()
            try:
                with self._lock_in_store():
                    yield
            finally:
                file.truncate(0)  # closing the file frees the lock

    @contextmanager
    def _lock_in_store(self) -> Iterator[None]:
        """Hold the run in its object store too, with the files as they are there; and send them back in the end."""
        if self.remote is None:
            yield
            return
        with self.remote.lease.hold():
            self.fetch_files()
            try:
                yield
            finally:
                self.remote.lease.require()  # what was taken over is the other one's to write
                self.send_files()

    def fetch_files(self, below: str = "") -> None:
        """Bring log, spool and pictures, or one folder of these, from the object store, where another machine wrote them last."""
        if self.remote is not None:
            self.remote.fetch_records(self.folder)
            self.remote.pull(self.folder, below)

    def send_files(self) -> None:
        """Send log, spool and pictures to the object store."""
        if self.remote is not None:
            self.remote.push(self.folder)

    def is_locked(self) -> bool:
        """Whether a live process holds the run, here or elsewhere; where a store does not answer, its run counts as held."""
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

    def current_attempt(self) -> int:
        """Return the number of the newest attempt, 0 before the first. A writer with a smaller one must not commit."""
        if self.remote is not None:
            return int(self.remote.folder.read("attempt") or b"0")
        try:
            return int((self.folder / "attempt").read_text())
        except FileNotFoundError:
            return 0

    def next_attempt(self) -> int:
        """Start a new attempt: its number is on disk, and fences off all older ones, when this returns."""
        with self._folder_lock():
            number = self.current_attempt() + 1
            write_atomically(self.folder / "attempt", f"{number}\n".encode())
            if self.remote is not None:
                self.remote.lease.require()
                self.remote.send_records(self.folder, "attempt")
        self.update(attempt=number)
        return number

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Serialise read-modify-write of the small files between processes; held for milliseconds."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def new_id() -> str:
    """Return a fresh run id: 8 characters, a letter first, none that is mistaken for another."""
    source = random.SystemRandom()
    return source.choice(LETTERS) + "".join(source.choice(LETTERS + DIGITS) for _ in range(ID_LENGTH - 1))


def normalise_name(name: str) -> str:
    """Return the name with only `A-Za-z0-9._-`, 1 to 64 characters, no leading dot or dash; UsageError if none is left."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-").lstrip(".-")[:64]
    if not kept:
        raise UsageError(f"name {name!r}: expected letters, digits, '.', '_' or '-'")
    return kept


def _try_lock(descriptor: int) -> bool:
    # a few tries, because `is_locked` in another process holds a shared lock for an instant
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def _holder(file: Any) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _listing(runs: list[Run], limit: int = 5) -> str:
    shown = ", ".join(f"{run.id} ({run.record.name})" for run in runs[:limit])
    return shown + (f" and {len(runs) - limit} more" if len(runs) > limit else "")


def _built(kind: type[T], path: Path) -> T:
    """Build a dataclass from a JSON file; fields of a later version are left out."""
    content = _read_json(path)
    try:
        return kind(**{item.name: content[item.name] for item in fields(kind) if item.name in content})  # type: ignore[arg-type]
    except TypeError as error:
        raise StorageError(f"{path}: {error}; the run folder is damaged, restore it or remove it") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error}); the run folder is damaged, restore it or remove it"
        ) from error
    if not isinstance(content, dict):
        raise StorageError(f"{path}: expected a JSON object; the run folder is damaged, restore it or remove it")
    return content


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
