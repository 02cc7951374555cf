"""What a sweep found: points best first, each with its error bar, and whether the best one really is.

An error bar is the standard error over seeds. Two points differ by more than the noise where Student's t test with pooled variance says
so at 95 %: with two seeds each that takes a difference of 4.3 standard errors, with four 2.4.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics.metric_identity import Generation
from pipeline.sweeps.ledger import Entry
from pipeline.sweeps.points import Point, Refused, canonical

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PointResult:
    """What is known of one point, over its seeds; lower values are better.

    `mean` is None of a point without a value: stopped early, or failed.
    """

    point: Point
    title: str
    entries: tuple[Entry, ...]

    @property
    def values(self) -> list[float]:
        """The metric's value of each seed that has one, by seed."""
        return [entry.value for entry in self.entries if entry.value is not None and math.isfinite(entry.value)]

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean over seeds; None of a single seed."""
        values = self.values
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    @property
    def status(self) -> str:
        """ "finished" where any seed has a value, else how the first seed ended."""
        return "finished" if self.values else self.entries[0].status

    @property
    def best_entry(self) -> Entry | None:
        """The seed of the lowest value."""
        found = [entry for entry in self.entries if entry.value is not None]
        return min(found, key=lambda entry: entry.value or 0.0) if found else None

    @property
    def training_s(self) -> float:
        """Mean training time of the seeds that finished, or of all."""
        spent = [entry.training_s for entry in self.entries if entry.value is not None]
        return statistics.fmean(spent or [entry.training_s for entry in self.entries])

    @property
    def network_calls(self) -> int | None:
        """Network calls for each image that was scored."""
        best = self.best_entry
        generation = {} if best is None else best.identity.get("generation", {})
        return Generation(**generation).network_calls if generation else None

    @property
    def curve(self) -> dict[int, float]:
        """Mean over seeds at each number of network calls that was scored."""
        found: dict[int, list[float]] = {}
        for entry in self.entries:
            for calls, value in entry.curve.items():
                found.setdefault(calls, []).append(value)
        return {calls: statistics.fmean(values) for calls, values in sorted(found.items())}

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "point": self.point,
            "title": self.title,
            "status": self.status,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "values": {entry.seed: entry.value for entry in self.entries},
            "network_calls": self.network_calls,
            "training_s": round(self.training_s, 3),
            "curve": self.curve,
            "early_kid": {entry.seed: entry.rungs for entry in self.entries if entry.rungs},
            "runs": {entry.seed: entry.run for entry in self.entries},
            "reasons": sorted({entry.reason for entry in self.entries if entry.reason}),
        }


@dataclass(frozen=True)
class Result:
    """A sweep's answer. `points` are ranked best first, those without a value last."""

    sweep_id: str
    name: str
    metric: str
    points: tuple[PointResult, ...]
    refused: tuple[Refused, ...] = ()
    warnings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    report: str = ""

    @property
    def ranked(self) -> list[PointResult]:
        """The points that have a value, best first."""
        return [point for point in self.points if point.mean is not None]

    @property
    def best(self) -> PointResult | None:
        """The point of the lowest mean."""
        return self.ranked[0] if self.ranked else None

    @property
    def failed(self) -> list[Entry]:
        """Trials that failed."""
        return [entry for point in self.points for entry in point.entries if entry.status == "failed"]

    @property
    def metric_name(self) -> str:
        """Full name of the metric, such as `fid_classifier_n559`."""
        best = self.best
        entry = best.best_entry if best is not None else None
        return entry.metric if entry is not None else self.metric

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return {
            "sweep": self.sweep_id,
            "name": self.name,
            "metric": self.metric_name,
            "identity": self.best.best_entry.identity if self.best and self.best.best_entry else None,
            "best": None if self.best is None else self.best.to_json(),
            "statement": statement(self),
            "points": [point.to_json() for point in self.points],
            "refused": [{"point": item.point, "reason": item.reason} for item in self.refused],
            "warnings": self.warnings,
            "failed": len(self.failed),
            "seconds": round(self.seconds, 1),
            "report": self.report,
        }


def result_of(
    sweep_id: str,
    name: str,
    metric: str,
    entries: Iterable[Entry],
    refused: Iterable[Refused] = (),
    warnings: dict[str, str] | None = None,
    seconds: float = 0.0,
) -> Result:
    """Gather entries by point and rank the points."""
    gathered: dict[str, list[Entry]] = {}
    for entry in entries:
        gathered.setdefault(canonical(entry.point), []).append(entry)
    points = [
        PointResult(group[0].point, group[0].title, tuple(sorted(group, key=lambda entry: entry.seed)))
        for group in gathered.values()
    ]
    points.sort(key=lambda point: (point.mean is None, point.mean or 0.0, point.title))
    return Result(sweep_id, name, metric, tuple(points), tuple(refused), warnings or {}, seconds)


