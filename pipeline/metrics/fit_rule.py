"""Which images of a dataset a classifier is fitted on, and which it judges: decided by each image's content alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.image_set import Images, ImageSet, Progress, Rows, row_chunks

SALT = "ddpm-pipe classifier 1"

Hashes = npt.NDArray[np.uint64]


def content_hashes(images: Images, salt: str = SALT) -> Hashes:
    """Return uint64 [n]: the first 8 bytes of blake2b(salt, shape, pixels) of each image [C, H, W] of uint8 [n, C, H, W].

    Equal images have equal hashes in any position, so two copies of a dataset in different order, or a dataset and its superset, agree on
    each image.
    """
    prefix = hashlib.blake2b(f"{salt}\0{'x'.join(map(str, images.shape[1:]))}\0".encode(), digest_size=64)
    hashes = np.empty(len(images), dtype=np.uint64)
    for i, image in enumerate(np.ascontiguousarray(images)):
        digest = prefix.copy()
        digest.update(image)
        hashes[i] = int.from_bytes(digest.digest()[:8], "big")
    return hashes


@dataclass(frozen=True)
class FitRule:
    """Which images a classifier is fitted on: those whose content hash lies below `fraction` of the range of hashes."""

    fraction: float
    salt: str = SALT

    def chosen(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Return bool [n]: whether each image belongs to the fitted part."""
        return hashes < np.uint64(int(self.fraction * 2**64))

    def __str__(self) -> str:
        return f"content hash below {self.fraction:.6g}, salt {self.salt!r}"


def held_out_rows(hashes: Hashes, rule: FitRule) -> Rows:
    """Return the rows outside the fitted part, in the order of their content hashes: a fixed random order."""
    rows = np.flatnonzero(~rule.chosen(hashes))
    return rows[np.argsort(hashes[rows], kind="stable")]


def hash_rows(dataset: ImageSet, progress: Progress | None = None) -> Hashes:
    """Return the content hash of every row, uint64 [num_rows]."""
    total = dataset.manifest.num_rows
    parts = []
    for rows in row_chunks(dataset, np.arange(total)):
        parts.append(content_hashes(dataset.read(rows)))
        if progress is not None:
            progress("reading the images", int(rows[-1]) + 1, total)
    return np.concatenate(parts)
