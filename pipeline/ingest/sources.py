"""Sources of images: items in a fixed order, and a key of the content.

This file has the built-in digits and ingested datasets; layout, npz, parquet and sets have the other sources.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.cluster_profile import Cache
from pipeline.data.shards import Dataset
from pipeline.data.shards_files import manifest_of
from pipeline.errors import DataError, UsageError
from pipeline.ingest.choice import ALL_SPLITS
from pipeline.ingest.rows import Item

FloatArray = NDArray[np.float64]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """Images to ingest.

    Attributes:
        name: short name for display and folders.
        origin: address or path for the manifest, without credentials.
        items: yields the images in a fixed order.
        key: returns a text that changes with the content; may read the whole source.
        class_names: one name per class, or None.
        has_labels: whether items carry labels.
        num_rows: number of images, if known beforehand.
        shape: (C, H, W) of every image before conversion, if known beforehand.
        num_bytes: bytes of encoded images to decode; 0 for arrays.
        note: an automatic choice, printed before the work; "" without one.
        lines: interpretation of the source, for the summary.
        download: description of the necessary download; "" if everything is local.
    """

    name: str
    origin: str
    items: Callable[[], Iterator[Item]]
    key: Callable[[], str]
    class_names: tuple[str, ...] | None = None
    has_labels: bool = False
    num_rows: int | None = None
    shape: tuple[int, int, int] | None = None
    num_bytes: int = 0
    note: str = ""
    lines: tuple[str, ...] = ()
    download: str = ""


def digits(split: str | None = None) -> Source:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels with 17 grey levels.

    Level v of 0..16 becomes round(255 v / 16): 0 is black, 16 is white, and the levels can be recovered.
    """
    if split not in (None, ALL_SPLITS):
        raise UsageError(f"digits has no split {split!r}: leave the split out")

    def items() -> Iterator[Item]:
        table = _digits_table()
        images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        for row, (image, label) in enumerate(zip(images, table[:, -1], strict=True)):
            yield Item(f"digits, row {row}", image, int(label))

    names = tuple(str(digit) for digit in range(10))
    return Source("digits", "digits (scikit-learn)", items, lambda: "digits 1", names, True, 1797)


def ingested(location: str, cache: Cache | None) -> Source:
    """Return the images of an ingested dataset as a source, to make datasets of its parts."""
    manifest = manifest_of(location)

    def items() -> Iterator[Item]:
        dataset = Dataset.open(location, cache)
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(dataset)))
            labels = dataset.labels(rows)
            for i, (row, image) in enumerate(zip(rows.tolist(), dataset.read(rows), strict=True)):
                yield Item(dataset.locate(row), image.transpose(1, 2, 0), 0 if labels is None else int(labels[i]))

    return Source(
        manifest.name,
        manifest.source,
        items,
        lambda: manifest.fingerprint,
        manifest.class_names,
        manifest.has_labels,
        manifest.num_rows,
        manifest.shape,
    )


def _digits_table() -> FloatArray:
    """Read the file of scikit-learn's `load_digits`: a row per image, 64 levels and the label.

    Importing scikit-learn would take longer than the rest of the ingest.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError("scikit-learn, which ships the digits, is not installed: pip install scikit-learn")
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, delimiter=",")


def content_key(files: Iterable[tuple[str, Path]]) -> str:
    """Return a hash of the files' names and bytes."""
    total = hashlib.sha256()
    for name, file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): make it readable") from None
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def short_name(path: Path | str) -> str:
    """Return the last part of a path, with characters that are safe in paths and run names."""
    stem = Path(path).resolve().stem if isinstance(path, Path) else path.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"
