"""Images as files, uint8 arrays and tensors in [-1, 1]: decoding within limits, and lossless scaling."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.data.image_format import RefusedFormatError, require_png_or_jpeg
from pipeline.errors import DataError, DivergedError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]

CHANNELS = {"L": 1, "RGB": 3}  # by mode: accepted without conversion; `mode` converts to one of them
MAX_PIXELS = 2**26  # 8192 x 8192
MAX_BYTES = 2**27  # of one encoded image
_ORIENTATION = 0x0112


class DamagedImageError(DataError):
    """A damaged or truncated image, or a file that is not an image. An intact image that is refused raises a plain DataError."""


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [-1, 1]: x / 127.5 - 1, each of the 256 values rounded once.

    Written as (2 x - 255) / 255, whose numerator is exact, so that black and white are exactly -1 and 1, and an image
    and its negative exact opposites.
    """
    return (images.float() * 2 - 255) / 255


def to_uint8(images: Tensor) -> Tensor:
    """Scale float images in [-1, 1] to uint8, to the nearest level and clamped; the inverse of `to_float`.

    Raises:
        DivergedError: some values are not finite.
    """
    if not bool(images.isfinite().all()):
        raise DivergedError("images contain non-finite values: the model has diverged. Use an earlier checkpoint")
    return ((images.float() * 255 + 255) / 2).round().clamp(0, 255).byte()


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images [B, C, H, W] for which the boolean `mask` [B] is true."""
    return images.flip(-1).where(mask[:, None, None, None], images)


def decode_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    mode: str | None = None,
    size: tuple[int, int] | None = None,
    where: str = "image",
) -> Pixels:
    """Decode a PNG or JPEG file to uint8 [H, W, C], cropped and resized to `size` (H, W) if given.

    docs/data.md lists which images are accepted, which need `mode` ("L" or "RGB"), and which are refused. Format and size are
    checked before any pixel is decoded.

    Raises:
        DamagedImageError: damaged, or not an image; `where` names it.
        DataError: another format, over a limit, or refused without `mode`.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: {len(data)} bytes, more than the limit of {MAX_BYTES}: leave it out or shrink it")
    try:
        kind = require_png_or_jpeg(data)
    except RefusedFormatError as error:
        raise DataError(f"{where}: {error}, expected a PNG or JPEG image: leave it out or convert it") from None
    except ValueError as error:
        raise DamagedImageError(f"{where}: {error}, expected a PNG or JPEG image: leave it out or replace it") from None
    try:
        with warnings.catch_warnings(), _opened(data, kind) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > max_pixels:
                raise _RefusedImageError(
                    f"{image.width}x{image.height} pixels, more than the limit of {max_pixels}: leave it out or shrink it"
                )
            if kind == "PNG":
                _opened(data, kind).verify()  # Pillow does not verify the checksums of pixel data while it decodes
            obstacle = _obstacle(image)
            taken = image if obstacle is None and mode in (None, image.mode) else _converted(image, mode, obstacle)
            return _pixels(taken if size is None else _fitted(taken, size))
    except _RefusedImageError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # Pillow raises many types for damaged files, from SyntaxError to struct.error
        if str(error).startswith("cannot handle"):  # a JPEG of 12 bits or of 2 layers
            raise DataError(f"{where}: a JPEG that Pillow cannot read ({error}): convert it first") from None
        raise DamagedImageError(f"{where}: a damaged {kind} image ({error}): leave it out or replace it") from None


def _opened(data: bytes, kind: str) -> ImageFile:
    """Read the header with Pillow's class for this format; no other decoder of Pillow sees the bytes."""
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    return (PngImageFile if kind == "PNG" else JpegImageFile)(io.BytesIO(data))


def convert_array(pixels: Pixels, mode: str | None, where: str = "image") -> Pixels:
    """Convert pixels [H, W, C] to the channels of `mode`, as `decode_image` does."""
    from PIL import Image

    if mode is None or pixels.shape[2] == CHANNELS[mode]:
        return pixels
    if pixels.shape[2] not in (1, 3):
        raise DataError(f"{where}: {pixels.shape[2]} channels, --mode {mode} converts from 1 or 3: leave out --mode")
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return _pixels(image.convert(mode))


def crop_and_resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut the largest centred part of pixels [H, W, C] with the aspect of `size` (H, W), then resize it (bicubic, antialiased)."""
    from PIL import Image

    if pixels.shape[:2] == size:
        return pixels
    bands = [Image.fromarray(np.ascontiguousarray(pixels[:, :, c])) for c in range(pixels.shape[2])]
    return np.stack([np.asarray(_fitted(band, size)) for band in bands], axis=2)


def _fitted(image: Image, size: tuple[int, int]) -> Image:
    from PIL import Image

    (width, height), (new_height, new_width) = image.size, size
    if (height, width) == size:
        return image
    scale = min(height / new_height, width / new_width)
    part_height, part_width = (max(1, min(n, round(m * scale))) for n, m in ((height, new_height), (width, new_width)))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = image.crop((left, top, left + part_width, top + part_height))
    return part.resize((new_width, new_height), Image.Resampling.BICUBIC)


class _RefusedImageError(Exception):
    """An intact image that is refused; the message gives the reason and the remedy."""


def _obstacle(image: ImageFile) -> str | None:
    """Return what conversion would lose or change; None if the image can be accepted unchanged."""
    if getattr(image, "is_animated", False):
        raise _RefusedImageError("holds several frames, expected one image: extract the frame you want")
    if _has_16_bits(image):
        return "has 16 bits per channel"
    if _has_transparency(image):
        return "has transparency"
    if image.mode not in CHANNELS:
        return {"1": "is black and white (1 bit)", "P": "has a palette"}.get(image.mode, f"is {image.mode}")
    if _orientation(image) != 1:
        return f"is to be shown turned (EXIF orientation {_orientation(image)})"
    return None


def _has_16_bits(image: ImageFile) -> bool:
    """Whether a PNG stores 16 bits per channel; in colour images, Pillow drops the lower 8."""
    return str(image.tile[0].args).endswith("16B")


def _has_transparency(image: ImageFile) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")


def _converted(image: ImageFile, mode: str | None, obstacle: str | None) -> Image:
    """Convert as the table in docs/data.md says."""
    from PIL import Image, ImageOps

    if mode is None:
        raise _RefusedImageError(
            f"{obstacle}, expected 8-bit grey (L) or colour (RGB): give --mode L or --mode RGB to convert it"
        )
    if _has_16_bits(image) and "transparency" in image.info:
        raise _RefusedImageError("has 16 bits per channel and a transparent colour: convert it first")
    upright: Image.Image = image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: keep the high byte, as Pillow does for 16-bit colour
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8))
    elif _has_transparency(image):
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return (upright if upright.mode in CHANNELS else upright.convert("RGB")).convert(mode)


def _orientation(image: Image) -> int:
    """Return the EXIF orientation; 1, upright, if it is missing or unreadable."""
    if not {"exif", "xmp", "XML:com.adobe.xmp"} & set(image.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow reports "Corrupt EXIF data" as a warning
            value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
    return value if 1 <= value <= 8 else 1


def _pixels(image: Image) -> Pixels:
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array
