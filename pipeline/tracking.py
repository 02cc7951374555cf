"""Tracking: what a run did, in MLflow, without training ever waiting for it.

A `Tracker` appends events to the spool of the run folder and returns; one daemon thread delivers them in order and in batches.
A server that is away costs nothing: the events stay, and `sync` delivers them later, each once.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import TrackingError, UsageError
from pipeline.home import artifacts_dir, default_tracking_uri
from pipeline.redaction import USERINFO, redact, redact_value
from pipeline.tracking_spool import Event, Position, Spool

log = logging.getLogger(__name__)

Family = Literal["train", "result"]
GRACE_S = 3.0  # how long closing waits for a store that has not answered
GRACE_KNOWN_DEAD_S = 0.3  # ... and where an earlier process found it dead already
START_TIMEOUT_S = 20.0  # strict: how long the first contact may take
MAX_BACKOFF_S = 30.0
MAX_VALUE_LENGTH = 6000  # MLflow's limit for parameters


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are recorded. `artifacts` is the folder of a local store's artifacts, None where a server decides."""

    uri: str
    experiment: str = "ddpm"
    artifacts: Path | None = None
    strict: bool = False
    mlflow_run_id: str | None = None
    batch_interval_s: float = 1.0

    @classmethod
    def resolve(
        cls, home: Path, uri: str | None = None, experiment: str = "ddpm", strict: bool = False
    ) -> TrackingSettings:
        """Return the settings: the run that `mlflow run` opened if there is one, else `uri` (the profile's), else
        MLFLOW_TRACKING_URI, else the SQLite store of the home folder.

        Takes MLFLOW_RUN_ID out of the environment: a process started from here must not use that run by accident.
        """
        opened = os.environ.pop("MLFLOW_RUN_ID", None)
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        chosen = (environment or uri) if opened else (uri or environment)
        address = _absolute(chosen) if chosen else default_tracking_uri(home)
        local = address.startswith("sqlite:")
        return cls(address, experiment, artifacts_dir(home).absolute() if local else None, strict, opened)

    @property
    def public_uri(self) -> str:
        """The address without user name and password."""
        return USERINFO.sub("", self.uri)


@dataclass(frozen=True)
class TrackedDataset:
    """The dataset as MLflow shows it: `fingerprint` is our manifest's, `source` a path or address."""

    name: str
    fingerprint: str
    source: str
    context: str = "training"


