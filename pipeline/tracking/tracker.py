"""Record a run in MLflow without making training wait.

A `Tracker` appends events to the spool of the run folder and returns; a daemon thread delivers them in order and in batches. If the server
does not answer, the events stay in the spool, and `sync` delivers them later, each once.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import TrackingError, UsageError
from pipeline.redaction import one_line, public_uri, redact, redact_value
from pipeline.storage.home import absolute_store, artifacts_dir, default_tracking_uri
from pipeline.storage.next_command import typeable
from pipeline.tracking.moved import require_unmoved
from pipeline.tracking.names import Group, clean_name, metric_name
from pipeline.tracking.run import require_schema
from pipeline.tracking.spool import Event, Spool
from pipeline.tracking.writer import Writer

if TYPE_CHECKING:
    from pipeline.config.cluster_profile import Profile

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "ddpm"
MAX_VALUE_LENGTH = 6000  # MLflow's limit for parameters


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are recorded.

    `artifacts` is the artifact folder of a local store, None if a server decides. With `strict`, a store that does not answer is an
    error: at the start after `start_timeout_s`, and at the end.
    """

    uri: str
    experiment: str = DEFAULT_EXPERIMENT
    artifacts: Path | None = None
    strict: bool = False
    mlflow_run_id: str | None = None
    batch_interval_s: float = 1.0
    start_timeout_s: float = 15.0

    @classmethod
    def resolve(
        cls, home: Path, uri: str | None = None, experiment: str | None = None, strict: bool = False
    ) -> TrackingSettings:
        """Return the settings: `uri` and `experiment` (the profile's) come before MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, and these
        before the SQLite store of the home folder and "ddpm". With MLFLOW_RUN_ID, MLFLOW_TRACKING_URI comes first.

        Takes MLFLOW_RUN_ID out of the environment: a process started from here must not use that run by accident.
        """
        opened = os.environ.pop("MLFLOW_RUN_ID", None)
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        chosen = (environment or uri) if opened else (uri or environment)
        address = _absolute(chosen) if chosen else default_tracking_uri(home)
        require_schema(address)
        require_unmoved(address, home)
        local = address.startswith("sqlite:")
        name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        return cls(address, name, artifacts_dir(home).absolute() if local else None, strict, opened)

    @classmethod
    def of_profile(cls, home: Path, profile: Profile) -> TrackingSettings:
        """Return the settings of runs under a cluster profile."""
        return cls.resolve(home, profile.mlflow.tracking_uri, profile.mlflow.experiment, profile.mlflow.strict)


@dataclass(frozen=True)
class TrackedDataset:
    """A dataset in MLflow: `fingerprint` of our manifest; `source` is a path or address."""

    name: str
    fingerprint: str
    source: str


