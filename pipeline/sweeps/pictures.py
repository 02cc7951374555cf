"""The pictures of a sweep: ranking, heat map, cost against quality, parallel coordinates, and samples side by side.

A colour means the same in all of them: green is the best point, light blue is within its noise, grey are the others.
"""

from __future__ import annotations

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
    calls_axis,
    dress,
    log_scale,
    new_figure,
    save_figure,
)
from pipeline.pictures.pictures import read_grid
from pipeline.storage.runs import Run
from pipeline.sweeps.result import PointResult, Result, failed_seeds, within_noise

SHOWN = ("diffusion.schedule", "diffusion.num_timesteps")  # what a heat map shows where both vary
MOST_POINTS = 24  # that a picture with one line of text for each shows
SHEET_IMAGES = 12
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
STYLES = ("-", "--", "-.")  # the Pareto front is dotted
GOOD, NOISE, REST = COLOURS[2], COLOURS[4], "#9AA0A6"


def draw_all(result: Result, runs: Mapping[str, Run], folder: Path) -> dict[str, Path]:
    """Write the pictures that this result has data for; return them by name, in reading order."""
    drawings = {
        "ranking": _ranking,
        "heatmap": _heat_map,
        "network_calls": _nfe,
        "training_time": _training_time,
        "parallel_coordinates": _parallel_coordinates,
    }
    paths = {}
    for name, draw in drawings.items():
        figure = draw(result) if result.ranked else None
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            save_figure(figure, paths[name])
    sheet = _samples(result, runs)
    if sheet is not None:
        paths["samples"] = folder / "samples.png"
        save_figure(sheet, paths["samples"])
    return paths


def _ranking(result: Result) -> Any:
    """Each point's mean with its error bar and its seeds, best on top."""
    points = result.ranked[:MOST_POINTS]
    figure = new_figure(7.6, 1.7 + 0.32 * len(points))
    axes = figure.add_subplot()
    for y, point in enumerate(points):
        colour = _colour(result, point)
        face = colour if point.is_complete else "white"
        error, style = point.standard_error, "-"
        if error is None and point.spread_of_one is not None:
            error, style = point.spread_of_one[0], ":"
        if error is not None:
            bars = axes.errorbar([point.mean], [y], xerr=[error], fmt="none", ecolor=colour, capsize=3, lw=1.6)
            bars[2][0].set_linestyle(style)
        axes.plot([point.mean], [y], "o", color=colour, markerfacecolor=face, ms=7, zorder=3)
        if len(point.values) > 1:
            axes.plot(point.values, [y] * len(point.values), "|", color=INK, ms=9, alpha=0.55)
    chance = "" if _several_seeds(result) else ", so that the order may be chance"
    dress(
        axes,
        f"Best first: {_each(result)}{chance}{_of_how_many(result)}",
        "",
        f"{result.metric_name} (lower is better)",
    )
    names = [point.title + (f" ({failed_seeds(point)})" if point.failed else "") for point in points]
    axes.set_yticks(range(len(points)), names)
    axes.set_ylim(len(points) - 0.5, -0.5)
    if (limit := noise_limit(result)) is not None and result.best is not None and result.best.mean is not None:
        axes.axvspan(result.best.mean, result.best.mean + limit, color=NOISE, alpha=0.15, lw=0)
    log_scale(axes, [point.mean or 0.0 for point in points], "x")
    axes.margins(x=0.06)
    _legend_of_ranking(figure, result, points)
    return figure


def noise_limit(result: Result) -> float | None:
    """Return the difference from the best point that chance alone reaches; None if it is not the same for all points."""
    counts = {len(point.values) for point in result.complete}
    return result.noise.limit(*counts, *counts) if result.noise is not None and len(counts) == 1 else None


