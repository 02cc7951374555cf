"""`ddpm-pipe train` as a user types it, on real Ray with real kills: one small experiment, its faults, and what they are told.

What is about the command's own process (signals, its death) is run as one; the rest is typed in this process, on the Ray of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from pipeline.data.shards import Dataset
from tests.kit.attempts import require_resume
from tests.kit.commands import children_of, told, training_workers
from tests.kit.experiments import SAVED_EVERY, TWO_WORKERS, slow_experiment
from tests.kit.ports import listening_addresses
from tests.kit.trainer import attempts, final_digests, newest_step, only_run
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# a decoder with a fault, in the workers alone: at one image it follows a null pointer
CRASHING_DECODER = """
import ctypes, hashlib, sys
import PIL.PngImagePlugin

_PngImageFile = PIL.PngImagePlugin.PngImageFile

def crashing(file):
    if hashlib.sha256(file.getvalue()).hexdigest() == "DIGEST":
        ctypes.string_at(0)
    return _PngImageFile(file)

if sys.argv[0].endswith("default_worker.py"):
    PIL.PngImagePlugin.PngImageFile = crashing
"""


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while this one is busy; what it fails of is raised at the end."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(act)
        yield
        done.result(timeout=0)


@pytest.mark.fault(1, 25)
@pytest.mark.promise("P1", "P2")
def test_a_killed_worker_and_one_that_hangs_cost_an_attempt_each_and_change_nothing(home, typed, ray_session, calm):
    slow_experiment(home)
    # Ray waits ten minutes for a worker that hangs, torch half an hour
    (home / "hang.yaml").write_text(TWO_WORKERS + "timeouts: {collective_s: 10}\n")

    listening: set[str] = set()

    def disturb() -> None:
        wait_for(lambda: newest_step(home) >= 10)
        listening.update(listening_addresses(psutil.Process()))
        training_workers(os.getpid())[-1].kill()
        wait_for(lambda: "attempt 2 starts at step" in only_run(home).log_path.read_text())
        reached = newest_step(home)
        wait_for(lambda: newest_step(home) > reached)
        training_workers(os.getpid())[-1].suspend()

    with meanwhile(disturb):
        code, _, stderr = typed("train", "slow.yaml", "--cluster", "hang.yaml")
    assert code == 0, stderr
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}  # the workers' own, too
    assert listening
    assert "attempt 1 failed" in stderr
    assert "did not answer within timeouts.collective_s" in stderr
    run = only_run(home)
    stacks = "".join(path.read_text() for path in run.folder.glob("stacks/attempt-2-worker-*.txt"))
    assert "loop.py" in stacks  # where the other one waited
    assert final_digests(run) == calm(2)
    first, second, third = attempts(home)
    require_resume(first, second, SAVED_EVERY)
    require_resume(second, third, SAVED_EVERY)


@pytest.mark.fault(2, 19, 20)
@pytest.mark.promise("P1", "P2")
def test_signals_reach_an_isolated_worker_and_sigkill_of_its_driver_leaves_no_process(
    home, start, typed, ray_session, calm
):
    slow_experiment(home)
    asked = start("train", "slow.yaml", "--isolated")
    asked.wait_for(lambda: newest_step(home) >= 5)
    run = only_run(home).id
    code, _, stderr = typed("resume", "latest")
    assert code == 9  # one run is worked on by one process
    assert f"process {asked.pid}" in stderr
    asked.send(signal.SIGINT, to_all=True)  # as a terminal does: to every process of the command
    code, _, stderr = asked.end()
    assert code == 130, stderr
    assert "in 1 Ray worker on this machine" in stderr
    assert told(stderr) == f"ddpm-pipe: stopped, saved at step {newest_step(home)}; resume with: ddpm-pipe resume {run}"

    killed = start("resume", run)
    before = newest_step(home)
    killed.wait_for(lambda: newest_step(home) > before)
    processes = children_of(killed.pid)
    assert training_workers(killed.pid)  # the profile that the run was started with, isolation included
    killed.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    saved = newest_step(home)
    (row,) = json.loads(typed("runs", "--json")[1])
    assert row["status"] == "INTERRUPTED"
    assert typed("resume", run[:4])[0] == 0
    assert final_digests(only_run(home)) == calm(1)  # those of a training in the command's process
    first, second, third = attempts(home)
    assert first.end == second.start  # of the signal no step is lost, of the kill those since the newest checkpoint
    assert third.start == saved
    require_resume(second, third, SAVED_EVERY)


@pytest.mark.fault(27, 28)
def test_an_image_that_crashes_the_decoder_ends_the_run_once_the_worker_died_twice_at_its_step(
    home, typed, ray_session, tmp_path
):
    images = np.random.default_rng(0).integers(
        0, 256, (40, 66, 30, 1), dtype=np.uint8
    )  # large enough to be kept as PNG
    np.savez(tmp_path / "images.npz", images=images)
    assert typed("ingest", str(tmp_path / "images.npz"), str(tmp_path / "set"))[0] == 0
    dataset = Dataset.open(tmp_path / "set")
    stored = dataset.storage(1)
    dataset.load(np.array([17]), stored, np.empty(1, dtype=np.int64))
    digest = hashlib.sha256(stored[0]).hexdigest()
    slow_experiment(home, pause=0.0)
    with (home / "slow_network.py").open("a") as module:
        module.write(CRASHING_DECODER.replace("DIGEST", digest))
    code, _, stderr = typed("train", "slow.yaml", "--data", str(tmp_path / "set"), "--isolated")
    assert code == 8, stderr
    assert "died twice" in told(stderr)
    assert "ddpm-pipe resume" in told(stderr)
    assert (only_run(home).folder / "attempt").read_text().strip() == "2"
    assert "Traceback" not in stderr
