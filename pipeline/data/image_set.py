"""What the sample metrics need of a dataset, and how they walk over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import Manifest

Images = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much

_READ_BYTES = 64 * 2**20


class ImageSet(Protocol):
    """What the metrics need of a dataset; `pipeline.data.shards.Dataset` is one."""

    @property
    def manifest(self) -> Manifest:
        """Its card: name, shape, number of rows, class names, fingerprint."""

    def read(self, rows: Rows, /) -> Images:
        """Return the images of these rows, uint8 [n, C, H, W]."""

    def labels(self, rows: Rows, /) -> npt.NDArray[np.int64] | None:
        """Return the labels of these rows, int64 [n], or None where the dataset has none."""


def row_chunks(dataset: ImageSet, rows: Rows) -> Iterator[Rows]:
    """Cut row numbers into chunks whose images take about 64 MB, to be read at once."""
    step = max(1, _READ_BYTES // dataset.manifest.image_bytes)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
