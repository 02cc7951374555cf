"""Images as files, as uint8 arrays and as tensors in [-1, 1]: decoding within limits, and scaling without loss."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.data.image_header import Header, RefusedFormatError, read_header
from pipeline.errors import DataError, DivergedError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]

MODES = ("L", "RGB")  # one channel of grey, or three of colour: taken as they are, and what `mode` converts to
MAX_PIXELS = 2**26  # 8192 x 8192
PILLOW_MAX_PIXELS = 89_478_485  # above it Pillow warns by itself
MAX_BYTES = 2**27  # of one encoded image
_ORIENTATION = 0x0112


class DamagedImageError(DataError):
    """A file that is no whole image; one that is whole but not taken is another DataError."""


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
        raise DivergedError("images hold values that are not finite: the model diverged, use an earlier checkpoint")
    return ((images.float() * 255 + 255) / 2).round().clamp(0, 255).byte()


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right those images [B, C, H, W] whose entry of the boolean `mask` [B] is true."""
    return images.flip(-1).where(mask[:, None, None, None], images)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, mode: str | None = None, where: str = "image") -> Pixels:
    """Decode a PNG or JPEG file to uint8 [H, W, C].

    docs/data.md has the table of what is taken as it is, what only `mode` ("L" or "RGB") converts, and what is refused.
    Format and size are read from the header before any pixel is decoded.

    Raises:
        DamagedImageError: no image, or a damaged one; `where` names it.
        DataError: an image of another format, over a limit, or not taken without `mode`.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: {len(data)} bytes, more than the limit of {MAX_BYTES}: leave it out or shrink it")
    try:
        header = read_header(data)
    except RefusedFormatError as error:
        raise DataError(f"{where}: {error}, expected a PNG or JPEG image: leave it out or convert it") from None
    except ValueError as error:
        raise DamagedImageError(f"{where}: {error}, expected a PNG or JPEG image: leave it out or replace it") from None
    if header.unreadable:
        raise DataError(f"{where}: {header.unreadable}: convert it first")
    if header.width * header.height > max_pixels:
        raise DataError(
            f"{where}: {header.width}x{header.height} pixels, more than the limit of {max_pixels}: leave it out or shrink it"
        )
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            warnings.filterwarnings("ignore", "Image appears to be a malformed MPO file")
            if image.size != (header.width, header.height):
                raise ValueError(f"its header says both {header.width}x{header.height} and {image.size}")
            obstacle = _obstacle(image, header)
            if obstacle is None and mode in (None, image.mode):
                return _pixels(image)
            return _pixels(_converted(image, header, mode, obstacle))
    except _RefusedImageError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # Pillow raises a dozen kinds, from SyntaxError to struct.error, for damaged files
        raise DamagedImageError(
            f"{where}: a damaged {header.format} image ({error}): leave it out or replace it"
        ) from None


def convert_array(pixels: Pixels, mode: str | None, where: str = "image") -> Pixels:
    """Give pixels [H, W, C] that come without a file the channels of `mode`, as `decode_image` does."""
    from PIL import Image

    if mode is None or pixels.shape[2] == {"L": 1, "RGB": 3}[mode]:
        return pixels
    if pixels.shape[2] not in (1, 3):
        raise DataError(f"{where}: {pixels.shape[2]} channels, --mode {mode} converts from 1 or 3: leave out --mode")
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return _pixels(image.convert(mode))


def crop_and_resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut the largest centred part [H, W, C] of the aspect of `size` (H, W), then resize it (bicubic, antialiased)."""
    from PIL import Image

    (height, width), (new_height, new_width) = pixels.shape[:2], size
    if (height, width) == size:
        return pixels
    scale = min(height / new_height, width / new_width)
    part_height, part_width = (max(1, min(n, round(m * scale))) for n, m in ((height, new_height), (width, new_width)))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = pixels[top : top + part_height, left : left + part_width]
    bands = [Image.fromarray(np.ascontiguousarray(part[:, :, c])) for c in range(part.shape[2])]
    resized = [np.asarray(band.resize((new_width, new_height), Image.Resampling.BICUBIC)) for band in bands]
    return np.stack(resized, axis=2)


class _RefusedImageError(Exception):
    """A sound image that is not taken; the message says why and what to do."""


def _obstacle(image: Image, header: Header) -> str | None:
    """Why the image cannot be taken as it is: something of it would be lost or changed; None if nothing would."""
    if header.is_animated:
        raise _RefusedImageError("holds several frames, expected one image: extract the frame you want")
    if header.bits > 8:
        return f"has {header.bits} bits per channel"
    if header.has_transparency or image.mode in ("LA", "PA", "RGBA"):
        return "has transparency"
    if image.mode not in MODES:
        return {"1": "is black and white (1 bit)", "P": "has a palette"}.get(image.mode, f"is {image.mode}")
    if _orientation(image) != 1:
        return f"is to be shown turned (EXIF orientation {_orientation(image)})"
    return None


def _converted(image: Image, header: Header, mode: str | None, obstacle: str | None) -> Image:
    """The conversions of the table in docs/data.md."""
    from PIL import Image, ImageOps

    if mode is None:
        raise _RefusedImageError(f"{obstacle}, taken as they are are 8-bit L and RGB: give --mode L or --mode RGB")
    if header.bits > 8 and header.has_transparency:
        raise _RefusedImageError("has 16 bits per channel and a transparent colour: convert it first")
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, as Pillow takes for 16-bit colour
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    elif header.has_transparency or image.mode in ("LA", "PA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return (image if image.mode in MODES else image.convert("RGB")).convert(mode)


def _orientation(image: Image) -> int:
    """EXIF orientation, 1 = upright; also where the tags are missing or cannot be read."""
    if not {"exif", "xmp", "XML:com.adobe.xmp"} & set(image.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "Corrupt EXIF data" comes as a warning
            value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
    return value if 1 <= value <= 8 else 1


def _pixels(image: Image) -> Pixels:
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array
