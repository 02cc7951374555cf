"""The batch script of a job of Slurm: compared with files here, and run by bash beside commands that stand for Slurm's.

Write the files anew with: REWRITE=1 .venv/bin/python tests/hermetic.py -n 0 -q tests/pipeline/jobs/test_slurm_script.py
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.config.yaml_files import validate
from pipeline.jobs.slurm_script import script_of
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.waiting import wait_for

SCRIPTS = Path(__file__).parent / "slurm_scripts"
ONE = {"kind": "slurm", "resources_per_worker": {"CPU": 8, "GPU": 1}}
NODE = {
    "kind": "slurm",
    "workers": 8,
    "resources_per_worker": {"CPU": 8, "GPU": 1},
    "slurm": {
        "partition": "gpu",
        "account": "vision",
        "qos": "long",
        "time": "1-12:00:00",
        "setup": ["module load cuda/12"],
    },
}
FOUR = NODE | {
    "workers": {"min": 8, "max": 32},
    "slurm": {"nodes": 4, "time": "4:00:00", "options": ["--mem=0", "--comment='two words'"], "signal_before_s": 300},
}
WORDS = ["train", "--preset", "ddpm-cifar10", "--cluster", "my slurm.yaml"]
# what stands for Slurm's commands notes that it was called; CODE is what `scontrol requeue` answers
STUBS = {
    "squeue": 'echo "${STATE:-RUNNING}"',
    "scontrol": 'echo "scontrol $*" >> calls; exit "${SCONTROL:-0}"',
    "sbatch": 'echo "sbatch $1 $DDPM_PIPE_REQUEUES ${SLURM_RESTART_COUNT-unset}" >> calls; exit "${SBATCH:-0}"',
    "sleep": "true",
}
COMMAND = """
trap 'echo USR1 >> signals; exit 75' USR1
trap 'echo TERM >> signals; exit 143' TERM
[ -z "$WAITS" ] && exit "$CODE"
touch started; while true; do /bin/sleep 0.05; done
"""


def script(profile: dict[str, object], folder: Path, programs: Path, here: Path) -> str:
    return script_of(validate(Profile, profile, "p"), "ddpm-k7m2abcd", WORDS, folder, here, here, programs, "k7m2abcd")


@pytest.mark.parametrize(("name", "profile"), [("1x1", ONE), ("1x8", NODE), ("4x8", FOUR)])
def test_the_script_of_nodes_and_gpus(name, profile):
    path = SCRIPTS / f"{name}.sh"
    written = script(profile, Path("/home/me/ddpm/runs/k7m2abcd"), Path("/home/me/.venv/bin"), Path("/home/me/ddpm"))
    if "REWRITE" in os.environ:
        path.write_text(written)
    assert written == path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.fixture
def batch(tmp_path):
    """Start the script of a profile, with stubs for Slurm's commands and ours, and more variables."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (STUBS | {"ddpm-pipe": COMMAND}).items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []

    def start(slurm: dict[str, object] | None = None, **variables: str) -> subprocess.Popen[bytes]:
        path = tmp_path / "job.sh"
        path.write_text(script(ONE | {"slurm": slurm or {}}, tmp_path, programs, tmp_path))
        environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17"} | variables
        started.append(subprocess.Popen(["bash", str(path)], cwd=tmp_path, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("code", "variables", "called", "final"),
    [
        ("75", {}, ["scontrol requeue 17"], False),
        ("75", {"SLURM_RESTART_COUNT": "2"}, ["scontrol requeue 17"], False),
        ("75", {"SLURM_RESTART_COUNT": "3"}, [], True),
        ("75", {"DDPM_PIPE_REQUEUES": "2", "SLURM_RESTART_COUNT": "1"}, [], True),
        (
            "75",
            {"SCONTROL": "1", "SLURM_RESTART_COUNT": "1"},
            ["scontrol requeue 17", "sbatch --dependency=afterany:17 2 unset"],
            False,
        ),
        ("75", {"STATE": "COMPLETING"}, [], True),  # `scancel`
        ("75", {"STATE": "CANCELLED"}, [], True),
        ("0", {}, [], True),
        ("1", {}, [], True),
        ("8", {}, [], True),
        ("130", {}, [], True),
        ("143", {}, [], True),
    ],
)
def test_only_a_command_that_saved_is_requeued_so_often(tmp_path, batch, code, variables, called, final):
    ended = batch({"max_requeues": 3}, CODE=code, **variables).wait(30)
    assert calls(tmp_path) == called
    assert (tmp_path / "ddpm-k7m2abcd.exit").exists() == final
    if final:
        assert ended == int((tmp_path / "ddpm-k7m2abcd.exit").read_text()) == int(code)


def test_while_the_controller_is_away_it_is_asked_again(tmp_path, batch):
    assert batch(CODE="75", SCONTROL="1", SBATCH="1", STATE="").wait(30) == 75
    assert len(calls(tmp_path)) == 12
    assert (tmp_path / "ddpm-k7m2abcd.exit").read_text() == "75\n"


@pytest.mark.parametrize(
    ("number", "called"),
    [
        (signal.SIGUSR1, ["scontrol requeue 17"]),
        (signal.SIGTERM, ["scontrol requeue 17"]),
        (signal.SIGUSR2, []),  # `ddpm-pipe jobs stop`
    ],
)
def test_a_signal_reaches_the_command_as_one_that_asks_to_save(tmp_path, batch, number, called):
    process = batch(WAITS="yes")
    wait_for((tmp_path / "started").exists)
    time.sleep(0.2)  # the traps are set after the command has started
    process.send_signal(number)
    assert process.wait(30) == (0 if called else 75)
    assert (tmp_path / "signals").read_text() == "USR1\n"
    assert calls(tmp_path) == called


def test_the_words_of_a_command_arrive_as_they_were_typed(tmp_path):
    lines = script(ONE, tmp_path, tmp_path, tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith("ddpm-pipe train")]
    assert shlex.split(line) == ["ddpm-pipe", *WORDS, "&"]


def test_a_dry_run_prints_the_script_and_writes_nothing_and_a_wrong_experiment_is_refused(home, typed):
    write_yaml(home / "mine.yaml", ONE)
    code, printed, told = typed("train", "--cluster", "mine.yaml", "--dry-run", "-s", "training.steps=7")
    assert code == 0, told
    assert printed.startswith("#!/bin/bash\n# ddpm-pipe train --cluster mine.yaml -s training.steps=7\n")
    assert "sbatch FILE" in told
    assert [path.name for path in home.iterdir()] == ["mine.yaml"]
    code, printed, told = typed("train", "--cluster", "mine.yaml", "--dry-run", "-s", "training.stepz=7")
    assert (code, printed) == (2, "")
    assert "did you mean 'steps'" in told


def test_where_there_is_no_slurm_a_line_says_so(home, typed, monkeypatch):
    write_yaml(home / "mine.yaml", ONE)
    monkeypatch.setenv("PATH", str(home))
    code, _, told = typed("train", "--cluster", "mine.yaml")
    assert code == 8
    assert told.splitlines()[-1] == (
        "ddpm-pipe: profile 'mine': no sbatch here, expected Slurm's commands. Run this on a login node of the cluster."
    )
    assert not list(home.glob("runs/*"))
    assert typed("jobs", "list", "--cluster", "mine.yaml").code == 8


def test_a_job_that_is_started_again_resumes_the_run_it_began(home, typed):
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 2}))
    assert typed("train", "tiny.yaml", env={"DDPM_PIPE_RUN": "mine"}).code == 0
    assert [path.name for path in (home / "runs").iterdir()] == ["mine"]
    code, _, told = typed("train", "tiny.yaml", env={"DDPM_PIPE_RUN": "mine"})
    assert code == 2
    assert "run mine is finished at step 2" in told
    assert typed("train", "tiny.yaml", env={"DDPM_PIPE_RUN": "../x"}).code == 2


