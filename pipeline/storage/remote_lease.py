"""Who works on something in an object store: one holder at a time, found dead when it no longer beats.

pyarrow cannot ask the store to create an object only where there is none, so the right is taken as at a bakery's counter, relying on
this alone: a listing shows every object whose writing was answered before it began.

    claim-<token>              1. write a claim; 2. list. Whoever sees no other claim and no holder has the lease,
    held-<time>-<token>        3. and writes that, with the store's time in milliseconds; rewritten at each beat.

Of two that claim at once, at least one lists after both have written, sees the other, and gives way; where both see each other, the
one with the smaller token stays. So there is one winner, and every loser knows the winner's name. A holder that has not beaten for
`MISSED_BEATS` beats, by the store's clock, is dead: its objects are removed and the lease is taken over. Should it come back (it was
only stopped), it finds its object gone, or a later one beside it, and has lost the lease.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import RunLockedError, StorageError
from pipeline.storage.remote import RemoteFolder, StoredObject

BEAT_S = 10.0
MISSED_BEATS = 3
_PAUSE_S = 0.3
_PATIENCE_S = 60.0
_NAME = re.compile(r"(claim|held-\d{13})-[0-9a-f]{16}")


class Lease:
    """The right to work on what `folder` belongs to; `what` names that in messages ("run k7m2abcd")."""

    def __init__(self, folder: RemoteFolder, what: str, beat_s: float | None = None) -> None:
        self._folder, self._what = folder, what
        self._beat_s = BEAT_S if beat_s is None else beat_s
        self._token = secrets.token_hex(8)
        self._claim = f"claim-{self._token}"
        self._held = ""
        self._since = ""
        self._closing = threading.Event()

    @property
    def was_held(self) -> bool:
        """Whether this one has ever been acquired."""
        return self._held != ""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease for the time of the context; RunLockedError, naming the holder, where another one does."""
        self.acquire()
        beating = threading.Thread(target=self._beat_until_closed, name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._closing.set()
            beating.join()
            with suppress(StorageError):  # then it is free once it is seen to be dead
                self._folder.delete(self._held)

    def require(self) -> None:
        """Refuse to go on where the lease was lost to another holder, or could not be kept (RunLockedError)."""
        if not self._held or not self._is_mine():
            raise RunLockedError(
                f"{self._what} was taken over by another process, since this one did not answer for "
                f"{MISSED_BEATS * self._beat_s:g} s; leave it to that one"
            )

    def holder(self) -> str | None:
        """Return who holds the lease now, in words; None where nobody does. Writes a small object, to learn the store's time."""
        live = self._live(self._now(f"clock-{self._token}"))
        self._folder.delete(f"clock-{self._token}")
        return next((self._words(entry) for entry in live if entry.name.startswith("held-")), None)

    def acquire(self) -> None:
        """Take the lease without keeping it alive, as `hold` does before anything else."""
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if self._try():
                return
            time.sleep(_PAUSE_S * random.uniform(0.5, 1.5))
        raise RunLockedError(f"{self._what}: several processes ask for it again and again; stop all but one")

    def _try(self) -> bool:
        """Claim once; False where another claim is in the way, which may yet be given up."""
        now = self._now(self._claim)
        try:
            others = [entry for entry in self._live(now, clean=True) if entry.name != self._claim]
            for entry in others:
                if entry.name.startswith("held-"):
                    raise RunLockedError(
                        f"{self._what} is being worked on by {self._words(entry)}; wait for it, or stop that process "
                        f"first (one that has died is passed over after {MISSED_BEATS * self._beat_s:g} s)"
                    )
            while others:
                if any(entry.name < self._claim for entry in others):
                    return False
                time.sleep(_PAUSE_S)
                now = self._now(self._claim)
                others = [entry for entry in self._live(now, clean=True) if entry.name != self._claim]
                if any(entry.name.startswith("held-") for entry in others):
                    return False
            return self._take(now)
        finally:
            self._folder.delete(self._claim)

    def _take(self, now: float) -> bool:
        """Turn the claim into the lease, unless the claim was passed over meanwhile because this process was stopped."""
        self._held = f"held-{int(now * 1000):013d}-{self._token}"
        self._write(self._held)
        if self._folder.stat(self._claim) is not None and self._is_mine():
            return True
        self._folder.delete(self._held)
        self._held = ""
        return False

    def _beat_until_closed(self) -> None:
        while not self._closing.wait(self._beat_s):
            with suppress(StorageError):  # the store may come back; whoever asks `require` is told
                if not self._is_mine():
                    self._folder.delete(self._held)  # a beat that was on its way while this process stood still
                    return
                self._write(self._held)

    def _is_mine(self) -> bool:
        """Whether the lease is still this one's, by the store."""
        names = {entry.name for entry in self._folder.objects()}
        held = max((name for name in names if name.startswith("held-")), default="")
        return self._held in names and self._held == held

    def _live(self, now: float, clean: bool = False) -> list[StoredObject]:
        """Return claims and holders that are alive at the store's time `now`; the others are removed if `clean`."""
        live = []
        for entry in self._folder.objects():
            if not _NAME.fullmatch(entry.name):
                continue
            dead = now - entry.modified_s > MISSED_BEATS * self._beat_s or self._died_here(entry)
            if not dead:
                live.append(entry)
            elif clean:
                self._folder.delete(entry.name)
        return live

    def _died_here(self, entry: StoredObject) -> bool:
        """Whether a holder was a process of this very machine that is gone: then nobody has to wait for its beats."""
        about = self._about(entry)
        return about.get("place") == _place() is not None and _started(about.get("pid") or 0) != about.get("started")

    def _about(self, entry: StoredObject) -> dict[str, Any]:
        try:
            content = json.loads(self._folder.read(entry.name) or b"{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _words(self, entry: StoredObject) -> str:
        about = self._about(entry)
        return f"process {about.get('pid', '?')} on {about.get('host', '?')} since {about.get('since', '?')}"

    def _write(self, name: str) -> None:
        self._folder.write(name, json.dumps(self._self()).encode())

    def _now(self, name: str) -> float:
        """Return the store's time, which is that of an object just written."""
        self._write(name)
        entry = self._folder.stat(name)
        if entry is None:
            raise StorageError(
                f"{self._folder}/{name}: was removed right after it was written; is another tool cleaning up?"
            )
        return entry.modified_s

    def _self(self) -> dict[str, Any]:
        pid = os.getpid()
        return {
            "host": socket.gethostname(),
            "pid": pid,
            "since": self._since,
            "place": _place(),
            "started": _started(pid),
        }


def _place() -> str | None:
    """Return what names this machine since it started, and the space of its process numbers; None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process of this machine started, which tells it from a later one of its number; None where it is gone."""
    try:
        after_name = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return None if after_name[0] in "ZX" else after_name[19]
