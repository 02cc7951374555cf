"""Ends what Ray leaves behind when the process that started it is killed: `python -m pipeline.watchdog FOLDER`.

Ray's workers notice that their driver is gone; some of its agents do not, and its folder stays. This process holds the reading end of a
pipe whose other end is the driver's. When that end closes without a message, the driver is dead: the watchdog ends every process that works
in Ray's folder, and removes the folder. (It knows them by their open files: they overwrite their command lines and environments.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

ALL_IS_WELL = b"."
GRACE_S = 3.0  # Ray ends most of its processes by itself


class Watchdog:
    """The driver's end: start it before Ray, and dismiss it at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.watchdog", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal must not end it
            cwd="/",
        )

    def started(self) -> list[psutil.Process]:
        """Return the processes that this process has started in Ray's folder, and all below them."""
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it has ended already
                if child.pid != self._process.pid and str(self._folder) in " ".join(child.cmdline()):
                    found += [child, *child.children(recursive=True)]
        return found

    def sweep_out(self) -> None:
        """End every process that works in Ray's folder now, except this one and the watchdog: those of a start that failed."""
        _end_all_in(self._folder, but=self._process.pid)

    def dismiss(self) -> None:
        """End the watchdog: Ray was shut down."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.write(ALL_IS_WELL)
            self._process.stdin.close()
        self._process.wait()


def main(folder: Path) -> None:
    """Wait for the driver to end, and clean up unless it dismissed the watchdog."""
    if sys.stdin.buffer.read() == ALL_IS_WELL:
        return
    time.sleep(GRACE_S)
    _end_all_in(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end_all(processes: Iterable[psutil.Process]) -> None:
    """Kill processes; some may have ended already."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _end_all_in(folder: Path, but: int | None = None) -> None:
    for _ in range(5):  # a process may start another while the first are being ended
        left = [process for process in _working_in(folder) if process.pid not in (os.getpid(), but)]
        if not left:
            break
        end_all(left)
        time.sleep(0.2)


def _working_in(folder: Path) -> Iterator[psutil.Process]:
    prefix = str(folder)
    for process in psutil.process_iter():
        try:
            if prefix in " ".join(process.cmdline()) or any(f.path.startswith(prefix) for f in process.open_files()):
                yield process
        except (psutil.Error, OSError):  # it belongs to another user, or has ended
            continue


if __name__ == "__main__":
    main(Path(sys.argv[1]))
