"""Convert images of any source to rows of a dataset: decode, convert, check, encode.

Pool processes import this module, so it imports neither torch nor pyarrow.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data.images import (
    MAX_BYTES,
    DamagedImageError,
    convert_array,
    crop_and_resize,
    decode_image,
)
from pipeline.data.manifest import RAW_LIMIT, ContentHash
from pipeline.errors import DataError

HOLDOUT_SALT = b"ddpm-pipe holdout 1"
_TOGETHER_BYTES = 2**22  # of pixels per histogram; one histogram per small image would be slow

Pixels = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]  # C, H, W


@dataclass(frozen=True)
class Item:
    """One image of a source: an encoded file, its path, uint8 pixels [H, W, C], or None if it is missing. `where` names it in messages."""

    where: str
    image: bytes | Path | Pixels | None
    label: int = 0


@dataclass(frozen=True)
class Treatment:
    """Conversions after decoding, and which part of the images is kept; by default all are, as they are.

    An image is held out if a salted hash of its content lies below `holdout` of the range of hashes: equal images fall on the same side
    in any dataset, and a larger share holds out those of a smaller one, too.
    """

    mode: str | None = None
    image_size: tuple[int, int] | None = None  # H, W
    holdout: float = 0.0
    held_out: bool = False  # the images held out are kept, not the others

    def keeps(self, digest: bytes) -> bool:
        """Return whether the image with this digest is kept."""
        hashed = int.from_bytes(hashlib.sha256(HOLDOUT_SALT + digest).digest()[:8], "big")
        return (hashed < self.holdout * 2**64) is self.held_out


@dataclass(frozen=True)
class Rows:
    """Consecutive rows: stored images, digests, labels, and per channel the count of each of the 256 values, int64 [C, 256].

    `first` is the name and shape of the source's first image, None before there is one. `damaged` has a message for each image that is left
    out. `num_read` counts all images that were read.
    """

    first: tuple[str, Shape] | None
    images: list[bytes]
    digests: bytes
    labels: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    damaged: tuple[str, ...]
    num_read: int

    @property
    def shape(self) -> Shape | None:
        """(C, H, W) of all rows; None before the first."""
        return None if self.first is None else self.first[1]


def make_rows(items: list[Item], treatment: Treatment, first: tuple[str, Shape] | None) -> Rows:
    """Convert items to rows, all with the shape of `first` (the source's first image), or of the first item if None.

    Raises:
        DataError: an image is refused, or shapes differ; names the item. Damaged images do not raise.
    """
    images, digests, labels, recent = [], [], [], list[Pixels]()
    histogram: npt.NDArray[np.int64] | None = None
    damaged: list[str] = []
    for item in items:
        try:
            pixels = _pixels(item, treatment)
        except DamagedImageError as error:
            damaged.append(str(error))
            continue
        shape = (pixels.shape[2], pixels.shape[0], pixels.shape[1])
        first = first or (item.where, shape)
        _check_shape(item.where, shape, *first)
        chw = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        digest = ContentHash.of_row(chw.data)
        if not treatment.keeps(digest):
            continue
        digests.append(digest)
        images.append(chw.tobytes() if stored_raw(shape) else encode_png(pixels))
        labels.append(item.label)
        recent.append(chw)
        if len(recent) * chw.nbytes >= _TOGETHER_BYTES:
            histogram = _histogram(recent) + (0 if histogram is None else histogram)
            recent.clear()
    if recent:
        histogram = _histogram(recent) + (0 if histogram is None else histogram)
    total = np.zeros((0, 256), np.int64) if histogram is None else histogram
    return Rows(first, images, b"".join(digests), np.array(labels, dtype=np.int64), total, tuple(damaged), len(items))


def _histogram(images: list[Pixels]) -> npt.NDArray[np.int64]:
    return np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in np.stack(images, axis=1)])


def stored_raw(shape: Shape) -> bool:
    """Whether images of this shape are stored as raw pixels, not as PNG."""
    return max(shape[1:]) <= RAW_LIMIT


def encode_png(pixels: Pixels) -> bytes:
    """Encode uint8 [H, W, C] with one or three channels as a PNG file."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    data = _png(image, compress_type=zlib.Z_HUFFMAN_ONLY)
    # zlib's search for repeated bytes does not shrink photographs, and takes longer than decoding and resizing
    return data if len(data) > pixels.nbytes / 3 else _png(image, compress_level=4)


def _png(image: Image.Image, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def _pixels(item: Item, treatment: Treatment) -> Pixels:
    if item.image is None:
        raise DamagedImageError(f"{item.where} has no image bytes: store the images inside the file")
    size = treatment.image_size
    if isinstance(item.image, np.ndarray):
        pixels = convert_array(item.image, treatment.mode, item.where)
        return pixels if size is None else crop_and_resize(pixels, size)
    data = item.image if isinstance(item.image, bytes) else _read(item.image, item.where)
    return decode_image(data, mode=treatment.mode, size=size, where=item.where)


def _read(path: Path, where: str) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:  # before it is read
            raise DataError(f"{where}: more bytes than the limit of {MAX_BYTES}: leave it out or shrink it")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from None


def _check_shape(where: str, shape: Shape, first_where: str, first_shape: Shape) -> None:
    if shape != first_shape:
        raise DataError(
            f"{where} is {_text(shape)}, but {first_where} is {_text(first_shape)}: all must be equal; "
            "--image-size N crops and resizes them, --mode L or RGB converts them"
        )
    if shape[0] not in (1, 3) and not stored_raw(shape):
        raise DataError(f"{where} is {_text(shape)}: images above {RAW_LIMIT}x{RAW_LIMIT} need 1 or 3 channels")


def _text(shape: Shape) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
