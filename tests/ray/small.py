"""Small experiments that are slow enough for a test to act in the middle of a training, and what tells how far one is."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.storage import checkpoint as checkpoints

TINY = """
name: tiny
model: {channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_resolutions: [4], norm_groups: 4, dropout: 0.2}
training: {steps: 40, batch_size: 16, warmup_steps: 5, ema_decay: 0.9}
checkpoint: {every_steps: 5, every_minutes: null}
logging: {every_steps: 4, grid_every_steps: null}
sampling: {steps: 2}
evaluation: {enabled: false}
"""
# one thread each: bit-exactness is promised for an equal number of them
TWO_WORKERS = "workers: 2\nresources_per_worker: {CPU: 1}\nthreads_per_worker: 1\n"
# slow enough that a test can act in the middle of a training
SLOW_NETWORK = """
import os, time
from pathlib import Path
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, pause: float = 0.15, die_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.pause, self.die_at, self.calls = pause, die_at, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.pause)
            self.calls += 1
            if self.calls == self.die_at:
                os.kill(os.getpid(), 9)
        return self.drop(self.net(x))
"""


def wait_until(done: Callable[[], bool], timeout_s: float = 480) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


class Started:
    """A `ddpm-pipe` process in the background, whose stderr tells how far it is."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, done: Callable[[], bool], timeout_s: float = 480) -> None:
        def done_or_dead() -> bool:
            found = done()
            assert found or self.process.poll() is None, self.process.communicate()
            return found

        wait_until(done_or_dead, timeout_s)

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=600)
        return self.process.returncode, stdout, stderr


def slow(tiny: Path, **arguments: float) -> None:
    lines = [line for line in TINY.splitlines() if not line.startswith("model:")]
    lines.append(f"model: {{type: 'slow_network:Slow', arguments: {json.dumps(arguments)}}}")
    (tiny / "slow.yaml").write_text("\n".join(lines))


def told(stderr: str) -> str:
    """Return the command's own last word; Ray's processes may still write to the same stream as they end."""
    return [line for line in stderr.splitlines() if line.startswith("ddpm-pipe: ")][-1]


def only_run(home: Path) -> Path:
    (run,) = (home / "runs").iterdir()
    return run


def newest_step(home: Path) -> int:
    runs = list((home / "runs").glob("*/checkpoints"))
    steps = [c.step for folder in runs for c in checkpoints.committed(folder)]
    return max(steps, default=-1)


def digests(run: Path) -> dict[str, str]:
    found = checkpoints.newest_verified(run / "checkpoints").checkpoint
    assert found is not None
    assert found.step == 40
    return {g: hashlib.sha256((found.folder / f"{g}.safetensors").read_bytes()).hexdigest() for g in checkpoints.GROUPS}


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def training_workers(pid: int) -> list[psutil.Process]:
    # Ray names its processes after what they do
    return [p for p in children_of(pid) if "RayTrainWorker" in " ".join(p.cmdline())]
