"""The pictures of a sweep: ranking, heat map, cost against quality, parallel coordinates, and samples side by side.

A colour means the same in all of them: green is the best point, light blue is within its noise, grey are the others.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics.statistics import AT
from pipeline.pictures.charts import (
    COLOURS,
    INK,
    MARKERS,
    Curve,
    draw_over_calls,
    dress,
    log_scale,
    new_figure,
    save_figure,
)
from pipeline.pictures.pictures import grid_picture, read_grid
from pipeline.storage.runs import Run
from pipeline.sweeps.points import Refused
from pipeline.sweeps.result import PointResult, Result, within_noise

SHOWN = ("diffusion.schedule", "diffusion.num_timesteps")  # what a heat map shows where both vary
MOST_POINTS = 24  # that a picture with one line of text for each shows
SHEET_IMAGES = 12
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
STYLES = ("-", "--", "-.")  # the Pareto front is dotted
GOOD, NOISE, REST = COLOURS[2], COLOURS[4], "#9AA0A6"


def draw_all(result: Result, runs: Mapping[str, Run], folder: Path) -> dict[str, Path]:
    """Write the pictures that this result has data for; return them by name, in reading order."""
    if not result.ranked:
        return {}
    figures = {
        "ranking": _ranking(result),
        "heatmap": _heat_map(result),
        "network_calls": _nfe(result),
        "training_time": _training_time(result),
        "parallel_coordinates": _parallel_coordinates(result),
        "samples": _samples(result, runs),
    }
    paths = {name: folder / f"{name}.png" for name, figure in figures.items() if figure is not None}
    for name, path in paths.items():
        save_figure(figures[name], path)
    return paths


def _ranking(result: Result) -> Any:
    """Each point's mean with its error bar and its seeds, best on top."""
    points = result.ranked[:MOST_POINTS]
    figure = new_figure(7.6, 1.7 + 0.32 * len(points))
    axes = figure.add_subplot()
    limit = noise_limit(result)
    if limit is not None:
        best = result.ranked[0].mean or 0.0
        axes.axvspan(best, best + limit, color=NOISE, alpha=0.15, lw=0, label=f"as far as chance alone reaches ({AT})")
    for y, point in enumerate(points):
        colour = _colour(result, point)
        error, line, of = point.standard_error, "-", "standard error over seeds"
        if point.spread_of_one is not None:
            error, line, of = point.spread_of_one[0], ":", f"deviation over {point.spread_of_one[1]}, not over seeds"
        if error is not None:
            bars = axes.errorbar(
                [point.mean], [y], xerr=[error], fmt="none", ecolor=colour, capsize=3, lw=1.6, label=of
            )
            bars[2][0].set_linestyle(line)
        face = colour if point.is_complete else "white"
        rank = _rank(result, point)
        axes.plot([point.mean], [y], "o", color=colour, markerfacecolor=face, ms=7, zorder=3, label=rank)
        if len(point.values) > 1:
            axes.plot(point.values, [y] * len(point.values), "|", color=INK, ms=9, alpha=0.55, label="a seed")
    chance = "" if _several_seeds(result) else ", so that the order may be chance"
    title = f"Best first: {_each(result)}{chance}{_of_how_many(result)}"
    dress(axes, title, "", f"{result.metric_name} (lower is better)")
    axes.set_yticks(range(len(points)), [point.name for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    log_scale(axes, [point.mean or 0.0 for point in points], "x")
    axes.margins(x=0.06)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    return figure


def _rank(result: Result, point: PointResult) -> str:
    """Return what the colour of a point in the ranking means."""
    if not point.is_complete:
        return "a seed failed: not compared"
    if point is result.best:
        return "best"
    if point in within_noise(result):
        return f"within its noise ({AT})"
    return "worse than the best" if result.noise is not None else "too few seeds to compare"


def noise_limit(result: Result) -> float | None:
    """Return the difference from the best point that chance alone reaches; None if it is not the same for all points."""
    counts = {len(point.values) for point in result.complete}
    return result.noise.limit(*counts, *counts) if result.noise is not None and len(counts) == 1 else None


def _heat_map(result: Result) -> Any:
    """The best mean over all other settings, by two of them: schedule and T where both vary."""
    from matplotlib import colormaps

    varied = [key for key in _settings(result) if 2 <= len(_values_of(result, key)) <= 12]
    if len(varied) < 2:
        return None
    keys = SHOWN if all(key in varied for key in SHOWN) else (varied[0], varied[1])
    rows, columns = (_values_of(result, key) for key in keys)

    def cell_of(point: dict[str, Any]) -> tuple[int, int] | None:
        return (rows.index(point[keys[0]]), columns.index(point[keys[1]])) if all(k in point for k in keys) else None

    cells = np.full((len(rows), len(columns)), np.nan)
    texts = {cell_of(item.point): "refused" for item in result.refused}
    for point in reversed(result.points):  # the best of a cell comes last
        cell = cell_of(point.point)
        texts[cell] = point.status
        if cell is not None and point.mean is not None:
            cells[cell] = point.mean
            error = "" if point.standard_error is None else f"\n± {point.standard_error:.2g}"
            texts[cell] = f"{point.mean:.4g}{error}" + ("\nseed failed" if point.failed else "")
    figure = new_figure(2.4 + 1.25 * len(columns), 1.6 + 0.75 * len(rows))
    axes = figure.add_subplot()
    shown = np.log(cells) if np.nanmin(cells) > 0 and np.nanmax(cells) > 4 * np.nanmin(cells) else cells
    axes.imshow(shown, cmap=colormaps["viridis_r"].with_extremes(bad="#F1F3F4"), aspect="auto")
    low, high = np.nanmin(shown), np.nanmax(shown)
    for y, x in np.ndindex(cells.shape):
        dark = high > low and (shown[y, x] - low) / (high - low) > 0.55
        ink = "white" if dark else INK
        axes.text(x, y, texts.get((y, x), ""), ha="center", va="center", fontsize=9.5, color=ink)
    best = cell_of(result.ranked[0].point)
    if best is not None:
        axes.add_patch(_frame(best[1], best[0]))
    _bare(axes, f"{result.metric_name}, {_each(result)}; lower is better")
    axes.set_yticks(range(len(rows)), [str(v) for v in rows])
    axes.set_xticks(range(len(columns)), [str(v) for v in columns])
    axes.set_xlabel(_short_key(keys[1]))
    axes.set_ylabel(_short_key(keys[0]))
    return figure


def _nfe(result: Result) -> Any:
    """Quality against network calls for each image: a line for each point, and the Pareto front."""
    points = result.ranked[:MOST_POINTS]
    by_calls = [point.curve or {point.nfe or 0: point.mean or 0.0} for point in points]
    if len({calls for curve in by_calls for calls in curve}) < 2:
        return None
    figure, axes = _with_legend(result)
    curves = [
        Curve(list(curve), list(curve.values()), _style(i, point, result))
        for i, (point, curve) in enumerate(zip(points, by_calls, strict=True))
    ]
    title = f"Quality against network calls for each image, {_each(result)}{_of_how_many(result)}"
    draw_over_calls(axes, curves, title, f"{result.metric_name} (lower is better)")
    complete = [curve for point, curve in zip(points, by_calls, strict=True) if point.is_complete]
    _front(axes, [pair for curve in complete for pair in curve.items()])
    _legend_beside(axes)
    return figure


def _training_time(result: Result) -> Any:
    """Quality against training time: means over seeds, the ranges of the seeds, and the Pareto front of the means."""
    points = result.ranked
    if len(points) < 2:
        return None
    figure, axes = _with_legend(result)
    for i, point in enumerate(points[:MOST_POINTS]):
        spans = [_span(point.values), _span(point.training_times)] if len(point.values) > 1 else [None, None]
        style = _style(i, point, result) | {"linestyle": ""}
        axes.errorbar([point.training_s], [point.mean], *spans, ms=6, capsize=2, elinewidth=0.9, **style)
    _front(axes, [(point.training_s, point.mean or 0.0) for point in points if point.is_complete])
    span = " and their ranges" if _several_seeds(result) else ""
    title = f"Quality against training time, {_each(result)}{span}{_of_how_many(result)}"
    dress(axes, title + _noise_of_time(result), f"{result.metric_name} (lower is better)", "training time in seconds")
    log_scale(axes, [point.mean or 0.0 for point in points], "y")
    axes.margins(x=0.05)
    _legend_beside(axes)
    return figure


def _noise_of_time(result: Result) -> str:
    """Return the part of a title that warns if times tell more about the machine's load than about the points."""
    several = [point for point in result.ranked if len(point.training_times) > 1]
    if not several:
        return "\nOne seed each: the time is also that of the machine's load"
    within = statistics.fmean(statistics.variance(point.training_times) for point in several)
    between = statistics.variance([point.training_s for point in several]) if len(several) > 1 else 0.0
    return "\nTimes differ between seeds of a point as much as between points" if within >= between else ""


def _parallel_coordinates(result: Result) -> Any:
    """A line for each point through its settings to its value."""
    axis_values = {key: values for key in _settings(result) if len(values := _values_of(result, key)) > 1}
    if len(axis_values) < 2:
        return None
    count = len(axis_values)
    figure = new_figure(1.9 * (count + 1) + 1.2, 4.0)
    axes = figure.add_subplot()
    means = [point.mean or 0.0 for point in result.ranked]
    scaled = np.log(means) if min(means) > 0 and max(means) > 4 * min(means) else np.array(means)
    shares = (scaled - scaled.min()) / (np.ptp(scaled) or 1.0)
    for point, share in reversed(list(zip(result.ranked, shares, strict=True))):
        ys = [
            values.index(point.point[key]) / (len(values) - 1) if key in point.point else math.nan
            for key, values in axis_values.items()
        ]
        width = 3.0 if point is result.best else 1.5
        axes.plot(range(count + 1), [*ys, share], color=_colour(result, point), lw=width, alpha=0.9)
    for x, values in enumerate(axis_values.values()):
        for i, value in enumerate(values):
            if len(values) <= 8 or i in (0, len(values) - 1):
                name, y = f"{value:g}" if isinstance(value, float) else str(value), i / (len(values) - 1)
                axes.text(x - 0.05, y, name, ha="right", va="center", fontsize=9, color=INK, bbox=LABEL)
    for y, mean in ((0.0, min(means)), (1.0, max(means))):
        axes.text(count + 0.05, y, f"{mean:.3g}", ha="left", va="center", fontsize=9, color=INK)
    for x in range(count + 1):
        axes.axvline(x, color="#999999", lw=0.8, zorder=0)
    _bare(axes, "Every point through its settings to its value; lower is better")
    axes.set_xticks(range(count + 1), [*map(_short_key, axis_values), result.metric_name])
    axes.set_yticks([])
    axes.set_xlim(-0.45, count + 0.45)
    return figure


def _samples(result: Result, runs: Mapping[str, Run]) -> Any:
    """The first images of each point, best first, all of one seed: each column starts from the same noise."""
    points = result.ranked[:MOST_POINTS]
    seed, pictured = _of_one_seed(points, runs)
    if not pictured:
        return None
    strips = [
        np.asarray(grid_picture(read_grid(_samples_of(run), _image_shape(run), SHEET_IMAGES), columns=SHEET_IMAGES))
        for _, run in pictured
    ]
    height, width = strips[0].shape[:2]
    row = 0.62
    figure = new_figure(2.3 + row * width / height, 0.5 + row * 1.12 * len(strips))
    for i, (strip, (point, _)) in enumerate(zip(strips, pictured, strict=True)):
        axes = figure.add_subplot(len(strips), 1, i + 1)
        axes.imshow(strip, interpolation="nearest")
        _bare(axes)
        axes.set_xticks([])
        axes.set_yticks([(height - 1) / 2], [f"{point.title}\n{point.mean:.3g}"], fontsize=8.5)
    lacking = len(points) - len(strips)
    without = f"; {lacking} without images of it" if lacking else ""
    title = f"The same noise in each column (seed {seed}{without}), best point first{_of_how_many(result)}"
    figure.suptitle(title, fontsize=10.5, color=INK)
    return figure


def _of_one_seed(points: Sequence[PointResult], runs: Mapping[str, Run]) -> tuple[int, list[tuple[PointResult, Run]]]:
    """Return the seed for which the most points have images (the lowest of several), and those points with their runs of it."""
    by_seed: dict[int, list[tuple[PointResult, Run]]] = {}
    for point in points:
        for entry in point.entries:
            run = runs.get(entry.run)
            if entry.value is not None and run is not None and _samples_of(run).is_file():
                by_seed.setdefault(entry.seed, []).append((point, run))
    return min(by_seed.items(), key=lambda item: (-len(item[1]), item[0]), default=(0, []))


def _samples_of(run: Run) -> Path:
    return run.folder / "pictures" / "samples.png"


def _image_shape(run: Run) -> tuple[int, int, int]:
    channels, height, width = json.loads((run.folder / "model" / "experiment.json").read_text())["shape"]
    return channels, height, width


# -- parts


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, value) pairs that no other pair beats in both, by cost; lower is better for both."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((cost, value))
    return front


def _front(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    front = pareto(pairs)
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=INK, lw=1.0, ls=":", label="Pareto front")


def _settings(result: Result) -> list[str]:
    return list(dict.fromkeys(key for point in result.points for key in point.point))


def _values_of(result: Result, key: str) -> list[Any]:
    """Return the values of a setting: numbers in ascending order, others as they were listed."""
    found: list[Any] = []
    tried: list[PointResult | Refused] = [*result.points, *result.refused]
    for item in tried:
        if key in item.point and item.point[key] not in found:
            found.append(item.point[key])
    if all(isinstance(v, int | float) for v in found):
        return sorted(found)
    listed = list(result.listed.get(key, ()))
    return sorted(found, key=lambda value: (listed.index(value) if value in listed else len(listed), str(value)))


def _short_key(key: str) -> str:
    return "T" if key == SHOWN[1] else key.rpartition(".")[2].replace("_", " ")


def _several_seeds(result: Result) -> bool:
    return any(len(point.values) > 1 for point in result.ranked)


def _each(result: Result) -> str:
    return "means over seeds" if _several_seeds(result) else "one seed each"


def _of_how_many(result: Result) -> str:
    """Return the part of a title that says how many points are shown, if not all are."""
    return f" (the best {MOST_POINTS} of {len(result.ranked)} points)" if len(result.ranked) > MOST_POINTS else ""


def _colour(result: Result, point: PointResult) -> str:
    return GOOD if point is result.best else NOISE if point in within_noise(result) else REST


def _style(i: int, point: PointResult, result: Result) -> dict[str, Any]:
    """Return what sets the i-th point apart, and its name; hollow if a seed failed."""
    style = {"color": _colour(result, point), "lw": 1.8, "label": point.name}
    style |= {"marker": MARKERS[i % len(MARKERS)], "linestyle": STYLES[i % len(STYLES)]}
    return style if point.is_complete else style | {"markerfacecolor": "white"}


def _span(values: Sequence[float]) -> list[list[float]]:
    """Return the distances of the lowest and the highest value from their mean."""
    mean = statistics.fmean(values)
    return [[mean - min(values)], [max(values) - mean]]


def _with_legend(result: Result) -> tuple[Any, Any]:
    """Return a figure and its axes, with room for one line of legend for each point."""
    shown = min(len(result.ranked), MOST_POINTS)
    figure = new_figure(8.4, max(4.2, 0.8 + 0.19 * shown))
    return figure, figure.add_subplot()


def _legend_beside(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bare(axes: Any, title: str = "") -> None:
    """Take lines and ticks from axes whose picture needs none."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor=GOOD, lw=3.5)
