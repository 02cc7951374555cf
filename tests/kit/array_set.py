"""A dataset that is two arrays: the second implementation of what the metrics ask of one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import Manifest


@dataclass(frozen=True)
class ArraySet:
    """uint8 images [n, C, H, W] and int64 labels [n] or None, as an `ImageSet`."""

    images: npt.NDArray[np.uint8]
    given_labels: npt.NDArray[np.int64] | None = None
    name: str = "arrays"
    class_names: tuple[str, ...] | None = None

    @property
    def manifest(self) -> Manifest:
        labels = b"" if self.given_labels is None else self.given_labels.tobytes()
        n, channels, height, width = self.images.shape
        return Manifest(
            format=1,
            name=self.name,
            source="memory",
            shape=(channels, height, width),
            encoding="raw",
            num_rows=n,
            shards=(),
            class_names=self.class_names,
            has_labels=self.given_labels is not None,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            fingerprint=hashlib.sha256(self.images.tobytes() + labels).hexdigest(),
        )

    def read(self, rows: Any, /) -> npt.NDArray[np.uint8]:
        images: npt.NDArray[np.uint8] = self.images[rows]
        return images

    def labels(self, rows: Any, /) -> npt.NDArray[np.int64] | None:
        return None if self.given_labels is None else self.given_labels[rows]

    def permuted(self, seed: int) -> ArraySet:
        """Return the same images and labels in another order."""
        order = np.random.default_rng(seed).permutation(len(self.images))
        labels = None if self.given_labels is None else self.given_labels[order]
        return ArraySet(self.images[order], labels, self.name, self.class_names)


def digits() -> ArraySet:
    """Return scikit-learn's digits as `ddpm-pipe ingest digits` makes them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return ArraySet(images, data.target.astype(np.int64), "digits", tuple(str(d) for d in range(10)))


def stripes(count: int, seed: int, *, mislabelled: float = 0.0, shape: tuple[int, int, int] = (1, 8, 8)) -> ArraySet:
    """Return noisy stripes along or across, class 0 or 1, a share of them with a label drawn at random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    rows = 180 * ((np.arange(shape[1])[:, None] + np.arange(shape[2])[None] * 0) // 2 % 2)
    columns = 180 * ((np.arange(shape[1])[:, None] * 0 + np.arange(shape[2])[None]) // 2 % 2)
    patterns = np.stack([rows, columns])[labels][:, None] + rng.integers(0, 70, (count, *shape))
    shown = np.where(rng.random(count) < mislabelled, rng.integers(0, 2, count), labels)
    return ArraySet(patterns.astype(np.uint8), shown.astype(np.int64), "stripes", ("along", "across"))
