"""What a submitted job runs: the same command line, in the cluster. `python -m pipeline.cli_in_job train --preset mnist ...`

Its results on stdout are marked line by line, because Ray keeps one log for both streams and whoever follows wants them apart.
"""

from __future__ import annotations

import io
import re
import sys
from typing import TextIO, cast

from pipeline.cli import run
from pipeline.errors import PipelineError
from pipeline.jobs import job_secrets
from pipeline.jobs.job_log import RESULT_MARK


class MarkedLines(io.TextIOBase):
    """A text stream that opens each line with a mark."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """Write text, marked."""
        if not isinstance(text, str):  # whoever tries wants to know whether this stream takes bytes
            raise TypeError("text is wanted")
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write(f"{RESULT_MARK}{line}" if self._at_start else line)
            self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flush the stream below."""
        self._stream.flush()


def main() -> int:
    """Run the command line of this process; return the exit code."""
    try:
        job_secrets.receive()
    except PipelineError as error:
        print(f"ddpm-pipe: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout = cast(TextIO, MarkedLines(sys.stdout))
    code = run(sys.argv[1:])
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
