"""Write a dataset: shards with page checksums, in a folder that appears only when it is complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import FORMAT, ContentHash, Manifest, Shard
from pipeline.data.shards_format import shard_schema
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.ingest.rows import Rows, Shape, stored_raw

_ROW_GROUP_BYTES = 3 * 2**19
_ROW_GROUPS_PER_SHARD = 32


def rows_per_group(shape: Shape) -> int:
    """Return the rows per row group: a power of two from 16 to 1,024 whose decoded images take at most 1.5 MiB."""
    fitting = max(1, _ROW_GROUP_BYTES // math.prod(shape))
    return int(min(1024, max(16, 1 << (fitting.bit_length() - 1))))


class ShardWriter:
    """Collects rows, writes shards of whole row groups, and finally the manifest; a context manager.

    `done` is called with the file of each finished shard.
    """

    def __init__(
        self,
        folder: Path,
        has_labels: bool,
        rows_per_shard: int | None = None,
        done: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._done = done
        self._folder, self._has_labels, self._rows_per_shard = folder, has_labels, rows_per_shard
        self._shape: Shape | None = None
        self._images: list[bytes] = []
        self._labels: list[int] = []
        self._content = ContentHash()
        self._histogram: Any = 0  # [C, 256]
        self._compression: str | None = None
        self._writer: Any = None
        self._written: list[int] = []
        self._shards: list[Shard] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, rows: Rows) -> None:
        """Add consecutive rows, all of one shape."""
        if rows.shape is None or not rows.images:
            return
        self._shape = rows.shape
        self._content.add(rows.digests, rows.labels.astype("<i8").tobytes() if self._has_labels else b"")
        self._histogram = self._histogram + rows.histogram
        self._images += rows.images
        self._labels += rows.labels.tolist()
        while len(self._images) >= rows_per_group(rows.shape):
            self._write_group(rows.shape, rows_per_group(rows.shape))

    def finish(
        self, name: str, source: str, class_names: tuple[str, ...] | None, skipped: tuple[str, ...] = ()
    ) -> Manifest:
        """Write the remaining rows, then the manifest."""
        shape = self._shape
        if shape is None:
            raise DataError(f"{source} has no images, expected one at least: check the source")
        if self._images:
            self._write_group(shape, len(self._images))
        self._close_shard()
        mean, std = zip(*(_mean_and_std(counts.tolist()) for counts in self._histogram), strict=True)
        manifest = Manifest(
            format=FORMAT,
            name=name,
            source=source,
            shape=shape,
            encoding="raw" if stored_raw(shape) else "png",
            num_rows=self._content.num_rows,
            shards=tuple(self._shards),
            class_names=class_names,
            has_labels=self._has_labels,
            mean=mean,
            std=std,
            skipped=skipped,
            fingerprint=self._content.fingerprint(shape, class_names, self._has_labels),
        )
        manifest.save(self._folder)
        return manifest

    def _write_group(self, shape: Shape, num_rows: int) -> None:
        width = math.prod(shape) if stored_raw(shape) else None
        schema = shard_schema(width, self._has_labels)
        images, self._images = self._images[:num_rows], self._images[num_rows:]
        labels, self._labels = self._labels[:num_rows], self._labels[num_rows:]
        columns = [pa.array(images, type=schema.field("image").type)]
        if self._has_labels:
            columns.append(pa.array(labels, type=pa.int64()))
        if self._writer is None:
            if self._compression is None:
                self._compression = _compression(images) if width else "none"
            self._writer = pq.ParquetWriter(
                self._folder / f"shard-{len(self._shards):05d}.parquet",
                schema,
                compression=self._compression,
                compression_level=1 if self._compression == "zstd" else None,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
            )
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=num_rows)
        self._written.append(num_rows)
        if sum(self._written) >= (self._rows_per_shard or _ROW_GROUPS_PER_SHARD * rows_per_group(shape)):
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
        self._done(path)
        self._written = []


def _mean_and_std(counts: list[int]) -> tuple[float, float]:
    """Return mean and standard deviation on the scale [-1, 1] from the count of each value; exact integers up to the last step."""
    count = sum(counts)
    total = sum(n * value for value, n in enumerate(counts))
    squares = sum(n * value * value for value, n in enumerate(counts))
    return total / count / 127.5 - 1, math.sqrt(squares * count - total * total) / count / 127.5


def _compression(images: list[bytes]) -> str:
    """Return "zstd" if it saves a fifth or more. Photographs hardly shrink, and reading compressed ones takes 1.5 times as long."""
    pixels = b"".join(images)
    return "zstd" if len(pa.compress(pixels, codec="zstd", asbytes=True)) < 0.8 * len(pixels) else "none"


@contextmanager
def new_folder(dest: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield a folder to fill, which becomes `dest` when the block ends and is removed if it raises, and a no-op for finished shards.

    The caller holds `sole_writer(dest)`.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    partial = dest.parent / f".{dest.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        yield partial, lambda _: None
        partial.rename(dest)
    except OSError as error:
        raise _unwritable(dest, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def sole_writer(dest: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock on `dest`, and create its parents. If another process holds it, call `waiting` and wait.

    Raises:
        UsageError: another process holds it, and `waiting` is None.
        StorageError: the folder cannot be written.
    """
    made = [folder for folder in dest.parents if not folder.exists()]
    lock = dest.parent / f".{dest.name}.lock"
    try:
        if dest.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "")
        dest.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock, dest, waiting)
    except OSError as error:
        raise _unwritable(dest, error) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is locked: nobody can lock a removed file unnoticed
        file.close()
        if not dest.exists():
            for folder in made:
                with suppress(OSError):  # another process uses it
                    folder.rmdir()


def _locked(lock: Path, dest: Path, waiting: Callable[[], None] | None) -> IO[bytes]:
    announced = False
    while True:
        file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
            file.close()  # its holder has removed it: lock the new one
            continue
        except BlockingIOError:
            file.close()
        if waiting is None:
            raise UsageError(f"another process is writing {dest}: wait for it, or give another folder")
        if not announced:
            waiting()
            announced = True
        time.sleep(0.2)


def _unwritable(dest: Path, error: OSError) -> StorageError:
    reason = os.strerror(error.errno) if error.errno else str(error)  # shorter than pyarrow's text
    return StorageError(f"{dest} cannot be written ({reason}): free space, or give another folder")
