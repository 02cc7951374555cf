"""The report of a sweep as one HTML page with its pictures inside: no script, no external address."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.console import duration
from pipeline.storage.durable import write_atomically
from pipeline.storage.runs import Run
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.pictures import draw_all
from pipeline.sweeps.result import Result, statement
from pipeline.sweeps.text import SWEEP_FILE, again, cells, troubles

REPORT_FILE = "sweep-report.html"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f7f8; margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 10px; }
.about { color: #667; margin: 0 0 18px; }
section, .answer { background: #fff; border: 1px solid #e3e6e8; border-radius: 10px; padding: 18px 20px; margin: 0 0 18px; }
.answer { border-left: 5px solid #009E73; font-size: 16.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #667; font-weight: 600; border-bottom: 2px solid #e3e6e8; padding: 5px 12px 5px 0; white-space: nowrap; }
td { border-bottom: 1px solid #eef0f1; padding: 5px 12px 5px 0; white-space: nowrap; }
tr.best td { background: #e9f6f1; font-weight: 600; } tr.noise td { background: #eef7fc; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; } figure { margin: 0; }
figcaption { color: #667; font-size: 13.5px; margin-top: 8px; }
pre { background: #f6f7f8; border-radius: 6px; padding: 10px 12px; font-size: 13px; margin: 6px 0; white-space: pre-wrap; }
details { margin-top: 8px; } summary { cursor: pointer; color: #0072B2; } li { margin: 3px 0; }
"""


def write_report(folder: SweepFolder, result: Result, runs: Mapping[str, Run], out: Path) -> Path:
    """Write the pictures, the page and the sweep's file into a folder, and return the page's path."""
    pictures = draw_all(result, runs, out)
    page = out / REPORT_FILE
    write_atomically(out / SWEEP_FILE, (json.dumps(folder.record.sweep, indent=1) + "\n").encode())  # JSON is YAML
    write_atomically(page, _page(folder, result, pictures).encode())
    return page


def _page(folder: SweepFolder, result: Result, pictures: Mapping[str, Path]) -> str:
    record, sweep = folder.record, folder.sweep
    trials = sum(len(point.entries) for point in result.points)
    about = (
        f"Sweep {record.id} over {', '.join(sweep.space)} of {sweep.base} on {record.dataset['name']}: {trials} trials of "
        f"{sweep.budget.to_text()}, {sweep.seeds} seeds"
    )
    about += f"; {duration(result.seconds)} in all." if result.seconds else "."
    parts = [
        f"<h1>{_text(record.name)}</h1><p class=about>{_text(about)}</p>",
        f"<div class=answer>{_text(statement(result))}</div>",
        f"<section><h2>Points, best first</h2><div class=scroll>{_table(result)}</div></section>",
        *(_figure(name, path, result) for name, path in pictures.items()),
        _troubles(result),
        _again(folder, result),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_text(record.name)}</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def _table(result: Result) -> str:
    table = cells(result)
    if not table:
        return "<p>No trial has ended.</p>"
    head = "".join(f"<th>{_text(name)}</th>" for name in table[0])
    lines = []
    for row in table[1:]:
        kind = {"best": " class=best", "within the noise": " class=noise"}.get(row[-1].partition(";")[0], "")
        lines.append(f"<tr{kind}>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(name: str, path: Path, result: Result) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    words = name.replace("_", " ").replace("heatmap", "heat map")
    return (
        f"<section><h2>{_text(words.capitalize())}</h2><figure><img alt='{_text(words)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{_text(_caption(name, result))}</figcaption></figure></section>"
    )


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
    if not items:
        return ""
    listed = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<section><h2>Not in the ranking</h2><ul>{listed}</ul></section>"


def _again(folder: SweepFolder, result: Result) -> str:
    record, best = folder.record, result.best
    identity: Any = best.best_entry.identity if best is not None and best.best_entry is not None else {}
    commands = [again(record), f"ddpm-pipe train --from {record.id}"]
    history = "\n".join(shlex.join(command) for command in [record.command, *record.extensions])
    return (
        f"<section><h2>Repeat it</h2>{''.join(f'<pre>{_text(command)}</pre>' for command in commands)}"
        f"<p>Code {_text(record.code_version)}; dataset fingerprint <code>{_text(record.dataset['fingerprint'][:16])}</code>.</p>"
        f"<details><summary>What {_text(result.metric_name)} is the score of</summary>"
        f"<pre>{_text(json.dumps(identity, indent=1))}</pre></details>"
        f"<details><summary>The whole sweep, as {SWEEP_FILE} beside this page has it</summary>"
        f"<pre>{_text(json.dumps(record.sweep, indent=1))}</pre></details>"
        f"<details><summary>How it was asked for</summary><pre>{_text(history)}</pre></details></section>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
