"""What runs have recorded, from their own spools: no tracking store is needed. A row for each value, as CSV and as a DataFrame.

from pipeline.tracking.curves import curves
frame = curves("k7m2", "p3xw")
frame[frame.metric == "train/loss"].pivot(index="step", columns="run", values="value").plot(logy=True)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.storage.home import home as home_folder
from pipeline.storage.runs import Run
from pipeline.tracking.names import is_repeated
from pipeline.tracking.spool import Spool

NONE = "no metrics recorded"


class Point(NamedTuple):
    """A recorded value: `metric` with its group, `time` UTC in ISO 8601."""

    run: str
    metric: str
    step: int
    value: float
    time: str


def curves(*references: str, home: Path | None = None) -> Any:
    """Return a pandas DataFrame with the columns of `Point`; `time` as timestamps.

    `references` are as in commands (a run's id, a prefix, `latest`), `home` is the folder of all state. UsageError if there is no such
    run, or if one has recorded nothing.
    """
    import pandas

    frame = pandas.DataFrame(curves_of(home or home_folder(), references), columns=list(Point._fields))
    return frame.assign(time=pandas.to_datetime(frame.time))


def curves_of(home: Path, references: Sequence[str], storage: str | None = None) -> list[Point]:
    """Return the points of runs; UsageError if there is no such run, or if one has recorded nothing."""
    runs = [Run.find(home, reference, storage, lambda run: "" if recorded(run) else NONE) for reference in references]
    found = []
    for run in {run.id: run for run in runs}.values():
        if not run.is_locked():
            run.fetch_files("spool")
        points = recorded(run)
        if not points:
            raise UsageError(f"run {run.id}: {NONE} in {run.folder / 'spool'}. Train it first, or restore its spool.")
        found += points
    return found


def recorded(run: Run) -> list[Point]:
    """Return the values in the order of recording, each once, as the tracking store gets them: a step that a resumed training repeats is
    left out."""
    found: list[Point] = []
    last: dict[str, int] = {}
    seen: set[tuple[str, int, float]] = set()
    for event in Spool(run.folder / "spool").pending():
        if event["kind"] != "metrics":
            continue
        step = event["step"]
        time = datetime.fromtimestamp(event["time"] / 1000, UTC).isoformat(timespec="milliseconds")
        for metric, value in event["values"].items():
            if (step <= last.get(metric, -1)) if is_repeated(metric) else ((metric, step, value) in seen):
                continue
            last[metric] = step
            seen.add((metric, step, value))
            found.append(Point(run.id, metric, step, value, time))
    return found


def to_csv(points: Sequence[Point]) -> str:
    """Return points as CSV with a head; values are exact."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    return content.getvalue()


def summary_rows(points: Sequence[Point]) -> list[dict[str, object]]:
    """Return a row for each curve: how many points, the first and last value, and the lowest with its step."""
    each: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        each.setdefault((point.run, point.metric), []).append(point)
    rows: list[dict[str, object]] = []
    for (run, metric), curve in sorted(each.items(), key=lambda item: (item[0][1], item[0][0])):
        lowest = min(curve, key=lambda point: point.value)
        row: dict[str, object] = {"metric": metric, "run": run, "points": len(curve), "first": curve[0].value}
        rows.append(row | {"last": curve[-1].value, "lowest": lowest.value, "at step": lowest.step})
    return rows
