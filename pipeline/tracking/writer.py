"""The thread that talks to the tracking store: it delivers the spool's events in order, so that training never waits for the store."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.redaction import one_line, public_uri
from pipeline.tracking.spool import Event, Spool

if TYPE_CHECKING:
    from pipeline.tracking.delivery import Delivery
    from pipeline.tracking.tracker import TrackingSettings

log = logging.getLogger(__name__)

GRACE_S = 3.0  # how long closing waits for a store that does not answer ...
GRACE_KNOWN_DEAD_S = 0.3  # ... and for one that did not answer before in this process
MAX_BACKOFF_S = 30.0
MAX_METRICS_PER_CALL = 1000
FILE_KINDS = {"image", "artifact", "model"}


class Writer:
    """Delivers a spool to one store; `token` distinguishes processes that deliver the same spool."""

    _silent: ClassVar[set[str]] = set()  # stores that did not answer

    def __init__(self, run_dir: Path, settings: TrackingSettings, spool: Spool, token: str) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._public_uri = public_uri(settings.uri)
        self._spool = spool
        self._token = token
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._delivery: Delivery | None = None
        self._failures = 0
        self._attempt = 0.0  # when the thread last started to deliver ...
        self._failed_attempt = -1.0  # ... when it last started and failed
        self._failed_files = -1.0  # ... or failed to store a file
        self._retry_files_at = 0.0
        self._answers = settings.uri.startswith("sqlite:")
        self._asked_at = math.inf  # when the store was first asked; the import of MLflow does not count
        self.problem: str | None = None
        spool.use_run(spool.known_run(self._public_uri), self._public_uri)

    # the thread

    def start(self) -> None:
        """Start the thread if it is not running."""
        self._stopping = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and wait half a second; a call may hang."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(0.5)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(min(self._settings.batch_interval_s * 2 ** min(self._failures, 10), MAX_BACKOFF_S))
            self._wake.clear()
            self._attempt = time.monotonic()
            try:
                while not self._stopping and self.deliver_some():
                    pass
            except Exception as error:
                self._note_failure(error)

    def drain(self, timeout: float, patient: bool = False) -> bool:
        """Wait until the store has everything in the spool; give up early if the store does not answer, unless `patient`."""
        grace_s = GRACE_KNOWN_DEAD_S if self._public_uri in self._silent else GRACE_S
        begin = moved = time.monotonic()
        woken = 0.0
        wanted = {event["id"] for event in self._spool.pending()}
        count = -1
        while True:
            left = [event for event in self._spool.pending() if event["id"] in wanted]
            if not left and not self._spool.unwritten:
                return True
            now = time.monotonic()
            if len(left) != count:  # delivered by this process or another one
                count, moved = len(left), now
            hangs = not self._answers and now - max(moved, self._asked_at) > grace_s
            if hangs and not patient:
                self._silent.add(self._public_uri)
            only_files = bool(left) and all(event["kind"] in FILE_KINDS for event in left)
            gone = hangs or self._failed_attempt >= begin or (only_files and self._failed_files >= begin)
            if now - begin > timeout or (gone and not patient):
                return False
            if now - woken > 0.5:
                woken = now
                self._retry_files_at = 0.0  # retry files that failed before this wait, too
                self.start()
                self._wake.set()
                self._spool.write_unwritten()
            time.sleep(0.02)

    def deliver_all(self, timeout: float) -> int:
        """Deliver the whole spool in this thread; return how many events were sent. Raises what MLflow raises, or TimeoutError."""
        deadline = time.monotonic() + timeout
        sent = 0
        while left := self._spool.pending():
            if time.monotonic() > deadline:
                raise TimeoutError(self.problem or f"not everything was taken within {timeout:.0f} s")
            done = self.deliver_some()
            sent += done
            if not done and self._spool.pending() == left:
                if self.problem:
                    raise OSError(self.problem)
                time.sleep(0.2)  # the run's own process is delivering
        return sent

    # one part of the spool

    def deliver_some(self) -> int:
        """Deliver the next events that fit into one call; return how many. Raises what MLflow raises."""
        with self._spool.delivering() as mine:
            if not mine:  # another process is delivering
                self._asked_at = min(self._asked_at, time.monotonic())
                return 0
            if not self._due():
                return 0
            delivery = self._attached()
            events = next_group(self._due())
            if events:
                self._deliver(delivery, events)
            return len(events)

    def _due(self) -> list[Event]:
        """Return the pending events, without files while the artifact store is left alone after a failure."""
        pending = self._spool.pending()
        if time.monotonic() >= self._retry_files_at:
            return pending
        return [event for event in pending if event["kind"] not in FILE_KINDS]

    def _attached(self) -> Delivery:
        """Return the connection to the MLflow run; look the run up again if another process has delivered."""
        from pipeline.tracking.delivery import Delivery

        if self._delivery is None:
            prepare_environment()
            self._delivery = Delivery(self._settings, self._run_dir)
            self._asked_at = min(self._asked_at, time.monotonic())
        elif self._spool.last_sender == self._token and self._spool.run == self._delivery.run_id:
            return self._delivery
        self._delivery.attach(self._spool.known_run(self._public_uri), self._spool.last_start, self._run_dir.name)
        self._answers = True
        self._spool.use_run(self._delivery.run_id, self._public_uri)
        return self._delivery

    def _deliver(self, delivery: Delivery, events: list[Event]) -> None:
        from pipeline.tracking.delivery import DeferredError, RejectedError

        try:
            delivery.deliver(events)
        except DeferredError as error:
            self._note_file_trouble(error)
        except RejectedError as error:
            if len(events) > 1:  # some of them may be sound
                for event in events:
                    self._deliver(delivery, [event])
                return
            log.warning("tracking: an event of kind %r was refused: %s", events[0]["kind"], error)
            self._spool.receive(events, self._token, refused=str(error))
        else:
            self._spool.receive(events, self._token)
            self._note_success(is_file=events[0]["kind"] in FILE_KINDS)

    # how it goes

    def _note_success(self, *, is_file: bool) -> None:
        self._failures = 0
        self._answers = True
        self._silent.discard(self._public_uri)
        if is_file or self._failed_files < 0:
            self.problem = None
            self._failed_files = -1.0

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
        self._silent.add(self._public_uri)


def next_group(events: Sequence[Event]) -> list[Event]:
    """Return the events of the next call: metrics of several events up to the limit, whole events; else one event."""
    group: list[Event] = []
    count = 0
    for event in events:
        size = len(event["values"]) if event["kind"] == "metrics" and isinstance(event.get("values"), dict) else 0
        if group and (not size or count + size > MAX_METRICS_PER_CALL):
            break
        group.append(event)
        count += size
        if not size:
            break
    return group


def prepare_environment() -> None:
    """Set environment variables of MLflow: short timeouts unless the user set others, no telemetry, no pickle."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
