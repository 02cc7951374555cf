"""`ddpm-pipe train` as a user types it, on real Ray with real kills: one small experiment, its faults, and what they are told.

What is about the command's own process (signals, its death) is run as one; the rest is typed in this process, on the Ray of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.data.shards import Dataset
from pipeline.storage import checkpoint as checkpoints
from tests.kit.commands import children_of, told, training_workers
from tests.kit.experiments import TWO_WORKERS, slow_experiment, tiny_experiment, write_yaml
from tests.kit.trainer import final_digests, newest_step, only_run
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
@pytest.mark.promise("P1")
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


@pytest.mark.fault(19, 20)
@pytest.mark.promise("P1")
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_ends_the_same(tiny, start, typed, ray_session, calm):
    slow_experiment(tiny)
    stopped = start("train", "slow.yaml")
    stopped.wait_for(lambda: newest_step(tiny) >= 5)
    run = only_run(tiny)
    code, _, stderr = typed("resume", "latest")
    assert code == 9  # one run is worked on by one process
    assert f"process {stopped.pid}" in stderr

    stopped.send(signal.SIGINT, to_all=True)  # as a terminal does: to every process of the command
    code, _, stderr = stopped.end()
    assert code == 130, stderr
    last = told(stderr)
    assert last.startswith("ddpm-pipe: stopped, saved at step")
    assert last.endswith(f"ddpm-pipe resume {run.id}")
    (row,) = json.loads(typed("runs", "--json")[1])
    assert row["status"] == "INTERRUPTED"
    assert 5 <= row["step"] < 40

    code, _, stderr = typed("resume", run.id)
    assert code == 0, stderr
    assert final_digests(run) == calm(1)


@pytest.mark.fault(2, 20)
@pytest.mark.promise("P1")
def test_sigterm_ends_with_75_and_sigkill_of_the_driver_leaves_no_process(tiny, start, typed, ray_session, calm):
    slow_experiment(tiny)
    asked = start("train", "slow.yaml")
    asked.wait_for(lambda: newest_step(tiny) >= 5)
    asked.send(signal.SIGTERM)
    assert asked.end()[0] == 75

    run = only_run(tiny).id
    killed = start("resume", run)
    before = newest_step(tiny)
    killed.wait_for(lambda: newest_step(tiny) > before)
    processes = children_of(killed.pid)
    killed.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    (row,) = json.loads(typed("runs", "--json")[1])
    assert row["status"] == "INTERRUPTED"
    assert typed("resume", run[:4])[0] == 0
    assert final_digests(only_run(tiny)) == calm(1)


@pytest.mark.fault(28)
def test_a_run_that_dies_twice_at_one_step_is_not_tried_for_ever(tiny, typed, ray_session):
    slow_experiment(tiny, pause=0.0, die_at=3)
    code, _, stderr = typed("train", "slow.yaml")
    assert code == 8, stderr
    assert "died twice" in told(stderr)
    assert "ddpm-pipe resume" in told(stderr)
    assert (only_run(tiny).folder / "attempt").read_text().strip() == "2"


@pytest.mark.fault(27)
def test_an_image_that_crashes_the_decoder_twice_is_named(tiny, typed, ray_session, tmp_path):
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
    assert code == 3, stderr
    assert f"{dataset.location}/shard-00000.parquet, row group 0, row 17" in told(stderr)
    assert "crashed, twice" in told(stderr)
    assert "Traceback" not in stderr


@pytest.mark.fault(16)
def test_divergence_is_told_with_its_step_and_no_checkpoint_holds_it(tiny, typed, ray_session):
    settings = {"training.learning_rate": "1e30", "training.grad_clip": "null", "checkpoint.every_steps": "1"}
    code, _, stderr = typed(
        "train", "tiny.yaml", *(w for key, value in settings.items() for w in ("-s", f"{key}={value}"))
    )
    assert code == 5, stderr
    diverged = re.search(r"diverged at step (\d+)", stderr)
    assert diverged is not None
    saved = checkpoints.committed(only_run(tiny).folder / "checkpoints")
    assert [checkpoint.step for checkpoint in saved][:1] == [int(diverged[1]) - 1]
    for checkpoint in saved:
        assert all(t.isfinite().all() for group in checkpoint.tensors().values() for t in group.values())