def _legend_of_ranking(figure: Any, result: Result, points: Sequence[PointResult]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(colour: str, label: str, face: str | None = None) -> Any:
        return Line2D([], [], marker="o", ls="", color=colour, markerfacecolor=face or colour, label=label)

    handles = [dot(GOOD, "best")]
    alike = within_noise(result)
    if alike:
        handles.append(dot(NOISE, f"within its noise ({AT})"))
    if any(point.is_complete and point is not result.best and point not in alike for point in points):
        handles.append(dot(REST, "worse than the best" if result.noise is not None else "too few seeds to compare"))
    if any(point.failed for point in points):
        handles.append(dot(REST, "a seed failed: not compared", "white"))
    if noise_limit(result) is not None:
        handles.append(Patch(color=NOISE, alpha=0.15, lw=0, label=f"as far as chance alone reaches ({AT})"))
    if any(point.standard_error is not None for point in points):
        handles.append(Line2D([], [], color=REST, lw=1.6, label="standard error over seeds"))
        handles.append(Line2D([], [], marker="|", ls="", color=INK, alpha=0.55, ms=9, label="a seed"))
    overs = sorted({point.spread_of_one[1] for point in points if point.spread_of_one is not None})
    if overs:
        handles.append(
            Line2D([], [], color=REST, ls=":", lw=1.6, label=f"deviation over {', '.join(overs)}, not over seeds")
        )
    figure.legend(handles=handles, loc="outside lower center", ncol=3, fontsize=8, frameon=False)


def _heat_map(result: Result) -> Any:
    """The best mean over all other settings, by two of them: schedule and T where both vary."""
    from matplotlib import colormaps

    axes_ = _two_settings(result)
    if axes_ is None:
        return None
    rows_key, columns_key = axes_
    rows, columns = (_values_of(result, key) for key in axes_)
    cells = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for point in reversed(result.ranked):  # the best of a cell comes last
        if rows_key in point.point and columns_key in point.point:
            y, x = rows.index(point.point[rows_key]), columns.index(point.point[columns_key])
            cells[y, x] = point.mean
            error = "" if point.standard_error is None else f"\n± {point.standard_error:.2g}"
            error += "\nseed failed" if point.failed else ""
            texts[y, x] = f"{point.mean:.4g}{error}"
    figure = new_figure(2.4 + 1.25 * len(columns), 1.6 + 0.75 * len(rows))
    axes = figure.add_subplot()
    shown = np.log(cells) if np.nanmin(cells) > 0 and np.nanmax(cells) > 4 * np.nanmin(cells) else cells
    axes.imshow(shown, cmap=colormaps["viridis_r"].with_extremes(bad="#F1F3F4"), aspect="auto")
    low, high = np.nanmin(shown), np.nanmax(shown)
    for y, x in np.ndindex(cells.shape):
        text = texts.get((y, x)) or _why_empty(result, {rows_key: rows[y], columns_key: columns[x]})
        dark = not math.isnan(shown[y, x]) and high > low and (shown[y, x] - low) / (high - low) > 0.55
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color="white" if dark else INK)
    best = result.best
    if best is not None and rows_key in best.point and columns_key in best.point:
        y, x = rows.index(best.point[rows_key]), columns.index(best.point[columns_key])
        axes.add_patch(_frame(x, y))
    axes.set_title(f"{result.metric_name}, {_each(result)}; lower is better", fontsize=10.5, color=INK, loc="left")
    axes.set_yticks(range(len(rows)), [str(v) for v in rows])
    axes.set_xticks(range(len(columns)), [str(v) for v in columns])
    axes.set_xlabel("T" if columns_key == SHOWN[1] else columns_key)
    axes.set_ylabel(rows_key.rpartition(".")[2])
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _nfe(result: Result) -> Any:
    """Quality against network calls for each image: a line for each point, and the Pareto front."""
    points = [point for point in result.ranked if len(point.curve) > 1]
    if not points and len({point.nfe for point in result.ranked}) < 2:
        return None
    figure, axes = _with_legend(result)
    pairs = []
    for i, point in enumerate(result.ranked[:MOST_POINTS]):
        curve = point.curve or {point.nfe or 0: point.mean or 0.0}
        if point.is_complete:
            pairs += [(float(calls), value) for calls, value in curve.items()]
        axes.plot(list(curve), list(curve.values()), ms=4.5, **_style(i, point, result))
    _front(axes, pairs)
    title = f"Quality against network calls for each image, {_each(result)}{_of_how_many(result)}"
    dress(axes, title, f"{result.metric_name} (lower is better)", "network calls for each image")
    calls_axis(axes, [calls for point in result.ranked[:MOST_POINTS] for calls in point.curve or [point.nfe or 0]])
    log_scale(axes, [value for _, value in pairs], "y")
    axes.margins(x=0.05)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _training_time(result: Result) -> Any:
    """Quality against training time: means over seeds, the ranges of the seeds, and the Pareto front of the means."""
    points = result.ranked
    if len(points) < 2:
        return None
    figure, axes = _with_legend(result)
    for i, point in enumerate(points[:MOST_POINTS]):
        style = {key: value for key, value in _style(i, point, result).items() if key != "linestyle"}
        spans = [_span(point.values), _span(point.training_times)] if len(point.values) > 1 else [None, None]
        axes.errorbar([point.training_s], [point.mean], *spans, ms=6, capsize=2, elinewidth=0.9, ls="", **style)
    pairs = [(point.training_s, point.mean or 0.0) for point in points if point.is_complete]
    _front(axes, pairs)
    span = " and their ranges" if _several_seeds(result) else ""
    title = f"Quality against training time, {_each(result)}{span}{_of_how_many(result)}"
    dress(axes, title + _noise_of_time(result), f"{result.metric_name} (lower is better)", "training time in seconds")
    log_scale(axes, [point.mean or 0.0 for point in points], "y")
    axes.margins(x=0.05)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
    keys = [key for key in _settings(result) if len(_values_of(result, key)) > 1]
    if len(keys) < 2:
        return None
    figure = new_figure(1.9 * (len(keys) + 1) + 1.2, 4.0)
    axes = figure.add_subplot()
    means = [point.mean or 0.0 for point in result.ranked]
    logarithmic = min(means) > 0 and max(means) > 4 * min(means)
    scaled = np.log(means) if logarithmic else np.array(means)
    low, high = float(scaled.min()), float(scaled.max())
    for point, value in reversed(list(zip(result.ranked, scaled, strict=True))):
        share = 0.0 if high == low else (float(value) - low) / (high - low)
        ys = [_position(point, key, result) for key in keys] + [share]
        width = 3.0 if point is result.best else 1.5
        axes.plot(range(len(ys)), ys, color=_colour(result, point), lw=width, alpha=0.9)
    for x, key in enumerate(keys):
        values = _values_of(result, key)
        ticks = values if len(values) <= 8 else [values[0], values[-1]]
        for value in ticks:
            y = values.index(value) / (len(values) - 1)
            axes.text(x - 0.05, y, _short(value), ha="right", va="center", fontsize=9, color=INK, bbox=LABEL)
    for y, mean in ((0.0, min(means)), (1.0, max(means))):
        axes.text(len(keys) + 0.05, y, f"{mean:.3g}", ha="left", va="center", fontsize=9, color=INK)
    for x in range(len(keys) + 1):
        axes.axvline(x, color="#999999", lw=0.8, zorder=0)
    names = ["T" if key == SHOWN[1] else key.rpartition(".")[2].replace("_", " ") for key in keys]
    axes.set_xticks(range(len(keys) + 1), [*names, result.metric_name])
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(keys) + 0.45)
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    axes.set_title(
        "Every point through its settings to its value; lower is better", fontsize=10.5, color=INK, loc="left"
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _samples(result: Result, runs: Mapping[str, Run]) -> Any:
    """The first images of each point, best first, all of one seed: each column starts from the same noise."""
    seed, pictured = _of_one_seed(result.ranked[:MOST_POINTS], runs)
    strips: list[tuple[PointResult, Any]] = []
    for point, run in pictured:
        shape = _image_shape(run)
        images = read_grid(_samples_of(run), shape, SHEET_IMAGES)
        gap = np.full((images.shape[1], shape[1], 1), 128, np.uint8)
        strip = np.concatenate([part for image in images for part in (image, gap)][:-1], axis=2)
        strips.append((point, strip.transpose(1, 2, 0)))
    if not strips:
        return None
    height, width = strips[0][1].shape[:2]
    row = 0.62
    figure = new_figure(2.3 + row * width / height, 0.5 + row * 1.12 * len(strips))
    for i, (point, strip) in enumerate(strips):
        axes = figure.add_subplot(len(strips), 1, i + 1)
        grey = strip.shape[2] == 1
        axes.imshow(
            strip[:, :, 0] if grey else strip, cmap="gray" if grey else None, vmin=0, vmax=255, interpolation="nearest"
        )
        axes.set_xticks([])
        axes.set_yticks([(height - 1) / 2], [f"{point.title}\n{point.mean:.3g}"], fontsize=8.5, color=INK)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    lacking = len(result.ranked[:MOST_POINTS]) - len(strips)
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


# -- parts


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, value) pairs that no other pair beats in both, by cost; lower is better for both."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((cost, value))
    return front


