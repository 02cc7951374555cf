"""Charts: how figures of this project look, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.durable import write_atomically

# Okabe and Ito's colours, which colour-blind readers can distinguish; line styles follow after the last colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, QUIET = "#222222", "#DDDDDD"
_DPI = 130


@dataclass(frozen=True)
class Curve:
    """Values of one setting by network calls for each image, and how its line looks: its name is the style's `label`."""

    calls: Sequence[int]
    values: Sequence[float]
    style: Mapping[str, Any]
    errors: Sequence[float] | None = None


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, in inches; no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure


def line_style(i: int) -> dict[str, Any]:
    """Return what sets the i-th line of a chart apart."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "lw": 1.8}


def dress(axes: Any, title: str, ylabel: str, xlabel: str = "") -> None:
    """Give axes their title, labels and quiet grid."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_ylabel(ylabel, color=INK)
    if xlabel:
        axes.set_xlabel(xlabel, color=INK)
    axes.grid(color=QUIET, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def log_scale(axes: Any, values: Sequence[float], which: str) -> None:
    """Make the x or y axis logarithmic if the values span much; KID may be negative, and stays linear."""
    if spans_much(values):
        getattr(axes, f"set_{which}scale")("log")


def spans_much(values: Sequence[float]) -> bool:
    """Return whether a logarithmic axis suits the values."""
    return min(values) > 0 and max(values) > 8 * min(values)


def draw_over_calls(axes: Any, curves: Sequence[Curve], title: str, ylabel: str) -> None:
    """Draw quality against network calls, a line for each setting that was scored.

    The x axis is logarithmic if the calls span much, with a tick at each number if they are few.
    """
    for curve in curves:
        axes.errorbar(curve.calls, curve.values, curve.errors, ms=4.5, capsize=2.5, **curve.style)
    calls = sorted({calls for curve in curves for calls in curve.calls})
    if calls[0] > 0 and calls[-1] > 3 * calls[0]:
        axes.set_xscale("log")
    if len(calls) <= 8:
        axes.set_xticks(calls, [str(n) for n in calls])
        axes.set_xticks([], minor=True)
    log_scale(axes, [value for curve in curves for value in curve.values], "y")
    dress(axes, title, ylabel, "network calls per image")
    axes.margins(x=0.05)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG; StorageError, and no part of a file, where it cannot be."""
    write_atomically(path, png_of(figure))


def png_of(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()