def test_a_run_of_slurm_is_not_resumed_on_a_login_node_by_accident(home, typed):
    write_yaml(home / "mine.yaml", ONE | {"resources_per_worker": {"CPU": 1}})
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 2}))
    words = ("train", "tiny.yaml", "--cluster", "mine.yaml")
    assert typed(*words, env={"SLURM_JOB_ID": "17", "DDPM_PIPE_RUN": "mine"}).code == 0
    code, _, told = typed("resume", "mine", "-s", "training.steps=4")
    assert code == 2
    assert "is of kind slurm, and this command runs outside of a job; name it with --cluster to submit one" in told


@pytest.fixture
def answering(home, monkeypatch):
    """Let a command of Slurm's print a text."""
    programs = home / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def answer(name: str, text: str) -> None:
        (programs / name).write_text(f"#!/bin/bash\necho '{text}'\n")
        (programs / name).chmod(0o755)

    return answer


def test_a_submitted_resume_names_the_run_that_latest_meant(home, typed, answering):
    write_yaml(home / "mine.yaml", ONE)
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 2}))
    assert typed("train", "tiny.yaml", env={"DDPM_PIPE_RUN": "mine"}).code == 0
    answering("sbatch", "5")
    words = ("--cluster", "mine.yaml", "-s", "training.steps=4")
    code, job, told = typed("resume", "latest", *words, "--detach")
    assert code == 0, told
    written = (home / "runs" / "mine" / f"{job.strip()}.sh").read_text()
    assert "\nddpm-pipe resume mine --cluster mine.yaml -s training.steps=4 &\n" in written
    assert "DDPM_PIPE_RUN" not in written
    answering("squeue", f"{job.strip()}|5|PENDING|Priority|N/A|0:00")
    (row,) = json.loads(typed("jobs", "list", "--cluster", "mine.yaml", "--json").stdout)
    assert (row["status"], row["reason"], row["slurm_job"], row["exit"]) == ("PENDING", "Priority", "5", None)
    assert row["command"] == "ddpm-pipe resume mine --cluster mine.yaml -s training.steps=4"
    assert typed("resume", "another", *words, "--detach").code == 2


def test_a_job_that_ended_without_an_exit_code_is_explained(home, typed, answering, monkeypatch):
    write_yaml(home / "mine.yaml", ONE)
    answering("sbatch", "5")
    answering("squeue", "")
    monkeypatch.setattr("pipeline.jobs.slurm.GONE_S", 0.0)
    words = ("--cluster", "mine.yaml", "-s", "training.steps=4")
    code, _, told = typed("train", *words)
    assert code == 8
    assert "ended without a log: got Slurm's state unknown, expected that compute nodes see" in told
    (script,) = home.glob("runs/*/*.sh")
    script.with_suffix(".log").write_text("a line\nhalf a line")
    code, _, told = typed("jobs", "follow", "latest", "--cluster", "mine.yaml")
    assert code == 8
    assert "a line\n" in told
    assert "was ended by Slurm: got its state unknown, expected an exit code." in told
    script.with_suffix(".exit").write_text("75\n")
    code, _, told = typed("jobs", "follow", "latest", "--cluster", "mine.yaml")
    assert (code, told) == (75, "a line\nhalf a line\n")
