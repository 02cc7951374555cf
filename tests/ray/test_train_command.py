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
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.data.shards import Dataset
from pipeline.storage.runs import Run
from tests.kit.attempts import require_resume
from tests.kit.commands import children_of, told, training_workers
from tests.kit.experiments import SAVED_EVERY, TWO_WORKERS, slow_experiment, tiny_experiment, write_yaml
from tests.kit.trainer import attempts, final_digests, newest_step, only_run
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

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


@pytest.fixture
def tiny(home: Path) -> Path:
    write_yaml(home / "tiny.yaml", tiny_experiment())
    (home / "two.yaml").write_text(TWO_WORKERS)
    return home


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while this one is busy; what it fails of is raised at the end."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(act)
        yield
        done.result(timeout=0)


@pytest.mark.fault(1)
@pytest.mark.promise("P1", "P2")
def test_killing_a_worker_costs_an_attempt_and_changes_nothing(tiny, typed, ray_session, calm):
    slow_experiment(tiny)

    def kill() -> None:
        wait_for(lambda: newest_step(tiny) >= 10)
        training_workers(os.getpid())[-1].kill()

    with meanwhile(kill):
        code, _, stderr = typed("train", "slow.yaml", "--cluster", "two.yaml")
    assert code == 0, stderr
    assert "attempt 1 failed" in stderr
    assert final_digests(only_run(tiny)) == calm(2)
    require_resume(*attempts(tiny), SAVED_EVERY)


def test_isolated_or_not_a_training_ends_with_the_same_bytes(tiny, typed, ray_session):
    ends = []
    for words in ([], ["--isolated"]):
        code, _, stderr = typed("train", "tiny.yaml", *words)
        assert code == 0, stderr
        assert ("in 1 Ray worker on this machine" if words else "in this process") in stderr
        ends.append(final_digests(Run.find(tiny, "latest")))
    assert ends[0] == ends[1]


@pytest.mark.fault(2, 19, 20)
@pytest.mark.promise("P1", "P2")
def test_signals_reach_an_isolated_worker_and_sigkill_of_its_driver_leaves_no_process(
    tiny, start, typed, ray_session, calm
):
    slow_experiment(tiny)
    asked = start("train", "slow.yaml", "--isolated")
    asked.wait_for(lambda: newest_step(tiny) >= 5)
    run = only_run(tiny).id
    code, _, stderr = typed("resume", "latest")
    assert code == 9  # one run is worked on by one process
    assert f"process {asked.pid}" in stderr
    asked.send(signal.SIGINT, to_all=True)  # as a terminal does: to every process of the command
    code, _, stderr = asked.end()
    assert code == 130, stderr
    assert told(stderr) == f"ddpm-pipe: stopped, saved at step {newest_step(tiny)}; resume with: ddpm-pipe resume {run}"

    killed = start("resume", run)
    before = newest_step(tiny)
    killed.wait_for(lambda: newest_step(tiny) > before)
    processes = children_of(killed.pid)
    assert training_workers(killed.pid)  # the profile that the run was started with, isolation included
    killed.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    saved = newest_step(tiny)
    (row,) = json.loads(typed("runs", "--json")[1])
    assert row["status"] == "INTERRUPTED"
    assert typed("resume", run[:4])[0] == 0
    assert final_digests(only_run(tiny)) == calm(1)
    first, second, third = attempts(tiny)
    assert first.end == second.start  # of the signal no step is lost, of the kill those since the newest checkpoint
    assert third.start == saved
    require_resume(second, third, SAVED_EVERY)


@pytest.mark.fault(28)
def test_a_run_that_dies_twice_at_one_step_is_not_tried_for_ever(tiny, typed, ray_session):
    slow_experiment(tiny, pause=0.0, die_at=3)
    code, _, stderr = typed("train", "slow.yaml", "--isolated")
    assert code == 8, stderr
    assert "died twice" in told(stderr)
    assert "ddpm-pipe resume" in told(stderr)
    assert (only_run(tiny).folder / "attempt").read_text().strip() == "2"


@pytest.mark.fault(27)
def test_an_image_that_crashes_the_decoder_ends_the_run_as_any_death_of_a_worker_does(
    tiny, typed, ray_session, tmp_path
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
    slow_experiment(tiny, pause=0.0)
    with (tiny / "slow_network.py").open("a") as module:
        module.write(CRASHING_DECODER.replace("DIGEST", digest))
    code, _, stderr = typed("train", "slow.yaml", "--data", str(tmp_path / "set"), "--cluster", "two.yaml")
    assert code == 8, stderr
    assert "died twice" in told(stderr)
    assert "Traceback" not in stderr
