"""Images of Parquet files as Hugging Face datasets write them: `struct<bytes, path>` or binary columns of PNG or JPEG."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.shards_format import reason_of, refuse_unsafe_environment
from pipeline.errors import DataError
from pipeline.ingest.choice import NO_LABELS, check_labels, choose_split, pick_column, pick_label, split_of
from pipeline.ingest.files import StoredFile, find_files, without_credentials
from pipeline.ingest.rows import Item
from pipeline.ingest.sources import Source, content_key, short_name

_BATCH_ROWS = 64
# Extension types that run Python code of the file's choosing, or once did (CVE-2026-41486, CVE-2023-47248).
_CODE_TYPES = re.compile(rb"ray\.data\.|arrow\.py_extension_type")


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    class_names: tuple[str, ...] | None


def parquet(
    source: str, image_column: str | None = None, label_column: str | None = None, split: str | None = None
) -> Source:
    """Images of a Parquet file, a folder of them, a glob, or one of these as a URI (s3://, gs://, ...).

    Columns are found by the feature metadata of the schema, else by type, whatever their names; or named by the options.

    Raises:
        DataError: no such files, damaged ones, or no images in them.
        UsageError: several candidates and none named, or a name or split that is not there.
    """
    refuse_unsafe_environment()
    shown, files, chosen, note = without_credentials(source), find_files(source, ".parquet"), None, ""
    if len(files) > 1 or split is not None:
        chosen, note = choose_split([file.name for file in files], split, shown)
        files = [file for file in files if chosen is None or split_of(file.name) == chosen]
    num_rows = sum(_num_rows(file) for file in files)
    columns = _columns(files, image_column, label_column)
    origin = shown if "://" in shown else str(Path(shown).absolute())

    def items() -> Iterator[Item]:
        for file in files:
            yield from _items(file, columns)

    return Source(
        name=short_name(re.sub(r"[*\[].*", "", shown).removesuffix(".parquet")),
        origin=origin if chosen is None else f"{origin} (split {chosen})",
        items=items,
        key=lambda: f"{_key(files)} {columns}",
        class_names=columns.class_names,
        has_labels=columns.label is not None,
        num_rows=num_rows,
        num_bytes=sum(file.num_bytes for file in files),
        note=note,
    )


def _key(files: list[StoredFile]) -> str:
    if all(file.is_local for file in files):
        return content_key((file.name, Path(file.path)) for file in files)
    return repr([(file.path, file.modified) for file in files])


@contextmanager
def _damage(file: StoredFile) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a DataError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{file.path} is not a readable Parquet file ({reason_of(error)}): replace it") from None


def _num_rows(file: StoredFile) -> int:
    """Rows by the footer, which is refused before its schema is interpreted if that could run code."""
    with _damage(file), file.filesystem.open_input_file(file.path) as stream:
        footer = _footer(stream)
        if _CODE_TYPES.search(base64.b64decode((footer.metadata or {}).get(b"ARROW:schema", b""))):
            raise DataError(f"{file.path} has extension types that could run code: store images as binary PNG or JPEG")
        return int(footer.num_rows)


def _footer(stream: Any) -> Any:
    """Read the footer. Extension types that others, such as Ray Data, registered in this process may raise anything on the way."""
    try:
        return pq.read_metadata(stream)
    except (OSError, pa.ArrowException):
        raise
    except Exception as error:
        raise pa.ArrowInvalid(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(file: StoredFile) -> Iterator[Any]:
    with _damage(file), file.filesystem.open_input_file(file.path) as stream:
        yield pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=not file.is_local)


def _columns(files: list[StoredFile], image_column: str | None, label_column: str | None) -> _Columns:
    with _opened(files[0]) as opened:
        schema = opened.schema_arrow
    where, there, features = files[0].path, list(schema.names), _features(schema)
    images = [name for name in there if _is_image(schema.field(name).type)]
    declared = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = pick_column("image", image_column, images if image_column else declared or images, there, where)
    labels = [name for name in there if pa.types.is_integer(schema.field(name).type)]
    declared = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    if label_column is not None:  # text is taken only where it is asked for: it may be a caption
        labels += [name for name in there if _is_text(schema.field(name).type)]
    label = pick_label(label_column, labels if label_column else declared or labels, there, where)
    if label is None:
        return _Columns(image, None, None)
    if _is_text(schema.field(label).type):
        return _Columns(image, label, _distinct(files, label))
    names = features.get(label, {}).get("names")
    return _Columns(image, label, tuple(map(str, names)) if names else None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the `datasets` library says of columns in the schema's metadata: {column: {"_type": "Image"}, ...}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _distinct(files: list[StoredFile], label: str) -> tuple[str, ...]:
    """The values of a column of text, sorted: they become the class names."""
    found: set[str] = set()
    for file in files:
        with _opened(file) as opened:
            found.update(opened.read(columns=[label]).column(label).unique().drop_null().to_pylist())
    return tuple(sorted(found))


def _items(file: StoredFile, columns: _Columns) -> Iterator[Item]:
    row, wanted = 0, [name for name in (columns.image, columns.label) if name is not None]
    with _opened(file) as opened:
        missing = [name for name in wanted if name not in opened.schema_arrow.names]
        if missing:
            raise DataError(
                f"{file.path} has no column {missing[0]!r}, which the first file has: give files of one schema"
            )
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            images, labels = _encoded(batch.column(columns.image)), _labels(batch, columns, file.path, row)
            for data, label in zip(images, labels, strict=True):
                if data is None:
                    raise DataError(f"{file.path}, row {row} has no image bytes: images must be inside the file")
                yield Item(f"{file.path}, row {row}", data, int(label))
                row += 1


def _encoded(column: Any) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")  # unlike field(), null where the struct is
    values: list[bytes | None] = column.to_pylist()
    return values


def _labels(batch: Any, columns: _Columns, path: str, first_row: int) -> npt.NDArray[np.int64]:
    if columns.label is None:
        return np.zeros(batch.num_rows, dtype=np.int64)
    column = batch.column(columns.label)
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise DataError(f"{path}, row {row} has no label: add it, or give --label-column {NO_LABELS}")
    if _is_text(column.type):
        index = {name: i for i, name in enumerate(columns.class_names or ())}
        return np.array([index[name] for name in column.to_pylist()], dtype=np.int64)
    return check_labels(column.to_numpy(zero_copy_only=False), columns.class_names, path, first_row)
