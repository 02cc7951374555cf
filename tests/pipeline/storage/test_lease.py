"""Fault 19 in an object store: of all that ask at once one wins; a dead holder is passed over; one that comes back has lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

import psutil
import pytest

from pipeline.errors import RunLockedError
from pipeline.storage import remote_lease
from pipeline.storage.remote import RemoteFolder, Version
from pipeline.storage.remote_lease import NAME, Lease
from tests.kit.object_store import objects

PROCESSES = multiprocessing.get_context("spawn")


def held_by_another(uri: str, beat_s: float, pipe: Connection, elsewhere: bool) -> None:
    """Hold the lease until killed, as a process of another machine if `elsewhere`; tell once it is held, and once it is lost."""
    if elsewhere:
        remote_lease._place = lambda: "another machine"
    with Lease(RemoteFolder(uri), "run x", beat_s).hold():
        pipe.send("held")
        (beating,) = [thread for thread in threading.enumerate() if thread.name == "lease"]
        beating.join()
        pipe.send("lost")
        threading.Event().wait()


@pytest.fixture
def holder(bucket):
    """Start a process that holds the lease of the bucket's folder `lease`; it is killed in the end."""
    started = []

    def start(beat_s: float, elsewhere: bool):
        mine, its = PROCESSES.Pipe()
        process = PROCESSES.Process(target=held_by_another, args=(f"{bucket}/lease", beat_s, its, elsewhere))
        process.start()
        started.append((process, mine, its))
        assert mine.recv() == "held"
        return process, mine

    yield start
    for process, *pipes in started:
        process.kill()
        process.join()
        process.close()
        for pipe in pipes:
            pipe.close()


@pytest.mark.fault(19)
@pytest.mark.slow
def test_of_several_that_ask_at_once_exactly_one_wins(bucket):
    for trial in range(8):
        folder = RemoteFolder(f"{bucket}/lease-{trial}")
        num, won, refused = 2 + trial % 4, [], []
        together = threading.Barrier(num)

        def ask(lease, together=together, won=won, refused=refused):
            together.wait()
            try:
                lease.acquire()
                won.append(lease)
            except RunLockedError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=ask, args=(Lease(folder, "run x"),)) for _ in range(num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, num - 1)
        assert all(f"process {os.getpid()} on" in told for told in refused)
        won[0].require()


def test_the_lease_is_free_again_after_its_holder_and_nothing_is_left(bucket):
    folder = RemoteFolder(f"{bucket}/lease")
    for _ in range(2):
        lease = Lease(folder, "run x")
        with lease.hold():
            lease.require()
            assert f"process {os.getpid()} on" in (Lease(folder, "run x").holder() or "")
            with pytest.raises(RunLockedError, match=f"run x is being worked on by process {os.getpid()} on"):
                Lease(folder, "run x").acquire()
    assert objects(folder.uri) == []
    assert Lease(folder, "run x").holder() is None


@pytest.mark.fault(19)
def test_a_holder_of_this_machine_that_was_killed_is_skipped_at_once(bucket, holder):
    process, _ = holder(beat_s=600.0, elsewhere=False)
    waiting = Lease(RemoteFolder(f"{bucket}/lease"), "run x", beat_s=600.0)
    with pytest.raises(RunLockedError, match=f"process {process.pid} on"):
        waiting.acquire()
    process.kill()
    process.join()
    waiting.acquire()
    waiting.require()


@pytest.mark.fault(19)
def test_a_holder_that_beats_is_not_skipped_and_one_that_was_stopped_has_lost_when_it_comes_back(
    bucket, holder, object_store
):
    """For whoever asks, a beat is due each ten minutes, by the store's clock; the holder beats ten times a second, by its own."""
    process, pipe = holder(beat_s=0.1, elsewhere=True)
    folder = RemoteFolder(f"{bucket}/lease")

    def held() -> Version:
        found = folder.version(NAME)
        assert found is not None
        return found

    first = held()
    object_store.ahead_s += 3600  # longer than a holder that does not beat would last
    while held().modified_s < first.modified_s + 3600:
        assert process.is_alive()
    with pytest.raises(RunLockedError):
        Lease(folder, "run x", beat_s=600).acquire()
    os.kill(process.pid, signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        pass
    taker = Lease(folder, "run x", beat_s=600)
    for _ in range(2):  # a beat that was on its way when the holder was stopped may arrive late
        object_store.ahead_s += 3600
        with contextlib.suppress(RunLockedError):
            taker.acquire()
            break
    taker.require()
    os.kill(process.pid, signal.SIGCONT)
    assert pipe.recv() == "lost"
    taker.require()
    assert f'"pid": {os.getpid()}' in held().content.decode()  # the other's late beat did not replace it


@pytest.mark.fault(19)
def test_whoever_was_taken_over_is_refused(bucket, object_store):
    folder = RemoteFolder(f"{bucket}/lease")
    stopped = Lease(folder, "run x")
    stopped.acquire()  # and never beats
    object_store.ahead_s += 3600
    other = Lease(folder, "run x")
    with other.hold():
        with pytest.raises(RunLockedError, match="run x was taken over by another process"):
            stopped.require()
        other.require()
