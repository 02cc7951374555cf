"""The sample metrics by name: each takes two sets of features and gives its values and the settings that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline import fid
from pipeline.errors import RefusedError
from pipeline.features import Extracted
from pipeline.fid import Moments


@dataclass(frozen=True)
class Pair:
    """Real images and the images that are judged by them.

    Attributes:
        real, judged: their features, for metrics that need single images.
        real_moments, judged_moments: for FID; `real_moments` may be of more images than `real` holds.
    """

    real: Extracted
    judged: Extracted
    real_moments: Moments
    judged_moments: Moments


@dataclass(frozen=True)
class Outcome:
    """Values by name, and what was chosen in computing them, in words ("" where there is nothing to choose)."""

    values: dict[str, float]
    settings: str = ""


def _fid(pair: Pair, seed: int) -> Outcome:
    return Outcome({"fid": fid.frechet_distance(pair.real_moments, pair.judged_moments)})


def _kid(pair: Pair, seed: int) -> Outcome:
    # Subsets of all images would be one and the same: half of them leaves the deviation a meaning.
    smaller = min(len(pair.real.features), len(pair.judged.features))
    size = 1000 if smaller >= 2000 else smaller // 2
    result = fid.kid(pair.real.features, pair.judged.features, subset_size=size, seed=seed)
    values = {"kid": result.mean, "kid_std": result.std}
    return Outcome(values, f"{result.num_subsets} subsets of {result.subset_size}, seed {seed}")


def _inception_score(pair: Pair, seed: int) -> Outcome:
    if pair.judged.logits is None:
        raise RefusedError("the Inception Score needs an extractor with logits; use inception or classifier")
    splits = 10
    mean, std = fid.inception_score(pair.judged.logits, num_splits=splits, seed=seed)
    return Outcome({"inception_score": mean, "inception_score_std": std}, f"{splits} splits, seed {seed}")


def _precision_recall(pair: Pair, seed: int) -> Outcome:
    real, judged = _equal(pair)
    precision, recall = fid.precision_recall(real.features, judged.features)
    return Outcome({"precision": precision, "recall": recall}, f"3rd neighbour, {len(real.features)} images each")


def _density_coverage(pair: Pair, seed: int) -> Outcome:
    real, judged = _equal(pair)
    density, coverage = fid.density_coverage(real.features, judged.features)
    return Outcome({"density": density, "coverage": coverage}, f"5th neighbour, {len(real.features)} images each")


def _equal(pair: Pair) -> tuple[Extracted, Extracted]:
    """Return the first images of both sides, as many of each: these metrics depend on the ratio of the counts."""
    n = min(len(pair.real.features), len(pair.judged.features))
    return pair.real.part(slice(n)), pair.judged.part(slice(n))


METRICS: dict[str, Callable[[Pair, int], Outcome]] = {
    "fid": _fid,
    "kid": _kid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "density_coverage": _density_coverage,
}
"""Functions of (pair, seed) by the name a user asks for."""
