"""`ddpm-pipe` as tests use it: typed in this process, or as a process of its own, run to its end or started; and other processes.

code, stdout, stderr = typed("runs", "--json")         in this process, in `home`: what is not about the process itself
result = cli("runs", "--json", env={...})              forked from a process with everything imported, to its end
training = start("train", "slow.yaml")                 as a user does, in the background, ended with the test
training.wait_for(lambda: newest_step(home) >= 10)     fails as soon as the process has ended
training.send(signal.SIGTERM)
code, stdout, stderr = training.end()
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil
import pytest

from tests.hermetic import REPOSITORY
from tests.kit.environment import forget_modules, restore_environment, users_own
from tests.kit.waiting import PATIENCE_S, Found, wait_for

PROGRAM = str(Path(sys.executable).with_name("ddpm-pipe"))


class Result(NamedTuple):
    """What a command returned and printed."""

    code: int
    stdout: str
    stderr: str


Typed = Callable[..., Result]


class Started:
    """A process in the background, the head of a session of its own. Its output goes to files: it waits for no reader."""

    def __init__(self, command: Sequence[str | Path], cwd: Path, env: Mapping[str, str]) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _text(self._out)

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return _text(self._err)

    def wait_for(self, condition: Callable[[], Found], timeout_s: float = PATIENCE_S) -> Found:
        """Wait for a condition while the process lives; one that its end makes true holds, too."""

        def holds() -> Found:
            ended = self.process.poll() is not None
            found = condition()
            assert found or not ended, self.result()
            return found

        return wait_for(holds, timeout_s, explain=self.result)

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """Send a signal to the process, or, as a terminal does, to all of its group."""
        if to_all:
            os.killpg(self.pid, number)
        else:
            self.process.send_signal(number)

    def result(self) -> Result:
        """Return what there is so far; the code is -1 while it runs."""
        return Result(-1 if self.process.returncode is None else self.process.returncode, self.stdout, self.stderr)

    def end(self, timeout_s: float = 600) -> Result:
        """Wait until it has ended; return what it returned and printed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s: {self.result()}") from None
        return self.result()

    def kill(self) -> None:
        """End it at once, with all of its group."""
        if not self._out.closed:
            if self.process.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
                self.process.wait()
            self._out.close()
            self._err.close()


def _text(file: IO[bytes]) -> str:
    # at its own position: the one of the file is shared with the process that writes
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


class Shell:
    """A user's shell in a home folder; `environment` is what the user has set there. What it started, `close` ends."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {"DDPM_PIPE_HOME": str(home)}
        self._started: list[Started] = []

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()

    def type(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
        """Type a command in this process: on the Ray that tests share, if `ray_session` has started it.

        What it leaves in the environment, and modules of the folder (networks of a user's own), are forgotten afterwards.
        """
        words = [str(word) for word in arguments]
        stdout, stderr = (
            io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
            for errors in ("strict", "backslashreplace")  # as Python opens its own
        )
        known, before = set(sys.modules), dict(os.environ)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            patch.chdir(self.home)
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", ["ddpm-pipe", *words])
            os.environ.update(self.environment | dict(env or {}))
            try:
                code = run_command(words)
            finally:
                restore_environment(before)
                forget_modules(self.home, known)
        out, err = (stream.buffer.getvalue().decode(errors="surrogateescape") for stream in (stdout, stderr))  # type: ignore[attr-defined]
        return Result(code, out, err)

    def process_environment(self) -> dict[str, str]:
        """Return the environment of a process that a user starts here."""
        return users_own() | self.environment

    def launch(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Started:
        """Start any program in the background, by default in the home folder, with the threads a user has."""
        started = Started(command, cwd or self.home, self.process_environment() | dict(env or {}))
        self._started.append(started)
        return started

    def start(self, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Started:
        """Start `ddpm-pipe ARGUMENTS` in the background."""
        return self.launch(PROGRAM, *arguments, cwd=cwd, env=env)

    def run(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 500,
    ) -> Result:
        """Run `ddpm-pipe ARGUMENTS` in a process of its own, to its end; with its children it is ended if it outlasts `timeout_s`.

        The process is forked from one that has imported everything, with one thread unless the command decides otherwise; what is about
        the start of a process, its imports or its death takes `start`.
        """
        from tests.kit.forks import run_command  # imports torch

        words = [str(word) for word in arguments]
        return Result(*run_command(cwd or self.home, words, self.process_environment() | dict(env or {}), timeout_s))


def run_command(words: Sequence[str]) -> int:
    """Run a command in this process; return its exit code."""
    from pipeline.cli import invoke
    from pipeline.commands.exit_code import exit_code_of

    return exit_code_of(lambda: invoke(words))


def told(stderr: str) -> str:
    """Return the command's own last word; Ray's processes may still write to the same stream as they end."""
    return [line for line in stderr.splitlines() if line.startswith("ddpm-pipe: ")][-1]


def children_of(pid: int) -> list[psutil.Process]:
    """Return the processes that a process and its children started."""
    return psutil.Process(pid).children(recursive=True)


def training_workers(pid: int) -> list[psutil.Process]:
    """Return the workers of Ray Train below a process; Ray names its processes after what they do."""
    return [p for p in children_of(pid) if "RayTrainWorker" in " ".join(p.cmdline())]


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start Python code in a process of its own, in the repository, its input and output piped: `with python(...) as process`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