def differ(a: PointResult, b: PointResult) -> bool | None:
    """Return whether two points differ by more than the noise; None where there is but one seed of each, which cannot tell."""
    from scipy.stats import t

    left, right = a.values, b.values
    freedom = len(left) + len(right) - 2
    if freedom < 1 or not left or not right:
        return None
    scatter = sum((x - statistics.fmean(side)) ** 2 for side in (left, right) for x in side)
    error = math.sqrt(scatter / freedom * (1 / len(left) + 1 / len(right)))
    limit = float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    return abs(statistics.fmean(left) - statistics.fmean(right)) > limit * error


def within_noise(result: Result) -> list[PointResult]:
    """Return the points that cannot be told from the best one."""
    return [point for point in result.ranked[1:] if result.best is not None and differ(result.best, point) is False]


def statement(result: Result) -> str:
    """Return one or two sentences: which point is best, and which others may as well be."""
    best = result.best
    if best is None:
        return "No trial gave a value."
    head = f"Best: {best.title}, {result.metric_name} {with_error(best)}."
    others = result.ranked[1:]
    if not others:
        return head
    if all(differ(best, other) is None for other in others):
        return f"{head} Each point has one seed, which says nothing of the noise: the order may be chance."
    alike = within_noise(result)
    untold = [other.title for other in others if differ(best, other) is None]
    if untold:
        more = f"; {len(untold) - 6} more" if len(untold) > 6 else ""
        head = f"{head} Not told apart from it, for want of seeds: {'; '.join(untold[:6])}{more}."
        if not alike:
            return head
    if not alike:
        return f"{head} It is better than every other point by more than the noise (95 %)."
    names = "; ".join(point.title for point in alike[:6]) + (f"; {len(alike) - 6} more" if len(alike) > 6 else "")
    return f"{head} Within the noise (95 %) of it: {names}. More seeds would tell them apart."


def with_error(point: PointResult) -> str:
    """Return a point's value with its error bar: "0.54 ± 0.03"."""
    if point.mean is None:
        return "-"
    error = point.standard_error
    return f"{point.mean:.4g}" + ("" if error is None else f" ± {error:.2g}")


def rows(result: Result) -> list[dict[str, object]]:
    """Return the table, best first: a column for each setting, then what came out."""
    settings = list(dict.fromkeys(key for point in result.points for key in point.point))
    alike = {point.title for point in within_noise(result)}
    table: list[dict[str, object]] = []
    for rank, point in enumerate(result.points, 1):
        row: dict[str, object] = {"": rank if point.mean is not None else ""}
        row |= {key.rpartition(".")[2]: point.point.get(key) for key in settings}
        row |= {
            result.metric_name: with_error(point),
            "seeds": len(point.values),
            "calls": point.network_calls,
            "training s": f"{point.training_s:.0f}",
            "": row[""],
        }
        note = "best" if point is result.best else "within the noise" if point.title in alike else ""
        table.append(row | {"note": note or ("" if point.mean is not None else point.status)})
    return table


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, value) pairs that none beats in both, by cost: lower is better in either."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((cost, value))
    return front


def to_text(result: Result) -> list[str]:
    """Return the lines that end a sweep: statement, what was refused or failed, where the report is, what to type next."""
    lines = ["", statement(result), ""]
    lines += [f"skipped:  {_named(item)}" for item in result.refused]
    lines += [f"warning:  {title}: {text}" for title, text in result.warnings.items()]
    lines += [
        f"failed:   {entry.title}, seed {entry.seed} (run {entry.run}): {entry.reason}" for entry in result.failed
    ]
    lines += [
        f"report:   {result.report}",
        "",
        "next:",
        f"  ddpm-pipe train --from {result.sweep_id}               the best point at full length",
        f"  ddpm-pipe sweep --extend {result.sweep_id} --seeds 4   more seeds; what is done is not done again",
        "  ddpm-pipe ui                                trials under their sweep, in MLflow's pages",
    ]
    return lines


def _named(item: Refused) -> str:
    from pipeline.sweeps.points import title

    return f"{title(item.point)}: {item.reason}"
