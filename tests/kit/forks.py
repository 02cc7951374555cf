"""Processes for trainings, forked from a server that has everything imported already: each takes a second, not seven."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.kit.preloaded"])


def run_team(function: Callable[..., None], arguments: tuple[Any, ...], size: int) -> None:
    """Call `function(rank, *arguments)` in `size` processes at once; an error in one of them is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]


def command(
    home: str, words: list[str], output: str, stdin: str = "", environment: dict[str, str] | None = None
) -> None:
    """Be a `ddpm-pipe` process in a folder: the target of a process of `PROCESSES`. What it prints goes to files named `output`.out and
    `output`.err. The folder is its home unless `environment`, which then replaces the one that tests have, names another.
    """
    os.setsid()
    os.chdir(home)
    os.environ["DDPM_PIPE_HOME"] = home
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    Path(output + ".in").write_text(stdin)
    sys.stdin = open(output + ".in")  # noqa: SIM115
    sys.argv = ["ddpm-pipe", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pipeline.cli import main

    main(words)


def run_command(cwd: Path, words: list[str], environment: dict[str, str], timeout_s: float) -> tuple[int, str, str]:
    """Run `ddpm-pipe WORDS` in a folder with an environment of its own; return its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = f"{folder}/printed"
        process = PROCESSES.Process(target=command, args=(str(cwd), words, printed, "", environment))
        process.start()
        process.join(timeout_s)
        late = process.exitcode is None
        if late:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        out, err = (Path(printed + suffix).read_text(errors="replace") for suffix in (".out", ".err"))
        assert not late, f"still running after {timeout_s:g} s: {out}\n{err}"
        assert process.exitcode is not None
        return process.exitcode, out, err
