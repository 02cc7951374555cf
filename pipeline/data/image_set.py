"""The part of a dataset that sample metrics use, and iteration over it in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import Manifest

Images = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]  # (task, done, total)

_READ_BYTES = 64 * 2**20


class ImageSet(Protocol):
    """The part of a dataset that metrics use; `pipeline.data.shards.Dataset` has it."""

    @property
    def manifest(self) -> Manifest:
        """Name, shape, number of rows, class names and fingerprint."""

    def read(self, rows: Rows, /) -> Images:
        """Return the images of these rows, uint8 [n, C, H, W]."""

    def labels(self, rows: Rows, /) -> npt.NDArray[np.int64] | None:
        """Return the labels of these rows, int64 [n]; None if the dataset has no labels."""


def row_chunks(dataset: ImageSet, rows: Rows) -> Iterator[Rows]:
    """Cut row numbers into chunks whose images take about 64 MB."""
    step = max(1, _READ_BYTES // dataset.manifest.image_bytes)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
