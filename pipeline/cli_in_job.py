"""Runs a command in a submitted job, with the parameters that the sender has parsed: `python -m pipeline.cli_in_job CALL`

CALL is JSON: `command` is the command's name, `parameters` are its values by name, `typed` the words that the run records.

Each line of its stdout gets a mark, because Ray keeps one log for both streams, and the sender separates them again.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any, TextIO, cast

import click

from pipeline.cli import cli
from pipeline.commands.exit_code import exit_code_of
from pipeline.errors import PipelineError
from pipeline.jobs import job_secrets
from pipeline.jobs.job_log import RESULT_MARK


class MarkedLines(io.TextIOBase):
    """A text stream that begins each line with a mark."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click writes bytes to find out whether a stream takes them
            raise TypeError(f"text stream: got {type(text).__name__}, expected str")
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write(f"{RESULT_MARK}{line}" if self._at_start else line)
            self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def main() -> int:
    """Run the command in this process's argument; return the exit code."""
    try:
        job_secrets.receive()
    except PipelineError as error:
        print(f"ddpm-pipe: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout = cast(TextIO, MarkedLines(sys.stdout))
    call = json.loads(sys.argv[1])
    sys.argv = ["ddpm-pipe", *call["typed"]]
    code = exit_code_of(lambda: invoke(cli, call["command"], call["parameters"]))
    sys.stdout.flush()
    return code


def invoke(group: click.Group, name: str, parameters: dict[str, Any]) -> object:
    """Call a command with parsed parameters; missing ones have their defaults."""
    command = group.commands[name]
    with click.Context(command, info_name=name, parent=click.Context(group, info_name="ddpm-pipe")) as context:
        kinds = {parameter.name: parameter.type for parameter in command.params}
        for key, value in parameters.items():
            is_path = isinstance(kinds[key], click.Path)
            context.params[key] = Path(value) if is_path else tuple(value) if isinstance(value, list) else value
        return context.invoke(command, **context.params)


if __name__ == "__main__":
    sys.exit(main())
