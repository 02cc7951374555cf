"""Features of images: the interface of `pipeline.metrics.inception` and `pipeline.metrics.classifier`, and what both share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.data.image_set import Images
from pipeline.metrics.fit_rule import FitRule
from pipeline.storage.tensor_file import Arrays
from pipeline.training.device import exact_inference

Floats = npt.NDArray[np.float32]


class Extracted(NamedTuple):
    """Features float32 [n, width] of n images, and logits float32 [n, classes]."""

    features: Floats
    logits: Floats

    def part(self, which: slice | npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Extracted:
        return Extracted(self.features[which], self.logits[which])

    def to_arrays(self, prefix: str = "") -> Arrays:
        """Return arrays for a file, which `from_arrays` reads under the same prefix."""
        return {f"{prefix}{name}": array for name, array in self._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays, prefix: str = "") -> Extracted:
        return cls(arrays[f"{prefix}features"], arrays[f"{prefix}logits"])


class FeatureExtractor(ABC):
    """A fixed network that turns images into features. Equal `name` and `sha256` mean equal features up to rounding.

    Attributes:
        name: a part of every metric's name.
        sha256: hash of the file that holds the weights.
        width: number of features.
        num_classes: number of logits.
        min_images: fewest images on each side of a comparison.
        fit_rule: which images of the dataset the network was fitted on, and cannot judge; None if it was fitted on other data.
        batch_size: images of one network call.
    """

    name: str
    width: int
    num_classes: int
    min_images: int
    fit_rule: FitRule | None = None
    batch_size: int

    def __init__(self, network: nn.Module, sha256: str, device: torch.device | None = None) -> None:
        self.sha256 = sha256
        self._device = device or torch.device("cpu")
        self._network = network.to(self._device).eval()

    def to(self, device: torch.device) -> None:
        self._device = device
        self._network = self._network.to(device)

    @abstractmethod
    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return what is done to images of shape (C, H, W) first; RefusedError if the network cannot judge them."""

    def __call__(self, images: Images) -> Extracted:
        """Extract from uint8 images [n, C, H, W], n >= 0: the same on any number of CPU cores, exact float32 on a GPU."""
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"expected uint8 images [n, C, H, W], got {images.dtype} {images.shape}")
        self.resize_rule((images.shape[1], images.shape[2], images.shape[3]))
        with exact_inference(self._device) as of_each:
            return concatenate(list(of_each(self._extract, in_batches(images, self.batch_size))), self)

    def _extract(self, images: Images) -> Extracted:
        features, logits = self._network(torch.from_numpy(np.ascontiguousarray(images)).to(self._device))
        return Extracted(features.cpu().numpy(), logits.cpu().numpy())


def extract(
    extractor: FeatureExtractor,
    batches: Iterable[Images],
    progress: Callable[[int], None] | None = None,
) -> Extracted:
    """Return the features of all images of `batches` in their order; `progress` gets the number of images done."""
    parts, done = [], 0
    for images in batches:
        parts.append(extractor(images))
        done += len(images)
        if progress is not None:
            progress(done)
    return concatenate(parts, extractor)


def concatenate(parts: list[Extracted], extractor: FeatureExtractor) -> Extracted:
    """Join the results of several calls of one extractor."""
    none = [np.empty((0, width), np.float32) for width in (extractor.width, extractor.num_classes)]
    return Extracted(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else Extracted(*none)


def in_batches(images: Images, batch_size: int) -> Iterator[Images]:
    """Cut images [n, C, H, W] into consecutive batches; the last one may be smaller."""
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]
