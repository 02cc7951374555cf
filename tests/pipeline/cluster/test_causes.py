"""Why an attempt failed is told in one line: of what really happened, not of its echoes in the other workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.causes import cause_of, starved
from pipeline.planning import memory
from tests.hermetic import REPOSITORY
from tests.kit.memory_limit import memory_limit


class WorkerHealthCheckFailedError(Exception):
    """By this name Ray Train tells of a worker that is gone or silent."""


class WorkerGroupError(Exception):
    """As Ray Train's: the error of each worker that failed, by rank."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("training failed")
        self.worker_failures = failures


DIED = "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died."
SILENT = "A worker health check has been hanging for 9 s.\nSet the RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S environment variable"
LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3443"
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
FULL = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: RuntimeError(LOST), 1: WorkerHealthCheckFailedError(DIED)}, "worker 1: its process was killed"),
        ({0: RuntimeError(LOST), 2: ValueError("3 is not 4"), 1: RuntimeError(LOST)}, "worker 2: 3 is not 4"),
        ({0: RuntimeError(LATE)}, "worker 0: another worker did not answer within timeouts.collective_s"),
        ({1: WorkerHealthCheckFailedError(SILENT)}, "worker 1: it did not answer within timeouts.collective_s"),
        ({0: RuntimeError(LOST), 3: RuntimeError(FULL)}, "worker 3: out of memory"),
    ],
)
def test_the_first_cause_is_reported(failures, told):
    assert cause_of(WorkerGroupError(failures)).startswith(told)


@pytest.mark.fault(17)
def test_only_a_killed_process_can_have_been_starved():
    killed = cause_of(WorkerGroupError({1: WorkerHealthCheckFailedError(DIED)}))
    assert starved(killed) == "worker 1: killed by the system: out of memory"
    assert starved("worker 2: 3 is not 4") == "worker 2: 3 is not 4"


STARVED = """
import os
from pipeline.planning.memory import oom_kills
before = oom_kills()
child = os.fork()
if child == 0:
    open("/proc/self/oom_score_adj", "w").write("1000")  # this one, not its parent
    b"x" * 2**30
    os._exit(0)
_, status = os.waitpid(child, 0)
print(before, os.waitstatus_to_exitcode(status), oom_kills())
"""


@pytest.mark.fault(17)
def test_the_count_of_the_oom_killer_is_the_kernels() -> None:
    """Of the process's own control group: one process in it is killed."""
    with memory_limit(2**28) as join:
        script = f"{join} && exec {sys.executable} -c '{STARVED}'"
        out = subprocess.run(["sh", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["0", "-9", "1"]


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="Linux alone counts")
def test_a_container_has_its_count_at_the_root_of_what_it_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in ("memory.events", "memory/memory.oom_control"):  # of control groups of version 2, and of version 1
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.oom_kills() == 7
