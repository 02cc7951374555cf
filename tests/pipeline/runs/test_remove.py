"""`ddpm-pipe rm` and `prune`: what goes, what stays and why, and a home that every command reads wherever a removal is killed."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.errors import UsageError
from pipeline.runs.record import Trial
from pipeline.runs.remove import Removal, plan_prune, plan_removal
from pipeline.storage import remote
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.removal import hide
from pipeline.storage.runs import Run
from pipeline.sweeps.config import plain_base, sweep_from
from pipeline.sweeps.folder import SweepFolder
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit.commands import Started, Typed
from tests.kit.object_store import QUICK, objects
from tests.kit.tracking import client_of

NewRun = Callable[..., Run]


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's temporary folder, for this test alone."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(remote.RETRIES, "backoff", QUICK)
    return folder


def new_sweep(home: Path, new_run: NewRun, storage: str | None = None) -> tuple[SweepFolder, list[Run]]:
    """Make a sweep of two trials."""
    asked = sweep_from(
        {"base": "digits", "space": {"diffusion.schedule": ["linear", "cosine"]}, "budget": {"steps": 9}}
    )
    base, profile = plain_base(asked), Profile(storage=storage).to_dict()
    sweep = SweepFolder.create(home, asked, base, base, {"path": "", "fingerprint": "x"}, profile, ["ddpm-pipe"])
    names = ("linear", "cosine")
    trials = [Trial(sweep.id, f"{name}-0", {"diffusion.schedule": name}, name, 0) for name in names]
    return sweep, [new_run(profile=profile, trial=trial.to_json()) for trial in trials]


def fork_of(run: Run, new_run: NewRun, step: int = 5) -> Run:
    return new_run(name="forked", initial_weights=str(run.checkpoints / f"step-{step:010d}-1"))


def old(path: Path, age_s: float = 7200.0) -> Path:
    """Make a file, as if written two hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    then = time.time() - age_s
    os.utime(path, (then, then))
    os.utime(path.parent, (then, then))
    return path


def listed(typed: Typed, *where: str) -> list[str]:
    code, stdout, stderr = typed("runs", "--json", *where)
    assert code == 0, stderr
    return sorted(row["id"] for row in json.loads(stdout))


# what stays


def test_what_something_depends_on_stays_and_the_line_names_it(home: Path, new_run: NewRun, typed: Typed) -> None:
    origin = new_run()
    fork = fork_of(origin, new_run)
    sweep, (trial, _) = new_sweep(home, new_run)
    before = listed(typed)
    for run, named, remedy in ((origin, f"run {fork.id} (forked)", fork.id), (trial, f"sweep {sweep.id}", sweep.id)):
        code, _, stderr = typed("rm", run.id, "--yes")
        assert code == 10
        assert stderr.startswith(f"ddpm-pipe: run {run.id}: {named}")
        assert remedy in stderr.partition("ddpm-pipe rm ")[2]
    fork_of_trial = fork_of(trial, new_run)
    code, _, stderr = typed("rm", sweep.id, "--yes")
    assert (code, fork_of_trial.id in stderr) == (10, True)
    assert listed(typed) == sorted([*before, fork_of_trial.id])
    assert typed("rm", origin.id, fork.id, fork_of_trial.id, sweep.id, "-y").code == 0
    assert listed(typed) == []
    assert [path for name in ("runs", "sweeps") for path in (home / name).iterdir()] == []


def test_a_locked_run_stays_and_the_line_names_the_process(new_run: NewRun, typed: Typed) -> None:
    run = new_run()
    with run.lock():
        code, _, stderr = typed("rm", run.id, "--yes")
        assert code == 9
        assert f"run {run.id} is being worked on by process {os.getpid()}" in stderr
        run.update(status="FAILED")
        code, stdout, stderr = typed("prune", "--runs", "failed", "--json", "--yes")
        assert (code, json.loads(stdout)["kept"]) == (
            0,
            [{"what": f"run {run.id} (test)", "why": "a process works on it"}],
        )
    assert listed(typed) == [run.id]


