"""The spool: what was logged, one JSON line each, and how far it has been delivered.

    spool/events.jsonl    every event, appended; the truth about what was logged from this run folder
    spool/delivered.json  how many bytes of it a tracking store has, and under which MLflow run
    spool/delivery.lock   held while delivering, so that two processes never deliver at once
    spool/rejected.jsonl  events that the store refused for good, with its reason
    spool/unreachable     present while the store cannot be reached: later processes then wait less for it

Appending is safe from several processes; a line cut by a crash is skipped when reading.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.durable import write_json

Event = dict[str, Any]
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """How far delivery to one store has come: `offset` bytes of the spool are there, but for the events at `deferred`.

    `writer` is who delivered last.
    """

    uri: str = ""
    offset: int = 0
    mlflow_run_id: str | None = None
    writer: str = ""
    deferred: tuple[int, ...] = ()


class Spool:
    """The spool of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events_path = folder / "events.jsonl"
        self._position_path = folder / "delivered.json"
        self._unreachable_path = folder / "unreachable"
        self._unwritten: list[bytes] = []
        self._appending = threading.Lock()
        self._seal_needed = self._ends_in_a_cut_line()

    def append(self, event: Event) -> None:
        """Add an event. Where the disk refuses it stays in memory and is tried again with the next one; never raises OSError."""
        with self._appending:
            self._unwritten.append(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self.write_unwritten()

    def write_unwritten(self) -> None:
        """Try again to write what the disk has refused; never raises OSError."""
        with self._appending:
            if not self._unwritten:
                return
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.events_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                try:
                    while self._unwritten:
                        self._write_line(descriptor, self._unwritten[0])
                        del self._unwritten[0]
                finally:
                    os.close(descriptor)
            except OSError:
                pass  # disk full or read-only: training goes on

    def _write_line(self, descriptor: int, line: bytes) -> None:
        content = b"\n" + line if self._seal_needed else line
        self._seal_needed = True
        if os.write(descriptor, content) < len(content):
            raise OSError("the disk took part of a line")
        self._seal_needed = False

    def _ends_in_a_cut_line(self) -> bool:
        try:
            with self.events_path.open("rb") as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return False
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:
            return False

    @property
    def unwritten(self) -> int:
        """Number of events that the disk has refused so far."""
        return len(self._unwritten)

    def size(self) -> int:
        """Return the offset behind the last whole line."""
        try:
            with self.events_path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                while end:
                    begin = max(0, end - CHUNK_BYTES)
                    file.seek(begin)
                    newline = file.read(end - begin).rfind(b"\n")
                    if newline >= 0:
                        return begin + newline + 1
                    end = begin
        except FileNotFoundError:
            pass
        return 0

    def read(self, offset: int) -> list[tuple[Event, int]]:
        """Return some events from `offset` on, each with the offset behind it; [] at the end. A cut line is an event {}."""
        found: list[tuple[Event, int]] = []
        try:
            with self.events_path.open("rb") as file:
                file.seek(offset)
                content = file.read(CHUNK_BYTES)
                if b"\n" not in content:
                    content += file.readline()
        except FileNotFoundError:
            return found
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            found.append((_parse(line), offset))
        return found

    def events(self, offset: int = 0) -> Iterator[Event]:
        """Yield every whole event from `offset` on."""
        while batch := self.read(offset):
            offset = batch[-1][1]
            yield from (event for event, _ in batch if event)

    def pending(self, position: Position) -> list[Event]:
        """Return the events that the store lacks at `position`."""
        late = [self.read(offset)[:1] for offset in position.deferred]
        return [event for found in late for event, _ in found] + list(self.events(position.offset))

    def last_start(self) -> Event | None:
        """Return the newest event of kind `start`, which says what an MLflow run is made from."""
        last = None
        for event in self.events():
            if event["kind"] == "start":
                last = event
        return last

    def position(self) -> Position:
        """Return how far delivery has come; the beginning where that is unknown, since delivery skips what is there."""
        try:
            content = json.loads(self._position_path.read_text())
            position = Position(**{**content, "deferred": tuple(content["deferred"])})
        except (OSError, ValueError, TypeError, KeyError):
            return Position()
        return position if 0 <= position.offset <= self.size() else Position(position.uri, 0, position.mlflow_run_id)

    def save_position(self, position: Position) -> None:
        """Replace the recorded position; StorageError where the disk refuses."""
        write_json(self._position_path, asdict(position))

    @contextmanager
    def delivering(self) -> Iterator[bool]:
        """Yield whether this process may deliver now; while it may, no other one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "delivery.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def reject(self, event: Event, reason: str) -> None:
        """Keep an event that the store refused for good, with the reason."""
        with (self.folder / "rejected.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"reason": reason, "event": event}) + "\n")

    @property
    def unreachable(self) -> bool:
        """Whether the last process that tried found no store."""
        return self._unreachable_path.exists()

    def mark_unreachable(self, unreachable: bool) -> None:
        """Remember for later processes whether the store could be reached."""
        if not unreachable:
            self._unreachable_path.unlink(missing_ok=True)
        elif not self.unreachable:
            self._unreachable_path.touch()


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) and "kind" in event else {}
