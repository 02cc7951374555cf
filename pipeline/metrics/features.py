"""The interface of a feature extractor, which `pipeline.metrics.inception` and `pipeline.metrics.classifier` implement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.image_set import Images
from pipeline.metrics.fit_rule import FitRule
from pipeline.training.device import exact_inference

Floats = npt.NDArray[np.float32]


class Extracted(NamedTuple):
    """Features float32 [n, width] of n images and, from a network that classifies, its logits float32 [n, classes]."""

    features: Floats
    logits: Floats | None

    def part(self, which: slice | npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Extracted:
        return Extracted(self.features[which], None if self.logits is None else self.logits[which])


class FeatureExtractor(Protocol):
    """A fixed network that turns images into features. Equal `name` and `sha256` mean equal features up to rounding."""

    @property
    def name(self) -> str:
        """Short name, a part of every metric's name."""

    @property
    def width(self) -> int: ...

    @property
    def sha256(self) -> str:
        """Hash of the file that holds the weights."""

    @property
    def num_classes(self) -> int | None:
        """Number of logits, or None if the network gives none."""

    @property
    def min_images(self) -> int:
        """Fewest images on each side of a comparison of its features."""

    @property
    def fit_rule(self) -> FitRule | None:
        """Which images of the dataset it was fitted on, and cannot judge; None if it was fitted on other data."""

    def to(self, device: torch.device) -> None: ...

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return what is done to images of shape (C, H, W) first; RefusedError if the network cannot judge them."""

    def __call__(self, images: Images) -> Extracted:
        """Extract from uint8 images [n, C, H, W], n >= 0, in evaluation mode and float32."""


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


def extract_batches(
    function: Callable[[Images], Extracted],
    batches: Iterable[Images],
    extractor: FeatureExtractor,
    device: torch.device,
) -> Extracted:
    """Return what a network's `function` gives for all batches: the same on any number of CPU cores, exact float32 on a GPU."""
    with exact_inference(device) as of_each:
        return concatenate(list(of_each(function, batches)), extractor)


def concatenate(parts: list[Extracted], extractor: FeatureExtractor) -> Extracted:
    """Join the results of several calls of one extractor."""
    if not parts:
        classes = extractor.num_classes
        logits = None if classes is None else np.empty((0, classes), np.float32)
        return Extracted(np.empty((0, extractor.width), np.float32), logits)
    with_logits = [p.logits for p in parts if p.logits is not None]
    return Extracted(np.concatenate([p.features for p in parts]), np.concatenate(with_logits) if with_logits else None)


def in_batches(images: Images, batch_size: int) -> Iterator[Images]:
    """Cut images [n, C, H, W] into consecutive batches; the last one may be smaller."""
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def check_images(images: Images, channels: Iterable[int]) -> None:
    """Raise ValueError for anything but uint8 images [n, C, H, W] of one of the channel counts."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in set(channels):
        raise ValueError(
            f"expected uint8 images [n, C, H, W] with C in {sorted(channels)}, got {images.dtype} {images.shape}"
        )
