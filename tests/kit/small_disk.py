"""A disk that really runs full: a tmpfs of a few pages or files, in a mount namespace that needs no rights.

with small_disk(folder, "size=1m") as disk:
    disk.start("ddpm-pipe", "train")     a process that sees the disk at `folder`; it is ended with the context
    disk.fill()                          not a byte is free any more, until disk.empty()
    disk.mount("remount,size=64m")       other options: size, nr_inodes, ro
    disk.inside / "runs"                 the disk as this process sees it
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.kit.commands import Result, Started

NO_NAMESPACE = "no mount namespaces here"
MOUNT = 'mount -t tmpfs -o "$1" small "$0" && echo mounted && read -r _'


class SmallDisk:
    """A tmpfs at `folder`, which the processes that it starts see, and nobody else."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.inside = folder, Path(f"/proc/{pid}/root{folder}")
        self._enter = ["nsenter", "--preserve-credentials", "--user", "--mount", f"--target={pid}"]
        self.started: list[Started] = []

    def start(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Started:
        """Start a process that sees the disk."""
        chdir = ["env", f"--chdir={cwd or self.folder}"]
        self.started.append(Started([*self._enter, *chdir, *command], Path("/"), env or os.environ))
        return self.started[-1]

    def run(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Result:
        """Run a process that sees the disk to its end."""
        return self.start(*command, cwd=cwd, env=env).end()

    def mount(self, options: str, folder: str | Path = "") -> None:
        """Mount the disk, or a folder of it, with other options."""
        done = self.run("mount", "-o", options, self.folder / folder)
        assert done.code == 0, done.stderr

    def fill(self) -> None:
        """Write until no byte is free."""
        descriptor = os.open(self.inside / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            while True:
                os.write(descriptor, bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        """Remove what `fill` wrote."""
        (self.inside / "ballast").unlink()

    def num_files(self) -> int:
        """Return how many inodes are in use."""
        figures = os.statvfs(self.inside)
        return figures.f_files - figures.f_ffree


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[SmallDisk]:
    """Mount a tmpfs at a folder that is there, for the time of the context; skips where the system lets nobody do so."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip(f"{NO_NAMESPACE}: util-linux is not installed")
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, folder, options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        with holder.stdin:  # closed at the end: the shell ends, and the disk goes with the last process that sees it
            if (said := holder.stdout.readline()) != "mounted\n":
                pytest.skip(f"{NO_NAMESPACE}: {said.strip()}")
            disk = SmallDisk(folder, holder.pid)
            try:
                yield disk
            finally:
                for process in disk.started:
                    process.kill()
