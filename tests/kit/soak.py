"""Random faults in trainings, for as many minutes as are given: each run is struck, gone on with, and compared with one left in peace.

    make soak SEED=7 MINUTES=30

All that is random is drawn from SEED, which is printed, and each trial's own seed with it where something is wrong: the kinds of faults,
the steps and moments at which they strike, the bits that they flip. A run is struck one to three times before it may end. Most of
the time is spent so; the rest on the tests that draw their own examples (hypothesis), with that seed. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.kit.environment import make_safe

make_safe()

from pipeline.storage.checkpoint import MANIFEST  # noqa: E402
from pipeline.storage.runs import Run  # noqa: E402
from tests.kit import trainer  # noqa: E402
from tests.kit.experiments import TINY  # noqa: E402
from tests.kit.forks import PROCESSES  # noqa: E402

STEPS, EVERY = TINY["training"]["steps"], TINY["checkpoint"]["every_steps"]
SHARE_OF_FAULTS = 0.7
SAID = "stderr.txt"
LONGEST_S = 3.0  # about as long as a whole training takes
AFTER_A_STEP, AT_A_MOMENT, STOPPED, DAMAGED = (
    "SIGKILL after a step",
    "SIGKILL at any moment",
    "asked to stop",
    "SIGKILL, one bit of the newest checkpoint flipped",
)
MAY_LOSE = {AFTER_A_STEP: EVERY, AT_A_MOMENT: EVERY, STOPPED: 0, DAMAGED: 2 * EVERY}  # steps, by each strike


@dataclass
class Row:
    """What became of the runs that one kind of fault struck."""

    runs: int = 0
    strikes: int = 0
    steps_lost: int = 0
    recovered: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)


def heard(told: Connection) -> Iterator[int]:
    """Yield the number of each step that a training makes in its process, until it ends."""
    try:
        while True:
            yield told.recv()
    except EOFError:
        return


def train(folder: str, told: Connection, stop_after: int | None) -> None:
    """Train in this process; what it says goes to a file of the run."""
    os.dup2(os.open(Path(folder, SAID), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    trainer.train(folder, told, stop_after)


def attempt(run: Run, rng: random.Random, fault: str | None = None) -> tuple[int, int | None]:
    """Start the run's next attempt, to be struck by the fault unless it ends before; return the steps it made, and its exit code."""
    target = rng.randint(1, STEPS)
    mine, its = PROCESSES.Pipe(duplex=False)
    stop_after = target if fault == STOPPED else None
    process = PROCESSES.Process(target=train, args=(str(run.folder), its, stop_after))
    process.start()
    its.close()
    made = 0
    if fault == AT_A_MOMENT:
        process.join(rng.uniform(0.0, LONGEST_S))
        process.kill()
    for made in heard(mine):
        if fault in (AFTER_A_STEP, DAMAGED) and made == target:
            process.kill()
    process.join()
    if fault == DAMAGED:
        flip_a_bit(run, rng)
    return made, process.exitcode


def flip_a_bit(run: Run, rng: random.Random) -> None:
    complete = sorted(manifest.parent for manifest in run.checkpoints.glob(f"*/{MANIFEST}"))
    if complete:
        file = rng.choice(sorted(path for path in complete[-1].iterdir() if path.name != MANIFEST))
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def began_at(run: Run) -> int:
    """Return the step that the run's newest attempt began at."""
    attempt = (run.folder / "attempt").read_text().strip()
    found = re.findall(rf"attempt {attempt} starts at step (\d+) ", run.log_path.read_text())
    return int(found[-1]) if found else 0


def trial(home: Path, fault: str, seed: int, calm: tuple[object, object], row: Row) -> None:
    """Strike one run, go on with it to its end, and note in the row what was lost and whether it ended as it should."""
    rng, run = random.Random(seed), trainer.make_run(home)
    strikes = (
        1 if fault == DAMAGED else rng.randint(1, 3)
    )  # a run keeps few checkpoints: not all of them are to be damaged
    row.runs += 1
    row.strikes += strikes
    reached = 0
    for kind in (*[fault] * strikes, None):
        made, code = attempt(run, rng, kind)
        if made:
            lost = reached - began_at(run)
            reached = began_at(run) + made
            row.steps_lost += lost
            if not 0 <= lost <= MAY_LOSE[fault]:
                row.wrong.append(f"seed {seed}: {lost} steps lost")
    if code != 0:
        row.wrong.append(f"seed {seed}: exit code {code}: {(run.folder / SAID).read_text()[-2000:]}")
        return
    row.recovered += 1
    if (trainer.final_digests(run), trainer.logged_losses(run)) == calm:
        row.equal += 1
    else:
        row.wrong.append(f"seed {seed}: other bytes or losses")


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'fault':50} {'runs':>5} {'strikes':>8} {'steps lost':>11} {'recovered':>10} {'bytes equal':>12}"]
    for fault, row in rows.items():
        lines.append(f"{fault:50} {row.runs:5} {row.strikes:8} {row.steps_lost:11} {row.recovered:10} {row.equal:12}")
    return "\n".join(lines)


def faults(seed: int, seconds: float) -> bool:
    """Strike runs until the time is over; print the table; return whether all ended as they should."""
    end, rng, rows = time.monotonic() + seconds, random.Random(seed), {fault: Row() for fault in MAY_LOSE}
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = trainer.make_run(Path(folder, "undisturbed"))
        attempt(undisturbed, rng)
        calm = trainer.final_digests(undisturbed), trainer.logged_losses(undisturbed)
        number = 0
        while time.monotonic() < end:
            for fault, row in rows.items():
                number += 1
                trial(Path(folder, str(number)), fault, rng.getrandbits(32), calm, row)
    print(table(rows))
    wrong = [f"{fault}: {line}" for fault, row in rows.items() for line in row.wrong]
    print(*wrong, sep="\n", end="\n" if wrong else "", flush=True)
    return not wrong


def examples(seed: int, seconds: float) -> bool:
    """Run the tests that draw their own examples, with other ones than the suite's, again and again until the time is over."""
    end, ended_well = time.monotonic() + seconds, True
    while (left := end - time.monotonic()) > 0:
        marks = ["-m", "hypothesis", "--hypothesis-profile=soak", f"--hypothesis-seed={seed}"]
        print(f"hypothesis, seed {seed}", flush=True)
        try:
            ended_well &= (
                subprocess.run([sys.executable, "-m", "pytest", "-q", *marks, "tests"], timeout=left).returncode == 0
            )
        except subprocess.TimeoutExpired:
            print("the time is over", flush=True)
        seed += 1
    return ended_well


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--minutes", type=float, default=30.0)
    given = parser.parse_args()
    print(f"SEED={given.seed}", flush=True)
    seconds = 60 * given.minutes
    well = faults(given.seed, SHARE_OF_FAULTS * seconds)
    return 0 if examples(given.seed, (1 - SHARE_OF_FAULTS) * seconds) and well else 1


if __name__ == "__main__":
    sys.exit(main())
