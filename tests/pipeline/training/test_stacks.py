"""What a worker was doing when it hung or crashed is found in its run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from pipeline.training.stacks import Stacks, path_of

PROCESSES = multiprocessing.get_context("spawn")


def hang(path: Path) -> None:
    with Stacks(path, step_may_take_s=0.5) as stacks:
        for _ in range(3):
            stacks.step()
            time.sleep(0.01)
        sleep_too_long()


def sleep_too_long() -> None:
    time.sleep(1.0)


def calm(path: Path) -> None:
    with Stacks(path, step_may_take_s=60) as stacks:
        stacks.step()


def crash(path: Path) -> None:
    with Stacks(path, step_may_take_s=60):
        decode_a_bad_image()


def decode_a_bad_image() -> None:
    import faulthandler

    faulthandler._sigsegv()  # type: ignore[attr-defined]


def ended(target: object, path: Path) -> int | None:
    process = PROCESSES.Process(target=target, args=(path,))  # type: ignore[arg-type]
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.fault(25)
def test_a_step_that_takes_too_long_leaves_its_stack(tmp_path):
    path = path_of(tmp_path, attempt=2, rank=1)
    assert ended(hang, path) == 0
    assert path == tmp_path / "stacks" / "attempt-2-worker-1.txt"
    assert "sleep_too_long" in path.read_text()


@pytest.mark.fault(27)
def test_a_crash_leaves_its_stack(tmp_path):
    path = path_of(tmp_path, attempt=1, rank=0)
    assert ended(crash, path) == -signal.SIGSEGV
    assert "Segmentation fault" in path.read_text()
    assert "decode_a_bad_image" in path.read_text()


def test_a_training_in_good_order_leaves_nothing(tmp_path):
    assert ended(calm, path_of(tmp_path, 1, 0)) == 0
    assert list(tmp_path.iterdir()) == []
