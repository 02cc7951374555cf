"""The manifest of a dataset, stored beside its shards.

`fingerprint` identifies the content alone (shape, decoded pixels in order, labels, class names); it does not depend on shard sizes,
compression or library versions. `sha256` of a shard identifies its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
RAW_LIMIT = 64  # images up to 64 x 64 are stored as raw pixels, larger ones as PNG
_SHARD_FILE = re.compile(r"shard-\d{5,}\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One Parquet file: name, rows, rows per row group, size and sha256."""

    file: str
    num_rows: int
    row_group_rows: tuple[int, ...]
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Description of a dataset; ingest writes it last.

    Attributes:
        format: version of the layout, 1.
        name: short name for display.
        source: where the images came from, without credentials.
        shape: (C, H, W) of every image.
        encoding: "raw" (uint8 [C, H, W]) or "png".
        num_rows: number of images.
        shards: the files, in the order of the rows.
        class_names: one name per class, or None.
        has_labels: whether rows carry an int64 label.
        mean, std: per channel, of pixels on the scale [-1, 1]; std is the population's.
        fingerprint: sha256 of the content.
        skipped: damaged images of the source that were left out, one entry each.
    """

    format: int
    name: str
    source: str
    shape: tuple[int, int, int]
    encoding: str
    num_rows: int
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] | None
    has_labels: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows of every row group, in order; an `Order` is built from them."""
        return tuple(rows for shard in self.shards for rows in shard.row_group_rows)

    @property
    def image_bytes(self) -> int:
        channels, height, width = self.shape
        return channels * height * width

    @property
    def num_bytes_decoded(self) -> int:
        return self.num_rows * self.image_bytes

    def save(self, folder: Path) -> None:
        content = asdict(self)
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=1)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json` of `folder`.

        Raises:
            DataError: it is missing or damaged, or a newer release wrote it.
        """
        path = folder / MANIFEST_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls.parse(None, str(path), str(folder))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): ingest the dataset again") from None
        return cls.parse(content, str(path), str(folder))

    @classmethod
    def parse(cls, data: bytes | None, path: str, folder: str) -> Manifest:
        """Parse the content of `path` in the dataset `folder` (None if the file is missing); DataError as in `load`."""
        if data is None:
            raise DataError(
                f"{folder} is not an ingested dataset (no {MANIFEST_FILE}): make one with `ddpm-pipe ingest SOURCE DEST`"
            )
        try:
            content = json.loads(data)
        except ValueError as error:
            raise DataError(f"{path} cannot be read ({error}): ingest the dataset again") from None
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise DataError(f"{path} is not a dataset manifest: ingest the dataset again")
        if content["format"] > FORMAT:
            raise DataError(
                f"{path} has dataset format {content['format']}, this release reads up to {FORMAT}: update ddpm-pipe"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise DataError(f"{path} was changed after it was written (its checksum differs): ingest the dataset again")
        try:
            return _parse(content)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a dataset manifest ({error}): ingest the dataset again") from None


class ContentHash:
    """Fingerprint of rows added in order; built from one sha256 per row, which other processes may compute."""

    def __init__(self) -> None:
        self._pixels = hashlib.sha256()
        self._labels = hashlib.sha256()
        self.num_rows = 0

    @staticmethod
    def of_row(pixels: bytes | memoryview) -> bytes:
        """Digest of one image's uint8 [C, H, W] pixels: 32 bytes."""
        return hashlib.sha256(pixels).digest()

    def add(self, row_digests: bytes, labels: bytes) -> None:
        """Add the digests of rows and their labels (int64, little endian; empty without labels)."""
        self._pixels.update(row_digests)
        self._labels.update(labels)
        self.num_rows += len(row_digests) // 32

    def fingerprint(self, shape: tuple[int, int, int], class_names: tuple[str, ...] | None, has_labels: bool) -> str:
        """Hex sha256 of the content added so far."""
        content = {
            "shape": list(shape),
            "num_rows": self.num_rows,
            "pixels": self._pixels.hexdigest(),
            "labels": self._labels.hexdigest() if has_labels else None,
            "class_names": None if class_names is None else list(class_names),
        }
        return _checksum(content)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(content: dict[str, Any]) -> Manifest:
    for key in ("shape", "mean", "std", "skipped"):
        content[key] = tuple(content[key])
    if content["class_names"] is not None:
        content["class_names"] = tuple(content["class_names"])
    content["shards"] = tuple(Shard(**{**s, "row_group_rows": tuple(s["row_group_rows"])}) for s in content["shards"])
    manifest = Manifest(**content)
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for values that this release cannot have written, such as a file name outside the folder."""
    shards = manifest.shards
    if len(manifest.shape) != 3 or min(manifest.shape) < 1 or manifest.encoding not in ("raw", "png"):
        raise ValueError(f"shape {manifest.shape} and encoding {manifest.encoding!r} do not go together")
    if any(not _SHARD_FILE.fullmatch(s.file) or not _SHA256.fullmatch(s.sha256) for s in shards):
        raise ValueError("a shard's file name or sha256 is malformed")
    if any(sum(s.row_group_rows) != s.num_rows or min(s.row_group_rows, default=0) < 1 for s in shards):
        raise ValueError("a shard's rows do not add up")
    if not shards or sum(s.num_rows for s in shards) != manifest.num_rows:
        raise ValueError("the rows do not add up")
