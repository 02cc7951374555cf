"""`ddpm-pipe train` as a user types it, on real Ray with real kills: one small experiment, its faults, and what they are told."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.data.shards import Dataset
from pipeline.storage import checkpoint as checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

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

# a decoder with a fault, in the workers alone: at one image it follows a null pointer
CRASHING_DECODER = """
import ctypes, hashlib, sys
import PIL.Image

_open = PIL.Image.open

def crashing(file, *arguments, **options):
    if hashlib.sha256(file.getvalue()).hexdigest() == "DIGEST":
        ctypes.string_at(0)
    return _open(file, *arguments, **options)

if sys.argv[0].endswith("default_worker.py"):
    PIL.Image.open = crashing
"""


class Started:
    """A `ddpm-pipe` process in the background, whose stderr tells how far it is."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, done: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=360)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def start(home: Path, user_environment: dict[str, str], ending: Any) -> Callable[..., Started]:
    def begin(*arguments: str) -> Started:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ddpm-pipe")), *arguments],
            cwd=home,
            env=user_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return Started(ending(process))

    return begin


@pytest.fixture
def tiny(home: Path) -> Path:
    (home / "tiny.yaml").write_text(TINY)
    (home / "two.yaml").write_text(TWO_WORKERS)
    (home / "slow_network.py").write_text(SLOW_NETWORK)
    return home


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


def test_killing_a_worker_costs_an_attempt_and_changes_nothing(tiny, start, cli):
    slow(tiny)
    calm = cli("train", "slow.yaml", "--cluster", "two.yaml")
    assert calm.code == 0, calm
    undisturbed = only_run(tiny)
    (tiny / "runs").rename(tiny / "calm")

    struck = start("train", "slow.yaml", "--cluster", "two.yaml")
    struck.wait_for(lambda: newest_step(tiny) >= 10)
    training_workers(struck.process.pid)[-1].kill()
    code, _, stderr = struck.end()
    assert code == 0, stderr
    assert "attempt 1 failed" in stderr
    assert digests(only_run(tiny)) == digests(tiny / "calm" / undisturbed.name)


def test_ctrl_c_saves_says_how_to_go_on_and_going_on_ends_the_same(tiny, start, cli):
    slow(tiny)
    assert cli("train", "slow.yaml").code == 0
    undisturbed = only_run(tiny)
    (tiny / "runs").rename(tiny / "calm")

    stopped = start("train", "slow.yaml")
    stopped.wait_for(lambda: newest_step(tiny) >= 5)
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    code, _, stderr = stopped.end()
    run = only_run(tiny)
    assert code == 130, stderr
    last = told(stderr)
    assert last.startswith("ddpm-pipe: stopped, saved at step")
    assert last.endswith(f"ddpm-pipe resume {run.name}")
    (row,) = json.loads(cli("runs", "--json").stdout)
    assert row["status"] == "INTERRUPTED"
    assert 5 <= row["step"] < 40

    went_on = cli("resume", run.name)
    assert went_on.code == 0, went_on
    assert digests(run) == digests(tiny / "calm" / undisturbed.name)


def test_sigterm_ends_with_75_and_sigkill_of_the_driver_leaves_no_process(tiny, start, cli):
    slow(tiny)
    asked = start("train", "slow.yaml")
    asked.wait_for(lambda: newest_step(tiny) >= 5)
    asked.process.send_signal(signal.SIGTERM)
    assert asked.end()[0] == 75

    run = only_run(tiny).name
    killed = start("resume", run)
    before = newest_step(tiny)
    killed.wait_for(lambda: newest_step(tiny) > before)
    processes = children_of(killed.process.pid)
    killed.process.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    (row,) = json.loads(cli("runs", "--json").stdout)
    assert row["status"] == "INTERRUPTED"
    assert cli("resume", run[:4]).code == 0
    assert digests(only_run(tiny))


def test_a_run_that_dies_twice_at_one_step_is_not_tried_for_ever(tiny, cli):
    slow(tiny, pause=0.0, die_at=3)
    result = cli("train", "slow.yaml")
    assert result.code == 8, result
    last = told(result.stderr)
    assert "died twice" in last
    assert "ddpm-pipe resume" in last
    assert (only_run(tiny) / "attempt").read_text().strip() == "2"


def test_an_image_that_crashes_the_decoder_twice_is_named(tiny, cli, tmp_path):
    images = np.random.default_rng(0).integers(
        0, 256, (40, 66, 30, 1), dtype=np.uint8
    )  # large enough to be kept as PNG
    np.savez(tmp_path / "images.npz", images=images)
    assert cli("ingest", tmp_path / "images.npz", tmp_path / "set").code == 0
    dataset = Dataset.open(tmp_path / "set")
    stored = dataset.storage(1)
    dataset.load(np.array([17]), stored, np.empty(1, dtype=np.int64))
    digest = hashlib.sha256(stored[0]).hexdigest()
    (tiny / "slow_network.py").write_text(SLOW_NETWORK + CRASHING_DECODER.replace("DIGEST", digest))
    slow(tiny, pause=0.0)
    result = cli("train", "slow.yaml", "--data", tmp_path / "set", "--cluster", "two.yaml")
    assert result.code == 3, result.stderr
    assert f"{dataset.location}/shard-00000.parquet, row group 0, row 17" in told(result.stderr)
    assert "crashed, twice" in told(result.stderr)
    assert "Traceback" not in result.stderr


def test_divergence_is_told_with_its_step_and_no_checkpoint_holds_it(tiny, cli):
    result = cli("train", "tiny.yaml", "-s", "training.learning_rate=1e30", "-s", "training.grad_clip=null")
    assert result.code == 5, result
    assert "diverged at step" in result.stderr
    for checkpoint in checkpoints.committed(only_run(tiny) / "checkpoints"):
        assert all(t.isfinite().all() for group in checkpoint.tensors().values() for t in group.values())


def test_one_run_is_worked_on_by_one_process(tiny, start, cli):
    slow(tiny)
    holder = start("train", "slow.yaml")
    holder.wait_for(lambda: newest_step(tiny) >= 5)
    result = cli("resume", "latest")
    assert result.code == 9
    assert f"process {holder.process.pid}" in result.stderr
    assert holder.end()[0] == 0
