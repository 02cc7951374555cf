"""One checkpoint under many sampler settings: every point scored, in one table and one picture of quality against cost.

--grid "sampler=ancestral,ddim steps=10,50,1000" names the points. What a point needs is kept as it comes: a point that
was scored before costs nothing, and a grid that was stopped resumes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipeline.errors import UsageError, nearest
from pipeline.metrics.score_table import with_spread
from pipeline.metrics.scores import Spread
from pipeline.pictures.charts import MARKERS, Curve, draw_over_calls, line_style, new_figure, save_figure
from pipeline.runs.evaluate import ScoreRequest
from pipeline.runs.evaluation import Evaluation
from pipeline.runs.sample import SampleRequest
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.retention import read_which

TABLE_FILE, CSV_FILE, PICTURE_FILE = "table.json", "grid.csv", "grid.png"
CALLS = "network_calls"

_PANEL = (5.2, 3.6)


def grid_keys() -> list[str]:
    """Return the names of what a grid may vary: all that says how images are generated."""
    return [field.name for field in fields(SampleRequest) if field.name != "num_images"]


def parse_grid(text: str, base: ScoreRequest) -> tuple[list[str], list[ScoreRequest]]:
    """Read "key=a,b key=c": return the keys and the request of each point, the last key varying fastest.

    UsageError names a key or a value that makes no sense, and a key that `base` sets too.
    """
    choices: dict[str, list[Any]] = {}
    for word in text.split():
        key, equals, values = word.partition("=")
        if not equals or not values.strip(","):
            raise UsageError(f"--grid: got {word!r}, expected key=value,value such as steps=10,50")
        if key not in grid_keys():
            raise UsageError(f"--grid: unknown key {key!r}{nearest(key, grid_keys())}; known: {', '.join(grid_keys())}")
        if key in choices:
            raise UsageError(f"--grid: {key} appears twice; give its values in one list")
        if getattr(base, key) != getattr(SampleRequest(), key):
            raise UsageError(f"--grid: {key} is given by its own option too; keep one of them")
        choices[key] = list(dict.fromkeys(_value(key, value) for value in values.split(",") if value))
    if not choices:
        raise UsageError('--grid: nothing to vary; give for example "sampler=ancestral,ddim steps=10,50"')
    points = itertools.product(*choices.values())
    return list(choices), [replace(base, **dict(zip(choices, point, strict=True))) for point in points]


def _value(key: str, text: str) -> Any:
    """Return a value as the type that the request's field asks for."""
    if key == "checkpoint":
        try:
            return read_which(text)
        except ValueError:
            raise UsageError(f"--grid: {key}={text!r}, expected a step, latest or best") from None
    hint = get_type_hints(SampleRequest)[key]
    kind = (get_args(hint) or (hint,))[0]  # of `int | None`, int
    convert = {"true": True, "false": False}.__getitem__ if kind is bool else kind
    try:
        return convert(text)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else "a number"
        raise UsageError(f"--grid: {key}={text!r}, expected {expected}") from None


def setting_of(request: ScoreRequest, keys: Sequence[str]) -> dict[str, Any]:
    """Return what a grid varies, at one point, as the user names it."""
    values = {key: getattr(request, key) for key in keys}
    return {key: "latest" if value is None else value for key, value in values.items()}


@dataclass(frozen=True)
class Point:
    """One setting and what came of it."""

    setting: dict[str, Any]
    nfe: int
    values: dict[str, float]  # by metric
    spreads: dict[str, Spread]

    @classmethod
    def of(cls, request: ScoreRequest, keys: Sequence[str], found: Evaluation) -> Point:
        """Take from an evaluation what stands in a grid's row."""
        values: dict[str, float] = {}
        spreads: dict[str, Spread] = {}
        calls = 0
        parts = [part for part in (found.measured, None if found.scored is None else found.scored.scores) if part]
        for part in parts:
            for key, identity in part.identities.items():
                values[identity.metric] = part.values[key]
                if key in part.spreads:
                    spreads[identity.metric] = part.spreads[key]
        if found.scored is not None:
            generation = next(iter(found.scored.scores.identities.values())).generation
            calls = generation.nfe
        return cls(setting_of(request, keys), calls, values, spreads)


