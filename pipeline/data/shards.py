"""Ingested datasets, on disk or in an object store: open, verify, read by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.cluster_profile import Cache
from pipeline.data.images import decode_image
from pipeline.data.manifest import ContentHash as ContentHash
from pipeline.data.manifest import Manifest as Manifest
from pipeline.data.manifest import Shard as Shard
from pipeline.data.shard_batches import RawBatch as RawBatch
from pipeline.data.shard_batches import read_batches as read_batches
from pipeline.data.shards_files import LocalShards, RemoteShards
from pipeline.data.shards_format import Stored, read_row_group, reason_of, refuse_unsafe_environment
from pipeline.errors import DataError
from pipeline.storage.remote import RemoteFolder, is_remote

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

_READ_AHEAD_SHARDS = 3


class Dataset:
    """An ingested dataset. Images are read from memory after `hold_in_memory`, else from the row groups needed."""

    def __init__(self, files: LocalShards | RemoteShards) -> None:
        self._files = files
        self.manifest = manifest = files.manifest
        self._groups = [(s, g) for s, shard in enumerate(manifest.shards) for g in range(len(shard.row_group_rows))]
        self._group_starts = np.concatenate([[0], np.cumsum(manifest.row_groups)]).astype(np.int64)
        self._held: Pixels | None = None
        self._labels: Ints | None = None

    @classmethod
    def open(cls, location: str | Path, cache: Cache | None = None) -> Dataset:
        """Open an ingested dataset, after comparing the size, schema and row counts of every shard with the manifest.

        Args:
            location: a folder, or the address of one in an object store. For an object store only sizes are compared at first, and shards
                are downloaded when they are read.
            cache: where copies of remote shards are kept; default: as in a cluster profile.

        Raises:
            DataError: something is missing, truncated, or not as the manifest says; the message names the file.
            UsageError: an environment variable would let Arrow files run code.
        """
        refuse_unsafe_environment()
        if isinstance(location, str) and is_remote(location):
            return cls(RemoteShards(RemoteFolder(location), cache or Cache()))
        folder = Path(location).absolute()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: give one that `ddpm-pipe ingest SOURCE DEST` wrote")
        return cls(LocalShards(folder))

    @property
    def location(self) -> str:
        """The path or address of the dataset's folder."""
        return self._files.location

    @property
    def place(self) -> tuple[str, Cache | None]:
        """Arguments of `open` that open this dataset in another process."""
        return self._files.location, self._files.cache

    @property
    def folder(self) -> Path:
        return Path(self._files.location)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.open, self.place  # a worker reopens the dataset, with the cache of its own machine

    def __len__(self) -> int:
        return self.manifest.num_rows

    @property
    def in_memory(self) -> bool:
        return self._held is not None

    def hold_in_memory(self) -> None:
        """Read and decode all rows, check every shard's sha256, and read from memory from now on."""
        if self._held is not None:
            return
        held = np.empty((len(self), *self.manifest.shape), dtype=np.uint8)
        labels = np.empty(len(self), dtype=np.int64)
        for group, stored, group_labels in self._every_group():
            start, stop = self._bounds(group)
            self.decode(stored, np.arange(stop - start), np.arange(start, stop), held[start:stop])
            if group_labels is not None:
                labels[start:stop] = group_labels
        self._held, self._labels = held, labels if self.manifest.has_labels else None

    def read(self, rows: npt.ArrayLike) -> Pixels:
        """Return the images of the given rows, in that order: uint8 [n, C, H, W].

        Raises:
            DataError: a page checksum differs, or an image cannot be decoded; names shard and row group or row.
        """
        wanted = self._checked(rows)
        if self._held is not None:
            return np.take(self._held, wanted, axis=0)
        stored, labels = self.storage(len(wanted)), np.empty(len(wanted), dtype=np.int64)
        images = np.empty((len(wanted), *self.manifest.shape), dtype=np.uint8)
        self.decode(stored, self.load(wanted, stored, labels), wanted, images)
        return images

    def labels(self, rows: npt.ArrayLike | None = None) -> Ints | None:
        """Return the labels of the given rows (default: all rows), int64 [n]; None if the dataset has no labels."""
        if not self.manifest.has_labels:
            return None
        if self._labels is None:
            parts = [self._read_group(group, labels_only=True)[1] for group in range(len(self._groups))]
            self._labels = np.concatenate([part for part in parts if part is not None])
        return self._labels[slice(None) if rows is None else self._checked(rows)]

    def storage(self, size: int) -> Stored:
        """Return an empty array for `size` stored images: uint8 [size, C*H*W], or objects [size] for PNG files."""
        if self.manifest.encoding == "raw":
            return np.empty((size, self.manifest.image_bytes), dtype=np.uint8)
        return np.empty(size, dtype=object)

    def load(self, rows: Ints, images: Stored, labels: Ints) -> Ints:
        """Read rows in their stored form, to be decoded later; each row group is read once.

        Args:
            rows: int64 [n], any order.
            images: `storage` for n images, filled in the order of reading.
            labels: int64 [n], filled likewise where there are labels.

        Returns:
            The position of each of `rows` in `images` and `labels`, int64 [n].
        """
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        by_group = np.argsort(groups, kind="stable")
        firsts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
        for begin, end in pairwise([*firsts.tolist(), len(rows)]):
            group = int(groups[by_group[begin]])
            stored, group_labels = self._read_group(group)
            inside = rows[by_group[begin:end]] - self._group_starts[group]
            stored.take(inside, axis=0, out=images[begin:end], mode="clip")  # unlike "raise", "clip" copies once
            if group_labels is not None:
                labels[begin:end] = group_labels[inside]
        at = np.empty(len(rows), dtype=np.int64)
        at[by_group] = np.arange(len(rows))
        return at

    def expect(self, rows: Callable[[], Ints]) -> None:
        """Start to download the shards of rows that will be read soon, if the dataset is remote; does not wait."""
        if self._files.cache is not None:
            groups = np.unique(np.searchsorted(self._group_starts, rows(), side="right") - 1)
            self._files.expect(dict.fromkeys(self._groups[int(group)][0] for group in groups))

    def decode(self, stored: Stored, at: Ints, rows: Ints, out: Pixels) -> None:
        """Decode the images at places `at` of `stored` into `out`, uint8 [n, C, H, W]; `rows` names them in messages."""
        channels, height, width = self.manifest.shape
        if stored.dtype == np.uint8:
            stored.take(at, axis=0, out=out.reshape(len(at), self.manifest.image_bytes), mode="clip")
            return
        for data, row, place in zip(stored[at], rows, out, strict=True):
            image = decode_image(data, max_pixels=height * width, where=self.locate(int(row)))
            if image.shape != (height, width, channels):
                raise DataError(
                    f"{self.locate(int(row))}: image is {image.shape}, expected {(height, width, channels)}"
                )
            place[...] = image.transpose(2, 0, 1)

    def locate(self, row: int) -> str:
        """Return shard, row group and row, for messages."""
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        return f"{self._place(group)}, row {row}"

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte and row, and check sha256, page checksums and the fingerprint of the content.

        Raises:
            DataError: something differs from the manifest.
        """
        content = ContentHash()
        for group, stored, labels in self._every_group():
            start, stop = self._bounds(group)
            images = np.empty((stop - start, *self.manifest.shape), dtype=np.uint8)
            self.decode(stored, np.arange(stop - start), np.arange(start, stop), images)
            digests = b"".join(ContentHash.of_row(image.tobytes()) for image in images)
            content.add(digests, b"" if labels is None else labels.astype("<i8").tobytes())
            if progress:
                progress(stop, len(self))
        found = content.fingerprint(self.manifest.shape, self.manifest.class_names, self.manifest.has_labels)
        if found != self.manifest.fingerprint:
            raise DataError(
                f"{self.location}: the content's fingerprint is {found[:12]}, the manifest says "
                f"{self.manifest.fingerprint[:12]}: ingest the dataset again"
            )

    def _every_group(self) -> Iterator[tuple[int, Stored, Ints | None]]:
        """Yield each row group in order, from files whose sha256 has been checked."""
        group = 0
        for index, shard in enumerate(self.manifest.shards):
            self._files.expect(range(index, min(index + _READ_AHEAD_SHARDS, len(self.manifest.shards))))
            source = pa.py_buffer(self._whole(index))
            for _ in shard.row_group_rows:
                yield group, *self._read_group(group, source=source)
                group += 1

    def _whole(self, index: int) -> bytes:
        """Return all bytes of a shard, after checking its sha256."""
        for again in (True, False):
            with self._files.opened(index) as (path, _):
                try:
                    data: bytes = path.read_bytes()
                except OSError as error:
                    raise DataError(f"{path} cannot be read ({error.strerror}): restore it or ingest again") from None
            if hashlib.sha256(data).hexdigest() == self.manifest.shards[index].sha256:
                return data
            if not (again and self._files.discard(index)):
                break
        raise DataError(f"{path} is damaged (its sha256 differs from the manifest's): restore it or ingest again")

    def _read_group(self, group: int, labels_only: bool = False, source: Any = None) -> tuple[Stored, Ints | None]:
        shard, index = self._groups[group]
        reason = ""
        for again in (True, False):
            with self._files.opened(shard) as (path, footer):
                try:
                    return read_row_group(source or str(path), footer, index, self.manifest, labels_only)
                except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                    reason = reason_of(error)
            if not (again and self._files.discard(shard)):
                break
        raise DataError(f"{self._place(group)} is damaged ({reason}): restore the file or ingest the dataset again")

    def _checked(self, rows: npt.ArrayLike) -> Ints:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} are outside 0..{len(self) - 1}")
        return wanted

    def _bounds(self, group: int) -> tuple[int, int]:
        return int(self._group_starts[group]), int(self._group_starts[group + 1])

    def _place(self, group: int) -> str:
        shard, index = self._groups[group]
        return f"{self.location.partition('?')[0]}/{self.manifest.shards[shard].file}, row group {index}"
