"""Image files and datasets that the tests of the data side make: PNGs chunk by chunk, so that nothing of Pillow's is assumed."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.order import Order, Rows
from pipeline.data.shards import Dataset
from pipeline.ingest.ingest import ingest

Pixels = npt.NDArray[np.uint8]

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG colour types


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG whose `rows` are packed as the format says (without the filter bytes); `extra` chunks precede the pixels."""
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *extra,
            chunk(b"IDAT", zlib.compress(lines)),
            chunk(b"IEND", b""),
        ]
    )


def png_of(pixels: Pixels) -> bytes:
    """8-bit PNG of [H, W, 1] or [H, W, 3]."""
    height, width, channels = pixels.shape
    return png(width, height, 8, GREY if channels == 1 else COLOUR, pixels.tobytes())


def jpeg_of(pixels: Pixels, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def rows_for(order: Order, step: int, stream: int) -> Rows:
    """Dataset rows of a stream at a step, int64 [batch_size / num_streams]."""
    found, wanted = [], order.rows_per_stream
    for part in order.parts(stream, step):
        found.append(order.rows_of(part)[:wanted])
        wanted -= len(found[-1])
        if wanted == 0:
            break
    return np.concatenate(found)


def some_images(count: int, shape: tuple[int, int, int] = (6, 5, 3), seed: int = 0) -> Pixels:
    """Random uint8 [count, H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_folder(root: Path, images: Pixels, labels: list[int] | None = None, names: tuple[str, ...] = ()) -> Path:
    """An image folder of PNGs whose order by path is that of the rows; labels must be sorted."""
    for row, image in enumerate(images):
        folder = root / names[labels[row]] if labels is not None else root
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:05d}.png").write_bytes(png_of(image))
    return root


def hugging_face(features: dict[str, Any]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    images: Pixels,
    labels: list[int],
    names: tuple[str, ...] | None,
    image: str = "image",
    label: str = "label",
) -> Path:
    """What the `datasets` library writes: struct<bytes, path> and int64 with feature metadata."""
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if names is not None:
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    values = [{"bytes": png_of(pixels), "path": f"{row}.png"} for row, pixels in enumerate(images)]
    table = pa.table(
        {image: pa.array(values, type=pa.struct({"bytes": pa.binary(), "path": pa.string()})), label: pa.array(labels)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(hugging_face(features)), path, row_group_size=7)
    return path


def dataset_of(folder: Path, images: Pixels, labels: Any = None, rows_per_shard: int | None = None) -> Dataset:
    """Ingest arrays by way of an .npz file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"x": images} if labels is None else {"x": images, "y": np.asarray(labels)}
    source = write_npz(folder.with_name(f"{folder.name}-source.npz"), **arrays)
    ingest(str(source), folder, rows_per_shard=rows_per_shard)
    return Dataset.open(folder)
