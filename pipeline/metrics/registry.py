"""The sample metrics by name: each takes two sets of features and the evaluation's settings, and returns its values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pipeline.config.experiment import EvaluationConfig
from pipeline.errors import RefusedError
from pipeline.metrics import fid
from pipeline.metrics.features import Extracted
from pipeline.metrics.fid import Moments
from pipeline.metrics.prdc import prdc


@dataclass(frozen=True)
class Pair:
    """Real images and the images that are compared with them.

    Attributes:
        real, judged: their features, for metrics that need single images.
        real_moments, judged_moments: for FID; `real_moments` may be of more images than `real`.
    """

    real: Extracted
    judged: Extracted
    real_moments: Moments
    judged_moments: Moments


@dataclass(frozen=True)
class MetricResult:
    """Values by name, the settings that were used in words ("" for none), and the spreads of the values that have one.

    A spread is a standard deviation (ddof 0) over what `over` says, such as "10 splits"; it is no standard error.
    """

    values: dict[str, float]
    settings: str = ""
    spreads: dict[str, float] = field(default_factory=dict)
    over: str = ""


Metric = Callable[[Pair, EvaluationConfig], MetricResult]
SEED = 0  # of KID's subsets and the Inception Score's parts


def require_enough(metrics: Collection[str], chosen: EvaluationConfig, *, num_real: int, num_judged: int) -> None:
    """Raise RefusedError if the settings of these metrics need more images than will be compared."""
    size, smaller = chosen.kid_subset_size, min(num_real, num_judged)
    if "kid" in metrics and size is not None and size > smaller:
        raise RefusedError(
            f"evaluation.kid_subset_size: got {size}, more than the {smaller} images on each side; choose fewer, or leave it out"
        )
    splits = chosen.inception_score_splits
    if "is" in metrics and splits > num_judged:
        raise RefusedError(
            f"evaluation.inception_score_splits: got {splits}, more than the {num_judged} images; choose fewer"
        )


def _fid(pair: Pair, chosen: EvaluationConfig) -> MetricResult:
    return MetricResult({"fid": fid.frechet_distance(pair.real_moments, pair.judged_moments)})


def _kid(pair: Pair, chosen: EvaluationConfig) -> MetricResult:
    smaller = min(len(pair.real.features), len(pair.judged.features))
    # Subsets of all images would be one and the same: half of fewer than 1000 leaves the deviation a meaning.
    size = chosen.kid_subset_size or (1000 if smaller >= 1000 else smaller // 2)
    size = min(size, smaller)  # a yardstick may have fewer images than `require_enough` looked at
    result = fid.kid(pair.real.features, pair.judged.features, subset_size=size, seed=SEED)
    subsets = f"{result.num_subsets} subsets of {result.subset_size}"
    return MetricResult({"kid": result.mean}, f"{subsets}, seed {SEED}", {"kid": result.std}, subsets)


def _inception_score(pair: Pair, chosen: EvaluationConfig) -> MetricResult:
    splits = min(chosen.inception_score_splits, len(pair.judged.logits))  # a yardstick may have fewer images
    mean, std = fid.inception_score(pair.judged.logits, num_splits=splits, seed=SEED)
    if splits == 1:  # one value has no deviation
        return MetricResult({"inception_score": mean}, "1 split")
    parts = f"{splits} splits"
    return MetricResult({"inception_score": mean}, f"{parts}, seed {SEED}", {"inception_score": std}, parts)


def _prdc(pair: Pair, chosen: EvaluationConfig) -> MetricResult:
    # equal counts: these metrics depend on their ratio
    n = min(len(pair.real.features), len(pair.judged.features))
    found = prdc(pair.real.features[:n], pair.judged.features[:n], k_precision=3, k_density=5)
    settings = f"precision and recall by the 3rd neighbour, density and coverage by the 5th, {n} images each"
    return MetricResult(found._asdict(), settings)


METRICS: dict[str, Metric] = {"fid": _fid, "kid": _kid, "is": _inception_score, "prdc": _prdc}
"""The metrics by the name a user asks for."""

HIGHER_IS_BETTER = frozenset({"inception_score", "precision", "recall", "density", "coverage"})
"""Metrics for which higher is better; for all others lower is better."""
