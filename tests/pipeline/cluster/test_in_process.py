"""`ddpm-pipe train` with one worker on this machine: in the command's own process, in its main thread, without Ray.

The network of these tests acts at exact calls: it sends its process signals, raises, or stops in a debugger. It counts its calls in a file,
so that what a resume repeats is counted, not inferred from equal bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.data.shards import Dataset
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.runs import Run
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.forks import PROCESSES, command
from tests.kit.trainer import final_digests, newest_step, only_run

NETWORK = """
import json, os, signal, sys, threading, time, weakref
from pathlib import Path
import torch
from torch import nn

def note(what):
    with open("calls", "a") as file:
        file.write(what + "\\n")

def act(when):
    plan = Path("plan.json")
    found = json.loads(plan.read_text()).get(when, []) if plan.exists() else []
    for action in found:
        if isinstance(action, int):
            os.kill(os.getpid(), action)
        else:
            exec(action, globals())

class Acting(nn.Module):
    alive = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.net, self.drop, self.calls = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.2), 0
        self.alive.add(self)
        act("init")

    def forward(self, x, t):
        if self.training:
            self.calls += 1
            note("step")
            act(str(self.calls))
        else:
            threads = sorted(thread.name for thread in threading.enumerate())
            note(json.dumps({"pid": os.getpid(), "alive": len(self.alive), "threads": threads, "ray": "ray" in sys.modules}))
        return self.drop(self.net(x))

    def state_dict(self, *args, **kwargs):
        if self.training and self.calls:
            act(f"save {self.calls}")
        return super().state_dict(*args, **kwargs)
