"""The spool: an append-only log of what was recorded for MLflow, and of what MLflow has received.

    spool/events.jsonl   one JSON object per line, with a checksum: an event, or a receipt for events
    spool/mlflow.json    the MLflow run that receives the events, and the address of its store
    spool/delivery.lock  held while delivering, so that two processes never deliver at once

An event has an `id` and a `kind`. A receipt {"received": [id, ...], "run": mlflow_run_id, "sender": process} says that an MLflow run has
these events; with "refused" it gives the reason for which the store will never take them. Appending is safe from several processes. A line
that was cut or damaged is skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage.durable import checked_line, read_line, write_json

Event = dict[str, Any]


class Spool:
    """The spool of one run folder, seen from one MLflow run: an event is pending until a receipt of that run names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events_path = folder / "events.jsonl"
        self._run_path = folder / "mlflow.json"
        self._unwritten: list[bytes] = []
        self._appending, self._reading = threading.Lock(), threading.RLock()
        self._seal_needed = self._ends_in_a_cut_line()
        self._run: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._offset = 0  # of what was read
        self._ids: set[Any] = set()
        self._pending: dict[Any, Event] = {}
        self.last_start: Event | None = None
        self.last_sender = ""

    # appending

    def append(self, event: Event) -> None:
        """Add an event. If the disk refuses it, it stays in memory until the next one; never raises OSError."""
        with self._appending:
            self._unwritten.append(checked_line(event))
        self.write_unwritten()

    def receive(self, events: Sequence[Event], sender: str, refused: str = "") -> None:
        """Note that the MLflow run has these events, or has `refused` them for good."""
        receipt = {"received": [event["id"] for event in events], "run": self._run, "sender": sender}
        with self._reading:
            self._apply(receipt)
        self.append(receipt | ({"refused": refused} if refused else {}))

    def write_unwritten(self) -> None:
        """Try again to write what the disk has refused; never raises OSError."""
        with self._appending:
            if not self._unwritten:
                return
            with suppress(OSError):  # disk full or read-only: training goes on
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.events_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                try:
                    while self._unwritten:
                        self._write_line(descriptor, self._unwritten[0])
                        del self._unwritten[0]
                finally:
                    os.close(descriptor)

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
        """Number of lines that the disk has refused so far."""
        return len(self._unwritten)

    # reading

    def pending(self) -> list[Event]:
        """Return the events that the MLflow run lacks, in order."""
        with self._reading:
            self._read()
            return list(self._pending.values())

    def ids(self) -> frozenset[Any]:
        """Return the ids of all events."""
        with self._reading:
            self._read()
            return frozenset(self._ids)

    def _read(self) -> None:
        """Take in the whole lines that were appended since the last call, by any process."""
        try:
            with self.events_path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # another machine's, shorter spool took its place
                    self._forget()
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    with suppress(ValueError):  # damaged
                        self._apply(read_line(line))
        except FileNotFoundError:
            self._forget()

    def _apply(self, line: Event) -> None:
        if "received" in line:
            self.last_sender = line["sender"]
            if line["run"] == self._run:
                for received in line["received"]:
                    self._pending.pop(received, None)
        elif "id" in line and line["id"] not in self._ids:
            self._ids.add(line["id"])
            self._pending[line["id"]] = line
            if line["kind"] == "start":
                self.last_start = line

    # the MLflow run

    def known_run(self, uri: str | None = None) -> str | None:
        """Return MLflow's id of the run, if it is known (and in the store `uri`)."""
        try:
            content = json.loads(self._run_path.read_text())
            return str(content["mlflow_run_id"]) if uri in (None, content["uri"]) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def use_run(self, mlflow_run_id: str | None, uri: str) -> None:
        """See the spool from this MLflow run, and remember the run for other processes."""
        with self._reading:
            if mlflow_run_id != self._run:
                self._run = mlflow_run_id
                self._forget()
        if mlflow_run_id is not None and self.known_run(uri) != mlflow_run_id:
            with suppress(StorageError):  # it is found again by its tag
                write_json(self._run_path, {"uri": uri, "mlflow_run_id": mlflow_run_id})

    @property
    def run(self) -> str | None:
        """MLflow's id of the run that the spool is seen from."""
        return self._run

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
