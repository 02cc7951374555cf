"""The result of a sweep: points best first, each with its error bar, and whether the best one really is best.

An error bar is the standard error over seeds. All points are tested at once, since the best one is picked by the values that are compared:
Tukey's test (1949; for unequal counts, Kramer 1956) calls any of several equal points different in 5% of sweeps. The noise is what the
settings (and, if all points share their seeds, the seeds) leave unexplained, pooled over all points. Two points differ if they are more
than q / sqrt(2) standard errors of their difference apart, where q is a quantile of the studentized range: 4.1 for nine points with two
seeds each, 3.4 with four.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from pipeline.metrics.metric_identity import LUCK, OF_THE_MODEL, Generation, differing
from pipeline.metrics.statistics import AT, Noise, noise_of
from pipeline.storage.next_command import typeable
from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.points import Point, Refused, canonical

MADE = frozenset(
    f"generation.{item.name}" for item in fields(Generation)
)  # how a point's images are made is a setting of it


@dataclass(frozen=True)
class PointResult:
    """The values of one point over its seeds; lower is better.

    `mean` is None if no seed has a value: all were stopped early, or failed. A point of which a seed failed is not complete: the point
    itself may be the cause, and its other seeds the lucky ones.
    """

    point: Point
    title: str
    entries: tuple[LedgerEntry, ...]

    @property
    def values(self) -> list[float]:
        """The metric's value of each seed that has one, by seed."""
        return [entry.value for entry in self.entries if entry.value is not None]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that have a value, ascending."""
        return tuple(entry.seed for entry in self.entries if entry.value is not None)

    @property
    def failed(self) -> list[LedgerEntry]:
        return [entry for entry in self.entries if entry.status == "failed"]

    @property
    def name(self) -> str:
        """The title, with "(seed 1 failed)" if a seed failed."""
        return f"{self.title} ({failed_seeds(self)})" if self.failed else self.title

    @property
    def is_complete(self) -> bool:
        """Whether there is a value, and no seed failed."""
        return bool(self.values) and not self.failed

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean over seeds; None for a single seed."""
        values = self.values
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    @property
    def spread_of_one(self) -> tuple[float, str] | None:
        """For a single seed: the standard deviation that its value comes with, and over what; not the noise between trainings."""
        only = self.best_entry if len(self.values) == 1 else None
        return None if only is None or only.std is None else (only.std, only.std_over)

    @property
    def status(self) -> str:
        """ "finished" if any seed has a value, else how the first seed ended."""
        return "finished" if self.values else self.entries[0].status

    @property
    def best_entry(self) -> LedgerEntry | None:
        """The seed with the lowest value."""
        found = [(entry.value, entry.seed, entry) for entry in self.entries if entry.value is not None]
        return min(found)[2] if found else None

    @property
    def training_times(self) -> list[float]:
        """Training time of the seeds that finished, or of all if none did, in seconds."""
        spent = [entry.training_s for entry in self.entries if entry.value is not None]
        return spent or [entry.training_s for entry in self.entries]

    @property
    def training_s(self) -> float:
        return statistics.fmean(self.training_times)

    @property
    def nfe(self) -> int | None:
        """Network calls for each image that was scored."""
        best = self.best_entry
        generation = {} if best is None else best.identity.get("generation", {})
        return Generation(**generation).nfe if generation else None

    @property
    def curve(self) -> dict[int, float]:
        """Mean over seeds at each number of network calls that was scored."""
        found: dict[int, list[float]] = {}
        for entry in self.entries:
            for calls, value in entry.curve.items():
                found.setdefault(calls, []).append(value)
        return {calls: statistics.fmean(values) for calls, values in sorted(found.items())}

    def to_json(self) -> dict[str, Any]:
        return {
            "point": self.point,
            "title": self.title,
            "status": self.status,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "spread_of_one": self.spread_of_one,
            "values": {entry.seed: entry.value for entry in self.entries},
            "network_calls": self.nfe,
            "training_s": round(self.training_s, 3),
            "curve": self.curve,
            "early_kid": {entry.seed: _finite(entry.rungs) for entry in self.entries if entry.rungs},
            "runs": {entry.seed: entry.run for entry in self.entries},
            "reasons": sorted({entry.reason for entry in self.entries if entry.reason}),
        }


