"""The command line: each command parses, calls one function, and prints. `ddpm-pipe --help` imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from pipeline import __version__
from pipeline.commands.data import ingest, inspect
from pipeline.commands.doctor import doctor
from pipeline.commands.evaluate import compare, evaluate
from pipeline.commands.exchange import export, import_
from pipeline.commands.results import runs, sample, sync, ui
from pipeline.commands.schedule import schedule
from pipeline.commands.submit import jobs
from pipeline.commands.sweep import serve, sweep
from pipeline.commands.train import resume, train
from pipeline.errors import PipelineError
from pipeline.redaction import refuse_secrets
from pipeline.signals import Terminated, raising
from pipeline.storage.durable import fault_of_storage

COMMANDS = (
    train,
    resume,
    sweep,
    sample,
    evaluate,
    compare,
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
    doctor,
)


class InOrder(click.Group):
    """A group whose help lists the commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in order of definition."""
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
    """Run the command line and exit; an error of the user's is one line on stderr and a documented exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        refuse_secrets(words, "the command line")
        with raising():
            left = cli.main(args=words, prog_name="ddpm-pipe", standalone_mode=False)
        return left if isinstance(left, int) else 0  # a command that ends by `Context.exit` leaves its code
    except PipelineError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _fail(_explain(error), 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped", 130)
    except Terminated:
        return _fail("stopped", 143)
    except BrokenPipeError:
        # whoever read our output has left, as `| head` does: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (fault := fault_of_storage(error)) is None:
            raise
        return _fail(str(fault), fault.exit_code)


def _fail(message: str, code: int) -> int:
    click.echo(f"ddpm-pipe: {' '.join(message.split())}", err=True)
    return code


def _explain(error: click.ClickException) -> str:
    """Return click's complaint in one line, with the command whose help to read."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ddpm-pipe"
    return f"{error.format_message().rstrip('.')}; see: {path} --help"
