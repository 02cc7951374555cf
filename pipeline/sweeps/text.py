"""The description of a sweep in MLflow's pages: what was asked, what came out, and the command that does it again."""

from __future__ import annotations

import shlex

from pipeline.sweeps.config import Sweep
from pipeline.sweeps.folder import SweepRecord
from pipeline.sweeps.result import Result, rows, statement


def describe_sweep(record: SweepRecord, sweep: Sweep, result: Result | None) -> str:
    """Return Markdown for a reader who has only this page."""
    asked = [
        f"**{record.name}**: a sweep over {', '.join(f'`{key}`' for key in sweep.space)} of `{sweep.base}` on "
        f"`{record.dataset['name']}`; {sweep.budget.to_text()} for each trial, {sweep.seeds} seeds, ranked by {sweep.metric}.",
    ]
    if result is not None:
        asked += ["### What came out", statement(result), _table(rows(result))]
    asked += [
        "### Do it again",
        f"```\n{shlex.join(record.command)}\n```",
        f"Code {record.code_version}. The best point at full length: `ddpm-pipe train --from {record.id}`; more seeds: "
        f"`ddpm-pipe sweep --extend {record.id} --seeds 4`.",
    ]
    return "\n\n".join(asked) + "\n"


def _table(table: list[dict[str, object]]) -> str:
    if not table:
        return ""
    columns = list(table[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    shown = [["" if row.get(c) is None else str(row.get(c)).replace("|", "/") for c in columns] for row in table]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in shown])
