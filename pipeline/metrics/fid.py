"""Distances of two sets of images by their features: FID, KID, and the Inception Score of one set.

All arithmetic is in float64 on arrays [n, width]. Features come from `pipeline.metrics.features`; `pipeline.metrics.scoring` decides which
images are compared. Matrix products and decompositions run in torch, each on one thread (`pipeline.training.threads`): numpy's thread count
would depend on the environment of the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.training.threads import one_thread, spread

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean [width] and scatter [width, width] = sum of (x - mean)(x - mean)^T of a set of features, in float64.

    The scatter is kept about the mean (not as a sum of outer products), so that features far from the origin lose no
    digits. Moments of disjoint parts merge to the moments of the whole, in any order, up to rounding (Chan, Golub,
    LeVeque 1979).
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Return the moments of no features, the neutral element of `merge`."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    @one_thread()
    def of(cls, features: npt.ArrayLike) -> Moments:
        """Return the moments of features [n, width], n >= 0, converted to float64 first."""
        x = as_features(features, "features")
        if len(x) == 0:
            return cls.empty(x.shape[1])
        mean = x.mean(axis=0)
        centred = torch.from_numpy(x - mean)
        return cls(len(x), mean, (centred.T @ centred).numpy())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Moments:
        """Read what `to_arrays` wrote under the same name; KeyError if a part is missing."""
        return cls(int(arrays[f"{name}.count"].item()), arrays[f"{name}.mean"], arrays[f"{name}.scatter"])

    def to_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Return arrays `name.count`, `name.mean` and `name.scatter` for a file."""
        return {f"{name}.count": np.array([self.count]), f"{name}.mean": self.mean, f"{name}.scatter": self.scatter}

    def add(self, features: npt.ArrayLike) -> Moments:
        """Return the moments of this set and `features` [n, width] together."""
        return self.merge(Moments.of(features))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the union of two disjoint sets."""
        if self.width != other.width:
            raise ValueError(f"moments of width {self.width} and {other.width} cannot be merged")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = (self.count * self.mean + other.count * other.mean) / count
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * (other.count / count))
        return Moments(count, mean, scatter)

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Array:
        """The unbiased covariance [width, width]; needs a count of at least 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


@one_thread()
def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the Frechet distance of Heusel et al. 2017, eq. 6 (a square).

    tr (A B)^(1/2) is taken as the sum of the singular values of A^(1/2) B^(1/2), which stays exact for covariances of
    deficient rank, where the eigenvalues of the product A B do not. Rounding below zero is cut off; the value itself is
    never negative.
    """
    if a.width != b.width:
        raise ValueError(f"moments of width {a.width} and {b.width} have no distance")
    root_a, vectors_a = _root(a.covariance)
    root_b, vectors_b = _root(b.covariance)
    singular = torch.linalg.svdvals(root_a[:, None] * (vectors_a.T @ vectors_b) * root_b)
    delta = torch.from_numpy(a.mean - b.mean)
    # The traces are summed from the same roots, so that what is left out of one term is left out of all.
    distance = delta.square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * singular.sum()
    return max(0.0, float(distance))


def _root(covariance: Array) -> tuple[Tensor, Tensor]:
    """Return the roots of the eigenvalues of a covariance [k], k <= width, and their eigenvectors as columns [width, k].

    Eigenvalues below the rounding error of the decomposition are left out: their roots would be 1e-8 of the largest and, a
    hundred at a time, show in the result.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    noise = len(values) * torch.finfo(torch.float64).eps * max(float(values[-1]), 0.0)
    kept = values > noise
    return values[kept].sqrt(), vectors[:, kept]


