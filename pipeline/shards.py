"""Ingested datasets on disk: Parquet shards with page checksums, opened, verified, and read in a training's order.

A shard has one layout and no other: `image`, FixedSizeBinary of the C*H*W raw bytes or binary PNG, and where there are
labels `label`, int64; both required, and no key-value metadata at all, so that opening one has nothing to interpret.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, UsageError
from pipeline.images import decode_image
from pipeline.manifest import ContentHash as ContentHash
from pipeline.manifest import Manifest as Manifest
from pipeline.manifest import Shard as Shard
from pipeline.shard_batches import RawBatch as RawBatch
from pipeline.shard_batches import read_batches as read_batches

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Encoded = Pixels | list[bytes]  # rows as stored: raw [n, C*H*W], or PNG files

_UNSAFE_SETTING = "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE"


class Dataset:
    """An ingested dataset; its images come from memory once held there, else from the row groups that are needed."""

    def __init__(self, folder: Path, manifest: Manifest, footers: Sequence[Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._footers = footers
        self._groups = [(s, g) for s, shard in enumerate(manifest.shards) for g in range(len(shard.row_group_rows))]
        self._group_starts = np.concatenate([[0], np.cumsum(manifest.row_groups)]).astype(np.int64)
        self._held: Pixels | None = None
        self._labels: Ints | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Open a folder written by ingest, after comparing every shard's size, schema and row counts with the manifest.

        Raises:
            DataError: something is missing, truncated, or not as the manifest says; the message names the file.
            UsageError: a setting of the environment would make Arrow files run code.
        """
        refuse_unsafe_environment()
        folder = Path(folder).absolute()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: give one that `ddpm-pipe ingest SOURCE DEST` wrote")
        manifest = Manifest.load(folder)
        return cls(folder, manifest, [_footer(folder / shard.file, shard, manifest) for shard in manifest.shards])

    def __len__(self) -> int:
        return self.manifest.num_rows

    @property
    def in_memory(self) -> bool:
        """Whether the decoded images are held in memory."""
        return self._held is not None

    def hold_in_memory(self) -> None:
        """Read and decode all rows, checking every shard's sha256, and serve them from memory from now on."""
        if self._held is not None:
            return
        held = np.empty((len(self), *self.manifest.shape), dtype=np.uint8)
        labels = np.empty(len(self), dtype=np.int64)
        for group, encoded, group_labels in self._every_group():
            start, stop = self._bounds(group)
            self.decode(encoded, np.arange(start, stop), held[start:stop])
            if group_labels is not None:
                labels[start:stop] = group_labels
        self._held, self._labels = held, labels if self.manifest.has_labels else None

    def read(self, rows: npt.ArrayLike) -> Pixels:
        """Images of the given rows, in that order: uint8 [n, C, H, W].

        Raises:
            DataError: a page's checksum differs, or an image cannot be decoded; named by shard and row group or row.
        """
        wanted = self._checked(rows)
        if self._held is not None:
            return np.take(self._held, wanted, axis=0)
        images = np.empty((len(wanted), *self.manifest.shape), dtype=np.uint8)
        self.load(wanted).decode(slice(None), images)
        return images

    def labels(self, rows: npt.ArrayLike | None = None) -> Ints | None:
        """Labels of the given rows (all rows by default), int64 [n]; None where the dataset has none."""
        if not self.manifest.has_labels:
            return None
        if self._labels is None:
            parts = [self._read_group(group, columns=["label"])[1] for group in range(len(self._groups))]
            self._labels = np.concatenate([part for part in parts if part is not None])
        return self._labels[slice(None) if rows is None else self._checked(rows)]

    def load(self, rows: Ints, buffer: Pixels | None = None) -> StoredRows:
        """Read the given rows as they are stored, to be decoded later; each row group that holds some is read once.

        Args:
            rows: int64 [n], any order.
            buffer: of an earlier load, to be written over if it is large enough.
        """
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        by_group = np.argsort(groups, kind="stable")
        firsts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
        labels = np.empty(len(rows), dtype=np.int64)
        images: Encoded = []
        if self.manifest.encoding == "raw":
            fits = buffer is not None and len(buffer) >= len(rows)
            images = (
                buffer if buffer is not None and fits else np.empty((len(rows), self.manifest.image_bytes), np.uint8)
            )
        for begin, end in pairwise([*firsts.tolist(), len(rows)]):
            group = int(groups[by_group[begin]])
            encoded, group_labels = self._read_group(group)
            inside = rows[by_group[begin:end]] - self._group_starts[group]
            if isinstance(images, list):
                images += [encoded[i] for i in inside]
            else:
                np.take(encoded, inside, axis=0, out=images[begin:end], mode="clip")  # unlike "raise", not buffered
            if group_labels is not None:
                labels[by_group[begin:end]] = group_labels[inside]
        at = np.empty(len(rows), dtype=np.int64)
        at[by_group] = np.arange(len(rows))
        return StoredRows(self, rows, labels if self.manifest.has_labels else None, images, at)

    def decode(self, encoded: Encoded, rows: Ints, out: Pixels) -> None:
        """Decode images as they are stored into `out`, uint8 [n, C, H, W]; `rows` names them in messages."""
        channels, height, width = self.manifest.shape
        if isinstance(encoded, np.ndarray):
            out[...] = encoded.reshape(out.shape)
            return
        for data, row, place in zip(encoded, rows, out, strict=True):
            image = decode_image(data, max_pixels=height * width, where=self.locate(int(row)))
            if image.shape != (height, width, channels):
                raise DataError(
                    f"{self.locate(int(row))}: image is {image.shape}, expected {(height, width, channels)}"
                )
            place[...] = image.transpose(2, 0, 1)

    def locate(self, row: int) -> str:
        """Where a row lies, for messages: its shard, row group and row."""
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        return f"{self._place(group)}, row {row}"

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte and row: each shard's sha256, page checksums, and the content against the fingerprint.

        Raises:
            DataError: something differs from the manifest.
        """
        content = ContentHash()
        for group, encoded, labels in self._every_group():
            start, stop = self._bounds(group)
            images = np.empty((stop - start, *self.manifest.shape), dtype=np.uint8)
            self.decode(encoded, np.arange(start, stop), images)
            digests = b"".join(ContentHash.of_row(image.tobytes()) for image in images)
            content.add(digests, b"" if labels is None else labels.astype("<i8").tobytes())
            if progress:
                progress(stop, len(self))
        found = content.fingerprint(self.manifest.shape, self.manifest.class_names, self.manifest.has_labels)
        if found != self.manifest.fingerprint:
            raise DataError(f"{self.folder}: the content's fingerprint is {found[:12]}, the manifest says "
                            f"{self.manifest.fingerprint[:12]}: ingest the dataset again")  # fmt: skip

    def _every_group(self) -> Iterator[tuple[int, Encoded, Ints | None]]:
        """Each row group in order, from files whose sha256 was checked first."""
        group = 0
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}): restore it or ingest again") from None
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                raise DataError(
                    f"{path} is damaged (its sha256 differs from the manifest's): restore it or ingest again"
                )
            source = pa.py_buffer(data)
            for _ in shard.row_group_rows:
                encoded, labels = self._read_group(group, source=source)
                yield group, encoded, labels
                group += 1

    def _read_group(
        self, group: int, columns: list[str] | None = None, source: Any = None
    ) -> tuple[Encoded, Ints | None]:
        shard, index = self._groups[group]
        where = source if source is not None else str(self.folder / self.manifest.shards[shard].file)
        try:
            # A fresh handle with the footer already parsed: cheap, and safe from several threads.
            with pq.ParquetFile(
                where, metadata=self._footers[shard], page_checksum_verification=True, memory_map=False
            ) as file:
                table = file.read_row_group(index, columns=columns, use_threads=False)
            if table.num_rows != self.manifest.shards[shard].row_group_rows[index]:
                raise ValueError(f"{table.num_rows} rows")
            labels = _int64s(table.column("label")) if self.manifest.has_labels else None
            return (self._stored(table.column("image")) if columns is None else []), labels
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self._place(group)} is damaged ({reason}): restore the file or ingest the dataset again"
            ) from None

    def _stored(self, column: Any) -> Encoded:
        if self.manifest.encoding == "png":
            images: list[bytes] = column.to_pylist()
            return images
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        width = self.manifest.image_bytes
        flat = np.frombuffer(array.buffers()[1], dtype=np.uint8, count=len(array) * width, offset=array.offset * width)
        return flat.reshape(len(array), width)

    def _checked(self, rows: npt.ArrayLike) -> Ints:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} are outside 0..{len(self) - 1}")
        return wanted

    def _bounds(self, group: int) -> tuple[int, int]:
        return int(self._group_starts[group]), int(self._group_starts[group + 1])

    def _place(self, group: int) -> str:
        shard, index = self._groups[group]
        return f"{self.folder / self.manifest.shards[shard].file}, row group {index}"


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored, decoded when they are wanted.

    Attributes:
        rows: the dataset rows asked for, int64 [n].
        labels: theirs, int64 [n], or None.
        images: raw [>= n, C*H*W] or PNG files, in the order in which they were read.
        at: where each of `rows` lies in `images`, int64 [n].
    """

    dataset: Dataset
    rows: Ints
    labels: Ints | None
    images: Encoded
    at: Ints

    def decode(self, part: slice, out: Pixels) -> None:
        """Write the images of `rows[part]` to `out`, uint8 [len, C, H, W]."""
        at = self.at[part]
        if isinstance(self.images, np.ndarray):
            np.take(self.images, at, axis=0, out=out.reshape(len(at), -1), mode="clip")
        else:
            self.dataset.decode([self.images[i] for i in at], self.rows[part], out)


