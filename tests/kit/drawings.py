"""What a picture shows: where an image stands in a sheet, and whether a file holds a figure whose parts a test has looked at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.pictures.charts import png_of

Pixels = npt.NDArray[np.uint8]


def pixels_of(path: Path, mode: str = "RGB") -> Pixels:
    """Return the pixels of a picture of this mode, uint8 [H, W, C]."""
    with Image.open(path) as image:
        assert image.mode == mode
        return np.asarray(image)


def place_of(image: Pixels, sheet: Pixels, scale: int) -> tuple[int, int]:
    """Return top and left of the one place where `image` [C, H, W], enlarged pixel by pixel, stands in the sheet."""
    block = np.kron(image.transpose(1, 2, 0), np.ones((scale, scale, 1), dtype=np.uint8))
    block = np.broadcast_to(block, (*block.shape[:2], 3))
    corners = np.argwhere((sheet == block[0, 0]).all(axis=2))
    height, width = block.shape[:2]
    found = [(int(y), int(x)) for y, x in corners if np.array_equal(sheet[y : y + height, x : x + width], block)]
    assert len(found) == 1
    return found[0]


def holds(path: Path, figure: Any) -> bool:
    """Whether a PNG is this figure, pixel by pixel."""
    drawn = io.BytesIO(png_of(figure))
    with Image.open(path) as found, Image.open(drawn) as wanted:
        return np.array_equal(np.asarray(found), np.asarray(wanted))


def points_of(line: Any) -> npt.NDArray[np.float64]:
    """Return what a line of matplotlib's goes through, [n, (x, y)]."""
    return np.asarray(line.get_xydata(), dtype=np.float64)
