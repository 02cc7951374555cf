"""Whether a difference is more than chance: between two models (Welch, or image by image), or among all points of a sweep (Tukey)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
AT = f"{CONFIDENCE:.0%}"


def of_paired(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the standard error of the mean of n > 1 differences, and its degrees of freedom."""
    n = len(differences)
    return float(differences.std(ddof=1) / math.sqrt(n)), n - 1


def of_welch(errors: tuple[float, float], counts: tuple[float, float]) -> tuple[float, float]:
    """Return the standard error of the difference of two means, and its degrees of freedom, by Welch's formula.

    `errors` are the means' standard errors, `counts` how many values each is the mean of; infinite if its error is exact.
    """
    squares = [error**2 for error in errors]
    if sum(squares) == 0:
        return 0.0, math.inf
    freedom = sum(squares) ** 2 / max(sum(s**2 / (n - 1) for s, n in zip(squares, counts, strict=True)), 1e-300)
    return math.sqrt(sum(squares)), freedom


def t_quantile(freedom: float) -> float:
    """Return how many standard errors a difference of equal models keeps within, by Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(min(freedom, 1e6), 0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Noise:
    """What chance does to the means of `num_points` points: the `variance` of a value, known with `freedom` degrees of freedom."""

    variance: float
    freedom: int
    num_points: int

    def limit(self, *num_seeds: int) -> float:
        """Return the difference that chance alone reaches in 5 % of sweeps, between two points of so many seeds."""
        error = math.sqrt(self.variance / 2 * sum(1 / count for count in num_seeds))
        return _studentized_range(self.num_points, self.freedom) * error


def noise_of(points: Sequence[Sequence[float]], *, same_seeds: bool) -> Noise | None:
    """Return the noise of points of two values or more, one for each seed; None if there are fewer than two points.

    Points of the same seeds are a two-way layout without interaction, the seeds its blocks: what a seed does to all of them, by the order
    of the images or the noise that is sampled from, is no noise in a difference. Else it is the variance within points.
    """
    if len(points) < 2:
        return None
    if same_seeds:
        x = np.array(points)
        residuals = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
        freedom = (x.shape[0] - 1) * (x.shape[1] - 1)
    else:
        residuals = np.concatenate([np.array(values) - np.mean(values) for values in points])
        freedom = len(residuals) - len(points)
    return Noise(float((residuals**2).sum()) / freedom, freedom, len(points))


@cache
def _studentized_range(num_points: int, freedom: int) -> float:
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, num_points, freedom))
