"""Why an attempt failed, in one line: which of several workers failed first, and why a process was killed."""

from __future__ import annotations

import traceback
from pathlib import Path

from pipeline.planning.memory import SAID

KILLED = "its process was killed"
STARVED = "out of memory"


def cause_of(error: BaseException) -> str:
    """Return one line for why an attempt failed: the first of several workers' errors, not the ones that it caused."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return _one_line(error)
    # a killed worker fails its health check; its peers lose their connection to it
    ranks = sorted(
        failures, key=lambda r: ("HealthCheck" not in type(failures[r]).__name__, "Connection" in str(failures[r]), r)
    )
    return f"worker {ranks[0]}: {_one_line(failures[ranks[0]])}"


def cause_here(error: BaseException, code_folder: str) -> str:
    """Return one line for an error of this process, with its file and line if it was raised in the user's own folder."""
    frames = traceback.extract_tb(error.__traceback__)
    paths = [(Path(frame.filename), frame.lineno) for frame in frames]
    mine = [
        (path, line) for path, line in paths if path.is_relative_to(code_folder) and "site-packages" not in path.parts
    ]
    where = f" ({mine[-1][0].name}, line {mine[-1][1]})" if mine else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (f"{STARVED} ({text})" if SAID.search(text) else text.rstrip(": ")) + where


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "worker process has died" in text:
        return f"{KILLED} (SIGKILL or out of memory)"
    if "HEALTH_CHECK_TIMEOUT" in text:
        return "it did not answer within timeouts.collective_s"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = (lines[-1] if lines else type(error).__name__)[:300]
    if SAID.search(text):
        return f"{STARVED} ({last})"
    if "Timed out waiting" in text or "collective operation timeout" in text:
        return "another worker did not answer within timeouts.collective_s"
    return last


def starved(cause: str) -> str:
    """Return the cause for a node where the system has killed a process because memory ran out."""
    worker, colon, what = cause.partition(": ")
    return f"{worker}{colon}killed by the system: {STARVED}" if what.startswith(KILLED) else cause
