"""The pictures of a sweep: ranking, heat map, cost against quality, parallel coordinates, and samples side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.pictures.charts import COLOURS, INK, QUIET, dress, line_style, new_figure, save_figure
from pipeline.pictures.pictures import read_grid
from pipeline.storage.runs import Run
from pipeline.sweeps.result import PointResult, Result, within_noise

SHOWN = ("diffusion.schedule", "diffusion.num_timesteps")  # what a heat map shows where both vary
MOST_POINTS = 24  # that a picture with one line of text for each shows
SHEET_IMAGES = 12
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
GOOD, NOISE, REST = COLOURS[2], COLOURS[4], "#9AA0A6"


def draw_all(result: Result, runs: Mapping[str, Run], folder: Path) -> dict[str, Path]:
    """Write the pictures that this result has something to show in; return them by name, in reading order."""
    drawings = {
        "ranking": _ranking,
        "heatmap": _heat_map,
        "network_calls": _network_calls,
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
    alike = {point.title for point in within_noise(result)}
    figure = new_figure(7.2, 1.3 + 0.32 * len(points))
    axes = figure.add_subplot()
    for y, point in enumerate(points):
        colour = GOOD if point is result.best else NOISE if point.title in alike else REST
        axes.errorbar(
            [point.mean], [y], xerr=[point.standard_error or 0.0], fmt="o", color=colour, ms=7, capsize=3, lw=1.6
        )
        axes.plot(point.values, [y] * len(point.values), "|", color=INK, ms=9, alpha=0.55)
    dress(axes, "Best first: mean, standard error, and each seed", "", result.metric_name)
    axes.set_yticks(range(len(points)), [point.title for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    if result.best is not None and result.best.standard_error is not None and result.best.mean is not None:
        error = result.best.standard_error
        axes.axvspan(result.best.mean - error, result.best.mean + error, color=GOOD, alpha=0.12, lw=0)
    _scale(axes, [point.mean or 0.0 for point in points], "x")
    axes.margins(x=0.06)
    return figure


def _heat_map(result: Result) -> Any:
    """The best mean over all other settings, by two of them: schedule and T where both vary."""
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
            texts[y, x] = f"{point.mean:.4g}{error}"
    figure = new_figure(2.4 + 1.25 * len(columns), 1.6 + 0.75 * len(rows))
    axes = figure.add_subplot()
    shown = np.log(cells) if np.nanmin(cells) > 0 and np.nanmax(cells) > 4 * np.nanmin(cells) else cells
    image = axes.imshow(shown, cmap="viridis_r", aspect="auto")
    low, high = np.nanmin(shown), np.nanmax(shown)
    for y, x in np.ndindex(cells.shape):
        text = texts.get((y, x)) or _why_empty(result, {rows_key: rows[y], columns_key: columns[x]})
        dark = not math.isnan(shown[y, x]) and high > low and (shown[y, x] - low) / (high - low) > 0.55
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color="white" if dark else INK)
    best = result.best
    if best is not None and rows_key in best.point and columns_key in best.point:
        y, x = rows.index(best.point[rows_key]), columns.index(best.point[columns_key])
        axes.add_patch(_frame(x, y))
    axes.set_title(f"{result.metric_name} (lower is better)", fontsize=10.5, color=INK, loc="left")
    axes.set_yticks(range(len(rows)), [str(v) for v in rows])
    axes.set_xticks(range(len(columns)), [str(v) for v in columns])
    axes.set_xlabel("T" if columns_key == SHOWN[1] else columns_key)
    axes.set_ylabel(rows_key.rpartition(".")[2])
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    image.cmap.set_bad("#F1F3F4")
    return figure


def _network_calls(result: Result) -> Any:
    """Quality against what an image costs to make, a line for each point, and the front of what nothing beats."""
    points = [point for point in result.ranked if len(point.curve) > 1]
    if not points and len({point.network_calls for point in result.ranked}) < 2:
        return None
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    pairs = []
    for i, point in enumerate(result.ranked[:MOST_POINTS]):
        curve = point.curve or {point.network_calls or 0: point.mean or 0.0}
        pairs += [(float(calls), value) for calls, value in curve.items()]
        named = i < 8
        style = line_style(i) if named else {"color": QUIET, "lw": 1.2}
        axes.plot(list(curve), list(curve.values()), marker="o", ms=4.5, label=point.title if named else None, **style)
    _front(axes, pairs)
    dress(axes, "Quality against network calls for each image", result.metric_name, "network calls")
    axes.set_xscale("log")
    calls = sorted({int(c) for c, _ in pairs})
    axes.set_xticks(calls, [str(c) for c in calls])
    axes.minorticks_off()
    _scale(axes, [value for _, value in pairs], "y")
    axes.margins(x=0.05)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _training_time(result: Result) -> Any:
    """Quality against training time, each seed a dot, and the front."""
    entries = [(point, entry) for point in result.ranked for entry in point.entries if entry.value is not None]
    if len(entries) < 2:
        return None
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for i, point in enumerate(result.ranked[:MOST_POINTS]):
        mine = [(entry.training_s, entry.value) for other, entry in entries if other is point]
        style = {"color": line_style(i)["color"], "label": point.title} if i < 8 else {"color": QUIET}
        axes.plot([s for s, _ in mine], [v for _, v in mine], "o", ms=6, alpha=0.85, **style)
    _front(axes, [(entry.training_s, entry.value or 0.0) for _, entry in entries])
    dress(axes, "Quality against training time, each seed a dot", result.metric_name, "training time in seconds")
    _scale(axes, [entry.value or 0.0 for _, entry in entries], "y")
    axes.margins(x=0.05)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _parallel_coordinates(result: Result) -> Any:
    """A line for each point through its settings to its value."""
    keys = [key for key in _settings(result) if len(_values_of(result, key)) > 1]
    if len(keys) < 2:
        return None
    from matplotlib import colormaps

    figure = new_figure(1.9 * (len(keys) + 1) + 1.2, 4.0)
    axes = figure.add_subplot()
    means = [point.mean or 0.0 for point in result.ranked]
    logarithmic = min(means) > 0 and max(means) > 4 * min(means)
    scaled = np.log(means) if logarithmic else np.array(means)
    low, high = float(scaled.min()), float(scaled.max())
    for point, value in reversed(list(zip(result.ranked, scaled, strict=True))):
        share = 0.0 if high == low else (float(value) - low) / (high - low)
        ys = [_position(point, key, result) for key in keys] + [share]
        is_best = point is result.best
        axes.plot(range(len(ys)), ys, color=colormaps["viridis"](share * 0.9), lw=3.0 if is_best else 1.5, alpha=0.9)
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
    """The first images of each point's first seed, best first: a column is one and the same noise."""
    strips: list[tuple[PointResult, Any]] = []
    for point in result.ranked[:MOST_POINTS]:
        run = runs.get(point.entries[0].run)
        picture = None if run is None else run.folder / "pictures" / "samples.png"
        if run is None or picture is None or not picture.is_file():
            continue
        shape = _image_shape(run)
        images = read_grid(picture, shape, SHEET_IMAGES)
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
    figure.suptitle("The same noise in each column, best point first", fontsize=10.5, color=INK)
    return figure


