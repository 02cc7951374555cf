"""A sweep's result as text: the table, the lines that end the command, and the description in MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Container

from pipeline.storage.next_command import cluster_in
from pipeline.sweeps.config import Sweep
from pipeline.sweeps.folder import SweepRecord
from pipeline.sweeps.points import title
from pipeline.sweeps.result import Result, failed_seeds, statement, with_error, within_noise
from pipeline.tracking.text import markdown_table

SWEEP_FILE = "sweep.yaml"  # beside the report


def rows(result: Result) -> list[dict[str, object]]:
    """Return the table, best first: a column for each setting, then the results."""
    settings = list(dict.fromkeys(key for point in result.points for key in point.point))
    alike = {point.title for point in within_noise(result)}
    table: list[dict[str, object]] = []
    for rank, point in enumerate(result.points, 1):
        row: dict[str, object] = {"": rank if point.mean is not None else ""}
        row |= {key.rpartition(".")[2]: point.point.get(key) for key in settings}
        row |= {
            result.metric_name: with_error(point),
            "seeds": f"{len(point.values)} of {len(point.entries)}" if point.failed else len(point.values),
            "calls": point.nfe,
            "training s": f"{point.training_s:.0f}",
        }
        note = "best" if point is result.best else "within the noise" if point.title in alike else ""
        if point.mean is None:
            note = point.status
        elif point.failed:
            note = "; ".join(filter(None, [note, failed_seeds(point)]))
        table.append(row | {"note": note})
    return table


def to_text(result: Result) -> list[str]:
    """Return the lines that end a sweep: the statement, what was refused or failed, and the report."""
    return ["", statement(result), "", *troubles(result, ("failed",)), f"report:   {result.report}", ""]


def troubles(result: Result, statuses: Container[str]) -> list[str]:
    """Return a line for each point that was skipped or has a warning, and for each trial that ended with one of the statuses."""
    lines = [f"skipped:  {title(item.point)}: {item.reason}" for item in result.refused]
    lines += [f"warning:  {name}: {text}" for name, text in result.warnings.items()]
    entries = [entry for point in result.points for entry in point.entries if entry.status in statuses]
    return lines + [
        f"{entry.status + ':':<10}{entry.title}, seed {entry.seed} (run {entry.run}): {entry.reason}"
        for entry in entries
    ]


def next_commands(result: Result) -> dict[str, str]:
    """Return what can be typed after a sweep, and what for."""
    seeds = max((len(point.entries) for point in result.points), default=1)
    return {
        f"train --from {result.sweep_id}": "the best point at full length",
        f"sweep --extend {result.sweep_id} --seeds {_more_than(seeds)}": "more seeds; what is done is not done again",
        "ui": "trials under their sweep, in MLflow's pages",
    }


def again(record: SweepRecord) -> str:
    """Return the command that repeats the whole sweep; for an extended one with its file, since each of its commands names a part only."""
    if not record.extensions:
        return shlex.join(record.command)
    words = ["ddpm-pipe", "sweep", f"sweeps/{record.id}/report/{SWEEP_FILE}"]
    if cluster := cluster_in(record.command):
        words += ["--cluster", cluster]
    return shlex.join(words)


def describe_sweep(record: SweepRecord, sweep: Sweep, result: Result | None) -> str:
    """Return the Markdown description of the sweep's run in MLflow, which explains itself."""
    asked = [
        f"**{record.name}**: a sweep over {', '.join(f'`{key}`' for key in sweep.space)} of `{sweep.base}` on "
        f"`{record.dataset['name']}`; {sweep.budget.to_text()} for each trial, {sweep.seeds} seeds, ranked by {sweep.metric}.",
    ]
    if result is not None:
        table = [markdown_table(cells(result))] if result.points else []
        asked += ["### Results", statement(result), *table]
    asked += [
        "### Repeat it",
        f"```\n{again(record)}\n```",
        f"Code {record.code_version}. The best point at full length: `ddpm-pipe train --from {record.id}`; more seeds: "
        f"`ddpm-pipe sweep --extend {record.id} --seeds {_more_than(sweep.seeds)}`.",
    ]
    return "\n\n".join(asked) + "\n"


def _more_than(seeds: int) -> int:
    return max(4, 2 * seeds)


def cells(result: Result) -> list[list[str]]:
    """Return the table as text, its head first; empty if no trial has ended."""
    table = rows(result)
    return [list(row) for row in table[:1]] + [
        ["" if value is None else str(value) for value in row.values()] for row in table
    ]
