"""Run folders: the record of what was asked for, the progress, and the lock. They need no MLflow.

runs/<id>/run.json     the record; written once
runs/<id>/attempt      number of the newest attempt, which fences the writes of an older one
runs/<id>/status.json, lock, log.txt, checkpoints/, spool/ ...   (folder.py)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError, UsageError
from pipeline.storage.durable import locked, write_atomically
from pipeline.storage.folder import Folder, Record, now


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """What was asked for: written once, when the run is made.

    `trial` names the sweep that the run is a trial of, and which trial (pipeline/runs/record.py). `origin` is the run or sweep that this
    one comes from: `what` ("run k7m2abcd", "sweep ..."), `words`, `mlflow_run_id`.
    """

    experiment: dict[str, Any]
    config_hash: str
    libraries: dict[str, str]
    initial_weights: str | None = None
    trial: dict[str, Any] | None = None
    imported_from: str = ""  # the folder that the weights of step 0 came from
    origin: dict[str, str] | None = None

    @property
    def seconds_allowed(self) -> float | None:
        """How long a sweep's trial trains if its budget is time; None if the experiment's steps end it."""
        seconds: float | None = (self.trial or {}).get("allowance", {}).get("seconds")
        return seconds


class Run(Folder):
    """One run folder."""

    KIND = "run"
    PLACES = (("dataset", "path"), ("experiment", "data", "source"), ("profile", "storage"), ("initial_weights",))

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
        """Make a run folder with its record, status CREATED. Raises StorageError if it cannot be written."""
        from pipeline.storage.provenance import code_version, library_versions

        # calling git takes long: it comes before the folder is made, so that a kill hardly ever leaves a folder without a record
        record = RunRecord(
            id="", name=normalise_name(name), created=now(), experiment=experiment, config_hash=config_hash, dataset=dataset,
            profile=profile, command=list(command), code_version=code_version(), libraries=library_versions(),
            initial_weights=initial_weights, trial=trial, imported_from=imported_from, origin=origin,
        )  # fmt: skip
        run = cls.new(home)
        run.write_first(replace(record, id=run.id))
        return run

    @cached_property
    def record(self) -> RunRecord:
        return self._read("run.json", RunRecord)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def current_attempt(self) -> int:
        """Return the number of the newest attempt, 0 before the first. A writer with a smaller number must not commit."""
        path = self.folder / "attempt"
        try:
            content = path.read_bytes() if self.remote is None else self.remote.folder.read("attempt")
            return int(content or b"0")
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{path}: cannot be read ({error}); write the number of the newest attempt into it (see log.txt)"
            ) from None

    def next_attempt(self) -> int:
        """Start a new attempt. When this returns, its number is on disk and excludes all older ones."""
        with locked(self.folder):
            number = self.current_attempt() + 1
            write_atomically(self.folder / "attempt", f"{number}\n".encode())
            if self.remote is not None:
                self.remote.lease.require()
                self.remote.send_records(self.folder, "attempt")
        self.update(attempt=number)
        return number


def normalise_name(name: str) -> str:
    """Return the name with only `A-Za-z0-9._-`, 1 to 64 characters, no leading dot or dash. Raises UsageError if nothing is left."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-").lstrip(".-")[:64]
    if not kept:
        raise UsageError(f"name {name!r}: expected letters, digits, '.', '_' or '-'")
    return kept