def _settings(result: Result) -> list[str]:
    return list(dict.fromkeys(key for point in result.points for key in point.point))


def _values_of(result: Result, key: str) -> list[Any]:
    """Return the values of a setting: numbers in ascending order, others as they were listed."""
    found: list[Any] = []
    for point in [*(p.point for p in result.points), *(r.point for r in result.refused)]:
        if key in point and point[key] not in found:
            found.append(point[key])
    if all(isinstance(v, int | float) for v in found):
        return sorted(found)
    listed = list(result.listed.get(key, ()))
    return sorted(found, key=lambda value: (listed.index(value) if value in listed else len(listed), str(value)))


def _two_settings(result: Result) -> tuple[str, str] | None:
    varied = [key for key in _settings(result) if 2 <= len(_values_of(result, key)) <= 12]
    if all(key in varied for key in SHOWN):
        return SHOWN
    return (varied[0], varied[1]) if len(varied) >= 2 else None


def _why_empty(result: Result, cell: dict[str, Any]) -> str:
    for point in result.points:
        if all(point.point.get(key) == value for key, value in cell.items()):
            return point.status
    refused = any(all(item.point.get(key) == value for key, value in cell.items()) for item in result.refused)
    return "refused" if refused else ""


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor=GOOD, lw=3.5)


