"""Output for people during work: lines, and progress as a bar on a terminal or as a line from time to time in a log."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

if TYPE_CHECKING:
    from tqdm.std import tqdm

PLAIN_EVERY_S = 15.0
QUIET_S = 1.0  # shorter work gets no bar


def answer(line: str) -> None:
    """Print a line of the result on stdout, and flush it: a program may wait for it at the other end of a pipe."""
    print(line, flush=True)


class Console:
    """Lines for people, on stderr, so that results on stdout can be piped."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        for bar in list(Bar.shown):
            bar.clear()
        print(line, file=self.stream, flush=True)


class Bar:
    """Progress of countable work, with its rate and the time left.

    It appears after `quiet_s` seconds, even if nothing is done by then.
    """

    shown: ClassVar[set[Bar]] = set()

    def __init__(self, console: Console, what: str, total: int, unit: str = "images", quiet_s: float = QUIET_S) -> None:
        self._stream, self._what, self._total, self._unit = console.stream, what, total, unit
        self._terminal = self._stream.isatty() or "ipykernel" in sys.modules
        self._count = self._first = 0
        self._beside, self._spoke = "", -PLAIN_EVERY_S
        self._lock = threading.Lock()
        self._drawn: tqdm[Any] | None = None
        self._begin = time.monotonic()
        self._quiet_until = self._begin + quiet_s
        # the timer does not keep a bar alive that an error has left behind
        left = weakref.ref(self)
        self._timer = threading.Timer(quiet_s, lambda: bar.refresh() if (bar := left()) is not None else None)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, count: int, beside: str = "", *, first: bool = False) -> None:
        """Show that `count` of the total are done, and the text `beside` it; with `first` the rate counts from here."""
        if first:
            self._first, self._begin = count, time.monotonic()
        self._count, self._beside = count, beside
        if count >= self._total:
            self.close()
        else:
            self.refresh()

    def refresh(self) -> None:
        """Show the progress, unless it is too early or was shown a moment ago."""
        with self._lock:
            if time.monotonic() >= self._quiet_until:
                self._show(done=False)

    def clear(self) -> None:
        """Clear the bar for a line; the next refresh draws it again, below the line."""
        if self._drawn is not None:
            self._drawn.clear()

    def close(self) -> None:
        """Leave the bar as it is, and draw it no more."""
        self._timer.cancel()
        with self._lock:
            if self._drawn is not None or self._spoke >= 0 or time.monotonic() >= self._quiet_until:
                self._show(done=True)
            if self._drawn is not None:
                self._drawn.close()
            Bar.shown.discard(self)

    def _show(self, *, done: bool) -> None:
        if self._terminal:
            bar = self._bar()
            bar.n, bar.initial, bar.start_t = self._count, self._first, time.time() - (time.monotonic() - self._begin)
            bar.set_postfix_str(self._beside, refresh=False)
            bar.refresh()
        elif done or time.monotonic() - self._spoke >= PLAIN_EVERY_S:
            from tqdm.std import tqdm

            self._spoke = time.monotonic()
            elapsed = self._spoke - self._begin
            line = tqdm.format_meter(
                self._count,
                self._total,
                elapsed,
                ncols=0,
                prefix=self._what,
                unit=f" {self._unit}",
                postfix=self._beside or None,
                initial=self._first,
            )
            print(line, file=self._stream, flush=True)

    def _bar(self) -> tqdm[Any]:
        if self._drawn is None:
            from tqdm.auto import tqdm

            tqdm.monitor_interval = 0  # no monitor thread
            tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system
            self._drawn = tqdm(
                desc=self._what, total=self._total, unit=f" {self._unit}", file=self._stream, dynamic_ncols=True
            )
            Bar.shown.add(self)
        return self._drawn


def rate(per_s: float) -> str:
    """Return a rate as text: 0.042, 3.1, 1,020."""
    return f"{per_s:.2g}" if per_s < 10 else f"{per_s:,.0f}"


def duration(seconds: float) -> str:
    """Return a duration as text: 42 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def plural(count: float, noun: str) -> str:
    """Return a count with its noun: 1 worker, 2 workers, 0.5 GPUs."""
    return f"{count:,g} {noun}{'s' * (count != 1)}"


def size(num_bytes: float) -> str:
    """Return a number of bytes as text: 571 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