@dataclass(frozen=True)
class Result:
    """The answer of a sweep. `points` are ranked best first: complete ones, those of which a seed failed, those without a value.

    `listed`: the values of settings that were given as a list, in its order.
    """

    sweep_id: str
    name: str
    metric: str
    points: tuple[PointResult, ...]
    refused: tuple[Refused, ...] = ()
    warnings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    report: str = ""
    listed: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def ranked(self) -> list[PointResult]:
        """The points that have a value, complete ones first, best first."""
        return [point for point in self.points if point.mean is not None]

    @property
    def complete(self) -> list[PointResult]:
        """The points that are compared, best first."""
        return [point for point in self.points if point.is_complete]

    @cached_property
    def noise(self) -> Noise | None:
        """The noise of the complete points; None if fewer than two have several seeds."""
        compared = [point for point in self.complete if len(point.values) > 1]
        return noise_of([p.values for p in compared], same_seeds=len({point.seeds for point in compared}) == 1)

    @property
    def best(self) -> PointResult | None:
        """The complete point with the lowest mean; if none is complete, the lowest."""
        return self.ranked[0] if self.ranked else None

    @property
    def failed(self) -> list[LedgerEntry]:
        return [entry for point in self.points for entry in point.failed]

    @property
    def metric_name(self) -> str:
        """Full name of the metric, such as `fid_classifier_n559`."""
        best = self.best
        entry = best.best_entry if best is not None else None
        return entry.metric if entry is not None else self.metric

    def to_json(self) -> dict[str, Any]:
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
    entries: Iterable[LedgerEntry],
    refused: Iterable[Refused] = (),
    warnings: dict[str, str] | None = None,
    listed: Mapping[str, Sequence[Any]] | None = None,
) -> Result:
    """Gather entries by point and rank the points; a value that was judged unlike the newest one is refused, not ranked."""
    newest = {(canonical(entry.point), entry.seed): entry for entry in entries}
    alike, unlike = _by_identity(list(newest.values()), sweep_id)
    gathered: dict[str, list[LedgerEntry]] = {}
    for entry in alike:
        gathered.setdefault(canonical(entry.point), []).append(entry)
    points = [
        PointResult(group[0].point, group[0].title, tuple(sorted(group, key=lambda entry: entry.seed)))
        for group in gathered.values()
    ]
    points.sort(key=lambda point: (point.mean is None, bool(point.failed), point.mean or 0.0, point.title))
    return Result(sweep_id, name, metric, tuple(points), (*refused, *unlike), warnings or {}, listed=listed or {})


def _by_identity(entries: list[LedgerEntry], sweep_id: str) -> tuple[list[LedgerEntry], list[Refused]]:
    """Separate the entries that compare with the newest value from those that were judged in another way."""
    valued = [entry for entry in entries if entry.value is not None]
    unlike = {}
    for entry in valued[:-1]:
        lines = differing(entry.identity, valued[-1].identity, LUCK | OF_THE_MODEL | MADE)
        if lines:
            reason = (
                f"seed {entry.seed} is not ranked: it was judged unlike the newest ({'; '.join(lines)}); what was judged before a change "
                f"is taken again by: {typeable(f'resume {sweep_id}')}"
            )
            unlike[id(entry)] = Refused(entry.point, reason)
    return [entry for entry in entries if id(entry) not in unlike], list(unlike.values())


def _finite(rungs: Mapping[float, float]) -> dict[float, float]:
    return {rung: kid for rung, kid in rungs.items() if math.isfinite(kid)}


def differ(result: Result, a: PointResult, b: PointResult) -> bool | None:
    """Return whether two points differ by more than the noise; None if one has a single seed, or one that failed."""
    if result.noise is None or not (a.is_complete and b.is_complete) or min(len(a.values), len(b.values)) < 2:
        return None
    return abs((a.mean or 0.0) - (b.mean or 0.0)) > result.noise.limit(len(a.values), len(b.values))


def within_noise(result: Result) -> list[PointResult]:
    """Return the points that do not differ from the best one by more than the noise."""
    best = result.best
    return [point for point in result.complete if point is not best and best and differ(result, best, point) is False]


def statement(result: Result) -> str:
    """Return a few sentences: which point is best, which ones are within its noise, and which are not compared."""
    best = result.best
    if best is None:
        return "No trial gave a value."
    sentences = [f"Best: {best.title}, {result.metric_name} {with_error(best)}.", *_compared(result, best)]
    partial = [point.name for point in result.ranked if point.failed]
    if partial:
        where = "ranked below the complete points" if result.complete else "no point is complete"
        sentences.append(f"Not compared, {where}: {_some(partial)}.")
    return " ".join(sentences)


def _compared(result: Result, best: PointResult) -> list[str]:
    others = [point for point in result.complete if point is not best]
    if not best.is_complete or not others:
        return []
    answers = {id(other): differ(result, best, other) for other in others}
    if all(answer is None for answer in answers.values()):
        if all(len(point.values) == 1 for point in result.complete):
            return ["Each point has one seed, which shows nothing about the noise: the order may be chance."]
        return ["Too few seeds to compare it with the others: the order may be chance."]
    alike, untested = ([other.title for other in others if answers[id(other)] is answer] for answer in (False, None))
    sentences = [f"Too few seeds to compare it with: {_some(untested)}."] if untested else []
    if alike:
        more = f"Within the noise ({AT}) of it: {_some(alike)}. More seeds may separate them."
        return [*sentences, more]
    if not untested:
        which = "every other point" if len(result.points) == len(others) + 1 else "every other complete point"
        sentences.append(f"It is better than {which} by more than the noise ({AT}, all compared at once).")
    return sentences


def failed_seeds(point: PointResult) -> str:
    """Return text such as "seed 1 failed"."""
    numbers = [str(entry.seed) for entry in point.failed]
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} failed"


def _some(names: list[str], most: int = 6) -> str:
    return "; ".join(names[:most]) + (f"; {len(names) - most} more" if len(names) > most else "")


def with_error(point: PointResult) -> str:
    """Return a value with its error bar, "0.54 ± 0.03", or for a single seed with the standard deviation that it comes with."""
    if point.mean is None:
        return "-"
    if point.standard_error is not None:
        return f"{point.mean:.4g} ± {point.standard_error:.2g}"
    spread = "" if point.spread_of_one is None else " (std {:.2g} over {})".format(*point.spread_of_one)
    return f"{point.mean:.4g}{spread}"
