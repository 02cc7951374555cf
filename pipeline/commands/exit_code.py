"""How a command ends: every error of the user's is one line on stderr and a documented exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

import click

from pipeline.errors import ClusterError, PipelineError, UsageError
from pipeline.planning.memory import SAID
from pipeline.signals import Terminated, raising
from pipeline.storage.durable import fault_of_storage
from pipeline.storage.home import is_text


def exit_code_of(call: Callable[[], object]) -> int:
    """Call a command, print the error that ended it, and return the exit code (docs/reference.md)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 are printed as they are
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
    except Terminated as stop:
        return _fail(str(stop) or "stopped", 143)
    except BrokenPipeError:
        # the reader of our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        if not SAID.search(text):
            raise
        return _fail(
            f"out of memory ({text[:300]}); use smaller batches, or a device with more memory", ClusterError.exit_code
        )
    except (OSError, UnicodeEncodeError) as error:
        if (fault := _fault_of_name(error)) is None:
            raise
        return _fail(str(fault), fault.exit_code)


def _fault_of_name(error: OSError | UnicodeEncodeError) -> PipelineError | None:
    """Return what to tell a user of a name that cannot be used, or of a disk; None for any other error."""
    if isinstance(error, UnicodeEncodeError):  # Arrow and others take UTF-8 only
        name = error.object
        return (
            None
            if is_text(name)
            else UsageError(f"{name}: got a name that is not UTF-8, expected one that is. Rename it.")
        )
    if error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return UsageError(f"{name[:80]}...: got a name of {len(name)} characters, expected a shorter one.")
    return fault_of_storage(error)


def _fail(message: str, code: int) -> int:
    click.echo(f"ddpm-pipe: {' '.join(message.split())}", err=True)
    return code


def _explain(error: click.ClickException) -> str:
    """Return click's message in one line, with the command whose help to read."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ddpm-pipe"
    return f"{error.format_message().rstrip('.')}; see: {path} --help"
