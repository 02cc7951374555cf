"""The report of a sweep: its statement, the points best first, pictures, and how it is repeated."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.console import duration
from pipeline.pictures.page import details, lines, page, picture, section, table, text
from pipeline.storage.durable import write_atomically
from pipeline.storage.runs import Run
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.pictures import draw_all
from pipeline.sweeps.result import Result, statement
from pipeline.sweeps.text import SWEEP_FILE, again, cells, troubles

REPORT_FILE = "sweep-report.html"


def write_report(folder: SweepFolder, result: Result, runs: Mapping[str, Run], out: Path) -> Path:
    """Write the pictures, the page and the sweep's file into a folder, and return the page's path."""
    pictures = draw_all(result, runs, out)
    path = out / REPORT_FILE
    write_atomically(out / SWEEP_FILE, (json.dumps(folder.record.sweep, indent=1) + "\n").encode())  # JSON is YAML
    write_atomically(path, _page(folder, result, pictures))
    return path


def _page(folder: SweepFolder, result: Result, pictures: Mapping[str, Path]) -> bytes:
    record, sweep = folder.record, folder.sweep
    trials = sum(len(point.entries) for point in result.points)
    about = (
        f"Sweep {record.id} over {', '.join(sweep.space)} of {sweep.base} on {record.dataset['name']}: {trials} trials of "
        f"{sweep.budget.to_text()}, {sweep.seeds} seeds"
    )
    about += f"; {duration(result.seconds)} in all." if result.seconds else "."
    parts = [
        f"<div class=answer>{text(statement(result))}</div>",
        section("Points, best first", _table(result) or "<p>No trial has ended.</p>"),
        *(_figure(name, path, result) for name, path in pictures.items()),
        section("Not in the ranking", _troubles(result)),
        _again(folder, result),
    ]
    return page(record.name, about, parts)


def _table(result: Result) -> str:
    rows = cells(result)
    kinds = {"best": "best", "within the noise": "noise"}
    return table(rows, [kinds.get(row[-1].partition(";")[0], "") for row in rows[1:]])


def _figure(name: str, path: Path, result: Result) -> str:
    words = name.replace("_", " ").replace("heatmap", "heat map")
    return section(words.capitalize(), picture(path.read_bytes(), words, _caption(name, result)))


def _caption(name: str, result: Result) -> str:
    """Return what a picture shows that its title and its legend do not say."""
    colours = "Green: the best point. Light blue: within its noise. Grey: the others."
    if name == "ranking":
        tested = "Tukey's test over all complete points says how far chance alone reaches."
        return tested if result.noise is not None else "Too few seeds to test whether the points differ."
    if name == "heatmap":
        return "Each cell is the best mean over all other settings; the frame marks the best point."
    if name == "network_calls":
        several = any(len(point.curve) > 1 for point in result.ranked)
        return f"{colours}" + (" A line is one model, scored at several numbers of network calls." if several else "")
    if name == "training_time":
        return f"{colours} Time is that of the training alone, on this sweep's workers; it grows with their machines' load."
    if name == "parallel_coordinates":
        return f"Read a line from left to right: its settings, then its value. Values of a setting are evenly spaced. {colours}"
    return "One seed, the same for all points. Equal noise makes the settings the only difference within a column."


def _troubles(result: Result) -> str:
    items = troubles(result, ("failed", "stopped"))
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>" if items else ""


def _again(folder: SweepFolder, result: Result) -> str:
    record, best = folder.record, result.best
    identity: Any = best.best_entry.identity if best is not None and best.best_entry is not None else {}
    return section(
        "Repeat it",
        lines([again(record)]),
        lines([f"ddpm-pipe train --from {record.id}"]),
        f"<p>Code {text(record.code_version)}; dataset fingerprint <code>{text(record.dataset['fingerprint'][:16])}</code>.</p>",
        details(f"What {result.metric_name} is the score of", lines([json.dumps(identity, indent=1)])),
        details(
            f"The whole sweep, as {SWEEP_FILE} beside this page has it", lines([json.dumps(record.sweep, indent=1)])
        ),
        details("How it was asked for", lines(map(shlex.join, [record.command, *record.extensions]))),
    )
