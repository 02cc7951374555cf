"""The manifest of a dataset, stored beside its shards.

`fingerprint` identifies the content alone (shape, decoded pixels in order, labels, class names); it does not depend on shard sizes,
compression or library versions. `sha256` of a shard identifies its bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.errors import DataError, StorageError
from pipeline.storage.local import LocalFolder
from pipeline.storage.remote import RemoteFolder

FORMAT = 1
MANIFEST_FILE = "manifest.json"
RAW_LIMIT = 64  # images up to 64 x 64 are stored as raw pixels, larger ones as PNG
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Shard:
    """One Parquet file: name, rows, rows per row group, size and sha256."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.parquet$")]
    num_rows: Count
    row_group_rows: tuple[Count, ...]
    num_bytes: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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
    shape: tuple[Count, Count, Count]
    encoding: Literal["raw", "png"]
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
    def load(cls, folder: Path | RemoteFolder) -> Manifest:
        """Read and check `manifest.json` of `folder`.

        Raises:
            DataError: it is missing or damaged, a newer release wrote it, or the store does not answer.
        """
        path = f"{folder}/{MANIFEST_FILE}"
        try:
            data = (LocalFolder(folder) if isinstance(folder, Path) else folder).read(MANIFEST_FILE)
        except StorageError as error:
            raise DataError(str(error)) from None
        if data is None:
            raise DataError(
                f"{folder} is not an ingested dataset (no {MANIFEST_FILE}): make one with `ddpm-pipe ingest SOURCE DEST`"
            )
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
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
            manifest: Manifest = _reader().validate_python(content)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise DataError(f"{path} is not a dataset manifest ({place} is wrong): ingest the dataset again") from None
        shards = manifest.shards
        if (
            any(sum(s.row_group_rows) != s.num_rows for s in shards)
            or not 0 < sum(manifest.row_groups) == manifest.num_rows
        ):
            raise DataError(f"{path} is not a dataset manifest (the rows do not add up): ingest the dataset again")
        return manifest


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


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
