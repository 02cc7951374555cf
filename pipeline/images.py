"""Images as bytes, as uint8 arrays and as tensors in [-1, 1]: decoding within limits, and scaling without loss."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, DivergedError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 2**26  # 8192 x 8192; Pillow itself warns from 89 million on
MAX_BYTES = 2**27  # of one encoded image
OPAQUE_MODES = ("L", "RGB")


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [-1, 1]: x / 127.5 - 1, each of the 256 values rounded once.

    Written as (2 x - 255) / 255, whose numerator is exact, so that black and white are exactly -1 and 1 and an image and
    its negative are exact opposites.
    """
    return (images.float() * 2 - 255) / 255


def to_uint8(images: Tensor) -> Tensor:
    """Scale float images in [-1, 1] back to uint8, rounding to the nearest level and clamping; inverts `to_float`.

    Raises:
        DivergedError: some values are not finite.
    """
    if not bool(images.isfinite().all()):
        raise DivergedError("images hold values that are not finite: the model has diverged, go back to a checkpoint")
    return ((images.float() * 255 + 255) / 2).round().clamp(0, 255).byte()


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right those images [B, C, H, W] whose entry of the boolean `mask` [B] is true."""
    return images.flip(-1).where(mask[:, None, None, None], images)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, mode: str | None = None, where: str = "image") -> Pixels:
    """Decode a PNG or JPEG file to uint8 [H, W, C].

    docs/data.md has the table of image modes: what is taken as it is, what only `mode` ("L" or "RGB") converts, and what
    is refused. Size and format are read from the header before any pixel is decoded.

    Raises:
        DataError: not a PNG or JPEG, damaged, over a limit, or in a mode that is not taken; `where` names it.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: {len(data)} bytes, more than the limit of {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{where}: {width}x{height} pixels, more than the limit of {max_pixels}")
            image.load()
            return _pixels(image)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: not a readable PNG or JPEG image ({error})") from None


def _pixels(image: Image) -> Pixels:
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array