def _of_how_many(result: Result) -> str:
    """Return the part of a title that says how many points are shown, if not all are."""
    return f" (the best {MOST_POINTS} of {len(result.ranked)} points)" if len(result.ranked) > MOST_POINTS else ""


def _with_legend(result: Result) -> tuple[Any, Any]:
    """Return a figure and its axes, with room for one line of legend for each point."""
    shown = min(len(result.ranked), MOST_POINTS)
    figure = new_figure(8.4, max(4.2, 0.8 + 0.19 * shown))
    return figure, figure.add_subplot()


def _several_seeds(result: Result) -> bool:
    return any(len(point.values) > 1 for point in result.ranked)


def _each(result: Result) -> str:
    return "means over seeds" if _several_seeds(result) else "one seed each"


def _colour(result: Result, point: PointResult) -> str:
    return GOOD if point is result.best else NOISE if point in within_noise(result) else REST


def _style(i: int, point: PointResult, result: Result) -> dict[str, Any]:
    """Return what sets the i-th point apart, and its name; hollow if a seed failed."""
    name = point.title + (f" ({failed_seeds(point)})" if point.failed else "")
    style: dict[str, Any] = {"color": _colour(result, point), "lw": 1.8, "label": name}
    style |= {"marker": MARKERS[i % len(MARKERS)], "linestyle": STYLES[i % len(STYLES)]}
    return style if point.is_complete else style | {"markerfacecolor": "white"}


def _span(values: Sequence[float]) -> list[list[float]]:
    """Return the distances of the lowest and the highest value from their mean."""
    mean = statistics.fmean(values)
    return [[mean - min(values)], [max(values) - mean]]


def _front(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    front = pareto(pairs)
    if len(front) > 1:
        axes.step(
            [c for c, _ in front], [v for _, v in front], where="post", color=INK, lw=1.0, ls=":", label="Pareto front"
        )


def _position(point: PointResult, key: str, result: Result) -> float:
    values = _values_of(result, key)
    return values.index(point.point[key]) / (len(values) - 1) if key in point.point else math.nan


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _image_shape(run: Run) -> tuple[int, int, int]:
    import json

    channels, height, width = json.loads((run.folder / "model" / "experiment.json").read_text())["shape"]
    return channels, height, width
