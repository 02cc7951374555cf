"""Seconds from the command to the first step of training: `ddpm-pipe train`, the same with `--isolated`, and bare Ray Train, in one run.

    python benchmarks/first_step.py               five rounds, about five minutes on two cores that do nothing else
    python benchmarks/first_step.py --rounds 3

A round starts each of them once, as a process of its own; an uncounted round before makes the dataset and MLflow's tables. Bare Ray
Train is `ray.init`, and a `TorchTrainer` with one worker whose function imports torch: it is counted to the line after that import, and
has no model, data or tracking yet. Ours are counted to the first line of progress. The processor's time is that of all processes of the
command up to then. Compare numbers of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

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


class Took(NamedTuple):
    """Seconds to the first step, by the clock and of processors."""

    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[Took]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="first-step-", dir="/tmp") as folder:
        for number in range(options.rounds + 1):
            for name, measure in WAYS.items():
                took = measure(Path(folder), number)
                print(
                    f"round {number}  {name:<30} {took.wall_s:6.2f} s, {took.cpu_s:6.2f} s of processors",
                    file=sys.stderr,
                )
                if number:
                    found[name].append(took)
    medians = {name: Took(*map(statistics.median, zip(*took, strict=True))) for name, took in found.items()}
    bare = medians["bare Ray Train"]
    print("| to the first step | s | of bare Ray Train | s of processors | of bare Ray Train |\n|---|---|---|---|---|")
    for name, took in medians.items():
        print(
            f"| {name} | {took.wall_s:.2f} | {took.wall_s / bare.wall_s:.2f} | {took.cpu_s:.2f} | {took.cpu_s / bare.cpu_s:.2f} |"
        )
    print(
        json.dumps(
            {
                "rounds": options.rounds,
                "wall_s": {name: [took.wall_s for took in each] for name, each in found.items()},
                "cpu_s": {name: [took.cpu_s for took in each] for name, each in found.items()},
                "ratio": {name: took.wall_s / bare.wall_s for name, took in medians.items()},
            }
        )
    )


def bare_ray_train(folder: Path, number: int) -> Took:
    reached = folder / f"reached-{number}"
    command = [sys.executable, "-c", BARE, str(reached), str(folder / f"bare-{number}")]
    return _until(command, folder, lambda _: reached.exists(), ending=None)


def ddpm_pipe(*more: str) -> Callable[[Path, int], Took]:
    def measure(folder: Path, number: int) -> Took:
        program = str(Path(sys.executable).with_name("ddpm-pipe"))
        step = re.compile(r"^step \d+/", re.MULTILINE)
        return _until([program, "train", *more], folder, lambda said: bool(step.search(said)), ending=signal.SIGTERM)

    return measure


def _until(command: list[str], folder: Path, reached: Callable[[str], bool], ending: signal.Signals | None) -> Took:
    """Run a command until it has reached what it is measured by, then let it end, by a signal if one is named."""
    environment = os.environ | {"DDPM_PIPE_HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    log = folder / "log"
    with log.open("w+b") as output:
        begin = time.monotonic()
        process = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while not reached(log.read_text()):
                if process.poll() is not None or time.monotonic() - begin > LIMIT_S:
                    raise SystemExit(
                        f"{' '.join(command[:3])}: did not reach its first step:\n{log.read_text()[-3000:]}"
                    )
                time.sleep(0.01)
            took = Took(time.monotonic() - begin, _cpu_s(process))
            if ending is not None:
                process.send_signal(ending)
            process.wait(LIMIT_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return took


def _cpu_s(process: psutil.Process) -> float:
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


WAYS: dict[str, Callable[[Path, int], Took]] = {
    "bare Ray Train": bare_ray_train,
    "ddpm-pipe train": ddpm_pipe(),
    "ddpm-pipe train --isolated": ddpm_pipe("--isolated"),
}


if __name__ == "__main__":
    main()
