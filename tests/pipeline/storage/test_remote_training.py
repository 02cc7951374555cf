"""Training in an object store: killed at any request, or cut off from the store, and gone on with on another machine, it ends the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.errors import RunLockedError, UsageError
from pipeline.storage.checkpoint import MANIFEST
from pipeline.storage.folder import RunStatus
from pipeline.storage.judgements import curve
from pipeline.storage.remote import RemoteFolder
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training.trained import Trained
from tests.kit import trainer
from tests.kit.experiments import TINY
from tests.kit.forks import PROCESSES
from tests.kit.object_store import CREDENTIALS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, str], dict[int, float]]:
    """What a training on a local disk ends with."""
    run = trainer.make_run(tmp_path_factory.mktemp("undisturbed"))
    process = PROCESSES.Process(target=trainer.train, args=(str(run.folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return trainer.final_digests(run), trainer.logged_losses(run)


class Site:
    """A run in a store, and processes that work on it from this machine or that."""

    def __init__(self, root: Path, storage: str, store, **changes) -> None:
        self.root, self.storage, self.store = root, storage, store
        (root / "first").mkdir()
        profile = Profile(threads_per_worker=1, storage=storage)
        self.run = trainer.make_run(root / "first", profile=profile, datasets=root / "datasets", **changes)

    def start(
        self,
        home: str = "first",
        elsewhere: str | None = None,
        *,
        told: Connection | None = None,
        stop_after: int | None = None,
    ):
        (self.root / home).mkdir(exist_ok=True)
        if elsewhere is not None:
            (self.root / elsewhere).mkdir(exist_ok=True)
            elsewhere = str(self.root / elsewhere)
        environment = CREDENTIALS | {"AWS_ENDPOINT_URL": self.store.url}
        arguments = (str(self.root / home), self.run.id, self.storage, environment, elsewhere, told, stop_after)
        process = PROCESSES.Process(target=trainer.train_in_store, args=arguments)
        process.start()
        return process

    def to_the_end(self, *where: str, stop_after: int | None = None) -> None:
        process = self.start(*where, stop_after=stop_after)
        process.join()
        assert process.exitcode == 0

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint in the store, as a machine sees it that has nothing of the run."""
        with tempfile.TemporaryDirectory(dir=self.root) as home:
            run = Run.find(Path(home), self.run.id, self.storage)
            # whatever was cut off, what counts as a checkpoint is whole
            assert RunCheckpoints(run).newest_verified().warnings == []
            return trainer.verified_step(run)

    def killed_at_request(self, number: int) -> None:
        """Train until the store has been asked to take so many objects, and kill the process then, before or after that is done.

        The steps since the newest checkpoint are lost, which are those of two intervals where one is on its way.
        """
        begin = self.newest_step()
        mine, its = PROCESSES.Pipe(duplex=False)
        asked, reached = [0], threading.Event()

        def count(method: str, path: str) -> bool:
            if method in ("PUT", "POST") and "/checkpoints/" in path and not path.endswith("?delete"):
                asked[0] += 1
                if asked[0] == number:
                    reached.set()
            return False

        self.store.refuse = count
        process = self.start(told=its)
        its.close()
        assert reached.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        made = 0
        with contextlib.suppress(EOFError):
            while True:
                made = mine.recv()
        self.store.refuse = lambda method, path: False
        assert 0 <= begin + made - self.newest_step() <= 2 * TINY["checkpoint"]["every_steps"]

    def result(self, home: str) -> tuple[dict[str, str], dict[int, float]]:
        run = Run.find(self.root / home, self.run.id, self.storage)
        run.fetch_files()
        return trainer.final_digests(run), trainer.logged_losses(run)


@pytest.fixture
def site(tmp_path, bucket, object_store):
    return Site(tmp_path, f"{bucket}/ddpm", object_store)


@pytest.mark.all
def test_the_best_in_a_store_is_what_the_curve_says_on_every_machine_through_a_kill(tmp_path, bucket, object_store):
    keep = {"every_steps": 4, "every_minutes": None, "keep_best": {"n": 1}, "milestones": [10]}
    changes = {"checkpoint": keep, "evaluation": {"every_steps": 6, "early_images": 12}, "sampling": {"steps": 2}}
    site = Site(tmp_path, f"{bucket}/ddpm", object_store, **changes)
    site.killed_at_request(14)
    site.to_the_end("second", "third")
    run = Run.find(site.root / "fourth", site.run.id, site.storage)  # a machine that has seen nothing of it yet
    trained = Trained.from_run(run, "best")
    values = {scored.step: scored.value for scored in curve(run.folder, "kid")}
    assert list(values) == [6, 12, 18, 24, 30]
    assert (trained.step, trained.selection) == (min(values, key=values.__getitem__), "best of 5 by kid_classifier_n12")
    assert {c.step for c in RunCheckpoints(run).committed()} == {10, 28, 30, trained.step}


