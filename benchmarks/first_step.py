"""Seconds from the command to the first step of training: `ddpm-pipe train`, the same with `--isolated`, and bare Ray Train.

Each is started as a process of its own. Bare Ray Train is `ray.init`, and a `TorchTrainer` with one worker whose function imports torch:
it is measured to the line after that import, and has no model, data or tracking yet. Ours are measured to the first line of progress.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.rounds import Case, Measure, ratio

BARE = """
import sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def train(config):
    import torch
    open(config["reached"], "w").close()

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
TorchTrainer(
    train,
    train_loop_config={"reached": sys.argv[1]},
    scaling_config=ScalingConfig(num_workers=1),
    run_config=RunConfig(name="bare", storage_path=sys.argv[2]),
).fit()
ray.shutdown()
"""
LIMIT_S = 600.0


IN_PROCESS, ISOLATED, BARE_RAY = "ddpm-pipe train", "ddpm-pipe train --isolated", "bare Ray Train"


def cases() -> list[Case]:
    figures = {"first_step_vs_bare_ray": ratio(ISOLATED, BARE_RAY), "first_step_in_process_s": lambda s: s[IN_PROCESS]}
    return [Case("until the first step", "s", _contestants, figures, rounds=5)]


def _contestants(stack: ExitStack) -> dict[str, Measure]:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-step-", dir="/tmp")))
    measures = {
        IN_PROCESS: lambda: _ddpm_pipe(home),
        ISOLATED: lambda: _ddpm_pipe(home, "--isolated"),
        BARE_RAY: lambda: _bare_ray_train(home),
    }
    measures[IN_PROCESS]()  # makes the dataset and MLflow's tables
    return measures


def _bare_ray_train(home: Path) -> float:
    folder = Path(tempfile.mkdtemp(dir=home))
    reached = folder / "reached"
    command = [sys.executable, "-c", BARE, str(reached), str(folder)]
    return _until(command, home, lambda _: reached.exists(), ending=None)


def _ddpm_pipe(home: Path, *more: str) -> float:
    program = str(Path(sys.executable).with_name("ddpm-pipe"))
    step = re.compile(r"training: .* [1-9]\d*/\d+ ")
    return _until([program, "train", *more], home, lambda said: bool(step.search(said)), ending=signal.SIGTERM)


def _until(command: list[str], folder: Path, reached: Callable[[str], bool], ending: signal.Signals | None) -> float:
    """Run a command until it has reached what it is measured by, then let it end, by a signal if one is named.

    It writes to a terminal, where progress is drawn at once.
    """
    environment = os.environ | {"DDPM_PIPE_HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    ours, its = pty.openpty()
    termios.tcsetwinsize(ours, (24, 120))  # no bar is drawn on one without columns
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=its, stderr=its)
    os.close(its)
    said = [""]
    reader = threading.Thread(target=_read, args=(ours, said))
    reader.start()
    try:
        while not reached(said[0]):
            if process.poll() is not None or time.monotonic() - begin > LIMIT_S:
                raise SystemExit(f"{' '.join(command[:3])}: did not reach its first step:\n{said[0][-3000:]}")
            time.sleep(0.01)
        took_s = time.monotonic() - begin
        if ending is not None:
            process.send_signal(ending)
        process.wait(LIMIT_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        reader.join()
        os.close(ours)
    return took_s


def _read(terminal: int, said: list[str]) -> None:
    with contextlib.suppress(OSError):  # raised at the end, when nobody has the terminal open for writing
        while found := os.read(terminal, 2**16):
            said[0] += found.decode(errors="replace")
