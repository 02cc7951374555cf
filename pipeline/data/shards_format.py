"""The layout of a shard, the only one that is read.

Column `image` is FixedSizeBinary of the C*H*W raw bytes, or binary with PNG files; column `label`, in labelled datasets, is int64. Both
are required. There is no key-value metadata, so opening a shard interprets nothing. Every page has a checksum, and reading verifies it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import DataError, UsageError

Ints = npt.NDArray[np.int64]
Stored = npt.NDArray[Any]  # stored images: raw, uint8 [n, C*H*W], or PNG files, objects [n]

_UNSAFE_SETTING = "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE"


def shard_schema(image_bytes: int | None, has_labels: bool) -> Any:
    """Return the Arrow schema of a shard: raw images of `image_bytes` bytes, or PNG files if None."""
    image = pa.binary() if image_bytes is None else pa.binary(image_bytes)
    fields = [pa.field("image", image, nullable=False)]
    return pa.schema([*fields, pa.field("label", pa.int64(), nullable=False)] if has_labels else fields)


def refuse_unsafe_environment() -> None:
    """Raise UsageError if a setting of Ray Data would let a file's metadata run code (CVE-2026-41486)."""
    if os.environ.get(_UNSAFE_SETTING, "0").lower() not in ("", "0", "false"):
        raise UsageError(f"{_UNSAFE_SETTING} is set, with which opening a Parquet file can run code: unset it")


def read_footer(path: Path, shard: Shard, manifest: Manifest) -> Any:
    """Parse a shard's footer and compare it with the manifest."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != shard.num_bytes:
            raise ValueError(f"{num_bytes} bytes, the manifest says {shard.num_bytes}")
        footer = pq.read_metadata(path)
        _check_footer(footer, shard, manifest)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is missing or damaged ({reason_of(error)}): restore it or ingest the dataset again"
        ) from None
    return footer


def _check_footer(footer: Any, shard: Shard, manifest: Manifest) -> None:
    if footer.metadata:
        raise ValueError(f"it has metadata, which no shard has: {sorted(footer.metadata)}")
    fixed = "FIXED_LEN_BYTE_ARRAY" if manifest.encoding == "raw" else "BYTE_ARRAY"
    expected = [("image", fixed), ("label", "INT64")][: 2 if manifest.has_labels else 1]
    columns = [footer.schema.column(i) for i in range(footer.num_columns)]
    found = [(c.path, c.physical_type) for c in columns]
    plain = all(c.max_definition_level == 0 and c.logical_type.type == "NONE" for c in columns)
    if found != expected or not plain or (manifest.encoding == "raw" and columns[0].length != manifest.image_bytes):
        raise ValueError(f"its columns are {found}, expected {expected}")
    rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    if rows != shard.row_group_rows or footer.num_rows != shard.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, the manifest says {shard.num_rows}")


def read_row_group(
    source: Any, footer: Any, index: int, manifest: Manifest, labels_only: bool = False
) -> tuple[Stored, Ints | None]:
    """Return images (empty if `labels_only`) and labels of one row group, after verifying its page checksums.

    Raises:
        pyarrow.ArrowException, OSError, ValueError, KeyError: it is damaged.
    """
    # A new handle with a parsed footer is cheap and thread-safe. Given a path, pyarrow would look up the file system each time;
    # pre_buffer only helps with remote files.
    with pa.OSFile(source) if isinstance(source, str) else pa.BufferReader(source) as handle:
        file = pq.ParquetFile(handle, metadata=footer, page_checksum_verification=True, pre_buffer=False)
        table = file.read_row_group(index, columns=["label"] if labels_only else None, use_threads=False)
    if table.num_rows != footer.row_group(index).num_rows:
        raise ValueError(f"{table.num_rows} rows, expected {footer.row_group(index).num_rows}")
    labels = _int64s(table.column("label")) if manifest.has_labels else None
    return np.empty(0) if labels_only else _images(table.column("image"), manifest), labels


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, without the path."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or (str(error).splitlines() or [type(error).__name__])[0]


def _images(column: Any, manifest: Manifest) -> Stored:
    if manifest.encoding == "png":
        files = np.empty(len(column), dtype=object)
        files[:] = column.to_pylist()
        return files
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    width = manifest.image_bytes
    flat = np.frombuffer(array.buffers()[1], dtype=np.uint8, count=len(array) * width, offset=array.offset * width)
    return flat.reshape(len(array), width)


def _int64s(column: Any) -> Ints:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.int64)