def shard_schema(image_bytes: int | None, has_labels: bool) -> Any:
    """Arrow schema of a shard: raw images of `image_bytes` bytes, or PNG files where that is None."""
    image = pa.binary() if image_bytes is None else pa.binary(image_bytes)
    fields = [pa.field("image", image, nullable=False)]
    return pa.schema([*fields, pa.field("label", pa.int64(), nullable=False)] if has_labels else fields)


def refuse_unsafe_environment() -> None:
    """Refuse to read Parquet where a setting of Ray Data would let a file's metadata run code (CVE-2026-41486)."""
    if os.environ.get(_UNSAFE_SETTING, "0").lower() not in ("", "0", "false"):
        raise UsageError(f"{_UNSAFE_SETTING} is set, with which opening a Parquet file can run code: unset it")


def _footer(path: Path, shard: Shard, manifest: Manifest) -> Any:
    """Parse a shard's footer and compare it with the manifest."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != shard.num_bytes:
            raise ValueError(f"{num_bytes} bytes, the manifest says {shard.num_bytes}")
        footer = pq.read_metadata(path)
        _check_footer(footer, shard, manifest)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise DataError(f"{path} is missing or damaged ({reason}): restore it or ingest the dataset again") from None
    return footer


def _check_footer(footer: Any, shard: Shard, manifest: Manifest) -> None:
    if footer.metadata:
        raise ValueError(f"it carries metadata that no shard of ours has: {sorted(footer.metadata)}")
    fixed = "FIXED_LEN_BYTE_ARRAY" if manifest.encoding == "raw" else "BYTE_ARRAY"
    expected = [("image", fixed), ("label", "INT64")][: 2 if manifest.has_labels else 1]
    columns = [footer.schema.column(i) for i in range(footer.num_columns)]
    found = [(c.path, c.physical_type) for c in columns]
    plain = all(c.max_definition_level == 0 and c.logical_type.type == "NONE" for c in columns)
    if found != expected or not plain or (manifest.encoding == "raw" and columns[0].length != manifest.image_bytes):
        raise ValueError(f"its columns are {found}, expected {expected}")
    rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    if rows != shard.row_group_rows or footer.num_rows != shard.num_rows:
        raise ValueError(f"its row groups hold {sum(rows)} rows, the manifest says {shard.num_rows}")


def _int64s(column: Any) -> Ints:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.int64)