@dataclass(frozen=True)
class Grid:
    """All points of a grid, and what they have in common."""

    keys: list[str]
    points: list[Point]
    yardsticks: dict[str, dict[str, float]]

    @property
    def metrics(self) -> list[str]:
        """Names of the values, in their order."""
        return list(dict.fromkeys(name for point in self.points for name in point.values))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each point: settings, network calls, values, and `<metric>_std` or `<metric>_se` where they have a spread."""
        rows = []
        for point in self.points:
            row: dict[str, Any] = {**point.setting, CALLS: point.nfe}
            for name, value in point.values.items():
                row[name] = value
                if name in point.spreads:
                    row[f"{name}_{point.spreads[name].suffix}"] = point.spreads[name].value
            rows.append(row)
        return rows

    def shown(self) -> list[dict[str, object]]:
        """Return the rows for people: values with their spreads, and the yardsticks below them."""
        found: list[dict[str, object]] = [
            {**point.setting, "network calls": point.nfe}
            | {name: with_spread(value, point.spreads.get(name)) for name, value in point.values.items()}
            for point in self.points
        ]
        for name, values in self.yardsticks.items():
            beside = {metric: values[metric] for metric in self.metrics if metric in values}
            found.append({self.keys[0]: name.replace("_", " "), **beside})
        return found

    def table(self) -> dict[str, Any]:
        """Return the rows in the form of MLflow's tables."""
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}

    def csv(self) -> str:
        """Return the rows as CSV."""
        table, text = self.table(), io.StringIO()
        csv.writer(text).writerows([table["columns"], *table["data"]])
        return text.getvalue()


def write_grid(grid: Grid, folder: Path) -> list[Path]:
    """Write table, CSV and picture into a folder, and return their paths."""
    make_folder(folder)
    paths = [folder / name for name in (TABLE_FILE, CSV_FILE, PICTURE_FILE)]
    write_atomically(paths[0], json.dumps(grid.table()).encode())
    write_atomically(paths[1], grid.csv().encode())
    save_figure(grid_figure(grid), paths[2])
    return paths


def grid_figure(grid: Grid) -> Any:
    """Return a figure: a panel for each metric against network calls per image, a line for each setting but the steps."""
    names = [name for name in grid.metrics if not name.startswith("bits_per_dim_")]
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure = new_figure(columns * _PANEL[0], rows * _PANEL[1] + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        draw_over_calls(panel, _curves(grid, name), name.replace("_", " "), name)
        real = grid.yardsticks.get("real_half", {}).get(name)
        if real is not None:
            panel.axhline(real, color="#999999", lw=1.2, ls="--", label="real half against real half")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    return figure


def _curves(grid: Grid, metric: str) -> list[Curve]:
    """Return a line for each combination of the settings other than the steps; errors are drawn if they are over seeds."""
    others = [key for key in grid.keys if key != "steps"]
    groups: dict[str, list[Point]] = {}
    for point in grid.points:
        if metric in point.values:
            groups.setdefault(_label(point, others), []).append(point)
    curves = []
    for i, (label, group) in enumerate(groups.items()):
        points = sorted(group, key=lambda point: point.nfe)
        spreads = [point.spreads.get(metric) for point in points]
        errors = [spread.value for spread in spreads if spread is not None and spread.parts]
        curves.append(
            Curve(
                [point.nfe for point in points],
                [point.values[metric] for point in points],
                {**line_style(i), "marker": MARKERS[i % len(MARKERS)], "label": label},
                errors if len(errors) == len(points) else None,
            )
        )
    return curves


def _label(point: Point, keys: Sequence[str]) -> str:
    alone = ("sampler", "weights", "spacing")  # their values need no name
    words = [str(point.setting[key]) if key in alone else f"{key} {point.setting[key]}" for key in keys]
    return ", ".join(words) or "this model"