# -- parts


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, value) pairs that none beats in both, by cost: lower is better in either."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((cost, value))
    return front


def _settings(result: Result) -> list[str]:
    return list(dict.fromkeys(key for point in result.points for key in point.point))


def _values_of(result: Result, key: str) -> list[Any]:
    """Return the values of a setting: numbers ascending, others as they were listed."""
    found: list[Any] = []
    for point in [*(p.point for p in result.points), *(r.point for r in result.refused)]:
        if key in point and point[key] not in found:
            found.append(point[key])
    return sorted(found) if all(isinstance(v, int | float) for v in found) else sorted(found, key=str)


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

    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor=COLOURS[1], lw=2.5)


def _front(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    front = pareto(pairs)
    if len(front) > 1:
        axes.step(
            [c for c, _ in front], [v for _, v in front], where="post", color=INK, lw=1.0, ls=":", label="Pareto front"
        )


def _scale(axes: Any, values: Sequence[float], which: str) -> None:
    """A logarithmic scale where values span much; KID may be negative, and is drawn as it is."""
    if min(values) > 0 and max(values) > 8 * min(values):
        getattr(axes, f"set_{which}scale")("log")


def _position(point: PointResult, key: str, result: Result) -> float:
    values = _values_of(result, key)
    return values.index(point.point[key]) / (len(values) - 1) if key in point.point else math.nan


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _image_shape(run: Run) -> tuple[int, int, int]:
    import json

    channels, height, width = json.loads((run.folder / "model" / "experiment.json").read_text())["shape"]
    return channels, height, width
