"""The one thread that talks to the tracking store: it takes the spool's events in order, and waits so that nobody else must."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.redaction import one_line, public_uri
from pipeline.tracking.spool import Event, Position, Spool

if TYPE_CHECKING:
    from pipeline.tracking.delivery import Delivery

log = logging.getLogger(__name__)

GRACE_S = 3.0  # how long closing waits for a store that does not answer
GRACE_KNOWN_DEAD_S = 0.3  # ... and where an earlier process of the run found it dead already
MAX_BACKOFF_S = 30.0


class Writer:
    """Delivers a spool to one store; `token` tells this process from others that deliver the same spool."""

    def __init__(
        self, run_dir: Path, uri: str, artifacts: Path | None, spool: Spool, token: str, interval_s: float = 1.0
    ) -> None:
        self._run_dir = run_dir
        self._uri = uri
        self._public_uri = public_uri(uri)
        self._artifacts = artifacts
        self._spool = spool
        self._token = token
        self._interval_s = interval_s
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._delivery: Delivery | None = None
        self._failures = 0
        self._attempt = 0.0  # when the thread last began to deliver ...
        self._failed_attempt = -1.0  # ... when it began the last time that failed
        self._failed_files = -1.0  # ... or in which a file could not be stored
        self._retry_files_at = 0.0
        self._answers = uri.startswith("sqlite:")
        self._asked_at = math.inf  # when the store was first asked: importing MLflow is not the store's fault
        self.problem: str | None = None

    # the thread

    def start(self) -> None:
        """Start the thread unless it runs."""
        self._stopping = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; where it hangs in a call, it is left behind."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(0.5)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(min(self._interval_s * 2 ** min(self._failures, 10), MAX_BACKOFF_S))
            self._wake.clear()
            self._attempt = time.monotonic()
            try:
                while not self._stopping and self.deliver_some():
                    pass
            except Exception as error:
                self._note_failure(error)

    def drain(self, timeout: float, patient: bool = False) -> bool:
        """Wait until the store has all that the spool holds now; give up early where it is away, unless `patient`."""
        grace_s = GRACE_KNOWN_DEAD_S if self._spool.unreachable else GRACE_S
        begin = moved = time.monotonic()
        woken = 0.0
        end, offset = self._spool.size(), -1
        while True:
            position = self.position()
            if position.offset >= end and not position.deferred and not self._spool.unwritten:
                return True
            now = time.monotonic()
            if position.offset != offset:  # by this process or another one
                offset, moved = position.offset, now
            hangs = not self._answers and now - max(moved, self._asked_at) > grace_s
            if hangs and not patient:
                self._spool.mark_unreachable(True)
            gone = hangs or self._failed_attempt >= begin or (position.offset >= end and self._failed_files >= begin)
            if now - begin > timeout or (gone and not patient):
                return False
            if now - woken > 0.5:
                woken = now
                self._retry_files_at = 0.0  # also files that failed in an attempt begun before this wait
                self.start()
                self._wake.set()
                self._spool.write_unwritten()
            time.sleep(0.02)

    def deliver_all(self, timeout: float) -> None:
        """Deliver the whole spool in this thread. Raises what MLflow raises, or TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            position = self.position()
            if position.offset >= self._spool.size() and not position.deferred:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(self.problem or f"not everything was taken within {timeout:.0f} s")
            if not self.deliver_some():
                if position.deferred and self.problem:
                    raise OSError(self.problem)
                time.sleep(0.2)  # the run's own process is delivering

    # one part of the spool

    def position(self) -> Position:
        """Return how far delivery to this store has come."""
        position = self._spool.position()
        return position if position.uri == self._public_uri else Position()

    def deliver_some(self) -> bool:
        """Deliver the next part of the spool; return whether there may be more. Raises what MLflow raises."""
        with self._spool.delivering() as mine:
            if not mine:  # another process is asking
                self._asked_at = min(self._asked_at, time.monotonic())
                return False
            position = self.position()
            files_due = position.deferred and time.monotonic() >= self._retry_files_at
            if position.offset >= self._spool.size() and not files_due:
                return False
            delivery, position = self._attached(position)
            if files_due:
                position = self._retry_files(delivery, position)
            batch = self._spool.read(position.offset)
            self._deliver(delivery, batch, position)
            return bool(batch)

    def _attached(self, position: Position) -> tuple[Delivery, Position]:
        """Make sure that there is an MLflow run to deliver to, and return where to go on."""
        from pipeline.tracking.delivery import Delivery

        if self._delivery is None:
            prepare_environment()
            self._delivery = Delivery(self._uri, self._run_dir, self._artifacts)
            self._asked_at = min(self._asked_at, time.monotonic())
        elif position.writer == self._token and position.mlflow_run_id == self._delivery.run_id:
            return self._delivery, position
        was_known = self._delivery.attach(position.mlflow_run_id, self._spool.last_start(), self._run_dir.name)
        self._answers = True
        if not was_known:  # a new run, or one whose delivery is not known: all again, what is there is skipped
            position = Position(self._public_uri)
        return self._delivery, replace(position, mlflow_run_id=self._delivery.run_id, writer=self._token)

    def _deliver(self, delivery: Delivery, batch: list[tuple[Event, int]], position: Position) -> None:
        from pipeline.tracking.delivery import DeferredError, RejectedError, groups

        for events, end in groups(batch):
            deferred = position.deferred
            try:
                if events:
                    delivery.deliver(events)
            except RejectedError as error:
                self._reject(delivery, events, error)
            except DeferredError as error:
                deferred = (*deferred, position.offset)
                self._note_file_trouble(error)
            position = replace(position, offset=end, deferred=deferred)
            self._spool.save_position(position)
            self._note_success(position)

    def _retry_files(self, delivery: Delivery, position: Position) -> Position:
        """Try again what could not be stored before the rest went on."""
        from pipeline.tracking.delivery import DeferredError, RejectedError

        for offset in position.deferred:
            events = [event for event, _ in self._spool.read(offset)[:1]]
            try:
                delivery.deliver(events)
            except RejectedError as error:
                self._reject(delivery, events, error)
            except DeferredError as error:
                self._note_file_trouble(error)
                break
            position = replace(position, deferred=position.deferred[1:])
            self._spool.save_position(position)
            self._note_success(position)
        return position

    def _reject(self, delivery: Delivery, events: list[Event], error: Exception) -> None:
        """Set aside what the store refuses for good; of several events, those that it refuses one by one."""
        from pipeline.tracking.delivery import RejectedError

        if len(events) > 1:
            for event in events:
                try:
                    delivery.deliver([event])
                except RejectedError as one:
                    self._reject(delivery, [event], one)
            return
        log.warning("tracking: an event of kind %r was refused: %s", events[0]["kind"], error)
        self._spool.reject(events[0], str(error))

    # how it goes

    def _note_success(self, position: Position) -> None:
        self._failures = 0
        self._answers = True
        if not position.deferred:
            self.problem = None
        self._spool.mark_unreachable(False)

    def _note_file_trouble(self, error: Exception) -> None:
        if self.problem is None:
            log.warning("tracking: %s: a file cannot be stored: %s; training goes on", self._public_uri, error)
        self.problem = one_line(error)
        self._failed_files = self._attempt
        self._retry_files_at = time.monotonic() + MAX_BACKOFF_S

    def _note_failure(self, error: Exception) -> None:
        if self._failures == 0:
            log.warning("tracking: %s: %s; training goes on", self._public_uri, one_line(error))
        self._failures += 1
        self._answers = False
        self._delivery = None
        self.problem = one_line(error)
        self._failed_attempt = self._attempt
        self._spool.mark_unreachable(True)


def prepare_environment() -> None:
    """Set what MLflow reads from the environment: short waits, no telemetry, no pickle. The user's own waits stay."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
