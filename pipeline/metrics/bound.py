"""Bits per dimension of a dataset: the variational bound over every image of a split, by canonical chunk.

A chunk's result depends on its rows and the seed alone, since the noise is a function of (seed, row, t), and results are
joined in the chunks' order: the same bytes for any number of workers. No row is dropped or flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ddpm import BitsPerDim, Model, conditioned
from ddpm.likelihood import rate_distortion
from pipeline.data.image_set import ImageSet, Progress, Rows
from pipeline.data.images import to_float
from pipeline.data.labels import ClassNames, model_labels
from pipeline.data.shards import Dataset
from pipeline.metrics.fit_rule import hash_rows
from pipeline.storage.tensor_file import Arrays
from pipeline.training.chunks import Task
from pipeline.training.device import Compute
from pipeline.training.randomness import image_generators

Array = npt.NDArray[np.float64]

PARTS = ("prior", "divergences", "decoder")


@dataclass(frozen=True)
class Curve:
    """Moments of a curve over t: how many images, mean [T], and sum of squared deviations [T], float64."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, values: Array) -> Curve:
        """Return the moments of values [n, T], n >= 1."""
        mean = values.mean(axis=0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def merge(self, other: Curve) -> Curve:
        """Return the moments of both sets of images (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + delta**2 * (self.count * (other.count / count))
        return Curve(count, mean, scatter)

    @property
    def standard_error(self) -> Array:
        """Of the mean [T]; NaN for one image."""
        if self.count == 1:
            return np.full_like(self.scatter, math.nan)
        errors: Array = np.sqrt(self.scatter / (self.count - 1) / self.count)
        return errors


@dataclass(frozen=True)
class Bound:
    """The bound of some images, in bits per dimension: total = prior + divergences + decoder, each float64 [n].

    `terms` is the curve over t, the decoder at t = 0 and a divergence at every later one; `x0_mse` that of the squared
    error of the x0 predicted at t, on [-1, 1].
    """

    prior: Array
    divergences: Array
    decoder: Array
    terms: Curve
    x0_mse: Curve

    @property
    def total(self) -> Array:
        """The negative variational bound of each image [n], Ho et al. 2020, eq. 5."""
        total: Array = self.prior + self.divergences + self.decoder
        return total

    def merge(self, other: Bound) -> Bound:
        """Return the bound of both sets of images, this one's first."""
        prior, divergences, decoder = (np.concatenate([getattr(self, p), getattr(other, p)]) for p in PARTS)
        return Bound(prior, divergences, decoder, self.terms.merge(other.terms), self.x0_mse.merge(other.x0_mse))

    def rate_distortion(self) -> tuple[Array, Array]:
        """(rate, distortion) [T]: bits/dim that x_t costs, and the RMSE of x0 known from it on the scale 0 .. 255."""
        means = (np.array(self.prior.mean()), self.terms.mean, self.x0_mse.mean)
        rate, distortion = rate_distortion(*map(torch.from_numpy, means))
        return rate.numpy(), distortion.numpy()

    def to_arrays(self) -> Arrays:
        """Return arrays for a file, each with a row for an image or one row; `from_arrays` reads them."""
        arrays: Arrays = {name: getattr(self, name) for name in PARTS}
        for name in ("terms", "x0_mse"):
            curve = getattr(self, name)
            arrays |= {f"{name}.mean": curve.mean[None], f"{name}.scatter": curve.scatter[None]}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Bound:
        """Read what `to_arrays` wrote; KeyError if a part is missing."""
        count = len(arrays["prior"])
        terms, x0_mse = (Curve(count, arrays[f"{n}.mean"][0], arrays[f"{n}.scatter"][0]) for n in ("terms", "x0_mse"))
        return cls(arrays["prior"], arrays["divergences"], arrays["decoder"], terms, x0_mse)


def rows_to_measure(dataset: ImageSet, num_images: int | None, progress: Progress | None = None) -> Rows:
    """Return all rows of a dataset, or some chosen by content: the same images of any copy of it. Ascending."""
    if num_images is None or num_images >= dataset.manifest.num_rows:
        return np.arange(dataset.manifest.num_rows)
    chosen = np.argsort(hash_rows(dataset, progress=progress), kind="stable")[:num_images]
    return np.sort(chosen)


@dataclass(frozen=True)
class Likelihood:
    """A model that measures images; if it knows classes, it gets those of the images.

    `measure` is `ddpm.bits_per_dim` of its process, or `pipeline.training.vae.bits_per_dim`.
    """

    measure: Callable[..., BitsPerDim]
    model: nn.Module
    class_names: ClassNames  # of a network that knows classes
    compute: Compute

    def bound(self, dataset: ImageSet, rows: Rows, seed: int) -> Bound:
        """Return the bound of some rows of a dataset, which the network sees at once."""
        self.model.eval()
        x0 = self.compute.send(to_float(torch.from_numpy(dataset.read(rows))))
        generators = [image_generators(seed, range(row, row + 1), "likelihood")[0] for row in rows.tolist()]
        model: Model = self.model
        if self.class_names:
            labels = torch.from_numpy(model_labels(dataset, rows, self.class_names))
            model = conditioned(self.model, self.compute.send(labels))
        found = self.measure(model, x0, generator=generators)
        prior, terms, x0_mse = (part.double().cpu().numpy() for part in (found.prior, found.terms, found.x0_mse))
        return Bound(prior, terms[:, 1:].sum(axis=1), terms[:, 0], Curve.of(terms), Curve.of(x0_mse))


class BoundTask(Task):
    """The bound of a dataset's rows, one chunk at a time, in any worker; `indices` are places in `rows`."""

    def __init__(self, likelihood: Likelihood, dataset: Dataset, rows: Rows, seed: int) -> None:
        self._likelihood, self._place, self._rows, self._seed = likelihood, dataset.place, rows, seed
        self._dataset: Dataset | None = None

    def start(self, here: Compute) -> None:
        here.place(self._likelihood.model)  # moves the network itself
        self._likelihood = replace(self._likelihood, compute=here)
        self._dataset = Dataset.open(*self._place)

    def __call__(self, indices: range) -> Arrays:
        """Return `Bound.to_arrays` of one chunk; the last chunk has the remaining rows."""
        assert self._dataset is not None, "start() comes first"
        rows = self._rows[indices.start : indices.stop]
        return self._likelihood.bound(self._dataset, rows, self._seed).to_arrays()


def join(chunks: Iterable[Bound]) -> Bound:
    """Return the bound of all chunks, which come in their canonical order."""
    return reduce(Bound.merge, chunks)


def mean_and_error(values: Array) -> tuple[float, float]:
    """Return the mean of values [n] and its standard error."""
    curve = Curve.of(values[:, None])
    return float(curve.mean[0]), float(curve.standard_error[0])
