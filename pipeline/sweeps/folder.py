"""Sweep folders: the sweep that was asked for, the ledger of its trials, and the report. Trials are runs of their own, under runs/.

sweeps/<id>/sweep.json     the sweep; replaced when points are added
sweeps/<id>/ledger.jsonl   how each trial ended
sweeps/<id>/report/        table, pictures, sweep-report.html
sweeps/<id>/status.json, lock, log.txt, spool/   as in a run folder

If the profile's storage is an object store, all of it is kept there, as a run is (pipeline/storage/remote_run.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile, settled
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.config.yaml_files import validate
from pipeline.errors import RunLockedError, StorageError, UsageError, nearest
from pipeline.runs.record import trial_of
from pipeline.storage.durable import write_json
from pipeline.storage.home import make_folder
from pipeline.storage.remote_run import RemoteRun
from pipeline.storage.runs import NAME, Run, RunState, new_id
from pipeline.sweeps.config import Sweep, sweep_from
from pipeline.sweeps.ledger import Ledger, LedgerEntry


@dataclass(frozen=True)
class SweepRecord:
    """The sweep that was asked for.

    `base` is the resolved experiment that trials vary, and `plain_base` the same without the sweep's overrides: the winner is trained
    with it, even if the preset has changed. `command` began the sweep, `extensions` added to it.
    """

    id: str
    name: str
    created: str
    sweep: dict[str, Any]
    base: dict[str, Any]
    dataset: dict[str, Any]
    profile: dict[str, Any]
    command: list[str]
    code_version: str
    plain_base: dict[str, Any]
    extensions: list[list[str]]


SECONDS = "seconds"


class RemoteSweep(RemoteRun):
    """The part of an object store that holds one sweep, under `<storage>/sweeps/<id>/`."""

    PLACE = "sweeps"
    RECORDS = ("status.json", "sweep.json")
    UNCHANGING = frozenset()  # points are added


class _Place(Run):
    """Status, lock, log and files of a sweep folder, kept as a run's are."""

    @cached_property
    def remote(self) -> RemoteSweep | None:
        """The sweep in its object store; None if it is only in this folder."""
        return RemoteSweep.of(SweepFolder(self.folder).record.profile.get("storage"), self.id)