def test_it_asks_lists_and_counts(new_run: NewRun, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    (run.folder / "big").write_bytes(b"x" * 5_000_000)
    code, stdout, _ = typed("rm", run.id, "--dry-run", "--json")
    found = json.loads(stdout)
    assert (code, found["removed"], len(found["items"])) == (0, False, 1)
    assert found["items"][0]["place"] == str(run.folder)
    assert found["bytes"] == sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    for answer, code in (("", 2), ("n\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        ended = typed("rm", run.id)
        assert (ended.code, "5.0 MB" in ended.stdout) == (code, True)
        assert "remove 1 item, 5.0 MB? [y/N]" in ended.stderr
        assert ("--yes" in ended.stderr) == (answer == "")
        assert listed(typed) == [run.id]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert typed("rm", run.id).stdout.endswith("removed 5.0 MB\n")
    assert not run.folder.exists()
    code, _, stderr = typed("rm", run.id)
    assert (code, "no such run or sweep" in stderr) == (2, True)


def test_mlflows_entry_artifacts_and_models_go_but_never_a_registered_one(
    home: Path, new_run: NewRun, typed: Typed, migrated_database: Path
) -> None:
    shutil.copy(migrated_database, home / "mlflow.db")
    run, settings = new_run(), TrackingSettings.resolve(home)
    tracker = Tracker(run.folder, settings)
    tracker.start("a run", {}, {}, "")
    tracker.artifact(run.folder / "run.json")
    assert tracker.close()
    mlflow_run_id = run.mlflow_run_id
    assert mlflow_run_id is not None
    client = client_of(settings)
    tracked = client.get_run(mlflow_run_id).info
    model = client.create_logged_model(tracked.experiment_id, name="model", source_run_id=mlflow_run_id)
    weights = old(Path(model.artifact_location.removeprefix("file://")) / "weights")
    client.create_registered_model("ddpm-digits")
    client.create_model_version("ddpm-digits", model.artifact_location, run_id=mlflow_run_id)
    code, _, stderr = typed("rm", run.id, "--yes")
    assert (code, "version 1 of ddpm-digits" in stderr) == (10, True)
    client.delete_model_version("ddpm-digits", "1")

    artifacts = Path(tracked.artifact_uri.removeprefix("file://"))
    assert (artifacts / "run.json").is_file()
    code, stdout, stderr = typed("rm", mlflow_run_id, "--yes", "--json")
    assert code == 0, stderr
    places = {item["place"] for item in json.loads(stdout)["items"]}
    assert places == {str(run.folder), str(artifacts.parent), str(weights.parent.parent)}
    assert not any(Path(place).exists() for place in places)
    assert client.get_run(mlflow_run_id).info.lifecycle_stage == "deleted"
    assert client.search_logged_models([tracked.experiment_id]) == []


def test_a_tracking_store_that_is_away_keeps_the_run(home: Path, new_run: NewRun, typed: Typed) -> None:
    run = new_run(profile=Profile.model_validate({"mlflow": {"tracking_uri": "http://127.0.0.1:9"}}).to_dict())
    (run.folder / "spool").mkdir()
    (run.folder / "spool" / "mlflow.json").write_text('{"uri": "http://127.0.0.1:9", "mlflow_run_id": "abc"}')
    code, _, stderr = typed("rm", run.id, "--yes")
    assert (code, stderr.startswith("ddpm-pipe: tracking: http://127.0.0.1:9 cannot be used")) == (7, True)
    assert listed(typed) == [run.id]


# killed at each step


@contextmanager
def killed_after(steps: int, removal: Removal) -> Iterator[bool]:
    """Carry out the first steps of a removal; yield whether it came to its end. What a killed process had locked is free."""
    going = removal.steps()
    done = sum(1 for _ in itertools.islice(going, steps))
    going.close()
    yield done < steps


def test_killed_at_any_step_every_command_reads_the_home_and_prune_ends_it(
    home: Path, new_run: NewRun, typed: Typed, tmp_path: Path
) -> None:
    other = new_run()
    sweep, trials = new_sweep(home, new_run)
    shutil.copytree(home, tmp_path / "before")
    context = Context.load(None)
    for steps in itertools.count(0):
        for name in ("runs", "sweeps"):
            shutil.rmtree(home / name)
            shutil.copytree(tmp_path / "before" / name, home / name)
        with killed_after(steps, plan_removal(context, [sweep.id], SweepFolder)) as at_its_end:
            left = listed(typed)
            assert other.id in left
            assert [found.id for found in SweepFolder.all(home)] == ([sweep.id] if steps == 0 else [])
            for run in Run.all(home):  # what is listed is whole
                assert run.record.id == run.id
                with run.lock():
                    run.update(reason="read")
            assert typed("compare").code == 2  # nothing is scored, which it says
        if steps:
            assert typed("prune", "--yes").code == 0
            assert listed(typed) == [other.id]
            assert sorted(path.name for path in (home / "runs").iterdir()) == [other.id]
            assert list((home / "sweeps").iterdir()) == []
        if at_its_end:
            break
    assert steps == 1 + len(trials) + 3 + 1  # each disappears, each is erased


def test_killed_at_any_step_every_machine_reads_the_store_and_prune_ends_it(
    home: Path, new_run: NewRun, bucket: str, tmp_path: Path
) -> None:
    profile = Profile(storage=bucket)
    context = Context(profile, profile)
    for steps in itertools.count(0):
        sweep, trials = new_sweep(home, new_run, bucket)
        for run in trials:
            assert run.remote is not None
            run.remote.folder.write("checkpoints/step-0000000001-1/model.safetensors", b"x" * 100)
        elsewhere = tmp_path / f"elsewhere-{steps}"  # a machine that knows the runs
        known = {run.id for run in Run.all(elsewhere, bucket)}
        assert known == {run.id for run in trials}
        with killed_after(steps, plan_removal(context, [sweep.id], SweepFolder)) as at_its_end:
            shutil.rmtree(home)  # all that this machine knew
            found = Run.all(home, bucket)
            assert {run.id for run in found} <= known
            for run in found:
                with run.lock():
                    run.update(reason="read")
            for run in Run.all(elsewhere, bucket):
                gone = run.id not in {each.id for each in found}
                assert run.remote is not None
                assert run.remote.fetch_records(run.folder) != gone
        if steps == 0:
            for _ in plan_removal(context, [sweep.id], SweepFolder).steps():
                pass
        else:
            for _ in plan_prune(context, SweepFolder).steps():
                pass
        assert objects(f"{bucket}/runs") == objects(f"{bucket}/sweeps") == []
        if at_its_end:
            break
    assert steps == 7


def test_a_copy_of_a_run_that_the_store_lost_is_said_to_be_one_and_removed(
    home: Path, new_run: NewRun, bucket: str, typed: Typed, tmp_path: Path
) -> None:
    run = new_run(profile=Profile(storage=bucket).to_dict())
    assert run.remote is not None
    run.remote.folder.delete_all("")
    code, _, stderr = typed("resume", run.id)
    assert (code, f"`ddpm-pipe rm {run.id}` removes" in stderr) == (2, True)
    assert typed("rm", run.id, "--yes").code == 0
    assert (listed(typed), objects(bucket)) == ([], [])


def test_a_lock_that_was_waited_for_until_the_run_was_gone_is_refused(
    home: Path, new_run: NewRun, bucket: str, tmp_path: Path
) -> None:
    run = new_run(profile=Profile(storage=bucket).to_dict())
    found = Run.find(tmp_path / "there", run.id, bucket)
    with run.lock(copies=False):
        hide(run)
    with pytest.raises(UsageError, match=r"is not in s3://.* any more"), found.lock():
        pass


@pytest.mark.all
def test_killed_by_sigkill_at_random_moments(
    home: Path, new_run: NewRun, start: Callable[..., Started], typed: Typed
) -> None:
    for pause_s in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1):
        run = new_run()
        for number in range(3000):
            (run.folder / f"file-{number}").write_bytes(b"x")
        removing = start("rm", run.id, "--yes")
        removing.wait_for(lambda folder=run.folder: not folder.exists())
        time.sleep(pause_s)
        removing.send(signal.SIGKILL)
        removing.end()
        assert listed(typed) == []
        assert typed("prune", "--yes").code == 0
        assert list((home / "runs").iterdir()) == []


# prune


def test_prune_removes_what_can_be_made_again_and_is_idle(home: Path, new_run: NewRun, typed: Typed) -> None:
    run, busy = new_run(), new_run()
    features = home / "datasets" / "features"
    goes = [
        old(run.folder / "features" / "0123" / "chunk-000000.safetensors"),
        old(run.folder / "generated" / "0123" / "chunk-000000.safetensors"),
        old(features / "reference-1.safetensors"),
        old(features / "parts" / "0123" / "chunk-000000.safetensors"),
        old(home / "datasets" / ".photos.partial" / "shard-0"),
        old(home / ".ddpm-probe-x" / "step"),
        old(Path(tempfile.gettempdir()) / f"ddpm-pipe-{os.getuid()}" / "shards" / "ab" / "abcd"),
        old(Path(tempfile.gettempdir()) / f"ddpm-pipe-{os.getuid()}" / "origins" / "runs-x" / "model"),
    ]
    os.chmod(Path(tempfile.gettempdir()) / f"ddpm-pipe-{os.getuid()}", 0o700)
    for path in goes:
        os.utime(path.parent.parent, (1e9, 1e9))
    stays = [
        old(features / "classifier-1.safetensors"),
        old(features / "reference-2.safetensors", age_s=60),
        old(home / "datasets" / "downloads" / "mnist"),
        old(home / "datasets" / "digits-1" / "shard-0"),
        old(run.folder / "pictures" / "samples.png"),
        old(busy.folder / "features" / "0123" / "chunk-000000.safetensors"),
    ]
    os.utime(busy.folder / "features", (1e9, 1e9))
    with busy.lock():
        code, stdout, stderr = typed("prune", "--dry-run", "--json")
        assert (code, all(path.exists() for path in goes)) == (0, True), stderr
        assert json.loads(stdout)["bytes"] == 1000 * len(goes)
        code, stdout, stderr = typed("prune", "--yes")
    assert code == 0, stderr
    assert stdout.endswith("removed 8.0 kB\n")
    assert [path for path in goes if path.exists()] == []
    assert [path for path in stays if not path.exists()] == []
    assert typed("prune", "--yes", "--json").stdout.count('"what"') == 1  # of the run that was busy


def test_prune_by_status_and_age(new_run: NewRun, typed: Typed, home: Path) -> None:
    failed, fresh, finished, origin = (new_run(name=name) for name in ("failed", "fresh", "finished", "origin"))
    fork = fork_of(origin, new_run)
    for run, status in ((failed, "FAILED"), (fresh, "FAILED"), (finished, "FINISHED"), (origin, "FAILED")):
        run.update(status=status)
    for run in (failed, origin):
        state = json.loads((run.folder / "status.json").read_text())
        (run.folder / "status.json").write_text(json.dumps(state | {"updated": "2020-01-01T00:00:00+00:00"}))
    assert typed("prune", "--older-than", "3").code == 2
    code, stdout, _ = typed("prune", "--runs", "failed", "--older-than", "3", "--yes")
    assert code == 0
    assert f"kept: run {origin.id} (origin): run {fork.id} (forked) was forked from it" in stdout
    assert listed(typed) == sorted([fresh.id, finished.id, origin.id, fork.id])


def test_prune_keeps_the_newest_checkpoints_and_those_of_forks(trained: Run, new_run: NewRun, typed: Typed) -> None:
    newest, before = CheckpointStore(trained.checkpoints).committed()
    fork = fork_of(trained, new_run, before.step)
    assert json.loads(typed("prune", "--checkpoints", "1", "--json", "--dry-run").stdout)["items"] == []
    assert typed("rm", fork.id, "--yes").code == 0
    shutil.copytree(newest.folder, newest.folder.with_name("kept"))
    damaged = newest.folder / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert (
        json.loads(typed("prune", "--checkpoints", "1", "--json").stdout)["items"] == []
    )  # the older one may be needed
    shutil.rmtree(newest.folder)
    newest.folder.with_name("kept").rename(newest.folder)
    code, stdout, _ = typed("prune", "--checkpoints", "1", "--yes")
    assert (code, before.folder.name in stdout) == (0, True)
    assert CheckpointStore(trained.checkpoints).committed() == [newest]
