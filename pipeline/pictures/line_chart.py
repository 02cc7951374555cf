"""A chart of lines as SVG inside a page: sharp at any width, and drawn at once, without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.pictures.charts import COLOURS, INK, QUIET, spans_much
from pipeline.pictures.page import text

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 40
MOST_POINTS = 300  # of a line; of more, means of neighbours are drawn
MOST_TICKS = 7


@dataclass(frozen=True)
class Line:
    """Values by step, and the standard deviations of those that have one. `number` chooses the colour."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] = ()
    number: int = 0

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]


@dataclass(frozen=True)
class _Axis:
    """One axis: from a value to a coordinate."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, log: bool, margin: float) -> _Axis:
        low, high = min(values), max(values)
        if log:
            ratio = (high / low) ** margin
            return cls(low / ratio, high * ratio, start, end, log=True)
        space = (high - low) * margin or abs(high) * 0.1 or 1.0
        return cls(low - space, high + space, start, end)

    def __call__(self, value: float) -> float:
        turn: Callable[[float], float] = math.log if self.log else float
        share = (turn(max(value, self.low)) - turn(self.low)) / (turn(self.high) - turn(self.low))
        return round(self.start + min(share, 1.0) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return round values within the axis, at most `MOST_TICKS`."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in ((1, 2, 5), (1,)):
                found = [m * 10.0**k for k in decades for m in multiples if self.low <= m * 10.0**k <= self.high]
                if len(found) <= MOST_TICKS:
                    return found
            return found[:: math.ceil(len(found) / MOST_TICKS)]
        width = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(width / MOST_TICKS))
        gap = next(unit * m for m in (1, 2, 5, 10, 20) if width / (unit * m) <= MOST_TICKS)
        first = math.ceil(self.low / gap)
        return [round(k * gap, 12) for k in range(first, math.floor(self.high / gap) + 1)]


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Return a chart with its title above and the last value of each line below; "" if no value is finite.

    The vertical axis is logarithmic if the values span much.
    """
    drawn = [line for line in map(_thinned, map(_finite, lines)) if line.values]
    if not drawn:
        return ""
    values = [value for line in drawn for value in line.values]
    log = spans_much(values)
    ends = values if log else [e for line in drawn for low, _, high in _spans(line) for e in (low, high)]
    steps = [step for line in drawn for step in line.steps]
    x = _Axis.over(steps, LEFT, WIDTH - RIGHT, log=False, margin=0.01)
    y = _Axis.over(ends, HEIGHT - BOTTOM, TOP, log=log, margin=0.04)
    parts = [
        *(_tick(f"M{LEFT} {y(at)}H{WIDTH - RIGHT}", LEFT - 6, y(at) + 4, "end", at) for at in y.ticks()),
        *(_tick(f"M{x(at)} {TOP}V{HEIGHT - BOTTOM}", x(at), HEIGHT - BOTTOM + 16, "middle", at) for at in x.ticks()),
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 5}' text-anchor='middle'>step</text>",
        *(_drawn(line, x, y) for line in drawn),
    ]
    averaged = ": means of neighbouring points" if any(len(line.steps) > MOST_POINTS for line in lines) else ""
    keys = [
        f"<span style='color:{line.colour}'>&#9632;</span> {text(line.label)}: {line.values[-1]:.4g} at step {line.steps[-1]:,.0f}"
        for line in map(_finite, lines)
        if line.values
    ]
    svg = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{text(title)}'>{''.join(parts)}</svg>"
    return f"<figure><h3>{text(title)}{averaged}</h3>{svg}<figcaption>{'<br>'.join(keys)}</figcaption></figure>"


def _tick(path: str, left: float, top: float, anchor: str, value: float) -> str:
    return (
        f"<path d='{path}' stroke='{QUIET}'/><text x='{left}' y='{top}' text-anchor='{anchor}'>{_short(value)}</text>"
    )


def _drawn(line: Line, x: _Axis, y: _Axis) -> str:
    points = [f"{x(step)} {y(value)}" for step, value in zip(line.steps, line.values, strict=True)]
    path = (
        f"<path d='M{'L'.join(points)}' fill='none' stroke='{line.colour}' stroke-width='1.8' stroke-linejoin='round'/>"
    )
    few = len(points) <= 30
    dots = "".join(
        f"<path d='M{at}h0' stroke='{line.colour}' stroke-width='5' stroke-linecap='round'/>" for at in points * few
    )
    bars = "".join(
        f"<path d='M{x(step)} {y(low)}V{y(high)}' stroke='{INK}' stroke-opacity='.45'/>"
        for step, (low, _, high) in zip(line.steps, _spans(line), strict=True)
        if high > low
    )
    return bars + path + dots


def _spans(line: Line) -> list[tuple[float, float, float]]:
    """Return (value - error, value, value + error) of each point."""
    errors = line.errors or [0.0] * len(line.values)
    return [(value - error, value, value + error) for value, error in zip(line.values, errors, strict=True)]


def _finite(line: Line) -> Line:
    kept = [i for i, value in enumerate(line.values) if math.isfinite(value)]
    errors = [line.errors[i] for i in kept] if line.errors else ()
    return Line(line.label, [line.steps[i] for i in kept], [line.values[i] for i in kept], errors, line.number)


def _thinned(line: Line) -> Line:
    """Return a line of at most `MOST_POINTS`: means of as many neighbours each, at their last step."""
    size = math.ceil(len(line.values) / MOST_POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.values), size)
    parts = [line.values[at : at + size] for at in starts]
    steps = [line.steps[min(at + size, len(line.steps)) - 1] for at in starts]
    return Line(line.label, steps, [sum(part) / len(part) for part in parts], (), line.number)


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