@pytest.mark.fault(5)
@pytest.mark.oracle(11)
@pytest.mark.promise("P1", "P2")
@pytest.mark.slow
def test_stopped_and_resumed_on_another_machine_by_a_worker_on_a_third_ends_the_same(site, undisturbed):
    site.to_the_end(stop_after=7)
    assert Run.find(site.root / "first", site.run.id, site.storage).state().step == 7
    site.to_the_end("second", "third")
    assert site.result("second") == undisturbed
    assert not [
        path for path in (site.root / "third").rglob("*") if path.is_file()
    ]  # nothing stays on a worker's machine
    assert site.result("fourth") == undisturbed  # a machine that has seen nothing of it yet
    state = Run.find(site.root / "fifth", "latest", site.storage).state()
    assert (state.step, state.attempt) == (30, 2)


@pytest.mark.fault(3, 24)
@pytest.mark.oracle(11)
@pytest.mark.promise("P1", "P2")
@pytest.mark.slow
@pytest.mark.parametrize("trial", [0, *(pytest.param(n, marks=pytest.mark.all) for n in range(1, 6))])
def test_killed_while_sending_and_resumed_elsewhere_ends_the_same(site, undisturbed, trial):
    rng = random.Random(trial)
    site.killed_at_request(rng.randint(1, 18))
    site.killed_at_request(rng.randint(8, 18))  # a checkpoint is five of them
    assert site.newest_step() > 0
    site.to_the_end("second", "third")
    assert site.result("second") == undisturbed


@pytest.mark.slow
@pytest.mark.fault(6)
def test_a_store_that_is_away_for_a_while_costs_checkpoints_and_changes_nothing(site, undisturbed):
    left = [2]  # manifests that do not arrive, however often they are tried

    def refuse(method: str, path: str) -> bool:
        return (
            method == "PUT"
            and path.endswith(MANIFEST)
            and any(f"step-{s:010d}" in path for s in (8, 12))
            and bool(left)
        )

    site.store.refuse = refuse
    site.to_the_end()
    site.store.refuse = lambda method, path: False
    assert site.result("second") == undisturbed
    log = (site.root / "second" / "runs" / site.run.id / "log.txt").read_text()
    assert log.count("the store says ServiceUnavailable") == 2
    assert not [c for c in RunCheckpoints(site.run).committed() if c.step in (8, 12)]


@pytest.mark.fault(6)
def test_a_store_that_stays_away_ends_the_training_with_what_arrived(site):
    site.store.refuse = lambda method, path: (
        method == "PUT" and path.endswith(MANIFEST) and "step-0000000004" not in path
    )
    process = site.start()
    process.join()
    assert process.exitcode == 1  # StorageError, after three intervals
    site.store.refuse = lambda method, path: False
    found = RunCheckpoints(Run.find(site.root / "second", site.run.id, site.storage)).newest_verified()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 4


@pytest.mark.fault(19)
@pytest.mark.parametrize("file", ["state.json", MANIFEST])
def test_a_worker_that_was_replaced_commits_nothing_more(site, file):
    """Replaced while it sends step 8, or between its last look and its commit."""
    bucket = site.storage.removeprefix("s3:/")

    def replace_it(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith(f"step-0000000008-1/{file}"):
            site.store.put(f"{bucket}/runs/{site.run.id}/attempt", b"2\n")
        return False

    site.store.refuse = replace_it
    process = site.start()
    process.join()
    assert process.exitcode == 1
    assert site.store.count("PUT", f"step-0000000008-1/{file}$") == 1
    assert [c.step for c in RunCheckpoints(site.run).committed()] == [4]


@pytest.mark.fault(19)
def test_one_process_works_on_the_run_whichever_machine_it_is_on(site):
    elsewhere = Run.find(site.root / "second", site.run.id, site.storage)
    with site.run.lock():
        with (
            pytest.raises(RunLockedError, match=f"run {site.run.id} is being worked on by process {os.getpid()} on"),
            elsewhere.lock(),
        ):
            pass
        site.run.update(status="RUNNING")
        assert Run.find(site.root / "second", "latest", site.storage).state().status is RunStatus.RUNNING
    assert Run.find(site.root / "second", "latest", site.storage).state().status is RunStatus.INTERRUPTED


def test_files_follow_the_run_from_machine_to_machine(site):
    other = Run.find(site.root / "second", site.run.id, site.storage)
    with site.run.lock():
        site.run.log("one")
        (site.run.folder / "pictures").mkdir()
        (site.run.folder / "pictures" / "grid.png").write_bytes(b"picture")
        (site.run.folder / "samples").mkdir()
    with other.lock():
        assert (other.folder / "pictures" / "grid.png").read_bytes() == b"picture"
        assert other.log_path.read_text().endswith("one\n")
        other.log("two")
        (other.folder / "pictures" / "grid.png").write_bytes(b"another")
    (site.run.folder / "evaluations").mkdir()
    (site.run.folder / "evaluations" / "scores.json").write_text("made without the lock")
    with site.run.lock():
        assert site.run.log_path.read_text().endswith("two\n")
        assert (site.run.folder / "pictures" / "grid.png").read_bytes() == b"another"
        assert (site.run.folder / "evaluations" / "scores.json").exists()
    with other.lock():
        assert (other.folder / "evaluations" / "scores.json").read_text() == "made without the lock"


def test_a_run_that_is_not_in_the_store_any_more_is_reported(site):
    RemoteFolder(site.storage).delete_all("runs")
    with pytest.raises(UsageError, match=r"is not in s3://.* any more"):
        Run.find(site.root / "first", site.run.id)