@dataclass(frozen=True)
class KernelDistance:
    """KID: mean and standard deviation (ddof 0) over subsets; the deviation is not the standard error of the mean."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kid(
    x: npt.ArrayLike, y: npt.ArrayLike, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return the Kernel Inception Distance of features x [n, width] and y [m, width] (Binkowski et al. 2018, sec. 4.1).

    The unbiased MMD^2 under k(a, b) = (a.b / width + 1)^3, over subsets drawn without replacement; it may be negative. Subsets are
    smaller if n or m is below `subset_size`; the result has the size used. They are drawn from numpy's legacy generator, whose stream
    never changes.
    """
    left, right = map(torch.from_numpy, pair_of(x, y))
    subset_size = min(subset_size, len(left), len(right))
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(f"KID needs subsets of at least 2 images and one subset, got {subset_size} and {num_subsets}")
    rng = np.random.RandomState(seed)
    subsets = [
        [rng.choice(len(side), subset_size, replace=False) for side in (left, right)] for _ in range(num_subsets)
    ]
    values = np.array(spread(lambda rows: _mmd2(left[rows[0]], right[rows[1]]), subsets))
    return KernelDistance(float(values.mean()), float(values.std()), num_subsets, subset_size)


@one_thread()
def kid_with_error(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[float, float]:
    """Return the unbiased MMD^2 of all of x [n, width] and y [m, width], n, m >= 3, under KID's kernel, and its standard error.

    The error is the jackknife's of two samples: the root of the sum over both sides of (n - 1) / n sum_i (v_i - mean v)^2, v_i the value
    without image i (Efron, Tibshirani 1993, eq. 11.5).
    """
    left, right = map(torch.from_numpy, pair_of(x, y))
    width = left.shape[1]
    if min(len(left), len(right)) < 3:
        raise ValueError(f"KID with an error needs at least 3 images on each side, got {len(left)} and {len(right)}")
    across = _cubic(left, right, width)
    # of each image with the others of its side
    within = [k.sum(1) - k.diagonal() for k in (_cubic(side, side, width) for side in (left, right))]
    means = [float(rows.sum()) / (len(rows) * (len(rows) - 1)) for rows in within]
    variance = 0.0
    for rows, between in zip(within, (across.sum(1), across.sum(0)), strict=True):
        n, m = len(rows), across.numel() // len(rows)
        values = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2)) - 2 * (between.sum() - between) / ((n - 1) * m)
        variance += float((values - values.mean()).square().sum()) * (n - 1) / n
    return sum(means) - 2 * float(across.mean()), math.sqrt(variance)


def _mmd2(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of two equal-sized sets under the cubic kernel."""
    n, width = x.shape
    within = sum(float(k.sum() - k.trace()) / (n * (n - 1)) for k in (_cubic(x, x, width), _cubic(y, y, width)))
    return within - 2 * float(_cubic(x, y, width).mean())


def _cubic(a: Tensor, b: Tensor, width: int) -> Tensor:
    k = a @ b.T / width + 1
    return k * k * k


def inception_score(logits: npt.ArrayLike, *, num_splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Return mean and deviation (ddof 0) over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016, sec. 4).

    `logits` [n, classes] are shuffled by `seed`, then cut into `num_splits` parts, p(y) being each
    part's own mean. Ho et al. use one part.
    """
    x = as_features(logits, "logits")
    if not 1 <= num_splits <= len(x):
        raise ValueError(f"the Inception Score needs 1 to n = {len(x)} splits, got {num_splits}")
    x = x[np.random.RandomState(seed).permutation(len(x))]
    top = x.max(axis=1, keepdims=True)
    log_p = x - top - np.log(np.exp(x - top).sum(axis=1, keepdims=True))
    scores = []
    for i in range(num_splits):
        part = log_p[i * len(x) // num_splits : (i + 1) * len(x) // num_splits]
        p = np.exp(part)
        # Where a whole class underflows to probability 0 its term is 0 * log 0 = 0.
        marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)
        scores.append(np.exp((p * (part - np.log(marginal))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def pair_of(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    """Return two sets of features as float64; ValueError if their widths differ."""
    x, y = as_features(x, "features"), as_features(y, "features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of width {x.shape[1]} and {y.shape[1]} cannot be compared")
    return x, y


def as_features(values: npt.ArrayLike, what: str) -> Array:
    """Return `values` as a contiguous float64 array [n, width]; ValueError for another shape or values that are not finite."""
    x = np.ascontiguousarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{what} must be [n, width], got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or infinity")
    return x
