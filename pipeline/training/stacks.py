"""What every thread of a worker was doing when a step took too long or the process crashed, written into a file of the run."""

from __future__ import annotations

import contextlib
import faulthandler
from pathlib import Path
from typing import TextIO

STACKS = "stacks"  # folder of a run
SHARE = 0.8  # of the time after which a hanging step fails: before it does


class Stacks:
    """Watches the steps of this process; a context. The file stays only if something was written, or the process was killed."""

    def __init__(self, path: Path, step_may_take_s: float) -> None:
        self._path, self._after_s = path, SHARE * step_may_take_s
        self._file: TextIO | None = None

    def __enter__(self) -> Stacks:
        with contextlib.suppress(OSError):  # training does not need it
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
            self._was_enabled = faulthandler.is_enabled()
            faulthandler.enable(self._file)
        return self

    def step(self) -> None:
        """Begin the time of another step."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._after_s, file=self._file)

    def __exit__(self, *exc: object) -> None:
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        if self._was_enabled:  # this process's own choice
            faulthandler.enable(2)
        else:
            faulthandler.disable()
        self._file.close()
        forget_empty(self._path.parent)


def path_of(run_folder: Path, attempt: int, rank: int) -> Path:
    """Return where a worker of an attempt writes."""
    return run_folder / STACKS / f"attempt-{attempt}-worker-{rank}.txt"


def forget_empty(folder: Path) -> None:
    """Remove empty files, and the folder if none is left."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.stat().st_size == 0:
                path.unlink()
        folder.rmdir()  # refused while something is in it
