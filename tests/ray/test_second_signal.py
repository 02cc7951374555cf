"""Ctrl-C twice, of an isolated worker: the first asks for a save after the step, the second does not wait for a step that hangs."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

from pipeline.storage.checkpoint_store import CheckpointStore
from tests.kit.commands import children_of, told
from tests.kit.experiments import slow_experiment
from tests.kit.trainer import newest_step, only_run

pytestmark = [pytest.mark.all, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.fault(21)
@pytest.mark.promise("P5")
def test_a_second_ctrl_c_stops_at_once_and_the_older_checkpoint_verifies(home, start, typed):
    training = start("train", slow_experiment(home, pause=0.0, hang_at=8), "--isolated")
    training.wait_for(lambda: newest_step(home) == 5)
    processes = children_of(training.pid)
    training.send(signal.SIGINT)
    training.wait_for(lambda: "once more to stop at once" in training.stderr)
    training.send(signal.SIGINT)
    code, _, stderr = training.end(120)
    run = only_run(home)
    assert code == 130, stderr
    assert told(stderr).endswith(f"ddpm-pipe resume {run.id}")
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    found = CheckpointStore(run.checkpoints).newest_verified()
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.warnings) == (5, [])
    (row,) = json.loads(typed("runs", "--json").stdout)
    assert (row["status"], row["step"]) == ("INTERRUPTED", 5)
