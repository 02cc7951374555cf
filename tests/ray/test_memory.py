"""A worker that the kernel ends for want of memory is told from one that was killed: a real limit, and the real OOM killer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.planning.memory import oom_kills
from tests.kit.commands import PROGRAM, told
from tests.kit.experiments import tiny_experiment, write_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT = 3 * 2**30
GREEDY = """
import torch
from torch import nn

class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = nn.Conv2d(1, 1, 3, padding=1), []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept.append(torch.ones(2**27))  # half a gigabyte at each step
        return self.net(x)
"""


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory control group with a limit; skips where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
    if "memory" in paths:
        group, limit = Path("/sys/fs/cgroup/memory", paths["memory"]), "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup", paths.get("", "")), "memory.max"
    group = group / f"ddpm-pipe-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.fault(17)
def test_a_worker_without_memory_is_told_as_such_with_what_to_lower(home, shell, limited):
    (home / "greedy.py").write_text(GREEDY)
    write_yaml(home / "greedy.yaml", tiny_experiment() | {"model": {"type": "greedy:Greedy"}})
    train = f"{PROGRAM} train greedy.yaml"
    join = f"echo $$ > {limited}/cgroup.procs && exec {train}"
    code, _, stderr = shell.launch("sh", "-c", join).end(300)
    assert code == 8, stderr
    last = told(stderr)
    assert "ended by the system for want of memory" in last
    assert "training.micro_batch_size" in last


def test_the_count_of_the_oom_killer_is_read_from_the_kernel():
    before = oom_kills()
    assert before >= 0
    assert oom_kills() == before  # nothing was starved in between