class Tracker:
    """Records one run. Recording methods return at once and never raise because of the store.

    Delivery starts with the first event. With `later`, it starts with `deliver` or the first wait, because importing MLflow and creating
    its tables take seconds of CPU.
    """

    def __init__(self, run_dir: Path, settings: TrackingSettings, *, later: bool = False) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._spool = Spool(run_dir / "spool")
        self._later = later
        self._token = secrets.token_hex(4)
        self._count = 0
        self._writer = Writer(run_dir, settings, self._spool, self._token)

    # recording

    def start(
        self,
        run_name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        description: str,
        dataset: TrackedDataset | None = None,
    ) -> None:
        """Open the MLflow run; `params` are flat, with dotted names. If strict, raises TrackingError if the store does not answer."""
        self._append(
            "start",
            our_id=self._run_dir.name,
            experiment=self._settings.experiment,
            run_name=run_name,
            tags={**_source_tags(tags.get("code_version", "")), **_clean_tags(tags)},
            params={clean_name(name): _clean_param(name, value) for name, value in params.items()},
            description=redact(description),
            dataset=None if dataset is None else {key: redact(value) for key, value in asdict(dataset).items()},
            mlflow_run_id=self._settings.mlflow_run_id,
        )
        if self._settings.strict and not self.flush(self._settings.start_timeout_s, patient=True):
            raise TrackingError(self._complaint("does not accept the run"))

    def metrics(self, step: int, values: Mapping[str, float], group: Group = "train") -> None:
        """Record metrics of one step under the names of a group.

        Those that a resumed training logs again (`names.REPEATED`) are skipped at steps that the store has. The others are measured
        explicitly: another value at the same step is kept, too.
        """
        kept = {}
        for name, value in values.items():
            try:
                kept[metric_name(group, name)] = float(value)
            except (TypeError, ValueError):
                log.warning("tracking: %s = %r is not a number and is not recorded", name, value)
        if kept:
            self._append("metrics", step=int(step), values=kept)

    def image(self, key: str, step: int, path: Path) -> None:
        """Record a picture for the step slider. The file must not move until it is delivered."""
        self._append("image", key=re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key), step=int(step), path=self._path(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder in `folder` of the run's artifacts; secrets in small text files are redacted."""
        self._append("artifact", path=self._path(path), folder=folder)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        self._append("tags", tags=_clean_tags(tags))

    def describe(self, description: str) -> None:
        """Replace the run's description (Markdown)."""
        self._append("tags", tags={"mlflow.note.content": redact(description)})

    def model(self, folder: Path, step: int) -> None:
        """Record a model folder (as `pipeline.training.trained.Trained.load` reads) as an MLflow model without pickle."""
        self._append("model", folder=self._path(folder), step=int(step))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Close the MLflow run; `start` opens it again."""
        self._append("finish", status=str(status))

    # delivering

    @property
    def problem(self) -> str | None:
        """Why events cannot be delivered now, in one line; None if they can."""
        return self._writer.problem

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run; None until it exists."""
        return self._spool.known_run()

    def undelivered(self) -> list[Event]:
        """Return the events without a receipt, to be stored in a checkpoint; `restore` on another machine merges them."""
        pending = self._spool.pending()
        start = self._spool.last_start
        if start is not None and all(event["id"] != start["id"] for event in pending):
            pending.insert(0, {**start, "restored": True})
        return pending

    def restore(self, events: Iterable[Event]) -> None:
        """Add events of a checkpoint that the spool does not have. Call it before recording anything."""
        present = self._spool.ids()
        for event in events:
            if event["id"] not in present:
                self._spool.append(event)
        if not self._later:
            self._writer.start()

    def deliver(self) -> None:
        """Start the delivery."""
        self._later = False
        self._writer.start()

    def flush(self, timeout: float = 60.0, patient: bool = False) -> bool:
        """Wait until everything recorded is delivered, and return whether it is.

        Returns early if the store does not answer, unless `patient`.
        """
        return self._writer.drain(timeout, patient)

    def close(self, timeout: float = 60.0) -> bool:
        """Deliver the remaining events, stop, and return whether everything was delivered.

        Waits a few seconds at most for a store that does not answer. If strict, raises TrackingError if events remain.
        """
        done = self._writer.drain(timeout)
        self._writer.stop()
        if not done:
            complaint = self._complaint("has not received everything")
            if self._settings.strict:
                raise TrackingError(complaint)
            log.warning("%s", complaint)
        return done

    def _complaint(self, what: str) -> str:
        reason = self.problem or "no answer yet"
        return (
            f"tracking: {public_uri(self._settings.uri)} {what} ({reason}); nothing is lost, "
            f"deliver it later with `{typeable(f'sync {self._run_dir.name}')}`"
        )

    def _append(self, kind: str, **fields: Any) -> None:
        self._count += 1
        event = {"id": f"{self._token}-{self._count}", "kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        self._spool.append(event)
        if not self._later:
            self._writer.start()

    def _path(self, path: Path) -> str:
        path = path.absolute()
        return str(path.relative_to(self._run_dir)) if path.is_relative_to(self._run_dir) else str(path)


def sync(run_dir: Path, settings: TrackingSettings, timeout: float = 600.0) -> int:
    """Deliver the pending events of a run's spool and return their number; TrackingError if the store does not answer."""
    spool = Spool(run_dir / "spool")
    writer = Writer(run_dir, settings, spool, secrets.token_hex(4))
    try:
        return writer.deliver_all(timeout)
    except Exception as error:
        raise TrackingError(
            f"tracking: {public_uri(settings.uri)} cannot be used ({one_line(error)}); "
            f"check the address and run `{typeable(f'sync {run_dir.name}')}` again"
        ) from error


def _absolute(uri: str) -> str:
    """Return the address with an absolute path for SQLite; UsageError for file stores, which MLflow refuses."""
    if uri.startswith("sqlite:///"):
        return absolute_store(uri)
    if re.match(r"^[a-z][a-z0-9+.-]*://", uri) and not uri.startswith("file:"):
        return uri
    raise UsageError(
        f"tracking address {public_uri(uri)!r}: expected http(s)://..., sqlite:///... or a database; "
        "MLflow no longer supports plain folders"
    )


def _source_tags(code_version: str) -> dict[str, str]:
    """Return the tags for the columns of MLflow's list of runs: user, program, commit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    tags = {"mlflow.user": user, "mlflow.source.name": "ddpm-pipe", "mlflow.source.type": "LOCAL"}
    commit = re.search(r"[0-9a-f]{40}", code_version)
    return tags | ({"mlflow.source.git.commit": commit[0]} if commit else {})


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {clean_name(name): redact_value(name, str(value)) for name, value in tags.items()}


def _clean_param(name: str, value: Any) -> str:
    text = redact_value(name, value if isinstance(value, str) else json.dumps(value, default=str))
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    note = f"... ({len(text)} characters; the whole value is in the run's experiment file)"
    return text[: MAX_VALUE_LENGTH - len(note)] + note
