"""Commands that a real Slurm runs, with real time limits, signals and requeues: two nodes, which both are this machine."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.kit.commands import Shell, told
from tests.kit.experiments import slow_experiment, tiny_experiment, write_yaml
from tests.kit.slurm import SlurmCluster, slurm_cluster
from tests.kit.trainer import final_digests, newest_step, only_run
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.all, pytest.mark.slow, pytest.mark.timeout(1200)]

LATE = "import os, time\nif 'SLURM_JOB_ID' in os.environ:\n    time.sleep(60)\n"
# the signal comes 45 to 75 seconds after the start
LIMITED = {"time": "2", "signal_before_s": 45}


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def profile(home: Path, shell: Shell, slurm: SlurmCluster) -> Iterator[Callable[..., str]]:
    """Write a profile; at the end nothing of its jobs is left in the queue or as a process."""
    shell.environment |= slurm.environment

    def write(**asked: Any) -> str:
        content = {"kind": "slurm", "resources_per_worker": {"CPU": 1}, "threads_per_worker": 1, "slurm": asked}
        return write_yaml(home / "slurm.yaml", content)

    yield write
    slurm.say("scancel", "--user=root")
    wait_for(lambda: not slurm.say("squeue", "--noheader").strip(), 60, explain=slurm.log)
    assert not list(working_in(home))


def working_in(home: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DDPM_PIPE_HOME") == str(home) and "SLURM_JOB_ID" in process.environ():
                yield process


def job_of(home: Path) -> str:
    """Return the one job of a home."""
    (path,) = home.glob("runs/*/ddpm-*.sh")
    return path.stem


def ended(home: Path, job: str) -> str | None:
    (path,) = home.glob(f"runs/*/{job}.sh")
    exit_file = path.with_suffix(".exit")
    return exit_file.read_text().strip() if exit_file.exists() else None


def log_of(home: Path, job: str) -> str:
    (path,) = home.glob(f"runs/*/{job}.sh")
    return path.with_suffix(".log").read_text()


def undisturbed(home: Path, shell: Shell, experiment: str) -> dict[str, str]:
    """Return what a training on this machine ends with, without a limit and a pause."""
    content = yaml.safe_load((home / experiment).read_text())
    content["model"]["arguments"]["training_s"] = 0.0
    write_yaml(home / "fast.yaml", content)
    write_yaml(home / "here.yaml", {"threads_per_worker": 1, "storage": str(home / "here")})
    assert shell.run("train", "fast.yaml", "--cluster", "here.yaml").code == 0
    return final_digests(only_run(home / "here"))


@pytest.mark.fault(20)
@pytest.mark.promise("P1", "P2")
def test_a_training_longer_than_its_limit_is_requeued_and_ends_with_the_bytes_of_an_undisturbed_one(
    home, shell, profile, slurm
):
    experiment = slow_experiment(home, pause=0.5, steps=280)
    profile(**LIMITED)
    following = shell.start("train", experiment, "--cluster", "slurm.yaml", "--json")
    code, stdout, stderr = following.end()
    assert code == 0, stderr + slurm.log()
    run = only_run(home)
    assert json.loads(stdout)["run"] == run.id
    log = log_of(home, job_of(home))
    saved = log.count("stopped, saved at step")
    assert saved >= 2, log
    assert run.state().attempt == saved + 1
    assert log.count("ingesting digits") == 1  # the output of the first start is still there
    assert final_digests(run) == undisturbed(home, shell, experiment)
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database:
        assert database.execute("select name, status from runs").fetchall() == [(f"tiny {run.id}", "FINISHED")]
    assert ended(home, job_of(home)) == "0"
    rows = json.loads(shell.run("jobs", "list", "--cluster", "slurm.yaml", "--json").stdout)
    assert [(row["job"], row["status"], row["exit"]) for row in rows] == [(f"ddpm-{run.id}", "ENDED", 0)]
    events = [json.loads(line) for line in (run.folder / "spool" / "events.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event.get("kind") == "metrics" and "train/loss" in event["values"]]
    assert sorted(steps) == list(range(1, 281))


def test_it_is_followed_listed_and_stopped_and_a_stopped_one_is_not_requeued(home, shell, profile, slurm):
    experiment = slow_experiment(home, pause=0.2, steps=5000)
    profile(time="60")
    code, job, stderr = shell.run("train", experiment, "--cluster", "slurm.yaml", "--detach")
    assert code == 0, stderr
    job = job.strip()
    wait_for(lambda: newest_step(home) > 0, 120, explain=slurm.log)
    listed = shell.run("jobs", "list", "--cluster", "slurm.yaml").stdout
    assert job in listed
    assert "RUNNING" in listed
    following = shell.start("jobs", "follow", job, "--cluster", "slurm.yaml")
    following.wait_for(lambda: "5000 steps in this process" in following.stderr)
    stopped = shell.run("jobs", "stop", job, "--cluster", "slurm.yaml")
    assert stopped.code == 0, stopped.stderr
    assert "stopped, saved at step" in stopped.stdout
    assert following.end().code == 75
    assert only_run(home).state().status == "INTERRUPTED"
    wait_for(lambda: not slurm.job(job), 60)
    again = shell.run("jobs", "stop", job, "--cluster", "slurm.yaml")
    assert again.stdout == f"{job} had ended already with exit code 75\n"


def test_scancel_of_a_user_ends_it_and_scancel_of_sigterm_requeues_it(home, shell, profile, slurm):
    experiment = slow_experiment(home, pause=0.2, steps=5000)
    profile(time="60")
    job = shell.run("train", experiment, "--cluster", "slurm.yaml", "--detach").stdout.strip()
    wait_for(lambda: newest_step(home) > 0, 120, explain=slurm.log)
    slurm.say("scancel", "--signal=TERM", "--full", slurm.job(job))
    wait_for(lambda: log_of(home, job).count("5000 steps in this process") == 2, 120, explain=slurm.log)
    assert log_of(home, job).count("stopped, saved at step") == 1
    at = newest_step(home)
    wait_for(lambda: newest_step(home) > at, 120)
    slurm.say("scancel", slurm.job(job))
    wait_for(lambda: ended(home, job) == "75", 60, explain=slurm.log)
    assert log_of(home, job).count("stopped, saved at step") == 2
    wait_for(lambda: not slurm.job(job), 60)


def test_where_requeueing_is_not_allowed_a_follower_goes_on_and_not_more_often_than_asked(home, shell, profile, slurm):
    experiment = slow_experiment(home, pause=0.2, steps=5000)
    profile(time="60", options=["--no-requeue"], max_requeues=1)
    job = shell.run("train", experiment, "--cluster", "slurm.yaml", "--detach").stdout.strip()
    wait_for(lambda: newest_step(home) > 0, 120, explain=slurm.log)
    first = slurm.job(job)
    slurm.say("scancel", "--signal=TERM", "--batch", first)
    wait_for(lambda: log_of(home, job).count("5000 steps in this process") == 2, 120, explain=slurm.log)
    second = slurm.job(job)
    assert int(second) > int(first)
    at = newest_step(home)
    wait_for(lambda: newest_step(home) > at, 120)
    slurm.say("scancel", "--signal=TERM", "--batch", second)
    wait_for(lambda: ended(home, job) == "75", 120, explain=slurm.log)
    assert "not requeued: got 1 requeues, expected at most 1" in log_of(home, job)


def test_the_controller_is_away_for_a_while(home, shell, profile, slurm):
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 3000}))
    profile(time="60")
    following = shell.start("train", "tiny.yaml", "--cluster", "slurm.yaml")
    following.wait_for(lambda: newest_step(home) > 0)
    slurm.stop_controller()
    following.wait_for(lambda: "may still be running: asking again" in following.stderr)
    slurm.start_controller()
    following.wait_for(lambda: "Slurm answers again" in following.stderr)
    assert following.end().code == 0


def test_what_is_wrong_is_said_in_one_line(home, shell, profile, slurm):
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 2}))
    words = ("train", "tiny.yaml", "--cluster", "slurm.yaml")
    profile(partition="nowhere")
    code, _, stderr = shell.run(*words)
    assert (code, stderr.count("\n")) == (8, 1)
    assert "Slurm did not accept the job: invalid partition specified: nowhere" in stderr
    assert not list(home.glob("runs/*"))
    profile(time="1", signal_before_s=59)
    slow = slow_experiment(home)
    (home / "slow_network.py").write_text(LATE + (home / "slow_network.py").read_text())
    code, _, stderr = shell.run("train", slow, "--cluster", "slurm.yaml")
    assert code == 143
    assert "the time limit of the job is near: raise slurm.time" in told(stderr)
    # more than there is; the reason is Slurm's
    profile(time="5", options=["--hold"])
    pending = shell.start(*words)
    pending.wait_for(lambda: "waiting in Slurm's queue: JobHeldUser" in pending.stderr)
    pending.send(signal.SIGINT)
    assert pending.end().code == 130
    stopped = shell.run("jobs", "stop", "latest", "--cluster", "slurm.yaml")
    assert "taken out of Slurm's queue" in stopped.stdout
