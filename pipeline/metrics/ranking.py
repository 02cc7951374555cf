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
from pipeline.metrics.statistics import AT, of_paired, of_welch, t_quantile
from pipeline.storage.tensor_file import unpack


@dataclass(frozen=True)
class MetricValue:
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
        return str(self.identity["metric"])


@dataclass(frozen=True)
class Rank:
    """An entry in its ranking.

    `behind` is its difference from the best value, `standard_error` that of the difference, if known, and `within_noise` whether equal
    models would often differ by as much (None if not known).
    """

    entry: MetricValue
    behind: float
    standard_error: float | None
    within_noise: bool | None


@dataclass(frozen=True)
class Ranking:
    """Models best first, the fields that their values share, and the fields that were allowed to differ."""

    metric: str
    common: dict[str, Any]
    across: list[str]
    ranks: list[Rank]

    @property
    def runs(self) -> set[str]:
        return {rank.entry.run for rank in self.ranks}

    def to_json(self) -> dict[str, Any]:
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

    def rows(self) -> list[list[str]]:
        """Return the table, its head first, then the models, best first."""
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
        return rows

    def notes(self) -> list[str]:
        """Return what the table rests on: the spreads, whether the first is shown to be better, and what is the same for all."""
        over = dict.fromkeys(r.entry.spread.over for r in self.ranks if r.entry.spread is not None)
        notes = [f"±: over {', '.join(over)}"] if over else []
        return [*notes, self.statement, f"same for all: {_circumstances(self.common)}"]

    def lines(self) -> list[str]:
        """Return table and notes as lines of text."""
        return [*aligned(self.rows()), "", *self.notes()]

    @property
    def statement(self) -> str:
        better = "higher" if self.metric in HIGHER_IS_BETTER else "lower"
        if len(self.ranks) == 1:
            return f"the only model with a value of this kind; {better} {self.metric} is better"
        numbered = list(enumerate(self.ranks, 1))[1:]
        tied = [f"{number} ({rank.entry.run})" for number, rank in numbered if rank.within_noise]
        first = f"1 ({self.ranks[0].entry.run})"
        if tied:
            return (
                f"{first} is not shown to be better than {', '.join(tied)}: "
                f"such a difference is within the noise ({AT})"
            )
        if any(rank.within_noise is None for _, rank in numbered):
            return "one draw of samples has no error bar, so the differences may be noise; evaluate with --seeds 3"
        return f"{first} is better than the others by more than the noise of the measurement ({AT})"


def rank(entries: Sequence[MetricValue], common: dict[str, Any], across: Sequence[str]) -> Ranking:
    """Return entries of one metric, best first; `common` is what their identities share, `across` names the fields that may differ."""
    metric = entries[0].metric
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    ordered = sorted(entries, key=lambda entry: sign * entry.value)
    best = ordered[0]
    ranks = [Rank(best, 0.0, None, None)]
    for entry in ordered[1:]:
        behind = abs(entry.value - best.value)
        error, freedom = difference_error(best, entry)
        within = None if error is None else behind <= t_quantile(freedom) * error
        ranks.append(Rank(entry, behind, error, within))
    return Ranking(metric, common, list(across), ranks)


def difference_error(a: MetricValue, b: MetricValue) -> tuple[float | None, float]:
    """Return the standard error of the difference of two values, None if it is not known, and its degrees of freedom.

    Bits/dim of the same images are compared image by image, so that the difficulty of an image drops out; means over seeds by Welch's
    formula.
    """
    if a.metric == "bits_per_dim" and b.metric == "bits_per_dim":
        bits = [_per_image(entry) for entry in (a, b)]
        if bits[0] is not None and bits[1] is not None and len(bits[0]) == len(bits[1]) > 1:
            return of_paired(bits[0] - bits[1])
    if a.spread is None or b.spread is None or a.spread.standard_error is None or b.spread.standard_error is None:
        return None, math.inf
    counts = len(a.spread.parts) or math.inf, len(b.spread.parts) or math.inf
    return of_welch((a.spread.standard_error, b.spread.standard_error), counts)


def _per_image(entry: MetricValue) -> Any:
    """Return the bits/dim of each image [n], or None if the file is missing."""
    try:
        _, arrays = unpack((entry.folder / BOUND_FILE).read_bytes())
        return np.asarray(Bound.from_arrays(arrays).total)
    except (OSError, ValueError, KeyError):
        return None


def _circumstances(common: dict[str, Any]) -> str:
    short = {name.removeprefix("generation."): value for name, value in common.items() if name != "metric"}
    shown = {name: str(value)[:12] if "sha256" in name or name == "dataset" else value for name, value in short.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in ("", None))
