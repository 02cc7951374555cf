"""A ranking: values of one kind, best first, and whether the first is shown to be better than the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics.bound import Bound
from pipeline.metrics.bound_report import BOUND_FILE
from pipeline.metrics.metric_identity import flat_identity
from pipeline.metrics.registry import HIGHER_IS_BETTER
from pipeline.metrics.score_table import aligned, with_spread
from pipeline.metrics.scores import Spread
from pipeline.storage.tensor_file import unpack

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MetricValue:
    """One value of one model."""

    run: str
    name: str
    step: int
    key: str
    value: float
    spread: Spread | None
    identity: dict[str, Any]
    folder: Path

    @property
    def metric(self) -> str:
        """What was measured."""
        return str(self.identity["metric"])


@dataclass(frozen=True)
class Rank:
    """An entry in its ranking.

    `behind` is how far it is behind the best one, `standard_error` that of the difference, where one is known, and `within_noise` whether a
    difference of this size is to be expected of equal models (None where that is not known).
    """

    entry: MetricValue
    behind: float
    standard_error: float | None
    within_noise: bool | None


@dataclass(frozen=True)
class Ranking:
    """Models best first, what their values have in common, and what was allowed to differ."""

    metric: str
    common: dict[str, Any]
    across: list[str]
    ranks: list[Rank]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        rows = []
        for number, rank in enumerate(self.ranks, 1):
            entry = rank.entry
            rows.append(
                {
                    "rank": number,
                    "run": entry.run,
                    "name": entry.name,
                    "step": entry.step,
                    "metric": entry.key,
                    "value": entry.value,
                    "spread": None if entry.spread is None else asdict(entry.spread),
                    "behind": rank.behind,
                    "standard_error": rank.standard_error,
                    "within_noise": rank.within_noise,
                    **{name: flat_identity(entry.identity).get(name) for name in self.across},
                }
            )
        return {"metric": self.metric, "common": self.common, "ranking": rows, "statement": self.statement}

    def lines(self) -> list[str]:
        """Return the table for people, best first, with what it stands on."""
        rows = [
            ["", "run", "name", "step", *(a.removeprefix("generation.") for a in self.across), self.metric, "behind"]
        ]
        for number, rank in enumerate(self.ranks, 1):
            entry = rank.entry
            flat = flat_identity(entry.identity)
            behind = "" if number == 1 else f"{rank.behind:.4g}"
            if rank.standard_error is not None:
                behind += f" ± {rank.standard_error:.2g}"
            rows.append(
                [
                    str(number), entry.run, entry.name, str(entry.step), *(str(flat.get(a)) for a in self.across),
                    with_spread(entry.value, entry.spread), behind,
                ]
            )  # fmt: skip
        over = dict.fromkeys(r.entry.spread.over for r in self.ranks if r.entry.spread is not None)
        notes = [f"±: over {', '.join(over)}"] if over else []
        return [*aligned(rows), "", *notes, self.statement, f"alike in all: {_circumstances(self.common)}"]

    @property
    def statement(self) -> str:
        """One sentence on whether the best one is better."""
        better = "more" if self.metric in HIGHER_IS_BETTER else "less"
        if len(self.ranks) == 1:
            return f"one model alone; {better} {self.metric} is better"
        numbered = list(enumerate(self.ranks, 1))[1:]
        tied = [f"{number} ({rank.entry.run})" for number, rank in numbered if rank.within_noise]
        first = f"1 ({self.ranks[0].entry.run})"
        if tied:
            return (
                f"{first} is not shown to be better than {', '.join(tied)}: "
                f"such a difference is within the noise ({CONFIDENCE:.0%})"
            )
        if any(rank.within_noise is None for _, rank in numbered):
            return "whether the differences are more than noise is not known: one draw of samples has no error bar; evaluate with --seeds 3"
        return f"{first} is better than the others by more than the noise of the measurement ({CONFIDENCE:.0%})"


def rank(entries: Sequence[MetricValue], common: dict[str, Any], across: Sequence[str]) -> Ranking:
    """Return entries of one metric, best first; `common` is what their identities share, `across` names what may differ."""
    metric = entries[0].metric
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    ordered = sorted(entries, key=lambda entry: sign * entry.value)
    best = ordered[0]
    ranks = [Rank(best, 0.0, None, None)]
    for entry in ordered[1:]:
        behind = abs(entry.value - best.value)
        error, freedom = difference_error(best, entry)
        within = None if error is None else behind <= _quantile(freedom) * error
        ranks.append(Rank(entry, behind, error, within))
    return Ranking(metric, common, list(across), ranks)


def difference_error(a: MetricValue, b: MetricValue) -> tuple[float | None, float]:
    """Return the standard error of the difference of two values, None where it is not known, and its degrees of freedom.

    Bits/dim of the same images differ image by image, so that how hard an image is drops out; means over seeds by Welch's formula.
    """
    if a.metric == "bits_per_dim" and b.metric == "bits_per_dim":
        bits = [_per_image(entry) for entry in (a, b)]
        if bits[0] is not None and bits[1] is not None and len(bits[0]) == len(bits[1]) > 1:
            apart = bits[0] - bits[1]
            return float(apart.std(ddof=1) / math.sqrt(len(apart))), len(apart) - 1
    errors = [None if e.spread is None else e.spread.standard_error for e in (a, b)]
    if errors[0] is None or errors[1] is None:
        return None, math.inf
    squares = [error**2 for error in errors if error is not None]
    counts = [len(e.spread.parts) if e.spread is not None and e.spread.parts else math.inf for e in (a, b)]
    if sum(squares) == 0:
        return 0.0, math.inf
    freedom = sum(squares) ** 2 / max(sum(s**2 / (n - 1) for s, n in zip(squares, counts, strict=True)), 1e-300)
    return math.sqrt(sum(squares)), freedom


def _per_image(entry: MetricValue) -> Any:
    """Return the bits/dim of each image [n], or None where they are not there any more."""
    try:
        _, arrays = unpack((entry.folder / BOUND_FILE).read_bytes())
        return np.asarray(Bound.from_arrays(arrays).total)
    except (OSError, ValueError, KeyError):
        return None


def _quantile(freedom: float) -> float:
    """Return how many standard errors a difference of equal models keeps within, by Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(min(freedom, 1e6), 0.5 + CONFIDENCE / 2))


def _circumstances(common: dict[str, Any]) -> str:
    short = {name.removeprefix("generation."): value for name, value in common.items() if name != "metric"}
    shown = {name: str(value)[:12] if "sha256" in name or name == "dataset" else value for name, value in short.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in ("", None))
