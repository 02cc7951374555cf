"""Pictures for people: sheets of images, denoising strips, and what a dataset looks like."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UsageError
from pipeline.storage.durable import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.manifest import Manifest
    from pipeline.data.shards import Dataset

Pixels = npt.NDArray[np.uint8]

_LEGIBLE_SIDE = 64  # smaller images are enlarged to about this, pixel by pixel
_GAP = 2
_BACKGROUND = (255, 255, 255)
_INK = (0, 0, 0)
_FONT_SIZE = 11
_FRAME_MS, _LAST_FRAME_MS = 80, 2000  # of an animation
_LINE = _FONT_SIZE + 4
_ADDED = ("left out", "verified", "picture")  # to a card, by some datasets and options


def save_grid(
    images: Pixels | Tensor, path: Path, columns: int | None = None, captions: Sequence[str] | None = None
) -> None:
    """Write one picture (format by the suffix of `path`) with images side by side, as `grid_picture` draws it."""
    write_picture(grid_picture(images, columns, captions), path)


def write_picture(picture: Any, path: Path, **options: Any) -> None:
    """Write a Pillow picture in the format of the path's suffix; StorageError, and no part of a file, where it cannot be."""
    content = io.BytesIO()
    content.name = str(path)  # Pillow reads its suffix
    picture.save(content, **options)
    write_atomically(path, content.getvalue())


