"""The command line: the list of its commands. `ddpm-pipe --help` imports nothing heavy."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click

from pipeline import __version__
from pipeline.commands.data import ingest, inspect
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import compare, evaluate
from pipeline.commands.exchange import export, import_
from pipeline.commands.exit_code import exit_code_of
from pipeline.commands.remove import prune, rm
from pipeline.commands.results import curves, report, runs, sample, sync, ui, verify
from pipeline.commands.schedule import schedule
from pipeline.commands.submit import jobs
from pipeline.commands.sweep import serve, sweep
from pipeline.commands.train import init, resume, train
from pipeline.redaction import refuse_secrets

COMMANDS = (
    train,
    init,
    resume,
    sweep,
    sample,
    evaluate,
    compare,
    report,
    curves,
    verify,
    runs,
    jobs,
    ui,
    ingest,
    inspect,
    schedule,
    export,
    import_,
    serve,
    sync,
    rm,
    prune,
    doctor,
)


class InOrder(click.Group):
    """A group whose help lists the commands in the order of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddpm-pipe")
def cli() -> None:
    """Train, sample, score and track DDPMs, on a laptop or a Ray cluster with the same command.

    With no arguments, `ddpm-pipe train` trains on real handwritten digits, here, in a few minutes. State lives in the current
    directory, or in $DDPM_PIPE_HOME.
    """


for _command in COMMANDS:
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    words = [in_home_folder(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    sys.exit(exit_code_of(lambda: invoke(words)))


def in_home_folder(word: str) -> str:
    """Expand `~/` in `--data=~/x` and `-s data.source=~/x`, which a shell does not."""
    option, equals, value = word.partition("=")
    if equals and value.startswith("~/") and re.fullmatch(r"[\w.-]+", option):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(word) if word.startswith("~/") else word


def invoke(words: Sequence[str]) -> object:
    """Run the command that the words name. Raises UsageError if a word is a secret."""
    refuse_secrets(words, "the command line")
    return cli.main(args=list(words), prog_name="ddpm-pipe", standalone_mode=False)
