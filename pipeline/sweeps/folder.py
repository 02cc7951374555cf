"""Sweep folders: the sweep that was asked for, the ledger of its trials, and the report. Trials are runs of their own, under runs/.

sweeps/<id>/sweep.json     the sweep; replaced when points are added
sweeps/<id>/ledger.jsonl   how each trial ended
sweeps/<id>/report/        table, pictures, sweep-report.html
sweeps/<id>/status.json, lock, log.txt, spool/   as in a run folder

If the profile's storage is an object store, all of it is kept there, as a run is (pipeline/storage/remote_run.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile, settled
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.config.yaml_files import validate
from pipeline.runs.record import trial_of
from pipeline.storage.folder import NAME, Folder, Record, now
from pipeline.storage.remote_run import RemoteRun
from pipeline.storage.runs import Run
from pipeline.sweeps.config import Sweep, sweep_from
from pipeline.sweeps.ledger import Ledger, LedgerEntry


@dataclass(frozen=True, kw_only=True)
class SweepRecord(Record):
    """The sweep that was asked for.

    `base` is the resolved experiment that trials vary, and `plain_base` the same without the sweep's overrides: the winner is trained
    with it, even if the preset has changed. `command` began the sweep, `extensions` added to it.
    """

    sweep: dict[str, Any]
    base: dict[str, Any]
    plain_base: dict[str, Any]
    extensions: list[list[str]] = field(default_factory=list)


SECONDS = "seconds"


class SweepFolder(Folder):
    """One sweep folder."""

    KIND = "sweep"
    PLACES = (
        ("dataset", "path"),
        ("base", "data", "source"),
        ("plain_base", "data", "source"),
        ("profile", "storage"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ledger = Ledger(folder / "ledger.jsonl")
        self._began: float | None = None

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

        made = cls.new(home)
        record = SweepRecord(
            id=made.id,
            name=sweep.name,
            created=now(),
            sweep=sweep.to_dict(),
            base=base.to_dict(),
            dataset=dataset,
            profile=profile,
            command=command,
            code_version=code_version(),
            plain_base=plain_base.to_dict(),
        )
        made.write_first(record)
        return made

    @classmethod
    def of(cls, home: Path, sweep_id: str, storage: str | None = None) -> SweepFolder | None:
        """Return the sweep of that very id, None if there is none."""
        if not NAME.fullmatch(sweep_id):
            return None
        found, remote = cls(cls.all_in(home) / sweep_id), RemoteRun.of(storage, cls.KIND, sweep_id)
        if remote is not None:
            remote.fetch_records(found.folder)
        return found if (found.folder / "sweep.json").is_file() else None

    def is_called(self, reference: str) -> bool:
        """Whether a reference means this sweep, by a prefix of its id or of MLflow's, or by name."""
        return reference == self.record.name or super().is_called(reference)

    # -- what is known

    @property
    def record(self) -> SweepRecord:
        """What was asked for; read anew, since points are added."""
        return self._read("sweep.json", SweepRecord)

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
        extensions = [*self.record.extensions, command]
        self._write_record(replace(self.record, sweep=sweep.to_dict(), extensions=extensions))
        if self.remote is not None:
            self.remote.send_records(self.folder, "sweep.json")

    def enter(self, entry: LedgerEntry) -> None:
        """Write into the ledger how a trial ended, and the time spent. Both are on disk when this returns."""
        self.ledger.append(entry)
        self.tick()
        self.send_files()

    def profile(self, named: Profile | None = None) -> Profile:
        """Return the profile named `cluster`, or the one that the sweep was started with."""
        return named or settled(validate(Profile, self.record.profile, f"sweep {self.id}"))

    @property
    def report(self) -> Path:
        return self.folder / "report"

    # -- the time it takes, over all drivers

    def begin(self) -> None:
        """Start this driver's clock, which continues that of earlier drivers."""
        self._began = time.monotonic() - self.seconds

    def tick(self) -> None:
        """Write the time spent so far; a kill loses only the time since."""
        if self._began is not None:
            self.update(summary={**self.state().summary, SECONDS: self.seconds})

    @property
    def seconds(self) -> float:
        """Time that all drivers have spent on the sweep."""
        if self._began is None:
            return self.state().summary.get(SECONDS, 0.0)
        return time.monotonic() - self._began

    def trials(self) -> dict[str, Run]:
        """Return the runs of this sweep's trials that were begun, by key; with their files, where those last in an object store."""
        found = {}
        for run in Run.all(self.home, self.record.profile.get("storage")):
            trial = trial_of(run.record)
            if trial is not None and trial.sweep == self.id:
                run.fetch_files()
                found[trial.key] = run
        return found
