"""Writing a dataset: shards with page checksums in a folder that appears complete or not at all."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest_rows import Rows, Shape, stored_raw
from pipeline.manifest import FORMAT, ContentHash, Manifest, Shard
from pipeline.shards import shard_schema

_ROW_GROUP_BYTES = 3 * 2**19
_ROW_GROUPS_PER_SHARD = 32


def rows_per_group(shape: Shape) -> int:
    """Rows of a row group: the power of two, 16 to 1,024, whose decoded images fill at most 1.5 MiB."""
    fitting = max(1, _ROW_GROUP_BYTES // math.prod(shape))
    return int(min(1024, max(16, 1 << (fitting.bit_length() - 1))))


class ShardWriter:
    """Collects rows, writes them as shards of whole row groups, and ends in a manifest."""

    def __init__(self, folder: Path, shape: Shape, has_labels: bool, rows_per_shard: int | None = None) -> None:
        self._folder, self._shape, self._has_labels = folder, shape, has_labels
        self._group_rows = rows_per_group(shape)
        groups = _ROW_GROUPS_PER_SHARD if rows_per_shard is None else math.ceil(rows_per_shard / self._group_rows)
        self._groups_per_shard = groups
        self._images: list[bytes] = []
        self._labels: list[int] = []
        self._content = ContentHash()
        self._sums = np.zeros((2, shape[0]), dtype=object)  # Python integers: exact for any number of rows
        self._writer: Any = None
        self._written: list[int] = []
        self._shards: list[Shard] = []

    def add(self, rows: Rows) -> None:
        """Add consecutive rows."""
        self._content.add(rows.digests, rows.labels.astype("<i8").tobytes() if self._has_labels else b"")
        self._sums += np.array([rows.sums, rows.sums_of_squares], dtype=object)
        self._images += rows.images
        self._labels += rows.labels.tolist()
        while len(self._images) >= self._group_rows:
            self._write_group(self._group_rows)

    def finish(self, name: str, source: str, class_names: tuple[str, ...] | None) -> Manifest:
        """Write what is left, and the manifest last."""
        if self._images:
            self._write_group(len(self._images))
        self._close_shard()
        count = self._content.num_rows * self._shape[1] * self._shape[2]
        means = [s / count for s in self._sums[0]]
        deviations = [math.sqrt(max(0, q * count - s * s)) / count for s, q in zip(*self._sums, strict=True)]
        manifest = Manifest(
            format=FORMAT,
            name=name,
            source=source,
            shape=self._shape,
            encoding="raw" if stored_raw(self._shape) else "png",
            num_rows=self._content.num_rows,
            shards=tuple(self._shards),
            class_names=class_names,
            has_labels=self._has_labels,
            mean=tuple(m / 127.5 - 1 for m in means),
            std=tuple(d / 127.5 for d in deviations),
            fingerprint=self._content.fingerprint(self._shape, class_names, self._has_labels),
        )
        manifest.save(self._folder)
        return manifest

    def _write_group(self, num_rows: int) -> None:
        width = math.prod(self._shape) if stored_raw(self._shape) else None
        schema = shard_schema(width, self._has_labels)
        images, self._images = self._images[:num_rows], self._images[num_rows:]
        labels, self._labels = self._labels[:num_rows], self._labels[num_rows:]
        columns = [pa.array(images, type=schema.field("image").type)]
        if self._has_labels:
            columns.append(pa.array(labels, type=pa.int64()))
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._folder / f"shard-{len(self._shards):05d}.parquet",
                schema,
                compression="zstd" if width else "none",
                compression_level=1 if width else None,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
            )
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=num_rows)
        self._written.append(num_rows)
        if len(self._written) == self._groups_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = self._folder / f"shard-{len(self._shards):05d}.parquet"
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        groups = tuple(self._written)
        self._shards.append(Shard(path.name, sum(groups), groups, path.stat().st_size, sha256))
        self._written = []


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to fill that becomes `dest` when the block ends, and is removed when it raises."""
    partial = dest.parent / f".{dest.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