class SweepFolder:
    """One sweep folder. Its status, lock, log and spool are those of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.ledger = Ledger(folder / "ledger.jsonl")
        self._as_run = _Place(folder)
        self._began: tuple[float, float] | None = None

    @classmethod
    def create(
        cls,
        home: Path,
        sweep: Sweep,
        base: Experiment,
        plain_base: Experiment,
        dataset: dict[str, Any],
        profile: dict[str, Any],
        command: list[str],
    ) -> SweepFolder:
        """Make a sweep folder with its record. StorageError if it cannot be written."""
        from pipeline.storage.provenance import code_version

        root = make_folder(sweeps_dir(home))
        found = cls(make_folder(root / new_id()))
        record = SweepRecord(
            id=found.id,
            name=sweep.name,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            sweep=sweep.to_dict(),
            base=base.to_dict(),
            dataset=dataset,
            profile=profile,
            command=list(command),
            code_version=code_version(),
            plain_base=plain_base.to_dict(),
            extensions=[],
        )
        write_json(found.folder / "status.json", asdict(RunState(updated=record.created)))
        write_json(found.folder / "sweep.json", asdict(record))
        if (remote := found._as_run.remote) is not None:
            remote.announce(found.folder)
        return found

    @classmethod
    def all(cls, home: Path, storage: str | None = None) -> list[SweepFolder]:
        """Return every sweep, oldest first, including those in an object store (a profile's `storage`)."""
        root = sweeps_dir(home)
        if storage is not None:
            RemoteSweep.fetch_all_records(storage, root)
        folders = sorted(root.iterdir()) if root.is_dir() else []
        found = [cls(entry) for entry in folders if NAME.fullmatch(entry.name) and (entry / "sweep.json").is_file()]
        return sorted(found, key=lambda sweep: (sweep.record.created, sweep.id))

    @classmethod
    def find(cls, home: Path, reference: str, storage: str | None = None) -> SweepFolder:
        """Return the sweep named by its id, by its MLflow id, by a unique prefix of either, by its unique name, or by `latest`."""
        sweeps = cls.all(home, storage)
        if not sweeps:
            raise UsageError(f"sweep {reference!r}: there are no sweeps in {home}; start one with: ddpm-pipe sweep")
        found = [sweeps[-1]] if reference == "latest" else [s for s in sweeps if s.is_called(reference)]
        if len(found) == 1:
            return found[0]
        listing = ", ".join(f"{sweep.id} ({sweep.record.name})" for sweep in (found or sweeps)[-5:])
        if found:
            raise UsageError(f"sweep {reference!r} is ambiguous: it fits {listing}; give more characters of the id")
        hint = nearest(reference, [sweep.id for sweep in sweeps])
        raise UsageError(f"sweep {reference!r}: no such sweep in {home}{hint}; there are {listing}")

    @classmethod
    def of(cls, home: Path, sweep_id: str, storage: str | None = None) -> SweepFolder | None:
        """Return the sweep with exactly this id, None if there is none."""
        if not NAME.fullmatch(sweep_id):
            return None
        folder, remote = sweeps_dir(home) / sweep_id, RemoteSweep.of(storage, sweep_id)
        if remote is not None:
            remote.fetch_records(folder)
        return cls(folder) if (folder / "sweep.json").is_file() else None

    def is_called(self, reference: str) -> bool:
        """Whether a reference means this sweep: its id, its MLflow id, a prefix of one, or its name."""
        ids = [self.id, self.mlflow_run_id or ""]
        return reference == self.record.name or any(i.startswith(reference) for i in ids)

    # -- what is known

    @property
    def record(self) -> SweepRecord:
        path = self.folder / "sweep.json"
        try:
            content = json.loads(path.read_text())
            return SweepRecord(**{item.name: content[item.name] for item in fields(SweepRecord)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: cannot be read ({error}); restore it or remove the folder") from None

    @property
    def sweep(self) -> Sweep:
        return sweep_from(self.record.sweep, f"sweep {self.id}")

    @property
    def base(self) -> Experiment:
        return experiment_from(self.record.base, f"sweep {self.id}")

    @property
    def plain_base(self) -> Experiment:
        """The base as it was, without the sweep's overrides."""
        return experiment_from(self.record.plain_base, f"sweep {self.id}")

    def extend(self, sweep: Sweep, command: list[str]) -> None:
        """Replace the sweep by one with more points or seeds. The caller holds the lock."""
        record = self.record
        extensions = [*record.extensions, list(command)]
        write_json(self.folder / "sweep.json", asdict(replace(record, sweep=sweep.to_dict(), extensions=extensions)))
        if self._as_run.remote is not None:
            self._as_run.remote.send_records(self.folder, "sweep.json")

    def enter(self, entry: LedgerEntry) -> None:
        """Write into the ledger how a trial ended, and the time spent. Both are on disk when this returns."""
        self.ledger.append(entry)
        self.tick()
        self._as_run.send_files()

    def fetch(self) -> None:
        """Copy ledger and report from the object store, where another machine may have written them."""
        self._as_run.fetch_files()

    def profile(self, named: Profile | None = None) -> Profile:
        """Return the profile named `cluster`, or the one that the sweep was started with."""
        return named or settled(validate(Profile, self.record.profile, f"sweep {self.id}"))

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the sweep's own run, the parent of its trials."""
        return self._as_run.mlflow_run_id

    def state(self) -> RunState:
        """Return the sweep's state; INTERRUPTED if it is RUNNING and its process is gone."""
        return self._as_run.state()

    def update(self, **changes: Any) -> RunState:
        return self._as_run.update(**changes)

    # -- the time it takes, over all drivers

    def begin(self) -> None:
        """Start this driver's clock, which continues that of earlier drivers."""
        self._began = (self.seconds, time.monotonic())

    def tick(self) -> None:
        """Write the time spent so far; a kill loses only the time since."""
        if self._began is not None:
            self.update(summary={**self.state().summary, SECONDS: self.seconds})

    @property
    def seconds(self) -> float:
        """Time that all drivers have spent on the sweep."""
        if self._began is None:
            return self.state().summary.get(SECONDS, 0.0)
        before, began = self._began
        return before + time.monotonic() - began

    def log(self, line: str) -> None:
        self._as_run.log(line)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep for this process; RunLockedError at once if another process holds it."""
        try:
            holding = self._as_run.lock()
            with holding:
                yield
        except RunLockedError as error:
            raise RunLockedError(str(error).replace("run ", "sweep ", 1)) from None

    def trials(self) -> dict[str, Run]:
        """Return the runs of this sweep's trials that were begun, by key; their files are copied from the object store first."""
        home = self.folder.parent.parent
        found = {}
        for run in Run.all(home, self.record.profile.get("storage")):
            trial = trial_of(run.record)
            if trial is not None and trial.sweep == self.id:
                run.fetch_files()
                found[trial.key] = run
        return found


def sweeps_dir(home: Path) -> Path:
    return home / "sweeps"
