"""What the user watches while work goes on: lines, and one progress line on a terminal or a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

PLAIN_EVERY_S = 15.0


def answer(line: str) -> None:
    """Print a line of what was asked for on stdout, at once: a program may wait for it at the other end of a pipe."""
    print(line, flush=True)


class Console:
    """Lines for people, on stderr so that results on stdout can be piped."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._width = 0
        self._spoke = -PLAIN_EVERY_S

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(line, file=self._stream, flush=True)

    def progress(self, line: str, *, done: bool = False) -> None:
        """Replace the progress line; in a log, print it every fifteen seconds and when `done`."""
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
            if done:
                self._stream.write("\n")
                self._width = 0
            self._stream.flush()
        elif done or time.monotonic() - self._spoke >= PLAIN_EVERY_S:
            self._spoke = time.monotonic()
            print(line, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


class Rate:
    """Progress of countable work, with its rate and the time left; work of under a second is not worth a line."""

    def __init__(self, console: Console, what: str, total: int, unit: str = "images") -> None:
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._begin = time.monotonic()

    def __call__(self, count: int) -> None:
        """Show that `count` of the total are done."""
        wall = time.monotonic() - self._begin
        if wall < 1.0:
            return
        left = (self._total - count) * wall / max(count, 1)
        line = f"{self._what} {count}/{self._total}  {rate(count / wall)} {self._unit}/s  {duration(left)} left"
        self._console.progress(line, done=count >= self._total)


def rate(per_s: float) -> str:
    """Return a rate as people say it: 0.042, 3.1, 1,020."""
    return f"{per_s:.2g}" if per_s < 10 else f"{per_s:,.0f}"


def duration(seconds: float) -> str:
    """Return a time as people say it: 42 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
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
    """Return a number of bytes as people say it: 571 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
