"""How a command ends: every error of the user's is one line on stderr and a documented exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from pipeline.errors import PipelineError
from pipeline.signals import Terminated, raising
from pipeline.storage.durable import fault_of_storage


def exit_code_of(call: Callable[[], object]) -> int:
    """Call a command, print the error that ended it, and return the exit code (docs/reference.md)."""
    try:
        with raising():
            code = call()
        return code if isinstance(code, int) else 0  # a command that ends by click's `Context.exit` returns its code
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
        # the reader of our output has closed it, as `| head` does
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
    """Return click's message in one line, with the command whose help to read."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ddpm-pipe"
    return f"{error.format_message().rstrip('.')}; see: {path} --help"
