"""Generating over several workers, as a user types it: the same files from any number of them, and after any stop."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cluster.gather import gather
from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile, Resources
from pipeline.console import Console
from pipeline.errors import DataError
from pipeline.signals import Signals
from pipeline.storage.runs import Run
from pipeline.storage.tensor_file import Arrays
from tests.kit.commands import Shell, Typed, children_of
from tests.kit.trainer import copied, trained_held_sampler, trained_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_IMAGES = 75  # seven whole chunks and half of one


@pytest.fixture(scope="module")
def held_sampler(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose network, while a file `hold` is beside it, does two chunks in a process and waits."""
    return trained_held_sampler(tmp_path_factory.mktemp("trained"), hold_after=10, steps=5, batch_size=10, eta=1.0)


@pytest.fixture
def run(held_sampler: Run, home: Path) -> Run:
    """The trained run, in a home of the test's own; its module stands in the folder where commands are typed."""
    return copied(held_sampler, home)


@pytest.fixture(scope="module")
def whole(held_sampler: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the file that one worker makes, undisturbed."""
    home = tmp_path_factory.mktemp("whole")
    copied(held_sampler, home)
    code, _, stderr = Shell(home).type(*sampling(held_sampler, home / "out", profile(home, 1)))
    assert code == 0, stderr
    return digest(home / "out")


def profile(home: Path, workers: int) -> str:
    path = home / f"w{workers}.yaml"
    path.write_text(f"workers: {workers}\nresources_per_worker: {{CPU: {2 / workers}}}\nthreads_per_worker: 1\n")
    return str(path)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "samples.parquet").read_bytes()).hexdigest()


def sampling(run: Run, out: Path, cluster: str) -> list[str]:
    return [
        *("sample", run.id, "-n", str(NUM_IMAGES), "--format", "parquet"),
        *("--out", str(out), "--cluster", cluster),
    ]


def test_an_error_of_ours_while_a_worker_gets_ready_is_raised_as_itself(ray_session: object) -> None:
    class Lacking:  # in here, so that it travels by value: workers don't know this file
        def start(self, here: object) -> None:
            raise DataError("the images are gone; fetch them again")

        def __call__(self, indices: range) -> Arrays:
            return {"i": np.array(indices)}

    settings = Profile(workers=2, resources_per_worker=Resources(CPU=1), threads_per_worker=1)
    with pytest.raises(DataError, match="the images are gone"):
        list(runner_of(settings)(Lacking(), {0: range(1), 1: range(1, 2)}))


def test_a_lost_node_that_answers_again_is_taken_back_where_nothing_else_fits(ray_session: Any) -> None:
    far = Profile(kind="connect", address="auto", storage="/shared", resources_per_worker=Resources(CPU=1))
    here, said = ray_session.get_runtime_context().get_node_id(), io.StringIO()
    assert gather([1], far, Console(said), Signals([]), {here}, lambda need, count: None, "the same command") == 1
    assert "waiting for 1 worker " in said.getvalue()


def test_files_are_the_same_from_one_two_and_four_workers(
    run: Run, home: Path, typed: Typed, ray_session: object, whole: str
) -> None:
    for workers in (2, 4):
        code, _, stderr = typed(*sampling(run, home / f"out{workers}", profile(home, workers)))
        assert code == 0, stderr
        assert digest(home / f"out{workers}") == whole
        assert not (run.folder / "generated").exists()  # what was kept for a repeat is gone once written


def test_scores_are_the_same_and_a_repeat_computes_nothing(
    run: Run, home: Path, typed: Typed, ray_session: object
) -> None:
    def chunks() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run.folder / "features").glob("*/chunk-*")}

    scores = {}
    for name, workers in (("one", 1), ("two", 2), ("again", 2)):
        if name == "two":
            shutil.rmtree(run.folder / "features")
            for path in (home / "datasets" / "features").glob("reference-*"):
                path.unlink()
        before = chunks()
        code, stdout, stderr = typed("evaluate", run.id, "-n", "200", "--json", "--cluster", profile(home, workers))
        assert code == 0, stderr
        scores[name] = json.loads(stdout)["values"]
        assert chunks()
        assert (chunks() == before) == (name == "again")
    assert scores["one"] == scores["two"] == scores["again"]


@pytest.mark.fault(1, 2, 20)
@pytest.mark.parametrize("fault", ["worker", *(pytest.param(f, marks=pytest.mark.all) for f in ("ctrl-c", "kill"))])
def test_what_was_generated_before_a_fault_is_kept(
    run: Run, home: Path, shell: Shell, typed: Typed, ray_session: object, whole: str, fault: str
) -> None:
    hold = home / "hold"  # four of the eight chunks are done at most, whatever the machine does
    hold.touch()
    process = shell.start(*sampling(run, home / "out", profile(home, 2)))

    def chunks() -> list[Path]:
        return list((run.folder / "generated").glob("*/chunk-*"))

    process.wait_for(lambda: len(chunks()) >= 2)
    kept = {path.name: path.stat().st_mtime_ns for path in chunks()}
    if fault == "worker":
        next(w for w in children_of(process.pid) if "ChunkWorker" in w.name()).kill()
        hold.unlink()
    else:
        process.send(signal.SIGINT if fault == "ctrl-c" else signal.SIGKILL)
    code, _, stderr = process.end(240)
    if fault == "worker":
        assert code == 0, stderr
    else:
        assert code == (130 if fault == "ctrl-c" else -signal.SIGKILL), stderr
        assert fault == "kill" or "the same command goes on" in stderr.splitlines()[-1]
        now = {path.name: path.stat().st_mtime_ns for path in chunks()}
        assert kept.items() <= now.items()
        assert len(now) < 8
        hold.unlink()
        code, _, stderr = typed(*sampling(run, home / "out", profile(home, 2)))
        assert code == 0, stderr
    assert digest(home / "out") == whole


def test_bits_per_dim_are_the_same_bytes_from_one_worker_and_two(home: Path, typed: Typed, ray_session: object) -> None:
    run = trained_run(
        home,
        diffusion={"num_timesteps": 20, "schedule": "cosine"},
        sampling={"steps": 5, "batch_size": 10},
        training={"steps": 2, "batch_size": 16},
    )
    bounds = set()
    for workers in (1, 2):
        shutil.rmtree(run.folder / "bound", ignore_errors=True)
        code, _, stderr = typed("evaluate", run.id, "--metrics", "bpd", "-n", "45", "--cluster", profile(home, workers))
        assert code == 0, stderr
        (path,) = run.folder.glob("evaluations/*/bound.safetensors")
        bounds.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(bounds) == 1
