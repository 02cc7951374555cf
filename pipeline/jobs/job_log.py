"""Print a job's log as it arrives: whole lines, each once, with results separated from the rest."""

from __future__ import annotations

import re
from collections.abc import Callable

RESULT_MARK = "\x1f"  # starts each line of the job's stdout; Ray keeps one log for both streams
SAVED = "stopped, saved at step"  # printed by a training that has stopped on request
NOISE = re.compile(r"^Running entrypoint for job |^[-0-9:, ]+\tINFO job_manager\.py|^\s*$")


class LogLines:
    """Prints a log that arrives in pieces: whole lines, each once, however often the log is read from its beginning."""

    def __init__(self, out: Callable[[str], None], log: Callable[[str], None]) -> None:
        self._out, self._log = out, log
        self._shown = self._position = 0
        self._rest = ""
        self.saved = False

    def rewind(self) -> None:
        """Expect the log from its beginning."""
        self._position = 0

    def write(self, text: str) -> None:
        """Print the new part of the next piece."""
        new = text[max(0, self._shown - self._position) :]
        self._position += len(text)
        self._shown = max(self._shown, self._position)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._print(line)

    def close(self) -> None:
        """Print a last line without a newline."""
        if self._rest:
            self._print(self._rest)
            self._rest = ""

    def _print(self, line: str) -> None:
        self.saved = self.saved or (line.startswith("ddpm-pipe: ") and SAVED in line)
        if line.startswith(RESULT_MARK):
            self._out(line.removeprefix(RESULT_MARK))
        elif not NOISE.match(line):
            self._log(line)
