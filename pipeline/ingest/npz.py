"""Images in NumPy archives (.npz)."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import DataError, UsageError
from pipeline.ingest.choice import ALL_SPLITS, choose_split, pick_column, pick_label, split_of
from pipeline.ingest.label_values import NO_LABELS, Classes, classes_of, is_one_hot, names_rows
from pipeline.ingest.rows import Item
from pipeline.ingest.sources import Source, content_key, short_name

HEADER_BYTES = 1 << 16  # a longer header names no array of images


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz(
    path: Path, image_column: str | None = None, label_column: str | None = None, split: str | None = None
) -> Source:
    """Read uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W], and labels: integers or booleans [N], one-hot rows [N, K], or text [N] if
    named.

    Arrays are found by type and shape, and by the split in their names (`x_train`, `test_images`).

    Raises:
        DataError: there is no such array, or the file is damaged.
        UsageError: several such arrays and none is named, or the named array or split does not exist.
    """
    arrays, note = _headers(path), ""
    if image_column is None and any(map(split_of, arrays)):
        if split == ALL_SPLITS:
            raise UsageError(f"{path}: arrays of several splits cannot be combined: name one with --split")
        chosen, note = choose_split([name for name in arrays if split_of(name)], split, str(path))
        arrays = {name: array for name, array in arrays.items() if split_of(name) == chosen}
    elif split not in (None, ALL_SPLITS):
        raise UsageError(f"{path} has no split {split!r}: its arrays are {', '.join(arrays)}")
    images = [n for n, a in arrays.items() if a.dtype == np.uint8 and len(a.shape) in (3, 4)]
    there = {name: str(array.dtype) for name, array in arrays.items()}
    image = pick_column("image", image_column, images, there, str(path))
    num_rows = arrays[image].shape[0]
    label, classes = _choose_labels(path, arrays, num_rows, label_column)
    to_hwc = _layout(arrays[image].shape, f"{path}: array {image!r}")

    def items() -> Iterator[Item]:
        with _damage(path), np.load(path, allow_pickle=False) as archive:
            pixels, values = archive[image], np.zeros(num_rows) if label is None else archive[label]
        labels = classes.numbers(values, f"{path}, {label}")
        for row, (array, value) in enumerate(zip(pixels, labels, strict=True)):
            yield Item(f"{path}, {image}, row {row}", to_hwc(array), int(value))

    return Source(
        name=short_name(path),
        origin=f"{path.absolute()} ({image})",
        items=items,
        key=lambda: f"{content_key([(path.name, path)])} {image} {label}",
        class_names=classes.names,
        has_labels=label is not None,
        num_rows=num_rows,
        note=note,
    )


def _choose_labels(
    path: Path, arrays: dict[str, _Array], num_rows: int, named: str | None
) -> tuple[str | None, Classes]:
    """Return the array of labels (None without labels) and its classes."""
    found: dict[str, Classes] = {}
    lengths = ((num_rows,), (num_rows, 1))
    with _damage(path), np.load(path, allow_pickle=False) as archive:
        for name, (shape, dtype) in arrays.items():
            if named == NO_LABELS or (named in arrays and name != named):
                continue
            if dtype.kind in "iub" and shape in lengths:
                values = np.unique(archive[name])
                if name == named or not names_rows(name, len(values), num_rows):
                    found[name] = classes_of(values)
            elif dtype.kind in "U" and shape in lengths and name == named:
                found[name] = classes_of(np.unique(archive[name]))
            elif len(shape) == 2 and shape[0] == num_rows and dtype.kind in "iubf" and is_one_hot(archive[name]):
                found[name] = Classes(tuple(map(str, range(shape[1]))))
    there = {name: str(array.dtype) for name, array in arrays.items()}
    label = pick_label(named, list(found), there, str(path))
    return label, Classes(None) if label is None else found[label]


# what numpy and zipfile raise for a damaged archive
DAMAGE = (
    OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RecursionError, SyntaxError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Convert exceptions of numpy and zipfile for a damaged archive to DataError."""
    try:
        yield
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path} is not a readable .npz file ({reason}): replace it") from None


def _headers(path: Path) -> dict[str, _Array]:
    """Return shape and type of each array, from its header."""
    found = {}
    with _damage(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as content:
                    file = io.BytesIO(content.read(HEADER_BYTES))
                    version = np.lib.format.read_magic(file)
                    formats = np.lib.format
                    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
                    shape, _, dtype = read(file)
                    size = archive.getinfo(member).file_size - file.tell()
                    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size:
                        raise ValueError(f"array {member} of shape {shape} and type {dtype} has {size:,} bytes")
                found[member.removesuffix(".npy")] = _Array(shape, dtype)
    return found


def _layout(shape: tuple[int, ...], where: str) -> Callable[[Any], Any]:
    """Return the conversion of one image of an array of this shape to [H, W, C]."""
    if len(shape) == 3:
        return lambda image: image[:, :, None]
    if shape[3] <= 4:
        return lambda image: image
    if shape[1] <= 4:
        return lambda image: image.transpose(1, 2, 0)
    raise DataError(f"{where} has shape {shape}, expected [N, H, W], [N, H, W, C] or [N, C, H, W] with C up to 4")