class Tracker:
    """Records one run. Every recording method returns at once and never raises for the store's sake."""

    def __init__(self, run_dir: Path, settings: TrackingSettings) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._spool = Spool(run_dir / "spool")
        self._token = secrets.token_hex(4)
        self._count = 0
        self._start: Event | None = None
        self._writer = Writer(run_dir, settings, self._spool, self._token)

    # recording

    def start(
        self,
        experiment_name: str,
        run_name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        description: str,
        dataset: TrackedDataset | None = None,
    ) -> None:
        """Open the MLflow run: params are flat, with dotted names. Strict: TrackingError where the store does not answer."""
        self._append(
            "start",
            our_id=self._run_dir.name,
            experiment=experiment_name,
            run_name=run_name,
            tags={**_source_tags(), **_clean_tags(tags)},
            params={_clean_name(name): _clean_param(name, value) for name, value in params.items()},
            description=redact(description),
            dataset=None if dataset is None else {key: redact(value) for key, value in asdict(dataset).items()},
            mlflow_run_id=self._settings.mlflow_run_id,
        )
        if self._settings.strict and not self.flush(START_TIMEOUT_S, grace_s=START_TIMEOUT_S):
            raise TrackingError(self._complaint("does not take the run"))

    def metrics(self, step: int, values: Mapping[str, float], family: Family = "train") -> None:
        """Record figures of one step.

        Family `train` is what a resumed training logs again: steps that the store has are skipped. Family `result` is
        measured on purpose, so another value at the same step is kept too.
        """
        kept = {_clean_name(name): float(value) for name, value in values.items()}
        if kept:
            self._append("metrics", step=int(step), values=kept, family=family)

    def image(self, key: str, step: int, path: Path) -> None:
        """Record a picture for the step slider. The file must stay where it is until it is delivered."""
        self._append("image", key=re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key), step=int(step), path=self._path(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder under a folder of the run's artifacts; small text files with secrets removed."""
        self._append("artifact", path=self._path(path), folder=folder)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        self._append("tags", tags=_clean_tags(tags))

    def describe(self, description: str) -> None:
        """Replace the run's description (Markdown)."""
        self._append("tags", tags={"mlflow.note.content": redact(description)})

    def model(self, folder: Path, step: int, name: str = "ddpm") -> None:
        """Record the model folder (what `pipeline.checkpoint.load_model` reads) as an MLflow model without pickle."""
        self._append("model", folder=self._path(folder), step=int(step), name=name)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Close the MLflow run; `start` opens it again."""
        self._append("finish", status=str(status))

    # delivering

    @property
    def problem(self) -> str | None:
        """One line on what keeps events from being delivered now; None where nothing does."""
        return self._writer.problem

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run, once there is one."""
        return self._spool.position().mlflow_run_id

    def undelivered(self) -> list[Event]:
        """Return the events that no store is known to have, for a checkpoint; `restore` on another machine merges them."""
        position = self._spool.position()
        pending = list(self._spool.events(position.offset))
        start = self._start = self._start or _last_start(self._spool)
        if start is not None and all(event["id"] != start["id"] for event in pending):
            pending.insert(0, {**start, "restored": True})
        return pending

    def restore(self, events: Iterable[Event]) -> None:
        """Merge events of a checkpoint into the spool; those it holds are left alone. Call it before recording anything."""
        present = {event["id"] for event in self._spool.events()}
        for event in events:
            if event["id"] not in present:
                self._spool.append(event)
        self._writer.wake()

    def flush(self, timeout: float = 60.0, grace_s: float | None = None) -> bool:
        """Wait until all that was recorded is delivered, or it is clear that the store is away; return whether it is."""
        return self._writer.drain(timeout, grace_s)

    def close(self, timeout: float = 60.0) -> bool:
        """Deliver what is left, stop, and return whether everything was delivered.

        A store that is away costs a few seconds at most. Strict: TrackingError where something is left.
        """
        done = self._writer.drain(timeout, None)
        self._writer.stop()
        if not done:
            complaint = self._complaint("has not taken everything")
            if self._settings.strict:
                raise TrackingError(complaint)
            log.warning("%s", complaint)
        return done

    def _complaint(self, what: str) -> str:
        reason = self.problem or "no answer yet"
        return (
            f"tracking: {self._settings.public_uri} {what} ({reason}); nothing is lost, "
            f"deliver it later with `ddpm-pipe sync {self._run_dir.name}`"
        )

    def _append(self, kind: str, **fields: Any) -> None:
        self._count += 1
        event = {"id": f"{self._token}-{self._count}", "kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        self._spool.append(event)
        self._writer.start()

    def _path(self, path: Path) -> str:
        path = path.absolute()
        return str(path.relative_to(self._run_dir)) if path.is_relative_to(self._run_dir) else str(path)


class Writer:
    """The one thread that talks to the store."""

    def __init__(self, run_dir: Path, settings: TrackingSettings, spool: Spool, token: str) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._spool = spool
        self._token = token
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._delivery: Any = None
        self._failures = 0
        self._last_failure = 0.0
        self._answered = settings.uri.startswith("sqlite:")
        self.problem: str | None = None

    def start(self) -> None:
        """Start the thread unless it runs."""
        if self._thread is None or not self._thread.is_alive():
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Deliver now instead of at the next interval."""
        self.start()
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; a call to a hanging server is left behind in it."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(0.5)

    def drain(self, timeout: float, grace_s: float | None) -> bool:
        """Wait until the store has all that the spool holds now; give up early where the store is away."""
        if grace_s is None:
            grace_s = GRACE_KNOWN_DEAD_S if self._spool.unreachable else GRACE_S
        begin = time.monotonic()
        end = self._spool.size()
        self.wake()
        while self._spool.unwritten or self.offset() < end:
            waited = time.monotonic() - begin
            failed_since = self._last_failure > begin and grace_s <= GRACE_S
            if waited > timeout or failed_since or (waited > grace_s and not self._answered):
                return False
            time.sleep(0.02)
            self._spool.write_unwritten()
        return True

    def offset(self) -> int:
        """Return how far delivery to this store has come."""
        position = self._spool.position()
        return position.offset if position.uri == self._settings.public_uri else 0

    def _run(self) -> None:
        while not self._stopping:
            pause = min(self._settings.batch_interval_s * 2 ** min(self._failures, 10), MAX_BACKOFF_S)
            self._wake.wait(pause)
            self._wake.clear()
            try:
                while not self._stopping and self.deliver_some():
                    pass
            except Exception as error:
                self._note_failure(error)

    def deliver_some(self) -> bool:
        """Deliver the next part of the spool; return whether there may be more. Raises whatever MLflow raises."""
        with self._spool.delivering() as mine:
            if not mine:
                return False
            position = self._spool.position()
            if position.uri == self._settings.public_uri and position.offset >= self._spool.size():
                return False
            position = self._attached(position)
            batch = self._spool.read(position.offset)
            self._deliver(batch, position)
            return bool(batch)

    def _attached(self, position: Position) -> Position:
        """Make sure that there is a run to deliver to, and return where to go on."""
        from pipeline.tracking_delivery import Delivery

        if self._delivery is None:
            prepare_environment()
            self._delivery = Delivery(self._settings.uri, self._run_dir, self._settings.artifacts)
        elif position.writer == self._token and position.mlflow_run_id == self._delivery.run_id:
            return position
        same_store = position.uri == self._settings.public_uri
        known = position.mlflow_run_id if same_store else None
        was_known = self._delivery.attach(known, _last_start(self._spool), self._run_dir.name)
        self._answered = True
        offset = position.offset if was_known else 0
        return Position(self._settings.public_uri, offset, self._delivery.run_id, self._token)

    def _deliver(self, batch: list[tuple[Event, int]], position: Position) -> None:
        from pipeline.tracking_delivery import RejectedError, groups

        for events, offset in groups(batch):
            try:
                if events:
                    self._delivery.deliver(events)
            except RejectedError as error:
                self._reject(events, error)
            position = replace(position, offset=offset)
            self._spool.save_position(position)
            self._note_success()

    def _reject(self, events: list[Event], error: Exception) -> None:
        """Set aside what the store refuses for good; of several, only those that it refuses one by one."""
        from pipeline.tracking_delivery import RejectedError

        if len(events) > 1:
            for event in events:
                try:
                    self._delivery.deliver([event])
                except RejectedError as one:
                    self._reject([event], one)
            return
        log.warning("tracking: an event of kind %r was refused: %s", events[0]["kind"], error)
        self._spool.reject(events[0], str(error))

    def _note_success(self) -> None:
        self._failures = 0
        self._answered = True
        self.problem = None
        self._spool.mark_unreachable(False)

    def _note_failure(self, error: Exception) -> None:
        if self._failures == 0:
            log.warning("tracking: %s: %s; training goes on", self._settings.public_uri, one_line(error))
        self._failures += 1
        self._answered = False
        self._delivery = None
        self.problem = one_line(error)
        self._last_failure = time.monotonic()
        self._spool.mark_unreachable(True)


def sync(run_dir: Path, settings: TrackingSettings, timeout: float = 600.0) -> int:
    """Deliver what a run's spool still holds and return the number of events; TrackingError where the store is away."""
    spool = Spool(run_dir / "spool")
    writer = Writer(run_dir, settings, spool, secrets.token_hex(4))
    pending = sum(1 for _ in spool.events(writer.offset()))
    deadline = time.monotonic() + timeout
    try:
        while writer.offset() < spool.size():
            if not writer.deliver_some():  # the run's own process is delivering
                time.sleep(0.2)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not everything was taken within {timeout:.0f} s")
    except Exception as error:
        raise TrackingError(
            f"tracking: {settings.public_uri} cannot be used ({one_line(error)}); "
            f"check the address and run `ddpm-pipe sync {run_dir.name}` again"
        ) from error
    return pending


def prepare_environment() -> None:
    """Set what MLflow reads from the environment: short waits, no telemetry, no pickle. The user's own values stay."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"


def one_line(error: Exception) -> str:
    """Return an error's first line, without secrets, short enough for a terminal."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def _absolute(uri: str) -> str:
    """Return the address with an absolute path for SQLite; file stores are refused as MLflow itself refuses them."""
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute().as_posix()}"
    if re.match(r"^[a-z][a-z0-9+.-]*://", uri) and not uri.startswith("file:"):
        return uri
    raise UsageError(
        f"tracking address {USERINFO.sub('', uri)!r}: expected http(s)://..., sqlite:///... or a database; "
        "MLflow no longer writes to plain folders"
    )


def _last_start(spool: Spool) -> Event | None:
    last = None
    for event in spool.events():
        if event["kind"] == "start":
            last = event
    return last


def _source_tags() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": "ddpm-pipe", "mlflow.source.type": "LOCAL"}


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_clean_name(name): redact_value(name, str(value)) for name, value in tags.items()}


def _clean_name(name: str) -> str:
    """MLflow's alphabet for names, and its limit."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:250]


def _clean_param(name: str, value: Any) -> str:
    text = redact_value(name, value if isinstance(value, str) else json.dumps(value, default=str))
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    note = f"... ({len(text)} characters; the whole value is in the run's experiment file)"
    return text[: MAX_VALUE_LENGTH - len(note)] + note
