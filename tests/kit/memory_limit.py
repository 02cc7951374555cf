"""A memory control group with a limit, in which the kernel's OOM killer really strikes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.waiting import wait_for


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[str]:
    """Make a group for the time of the context; yield the shell words that put a process into it. Skips where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
    if "memory" in paths:
        group, limit = Path("/sys/fs/cgroup/memory", paths["memory"]), "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup", paths.get("", "")), "memory.max"
    group = group / f"ddpm-pipe-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(num_bytes))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    try:
        yield f"echo $$ > {group}/cgroup.procs"
    finally:
        members = group / "cgroup.procs"
        for pid in members.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: not members.read_text())
        group.rmdir()
