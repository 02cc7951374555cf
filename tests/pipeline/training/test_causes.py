"""Why an attempt failed is told in one line: of what really happened, not of its echoes in the other workers."""

from __future__ import annotations

import pytest

from pipeline.cluster.causes import cause_of, starved


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
def test_the_first_cause_is_told(failures, told):
    assert cause_of(WorkerGroupError(failures)).startswith(told)


@pytest.mark.fault(17)
def test_out_of_memory_says_what_to_lower():
    assert "training.micro_batch_size" in cause_of(WorkerGroupError({0: RuntimeError(FULL)}))


@pytest.mark.fault(17)
def test_only_a_killed_process_can_have_been_starved():
    killed = cause_of(WorkerGroupError({1: WorkerHealthCheckFailedError(DIED)}))
    assert starved(killed).startswith(
        "worker 1: ended by the system for want of memory; lower training.micro_batch_size"
    )
    assert starved("worker 2: 3 is not 4") == "worker 2: 3 is not 4"