def grid_picture(images: Pixels | Tensor, columns: int | None = None, captions: Sequence[str] | None = None) -> Any:
    """Return a Pillow picture with images side by side, row by row.

    Args:
        images: uint8 [n, C, H, W]; tiny ones are enlarged to be legible, without smoothing.
        columns: images in a row; as square as possible by default.
        captions: a text below each image.
    """
    pixels = _array(images)
    columns = min(columns or math.ceil(math.sqrt(len(pixels))), len(pixels))
    sheet = _Sheet(pixels.shape[2:], math.ceil(len(pixels) / columns), columns, below=_LINE if captions else 0)
    for i, (image, caption) in enumerate(zip(pixels, captions or [""] * len(pixels), strict=True)):
        sheet.draw(i // columns, i % columns, image, caption)
    return sheet.image


def read_grid(path: Path, shape: tuple[int, int, int], count: int) -> Pixels:
    """Return the first `count` images of a PNG that `save_grid` wrote without captions: uint8 [n, C, H, W], C 1 or 3, as they were.

    Args:
        path: the picture.
        shape: (C, H, W) of its images.
        count: how many to return at most.
    """
    from PIL import Image

    channels, height, width = shape
    sheet = _Sheet((height, width), 1, 1)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows, columns = ((pixels.shape[axis] - _GAP) // sheet.cell[axis] for axis in (0, 1))
    images = []
    for i in range(min(count, columns * rows)):
        top, left = (i // columns) * sheet.cell[0] + _GAP, (i % columns) * sheet.cell[1] + _GAP
        cell = pixels[top : top + height * sheet.scale : sheet.scale, left : left + width * sheet.scale : sheet.scale]
        images.append(cell.transpose(2, 0, 1)[: 3 if channels == 3 else 1])
    return np.stack(images)


def grid_preview(path: Path, shape: tuple[int, int, int] | None, count: int, most_pixels: int) -> Any:
    """Return a Pillow picture of the first `count` images of a stored grid, or of all if their shape is not known, in at most so many
    pixels each way."""
    from PIL import Image

    if shape is None:
        with Image.open(path) as stored:
            picture = stored.convert("RGB")
    else:
        picture = grid_picture(read_grid(path, shape, count))
    picture.thumbnail((most_pixels, most_pixels))
    return picture


def save_strip(frames: Sequence[Pixels | Tensor], path: Path, labels: Sequence[str]) -> None:
    """Write a denoising strip: a row for each image, a column for each frame of time, its label above.

    Args:
        frames: each uint8 [n, C, H, W], all alike.
        path: file to write.
        labels: a text for each frame, such as "t = 500".
    """
    arrays = np.stack([_array(frame) for frame in frames])
    sheet = _Sheet(arrays.shape[3:], arrays.shape[1], len(arrays), above=_LINE)
    for x, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        sheet.write(label, x, 0)
        for y, pixels in enumerate(array):
            sheet.draw(y, x, pixels)
    write_picture(sheet.image, path)


def save_animation(frames: Sequence[Pixels | Tensor], path: Path) -> None:
    """Write an animated GIF that repeats: each frame, uint8 [n, C, H, W], is a sheet of images, and the last one is shown longer."""
    sheets = [grid_picture(frame) for frame in frames]
    times = [_FRAME_MS] * (len(sheets) - 1) + [_LAST_FRAME_MS]
    options = {"format": "GIF", "save_all": True, "append_images": sheets[1:], "duration": times, "loop": 0}
    write_picture(sheets[0], path, **options)


def dataset_card(manifest: Manifest) -> dict[str, Any]:
    """Return the facts that `ddpm-pipe inspect` prints, as plain data."""
    channels, height, width = manifest.shape
    return {
        "name": manifest.name,
        "source": manifest.source,
        "images": manifest.num_rows,
        "shape": {"channels": channels, "height": height, "width": width},
        "classes": None if manifest.class_names is None else list(manifest.class_names),
        "labels": manifest.has_labels,
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "encoding": manifest.encoding,
        "shards": len(manifest.shards),
        "bytes_on_disk": sum(shard.num_bytes for shard in manifest.shards),
        "bytes_in_memory": manifest.num_bytes_decoded,
        "fingerprint": manifest.fingerprint,
    } | ({"left out": f"{len(manifest.skipped)} damaged images"} if manifest.skipped else {})


def card_lines(card: dict[str, Any]) -> list[str]:
    """A card for people, a line for each fact."""
    shape, classes = card["shape"], card["classes"]
    channels = "grey" if shape["channels"] == 1 else f"{shape['channels']} channels"
    named = "unnamed" if card["labels"] else "none"
    if classes:
        named = f"{len(classes)} ({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})"
    facts = {
        "dataset": card["name"],
        "source": card["source"],
        "images": f"{card['images']:,} of {shape['height']}x{shape['width']}, {channels}",
        "classes": named,
        "mean ± std": ", ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(card["mean"], card["std"], strict=True))
        + " on [-1, 1]",
        "stored as": f"{card['encoding']}, {card['bytes_on_disk'] / 1e6:.2f} MB in {card['shards']} shard"
        f"{'s' if card['shards'] > 1 else ''}, {card['bytes_in_memory'] / 1e6:.2f} MB in memory",
        "fingerprint": card["fingerprint"],
    }
    facts |= {name: card[name] for name in _ADDED if name in card}
    return [f"{name:12} {value}" for name, value in facts.items()]


def inspect_picture(dataset: Dataset, path: Path, num_images: int = 64) -> None:
    """Write a grid of images spread evenly over the dataset, with their classes where there are any."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, num=min(num_images, len(dataset))).round().astype(np.int64))
    labels, names = dataset.labels(rows), dataset.manifest.class_names
    captions = None if labels is None else [names[label] if names else str(label) for label in labels]
    save_grid(dataset.read(rows), path, captions=captions)


class _Sheet:
    """Cells of equal size on a white ground, with room for a line of text above all or below each."""

    def __init__(self, size: tuple[int, ...], num_rows: int, num_columns: int, above: int = 0, below: int = 0) -> None:
        from PIL import Image, ImageDraw, ImageFont

        height, width = size
        self.scale = max(1, round(_LEGIBLE_SIDE / max(height, width)))
        self.above = above
        self.cell = height * self.scale + below + _GAP, width * self.scale + _GAP
        shape = (num_columns * self.cell[1] + _GAP, num_rows * self.cell[0] + above + _GAP)
        self.image = Image.new("RGB", shape, _BACKGROUND)
        self._pen = ImageDraw.Draw(self.image)
        self._font: Any = ImageFont.load_default(_FONT_SIZE)

    def draw(self, y: int, x: int, pixels: Pixels, caption: str = "") -> None:
        from PIL import Image

        chw = pixels if pixels.shape[0] == 3 else np.repeat(pixels[:1], 3, axis=0) if len(pixels) < 3 else pixels[:3]
        enlarged = chw.transpose(1, 2, 0).repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        top = y * self.cell[0] + self.above + _GAP
        self.image.paste(Image.fromarray(enlarged), (x * self.cell[1] + _GAP, top))
        if caption:
            self.write(caption, x, top + enlarged.shape[0])

    def write(self, text: str, x: int, top: int) -> None:
        """Write in a column, cut to its width."""
        text, width = " ".join(text.split()), self.cell[1] - _GAP
        while len(text) > 1 and self._pen.textlength(text, self._font) > width:
            text = text[:-1]
        self._pen.text((x * self.cell[1] + _GAP, top), text, fill=_INK, font=self._font)


def _array(images: Pixels | Tensor) -> Pixels:
    array = images if isinstance(images, np.ndarray) else images.cpu().numpy()
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"expected uint8 images [n, C, H, W], got {array.dtype} of shape {array.shape}")
    return array


def picture_of(image: Tensor) -> Any:
    """Return a Pillow image of uint8 [C, H, W]; more channels than colours have are refused, since a PNG cannot hold them."""
    from PIL import Image

    channels = image.shape[0]
    if channels not in (1, 3):
        raise UsageError(f"images with {channels} channels have no PNG form; use --format parquet")
    array = image.numpy()
    return Image.fromarray(array[0] if channels == 1 else array.transpose(1, 2, 0))


def as_png(picture: Any) -> bytes:
    """Return a Pillow image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
