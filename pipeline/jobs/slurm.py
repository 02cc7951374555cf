"""Send commands to Slurm as batch jobs: write the script into the run's folder, submit it, follow its log, list and stop.

A job's name, `ddpm-` and an id, is unique: by it Slurm is asked, and its files in the folder are named.

<folder>/<job>.sh         the script
<folder>/<job>.out, .log  what the command prints as its result, and the rest
<folder>/<job>.exit       the exit code, once the job has ended and is not requeued
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.console import Console
from pipeline.errors import ClusterError
from pipeline.jobs.sent_jobs import AFTER_STOP_S, SentJobs
from pipeline.redaction import redact
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.next_command import typeable

POLL_S = 1.0
ASK_S = 5.0  # between two questions to Slurm's controller, which all users share
GONE_S = 30.0  # a network file system may show a job's files so much later
PENDING = "PENDING"
FIELDS = ("%j", "%i", "%T", "%r", "%S", "%M")


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue: waiting, running, or about to end."""

    number: str
    state: str
    reason: str
    started: str
    took: str


class SlurmJobs(SentJobs):
    """The jobs of a home that were sent to Slurm."""

    def __init__(self, profile: Profile, console: Console) -> None:
        super().__init__(profile, console, "this Slurm cluster")
        self._home = profile.home()

    def submit(self, job: str, folder: Path, script: str) -> None:
        """Write a job's script into a folder, and submit it."""
        path = make_folder(folder) / f"{job}.sh"
        write_atomically(path, script.encode())
        try:
            number = self._ask("accept the job", "sbatch", "--parsable", str(path))
        except ClusterError:
            path.unlink()
            with suppress(OSError):  # it is a run's
                folder.rmdir()
            raise
        self._console.say(f"submitted {job} as Slurm's job {number.partition(';')[0]}: {path}")

    def follow(self, job: str, out: Callable[[str], None], log: Callable[[str], None]) -> int:
        files = self._files(job)
        tails = [Tail(files.with_suffix(".out"), out), Tail(files.with_suffix(".log"), log)]
        asked_at, watch = float("-inf"), _Watch(job, self._console)
        while True:
            code = _exit_code(files)  # before the log: what is read afterwards is all of it
            for tail in tails:
                tail.read()
            if code is not None:
                for tail in tails:
                    tail.close()
                return code
            if time.monotonic() - asked_at >= ASK_S:
                asked_at = time.monotonic()
                watch.look(self._queue)
            if watch.gone_s() > GONE_S:
                raise self._vanished(job, watch.number, files)
            time.sleep(POLL_S)

    def _vanished(self, job: str, number: str, files: Path) -> ClusterError:
        """Return why a job ended that left no exit code."""
        about = ""
        if number:
            with suppress(ClusterError):  # Slurm forgets a job some minutes after its end
                about = self._ask("describe the job", "scontrol", "show", "job", "--oneliner", number)
        state = next((word.partition("=")[2] for word in about.split() if word.startswith("JobState=")), "unknown")
        if not files.with_suffix(".log").exists():
            return ClusterError(
                f"job {job} ended without a log: got Slurm's state {state}, expected that compute nodes see {files.parent}. Set "
                "storage, or DDPM_PIPE_HOME, to a folder that all nodes share."
            )
        return ClusterError(
            f"job {job} was ended by Slurm: got its state {state}, expected an exit code. What was saved is kept: {typeable('runs')}, then "
            f"{typeable('resume RUN')}"
        )

    def listed(self) -> list[dict[str, Any]]:
        queue = self._queue()
        scripts = [*self._home.glob("runs/*/ddpm-*.sh"), *self._home.glob("sweeps/*/ddpm-*.sh")]
        return [_row(path, queue.get(path.stem)) for path in sorted(scripts, key=_written, reverse=True)]

    def stop(self, job: str) -> str:
        files, queued = self._files(job), self._queue().get(job)
        if queued is None:
            code = _exit_code(files)
            return f"{job} had ended already{'' if code is None else f' with exit code {code}'}"
        if queued.state == PENDING:
            self._ask("cancel the job", "scancel", queued.number)
            write_atomically(files.with_suffix(".exit"), b"143\n")
            return f"{job}: taken out of Slurm's queue"
        self._console.say(f"asked {job} to stop; a training saves first")
        self._ask("stop the job", "scancel", "--batch", "--signal=USR2", queued.number)
        deadline = time.monotonic() + self._profile.timeouts.stop_s + 2 * AFTER_STOP_S
        while (code := _exit_code(files)) is None:
            if time.monotonic() > deadline:
                raise ClusterError(f"{job} was asked to stop and has not yet; see: {self._how_to_follow(job)}")
            time.sleep(0.5)
        text = files.with_suffix(".log").read_text(errors="replace")
        said = [line for line in text.splitlines() if line.startswith("ddpm-pipe: ")]
        return f"{job}: {said[-1].removeprefix('ddpm-pipe: ') if said else f'ended with exit code {code}'}"

    def _files(self, job: str) -> Path:
        """Return a job's script, beside which its files are."""
        return next(self._home.glob(f"*s/*/{job}.sh"))

    def _queue(self) -> dict[str, Queued]:
        """Return the user's jobs in Slurm's queue, by name; of a job and its follower, the one that is not ending."""
        text = self._ask("list its jobs", "squeue", "--me", "--noheader", f"--format={'|'.join(FIELDS)}")
        rows = [line.strip().split("|") for line in text.splitlines()]
        found = [(row[0], Queued(*row[1:])) for row in rows if len(row) == len(FIELDS)]
        return dict(sorted(found, key=lambda each: each[1].state != "COMPLETING"))

    def _ask(self, what: str, *command: str) -> str:
        """Return what one of Slurm's commands prints. Any error becomes a ClusterError of one line, with Slurm's reason."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ClusterError(
                f"profile {self._profile.name!r}: no {command[0]} here, expected Slurm's commands. Run this on a login node of the cluster."
            ) from None
        if done.returncode != 0:
            lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
            raise ClusterError(f"profile {self._profile.name!r}: Slurm did not {what}: {redact('; '.join(lines[:2]))}")
        return done.stdout.strip()


class _Watch:
    """What Slurm says of a job that is followed: changes of its state are printed."""

    def __init__(self, job: str, console: Console) -> None:
        self._job, self._console = job, console
        self._shown, self._silent = "", False
        self._gone_since: float | None = None
        self.number = ""

    def look(self, queue: Callable[[], dict[str, Queued]]) -> None:
        """Ask for the queue. A controller that does not answer is reported once."""
        try:
            queued = queue().get(self._job)
        except ClusterError as error:
            if not self._silent:
                self._console.say(f"{error}; {self._job} may still be running: asking again")
            self._silent = True
            return
        if self._silent:
            self._console.say(f"Slurm answers again: following {self._job}")
        self._silent = False
        if queued is None:
            self._gone_since = self._gone_since or time.monotonic()
            return
        self._gone_since, self.number = None, queued.number
        waits = "waiting in Slurm's queue" + (f": {queued.reason}" if queued.reason != "None" else "")
        state = waits if queued.state == PENDING else "running"
        if state != self._shown and (self._shown or queued.state == PENDING):
            self._console.say(f"{self._job}: {state}")
        self._shown = state

    def gone_s(self) -> float:
        """Return for how many seconds the job has not been in the queue; 0 if it is."""
        return 0.0 if self._gone_since is None else time.monotonic() - self._gone_since


class Tail:
    """Prints the lines that a file gets, each once."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self._path, self._show = path, show
        self._position = 0
        self._rest = b""

    def read(self) -> None:
        """Print the new whole lines. The file may not be there yet."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
            self._position += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                self._show(line.decode(errors="replace"))

    def close(self) -> None:
        """Print a last line without a newline."""
        if self._rest:
            self._show(self._rest.decode(errors="replace"))


def _exit_code(files: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):  # it is being written
        return int(files.with_suffix(".exit").read_text())
    return None


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _row(script: Path, queued: Queued | None) -> dict[str, Any]:
    code = _exit_code(script)
    with script.open() as file:
        command = [file.readline() for _ in range(2)][1].removeprefix("# ").strip()
    return {
        "job": script.stem,
        "status": queued.state if queued and code is None else "GONE" if code is None else "ENDED",
        "exit": code,
        "started": queued.started.replace("T", " ") if queued and queued.state != PENDING else None,
        "took": queued.took if queued else None,
        "submitted": datetime.fromtimestamp(_written(script)).isoformat(" ", "seconds"),
        "slurm_job": queued.number if queued else None,
        "reason": queued.reason if queued else None,
        "command": command,
    }
