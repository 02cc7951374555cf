"""A lock in an object store: a lease with one holder at a time, which is replaced if it stops renewing the lease.

The lease is one object, `lease.json`, that names its holder; `{}` means that it is free. Every write to it is conditional: it creates the
object, or replaces the version that the writer has read. The holder renews the lease every `BEAT_S` seconds. A holder that has not renewed
it for `MISSED_BEATS` beats, by the store's clock, counts as dead and may be replaced. If that holder was only stopped and continues, its
next renewal fails: it has lost the lease.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import RunLockedError, StorageError
from pipeline.storage.remote import RemoteFolder, Version

BEAT_S = 10.0
MISSED_BEATS = 3
NAME = "lease.json"


class Lease:
    """The lease of what `folder` belongs to; `what` names that in messages ("run k7m2abcd")."""

    def __init__(self, folder: RemoteFolder, what: str, beat_s: float | None = None) -> None:
        self._folder, self._what = folder, what
        self._beat_s = BEAT_S if beat_s is None else beat_s
        self._token = secrets.token_hex(8)
        self._since = ""
        self._held: Version | None = None
        self.was_held = False
        self._writing = threading.Lock()
        self._closing = threading.Event()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease for the time of the context. Raises RunLockedError, which names the holder, if another process holds it."""
        self.acquire()
        self._closing.clear()
        beating = threading.Thread(target=self._beat_until_closed, name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._closing.set()
            beating.join()
            with suppress(StorageError), self._writing:  # if the store fails, the lease expires by itself
                if self._held is not None:
                    self._folder.replace(NAME, b"{}", self._held)
                self._held = None

    def acquire(self) -> None:
        """Take the lease, without a thread that renews it. Raises RunLockedError, which names the holder, if another process holds it."""
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        while True:  # in each round but the last, another process has written between the read and the write
            found = self._folder.version(NAME)
            if found is not None and self._is_live(found):
                raise RunLockedError(
                    f"{self._what} is being worked on by {_words(found)}; wait for it, or stop that process "
                    f"first (one that has died is replaced after {MISSED_BEATS * self._beat_s:g} s)"
                )
            if self._write(found):
                self.was_held = True
                return

    def require(self) -> None:
        """Renew the lease. Raises RunLockedError if another process has it."""
        if not self._renew():
            raise RunLockedError(
                f"{self._what} was taken over by another process, since this one did not answer for "
                f"{MISSED_BEATS * self._beat_s:g} s; leave it to that one"
            )

    def holder(self) -> str | None:
        """Return a description of the current holder; None if there is none."""
        found = self._folder.version(NAME)
        return _words(found) if found is not None and self._is_live(found) else None

    def _beat_until_closed(self) -> None:
        while not self._closing.wait(self._beat_s):
            with suppress(StorageError):  # the store may recover; if not, `require` raises its error
                if not self._renew():
                    return

    def _renew(self) -> bool:
        with self._writing:
            if self._held is None or not self._write(self._held):
                self._held = None
            return self._held is not None

    def _write(self, before: Version | None) -> bool:
        """Write this holder if `before` is still the newest version (None: no object); return whether it was."""
        about = {
            "token": self._token,
            "beat": secrets.token_hex(8),  # no two versions are equal, and neither are their tags
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "place": _place(),
            "started": _started(os.getpid()),
        }
        content = json.dumps(about).encode()
        if before is None:
            self._folder.create(NAME, content)
        else:
            self._folder.replace(NAME, content, before)
        # read back for the tag, and because obstore repeats a write whose answer was lost, which the store then refuses
        found = self._folder.version(NAME)
        if found is None or _about(found).get("token") != self._token:
            return False
        self._held = found
        return True

    def _is_live(self, found: Version) -> bool:
        """Whether a version names a holder that is not known to be dead."""
        about = _about(found)
        if not about.get("token"):
            return False
        if about.get("place") == _place() is not None and _started(about.get("pid") or 0) != about.get("started"):
            return False  # a dead process of this machine: no need to wait for missed beats
        return self._now() - found.modified_s <= MISSED_BEATS * self._beat_s

    def _now(self) -> float:
        """Return the store's time: that of an object just written."""
        clock = f"clock-{self._token}"
        self._folder.write(clock, b"")
        found = self._folder.version(clock)
        self._folder.delete(clock)
        if found is None:
            raise StorageError(
                f"{self._folder}/{clock}: was removed right after it was written; is another tool cleaning up?"
            )
        return found.modified_s


def _about(found: Version) -> dict[str, Any]:
    try:
        content = json.loads(found.content or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _words(found: Version) -> str:
    about = _about(found)
    return f"process {about.get('pid', '?')} on {about.get('host', '?')} since {about.get('since', '?')}"


def _place() -> str | None:
    """Return the ids of this machine's last boot and of this process's PID namespace; None on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return the start time of a process, which tells it from a later process with the same PID; None if it has ended."""
    try:
        after_name = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return None if after_name[0] in "ZX" else after_name[19]
