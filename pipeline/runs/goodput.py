"""How much of a training's time went into steps that count, and what kills and restarts cost, by the run's log.

The log survives every kill. Time in which no process trained (a run that waits for its resume) is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from pipeline.console import duration, plural
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run

_LINE = re.compile(
    r"(\d{4}-\S+) (?:(?P<begins>training begins)|attempt \d+ starts at step (?P<starts>\d+)|step (?P<step>\d+)/"
    r"|attempt \d+ ended at step (?P<ended>\d+))"
)


def goodput_of(run: Run) -> dict[str, float]:
    """Return what the run's record keeps, of all attempts so far:

    goodput     share of the time that went into steps of the final weights: not into start-up, waits for data or room, saving, pictures
                and scores, nor into steps that were made again
    steps_lost  that were made again after a kill or a failure, as far as they were logged
    recovery_s  from the end of an attempt, or the begin of a new process, until steps went on
    restarts    attempts after the first
    """
    useful_s = float(RunCheckpoints(run).newest_state().get("useful_s", 0.0))
    return _figures(run.log_path.read_text(errors="replace").splitlines() if run.log_path.exists() else (), useful_s)


def _figures(lines: Iterable[str], useful_s: float) -> dict[str, float]:
    wall_s = recovery_s = 0.0
    lost = restarts = 0
    before = ended = 0.0
    made: int | None = None  # the last step that is known to have been made
    for match in filter(None, map(_LINE.match, lines)):
        time, found = datetime.fromisoformat(match[1]).timestamp(), match.groupdict()
        if found["begins"]:  # nobody trained since the line before
            before = ended = time
            continue
        wall_s, before = wall_s + max(time - before, 0.0), time
        if found["starts"] is not None:
            if made is not None:
                lost += max(made - int(found["starts"]), 0)
                recovery_s += max(time - ended, 0.0)
                restarts += 1
            made = int(found["starts"])
        elif found["step"] is not None:
            made = int(found["step"])
        else:
            made, ended = max(made or 0, int(found["ended"])), time
    share = min(useful_s / wall_s, 1.0) if wall_s else 0.0
    return {"goodput": share, "steps_lost": lost, "recovery_s": recovery_s, "restarts": restarts}


def goodput_line(figures: dict[str, float]) -> str:
    """Return the figures of a training that was restarted in words."""
    restarts, lost = plural(figures["restarts"], "restart"), plural(figures["steps_lost"], "step")
    return (
        f"{figures['goodput']:.0%} of the time went into useful steps; {restarts}: {duration(figures['recovery_s'])} to recover, "
        f"{lost} lost"
    )
