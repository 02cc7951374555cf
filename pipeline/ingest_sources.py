"""Where images come from: each source lists its items in one fixed order, and knows a key of its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.ingest_rows import Item


@dataclass(frozen=True)
class Source:
    """Images to ingest.

    Attributes:
        name: short name for people and folders.
        origin: where they come from, for the manifest; without credentials.
        items: yields the images in their fixed order.
        key: text that changes when the content does.
        class_names: one name per class, or None.
        has_labels: whether items carry labels.
        num_rows: images, where known beforehand.
        num_bytes: bytes of encoded images to decode; 0 where pixels come as arrays.
    """

    name: str
    origin: str
    items: Callable[[], Iterator[Item]]
    key: Callable[[], str]
    class_names: tuple[str, ...] | None = None
    has_labels: bool = False
    num_rows: int | None = None
    num_bytes: int = 0


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels in 17 grey levels.

    Level v of 0..16 becomes round(255 v / 16), so that 0 is black, 16 is white and the levels can be told again.
    """

    def items() -> Iterator[Item]:
        from sklearn.datasets import load_digits

        data = load_digits()
        levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
        for row, (image, label) in enumerate(zip(levels, data.target, strict=True)):
            yield Item(f"digits, row {row}", image[:, :, None], int(label))

    names = tuple(str(digit) for digit in range(10))
    return Source("digits", "digits (scikit-learn)", items, lambda: "digits 1", names, True, 1797)