"""
ONE = "threads_per_worker: 1\ntimeouts: {{stop_s: {}}}\n"


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    pid: int
    code: int
    stdout: str
    stderr: str


def furnish(home: Path, database: Path, dataset: Dataset) -> None:
    """Put into a home what a training would make first, and its experiment and profile."""
    shutil.copy(database, home / "mlflow.db")
    sections = {"model": {"type": "acting:Acting"}, "data": {"source": str(dataset.folder)}}
    write_yaml(home / "acting.yaml", tiny_experiment() | sections)
    (home / "one.yaml").write_text(ONE.format(600))
    (home / "acting.py").write_text(NETWORK)


@pytest.fixture
def acting(home: Path, migrated_database: Path, dataset: Dataset) -> Callable[..., Done]:
    """Run a command in a forked process; `plan` says what the network does, by the number of its call in training."""
    furnish(home, migrated_database, dataset)

    def run(*words: str, stdin: str = "", module: str = NETWORK, **plan: list[Any]) -> Done:
        (home / "acting.py").write_text(module)
        (home / "plan.json").write_text(
            json.dumps({name.replace("_", " ").strip(): what for name, what in plan.items()})
        )
        process = PROCESSES.Process(target=command, args=(str(home), list(words), str(home / "printed"), stdin))
        process.start()
        process.join()
        assert process.pid is not None
        assert process.exitcode is not None
        printed = ((home / f"printed{suffix}").read_text() for suffix in (".out", ".err"))
        return Done(process.pid, process.exitcode, *printed)

    return run


def train(acting: Callable[..., Done], **plan: Any) -> Done:
    return acting("train", "acting.yaml", "--cluster", "one.yaml", **plan)


def steps_made(home: Path) -> int:
    """Return how many steps all processes of a home made, and forget them."""
    calls = home / "calls"
    count = calls.read_text().splitlines().count("step") if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return count


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, dataset: Dataset) -> dict[str, str]:
    """What the training ends with if nobody disturbs it."""
    home = tmp_path_factory.mktemp("undisturbed")
    furnish(home, migrated_database, dataset)
    words = ["train", "acting.yaml", "--cluster", "one.yaml"]
    process = PROCESSES.Process(target=command, args=(str(home), words, str(home / "printed")))
    process.start()
    process.join()
    assert process.exitcode == 0, (home / "printed.err").read_text()
    return final_digests(only_run(home))


def resumed(acting: Callable[..., Done], home: Path, from_step: int, undisturbed: dict[str, str]) -> None:
    """Resume the run; it makes the steps after its newest checkpoint, no more, and ends as if nothing had happened."""
    steps_made(home)
    ended = acting("resume", "latest")
    assert ended.code == 0, ended.stderr
    assert steps_made(home) == 40 - from_step
    assert final_digests(only_run(home)) == undisturbed


@pytest.mark.fault(20)
@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_after_the_step_saved_and_loses_none(acting, home, undisturbed, number, code):
    ended = train(acting, _7=[int(number)])
    assert ended.code == code, ended.stderr
    assert "stopping after this step, and saving" in ended.stderr
    run = only_run(home)
    again = f"ddpm-pipe resume {run.id} --cluster one.yaml"
    assert ended.stderr.splitlines()[-1] == f"ddpm-pipe: stopped, saved at step 7; resume with: {again}"
    assert (steps_made(home), newest_step(home), run.state().step) == (7, 7, 7)
    assert (run.state().status, run.is_locked()) == ("INTERRUPTED", False)
    resumed(acting, home, 7, undisturbed)


@pytest.mark.fault(20)
@pytest.mark.promise("P2")
@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGUSR1, signal.SIGTERM], pytest.param([signal.SIGTERM, signal.SIGUSR1], marks=pytest.mark.slow)],
)
def test_in_a_job_of_slurm_sigusr1_asks_to_save_and_is_no_second_signal_beside_sigterm(acting, home, numbers):
    ended = train(acting, init=["os.environ['SLURM_JOB_ID'] = '17'"], _7=[int(number) for number in numbers])
    assert ended.code == 75, ended.stderr
    assert "stopped, saved at step 7" in ended.stderr
    assert (steps_made(home), newest_step(home)) == (7, 7)


@pytest.mark.fault(21)
@pytest.mark.promise("P1", "P5")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("when", [pytest.param("_7", marks=pytest.mark.slow), "save_5"])
def test_a_second_signal_ends_it_at_once_and_what_was_saved_stays(acting, home, undisturbed, number, code, when):
    ended = train(acting, **{when: [int(number), int(number)]})
    at = 5 if when == "_7" else -1
    assert ended.code == (75 if code == 143 and at == 5 else code), ended.stderr
    assert (steps_made(home), newest_step(home)) == (7 if when == "_7" else 5, at)
    assert "Traceback" not in ended.stderr
    resumed(acting, home, max(at, 0), undisturbed)


@pytest.mark.fault(20)
def test_a_signal_during_a_save_lets_it_end(acting, home, undisturbed):
    ended = train(acting, save_5=[int(signal.SIGTERM)])
    assert ended.code == 75, ended.stderr
    # the step after the save is the first that is asked whether to go on
    assert (steps_made(home), newest_step(home)) == (6, 6)
    resumed(acting, home, 6, undisturbed)


@pytest.mark.slow
def test_a_stop_that_takes_too_long_is_given_up(acting, home, undisturbed):
    (home / "one.yaml").write_text(ONE.format(0.5))
    ended = train(acting, _7=[int(signal.SIGTERM), "time.sleep(600)"])
    assert ended.code == 75, ended.stderr
    assert (steps_made(home), newest_step(home)) == (7, 5)
    resumed(acting, home, 5, undisturbed)


@pytest.mark.fault(20)
@pytest.mark.slow
@pytest.mark.parametrize(("built", "code", "steps"), [(1, 143, 0), (2, 75, 1)])
def test_a_signal_before_the_first_step_ends_it_too(acting, home, undisturbed, built, code, steps):
    """The network is built to plan the training, before there is a run, and by the worker."""
    count = "count = Path('built'); count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))"
    ended = train(acting, init=[count, f"count.read_text() == '{built}' and os.kill(os.getpid(), signal.SIGTERM)"])
    assert ended.code == code, ended.stderr
    assert steps_made(home) == steps
    assert len(Run.all(home)) == (1 if steps else 0)
    if steps:
        resumed(acting, home, steps, undisturbed)


@pytest.mark.fault(2)
@pytest.mark.promise("P1", "P2")
def test_a_killed_one_is_listed_as_dead_with_the_line_that_resumes_it(acting, home, typed, undisturbed):
    assert train(acting, _13=[int(signal.SIGKILL)]).code == -signal.SIGKILL
    run = only_run(home)
    assert (steps_made(home), newest_step(home)) == (13, 10)
    listed = typed("runs").stdout.splitlines()
    assert listed[-1] == (
        f"{run.id} died after step 10 (its process was killed or crashed); resume it with: ddpm-pipe resume {run.id}"
    )
    (row,) = json.loads(typed("runs", "--json").stdout)
    assert (row["status"], row["reason"]) == ("INTERRUPTED", "its process is gone")
    resumed(acting, home, 10, undisturbed)
    assert "died" not in typed("runs").stdout


@pytest.mark.slow
def test_an_exception_of_an_own_network_is_one_line_and_its_traceback_is_in_the_log(acting, home, undisturbed):
    ended = train(acting, _7=["raise ValueError('a fault\\nin two lines')"])
    assert ended.code == 8
    run = only_run(home)
    (last,) = [line for line in ended.stderr.splitlines() if line.startswith("ddpm-pipe: ")]
    assert f"run {run.id} failed after step 5: ValueError: a fault in two lines (acting.py, line " in last
    assert last.endswith(f"ddpm-pipe resume {run.id} --cluster one.yaml")
    assert "Traceback" not in ended.stdout + ended.stderr
    log = run.log_path.read_text()
    assert "Traceback" in log
    assert "in forward" in log
    assert run.current_attempt() == 1  # another one in the same process would fail in the same way
    assert run.state().status == "FAILED"
    steps_made(home)
    resumed(acting, home, 5, undisturbed)


@pytest.mark.slow
def test_it_samples_in_its_own_process_with_nothing_left_of_the_training_and_no_ray(acting, home):
    scored = ("-s", "evaluation.enabled=true", "-s", "evaluation.num_images=16")
    ended = acting("train", "acting.yaml", "--cluster", "one.yaml", *scored)
    assert ended.code == 0, ended.stderr
    assert "40 steps in this process, on " in ended.stderr
    *_, after = (home / "calls").read_text().rpartition("step\n")
    assert after
    for seen in map(json.loads, after.splitlines()):
        assert (seen["pid"], seen["alive"], seen["ray"]) == (ended.pid, 1, False)
        assert not {"prefetch", "watch", "upload"} & set(seen["threads"])


@pytest.mark.slow
def test_a_breakpoint_stops_in_the_users_terminal(acting):
    ended = train(
        acting,
        stdin="p self.calls * 6\nc\n",
        module=NETWORK.replace("act(str(self.calls))", "self.calls == 7 and breakpoint()"),
    )
    assert ended.code == 0, ended.stderr
    assert "(Pdb) 42" in ended.stdout


@pytest.mark.fault(16)
def test_divergence_is_reported_with_its_step_and_no_checkpoint_holds_it(home, typed):
    write_yaml(home / "tiny.yaml", tiny_experiment())
    settings = {"training.learning_rate": "1e30", "training.grad_clip": "null", "checkpoint.every_steps": "1"}
    code, _, stderr = typed(
        "train", "tiny.yaml", *(w for key, value in settings.items() for w in ("-s", f"{key}={value}"))
    )
    assert code == 5, stderr
    diverged = re.search(r"diverged at step (\d+)", stderr)
    assert diverged is not None
    saved = CheckpointStore(only_run(home).checkpoints).committed()
    assert [checkpoint.step for checkpoint in saved][:1] == [int(diverged[1]) - 1]
    for checkpoint in saved:
        assert all(t.isfinite().all() for group in checkpoint.tensors().values() for t in group.values())
