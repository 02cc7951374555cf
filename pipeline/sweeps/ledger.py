"""The ledger of a sweep: one line, with a checksum, for each trial that ended. A trial in the ledger is not run again.

Resuming a sweep and extending it both rest on it: a trial is looked up here by its key before it runs. The key stands for everything that
decides the trial's number (`pipeline.sweeps.points.key_of`).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipeline.errors import StorageError
from pipeline.storage.durable import checked_line, read_line

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class LedgerEntry:
    """How one trial ended.

    Attributes:
        key, point, title, seed: which trial (see `pipeline.runs.record.Trial`).
        run: id of its run folder.
        status: "finished", "stopped" early, or "failed".
        value: of the sweep's metric; None unless finished.
        metric: name of that value, such as `fid_classifier_n559`; identity: everything it depends on besides the model.
        std: deviation that comes with the value, over what `std_over` says; None if there is none.
        curve: values of the same metric at other numbers of network calls, by that number.
        rungs: KID of few images by the share of the budget at which it was taken.
        steps, training_s: what was spent.
        reason: why it was stopped or failed.
    """

    key: str
    point: dict[str, Any]
    title: str
    seed: int
    run: str
    status: Status
    value: float | None = None
    metric: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    std: float | None = None
    std_over: str = ""
    curve: dict[int, float] = field(default_factory=dict)
    rungs: dict[float, float] = field(default_factory=dict)
    steps: int = 0
    training_s: float = 0.0
    reason: str = ""


_ENTRY = TypeAdapter(LedgerEntry)


class Ledger:
    """The lines of one sweep, in the order in which trials ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> dict[str, LedgerEntry]:
        """Return the newest entry of each trial, by its key. A last line that a kill cut short is ignored."""
        found: dict[str, LedgerEntry] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut short, or empty
            try:
                entry = _ENTRY.validate_python(read_line(line))
            except ValueError as error:
                wrong = " ".join(str(error).split())[:200]
                raise StorageError(
                    f"{self.path}, line {number}: cannot be read ({wrong}); remove the line, and its trial is run again"
                ) from None
            found[entry.key] = entry
        return found

    def append(self, entry: LedgerEntry) -> None:
        """Write one line; it is on disk when this returns. StorageError if it cannot be written."""
        try:
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a line that a kill cut short stays alone, on a line of its own
                        cut = file.tell() - len(self.path.read_bytes().rpartition(b"\n")[2])
                        file.truncate(cut)
                file.write(checked_line(asdict(entry)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror}); make room, then resume") from error
