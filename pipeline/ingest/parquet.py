"""Images in Parquet files as Hugging Face datasets write them: `struct<bytes, path>` or binary columns of PNG or JPEG."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
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
from pipeline.ingest.choice import choose_split, pick_column, pick_label, split_of
from pipeline.ingest.files import StoredFile, find_files, without_credentials
from pipeline.ingest.label_values import NO_LABELS, Classes, classes_of, is_one_hot, is_pandas_index, names_rows
from pipeline.ingest.layout import SPLIT_KEYS, hive_key
from pipeline.ingest.rows import Item
from pipeline.ingest.sources import Source, content_key, short_name

_BATCH_ROWS = 64
_LABELS_AT_ONCE = 4096
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# Extension types that run, or in old versions ran, Python code from the file (CVE-2026-41486, CVE-2023-47248).
_CODE_TYPES = re.compile(rb"ray\.data\.|arrow\.py_extension_type")


@dataclass(frozen=True)
class _Columns:
    """The columns to read.

    `raw` is the shape (C, H, W) of images stored as pixels, as in `ddpm-pipe sample --format parquet`. `label` may be the key of a Hive
    path instead of a column.
    """

    image: str
    raw: tuple[int, int, int] | None
    label: str | None
    classes: Classes


def parquet(
    source: str, image_column: str | None = None, label_column: str | None = None, split: str | None = None
) -> Source:
    """Read images of a Parquet file, a folder of them, a glob, or one of these as a URI (s3://, gs://, ...).

    Columns are found by the feature metadata of the schema, else by type, unless the options name them.

    Raises:
        DataError: there are no such files, or no images in them, or a file is damaged.
        UsageError: several candidates and none is named, or the named column or split does not exist.
    """
    refuse_unsafe_environment()
    shown, files, chosen, note = without_credentials(source), find_files(source, ".parquet"), None, ""
    lines: list[str] = []
    if len(files) > 1 or split is not None:
        there = files
        chosen, note = choose_split([_split_name(file) for file in files], split, shown)
        files = [file for file in files if chosen is None or split_of(_split_name(file)) == chosen]
        if chosen is not None:
            counts = Counter(split_of(_split_name(file)) for file in there if file not in files)
            others = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(
                f"splits: {chosen} taken ({len(files)} files)" + (f"; not taken, in files: {others}" if others else "")
            )
    num_rows = sum(_num_rows(file) for file in files)
    columns, described = _columns(files, num_rows, image_column, label_column)
    origin = shown if "://" in shown else str(Path(shown).absolute())

    def items() -> Iterator[Item]:
        for file in files:
            yield from _items(file, columns)

    return Source(
        name=short_name(re.sub(r"[*\[].*", "", shown).removesuffix(".parquet")),
        origin=origin if chosen is None else f"{origin} (split {chosen})",
        items=items,
        key=lambda: f"{_key(files)} {columns}",
        class_names=columns.classes.names,
        has_labels=columns.label is not None,
        num_rows=num_rows,
        num_bytes=sum(file.num_bytes for file in files),
        note=note,
        lines=(*lines, *described),
    )


def _split_name(file: StoredFile) -> str:
    """Return the part of a file name that may be a split: without Hive keys other than split=."""
    parts = [part for part in file.name.split("/") if (key := hive_key(part)) is None or key[0].lower() in SPLIT_KEYS]
    return "/".join(parts)


def _hive_keys(file: StoredFile) -> dict[str, str]:
    """Return keys and values of a file's Hive partition, without splits."""
    keys = [key for part in file.name.split("/")[:-1] if (key := hive_key(part)) is not None]
    return {key: value for key, value in keys if key.lower() not in SPLIT_KEYS}


def _key(files: list[StoredFile]) -> str:
    if all(file.is_local for file in files):
        return content_key((file.name, Path(file.path)) for file in files)
    return repr([(file.path, file.modified) for file in files])


@contextmanager
def _damage(file: StoredFile) -> Iterator[None]:
    """Convert exceptions of pyarrow for a damaged file to a DataError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{file.path} is not a readable Parquet file ({reason_of(error)}): replace it") from None


def _num_rows(file: StoredFile) -> int:
    """Return the number of rows in the footer; refuse a schema whose interpretation could run code."""
    with _damage(file), file.filesystem.open_input_file(file.path) as stream:
        footer = _footer(stream)
        if _CODE_TYPES.search(base64.b64decode((footer.metadata or {}).get(b"ARROW:schema", b""))):
            raise DataError(f"{file.path} has extension types that could run code: store images as binary PNG or JPEG")
        return int(footer.num_rows)


def _footer(stream: Any) -> Any:
    """Read the footer. Extension types that Ray Data and others register in this process may raise any exception."""
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


def _columns(
    files: list[StoredFile], num_rows: int, image_column: str | None, label_column: str | None
) -> tuple[_Columns, list[str]]:
    """Choose the columns; return them and lines for the summary."""
    with _opened(files[0]) as opened:
        schema = opened.schema_arrow
    where, features, keys = files[0].path, _features(schema), _hive_keys(files[0])
    types = {name: schema.field(name).type for name in schema.names}
    there = {name: str(kind) for name, kind in types.items()}
    shape = _raw_shape(schema)
    images = [name for name, kind in types.items() if _is_image(kind) or (shape and _is_raw(kind, shape))]
    declared = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = pick_column("image", image_column, images if image_column else declared or images, there, where)
    raw = shape if shape and _is_raw(types[image], shape) else None
    declared = [
        name for name, kind in types.items() if features.get(name, {}).get("_type") == "ClassLabel" and _kind(kind)
    ]
    if label_column == NO_LABELS:
        wanted = list[str]()
    elif label_column is not None and label_column in (*types, *keys):
        wanted = [label_column]
    else:
        wanted = declared or [name for name in (*types, *keys) if name not in (image, *images)]
    found: dict[str, Classes | None] = {}
    for name in wanted:
        names = features[name].get("names") if name in declared else None
        named = name == label_column or name in declared
        found[name] = (
            Classes(tuple(map(str, names))) if names else _classes(files, name, types, keys, num_rows, named=named)
        )
    candidates = [name for name, classes in found.items() if classes is not None]
    label = pick_label(label_column, candidates, there | dict.fromkeys(keys, "of the path"), where)
    columns = _Columns(image, raw, label, (found[label] if label else None) or Classes(None))
    unseen = [f"{name} ({types[name]})" for name, classes in found.items() if classes is None and _kind(types[name])]
    return columns, _described(columns, [name for name in candidates if name != label], unseen)


def _described(columns: _Columns, others: list[str], unseen: list[str]) -> list[str]:
    line = f"columns: images in {columns.image!r}"
    if columns.label is not None:
        return [f"{line}, labels in {columns.label!r}" + (f" (not in {', '.join(others)})" if others else "")]
    hint = f"; no labels were seen in {', '.join(unseen)}: name one with --label-column" if unseen else ""
    return [line, f"classes: none{hint}"]


def _classes(
    files: list[StoredFile], name: str, types: dict[str, Any], keys: dict[str, str], num_rows: int, *, named: bool
) -> Classes | None:
    """Return the classes of a column or Hive key; None if its values are not labels.

    Text and floating-point numbers are labels only if named, since they may be captions or measurements.
    """
    if name in keys and name not in types:
        values = {_hive_keys(file).get(name, _NO_PARTITION) for file in files} - {_NO_PARTITION}
        numbers = all(re.fullmatch(r"0|[1-9]\d{0,17}", value) for value in values)
        return classes_of(map(int, values)) if numbers else classes_of(values)
    kind = _kind(types[name])
    if kind is None or (kind in ("text", "fractions") and not named) or (is_pandas_index(name) and not named):
        return None
    distinct, widths = set[Any](), set[int]()
    for file in files:
        with _opened(file) as opened:
            if name not in opened.schema_arrow.names:
                if named:
                    raise _no_column(file, name)
                return None
            for batch in opened.iter_batches(batch_size=_LABELS_AT_ONCE, columns=[name]):
                if kind == "one-hot":
                    rows = _one_hot(batch.column(name))
                    if rows is None:
                        return None
                    widths.add(rows.shape[1])
                    continue
                values = _plain(batch.column(name)).drop_null().unique()
                if kind == "fractions" and not pc.all(pc.equal(values, pc.round(values)), min_count=0).as_py():
                    return None
                distinct.update(values.to_pylist())
    if kind == "one-hot":
        return Classes(tuple(map(str, range(widths.pop())))) if len(widths) == 1 else None
    if not named and kind != "truths" and names_rows(name, len(distinct), num_rows):
        return None
    return classes_of(map(int, distinct)) if kind == "fractions" else classes_of(distinct)


def _one_hot(column: Any) -> npt.NDArray[Any] | None:
    """Return a column of lists as rows [n, K] if they are one-hot."""
    lists = column.to_pylist()
    if not lists or any(row is None or None in row or len(row) != len(lists[0]) for row in lists):
        return None
    rows = np.array(lists)
    return rows if is_one_hot(rows) else None


def _no_column(file: StoredFile, name: str) -> DataError:
    return DataError(f"{file.path} has no column {name!r}, which the first file has: give files of one schema")


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features that the `datasets` library stores in the schema's metadata: {column: {"_type": "Image"}, ...}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _plain_type(kind: Any) -> Any:
    """Return the type of the values, without dictionary encoding and extension types."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _plain(column: Any) -> Any:
    """Convert a column to its plain type, and any text layout to `string`."""
    kind = _plain_type(column.type)
    kind = pa.string() if _kind(kind) == "text" else kind
    return column if column.type == kind else column.cast(kind)


def _kind(kind: Any) -> str | None:
    """Return the kind of labels that a type can hold: "numbers", "truths", "categories", "text", "fractions", "one-hot", or None."""
    types, plain = pa.types, _plain_type(kind)
    if types.is_integer(plain):
        return "numbers"
    if types.is_boolean(plain):
        return "truths"
    if types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain):
        return "categories" if types.is_dictionary(kind) else "text"
    if types.is_floating(plain) or types.is_decimal(plain):
        return "fractions"
    if (
        types.is_list(plain)
        or types.is_large_list(plain)
        or types.is_fixed_size_list(plain)
        or types.is_list_view(plain)
    ):
        inner = _kind(plain.value_type)
        return "one-hot" if inner in ("numbers", "truths", "fractions") else None
    return None


def _is_image(kind: Any) -> bool:
    plain = _plain_type(kind)
    if pa.types.is_struct(plain):
        index = plain.get_field_index("bytes")
        return index >= 0 and _is_image(plain.field(index).type)
    return bool(pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or pa.types.is_binary_view(plain))


def _raw_shape(schema: Any) -> tuple[int, int, int] | None:
    """Return the shape (C, H, W) in the schema's metadata, for images stored as pixels."""
    match = re.fullmatch(rb"(\d{1,6})x(\d{1,6})x(\d{1,6})", (schema.metadata or {}).get(b"shape", b""))
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def _is_raw(kind: Any, shape: tuple[int, int, int]) -> bool:
    return bool(pa.types.is_fixed_size_binary(kind)) and kind.byte_width == math.prod(shape)


def _items(file: StoredFile, columns: _Columns) -> Iterator[Item]:
    keys = _hive_keys(file)
    row, wanted = 0, [name for name in (columns.image, columns.label) if name is not None and name not in keys]
    with _opened(file) as opened:
        missing = [name for name in wanted if name not in opened.schema_arrow.names]
        if missing:
            raise _no_column(file, missing[0])
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            images, labels = _encoded(batch.column(columns.image)), _labels(batch, columns, keys, file.path, row)
            for data, label in zip(images, labels, strict=True):
                image = data if columns.raw is None or data is None else _pixels(data, columns.raw)
                yield Item(f"{file.path}, row {row}", image, int(label))
                row += 1


def _pixels(data: bytes, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)


def _encoded(column: Any) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")  # unlike field(), null where the struct is
    values: list[bytes | None] = column.to_pylist()
    return values


def _labels(batch: Any, columns: _Columns, keys: dict[str, str], path: str, first_row: int) -> npt.NDArray[np.int64]:
    if columns.label is None:
        return np.zeros(batch.num_rows, dtype=np.int64)
    if columns.label in keys and columns.label not in batch.schema.names:
        value = keys[columns.label]
        if value == _NO_PARTITION:
            raise DataError(f"{path} has no label in its path: add it, or give --label-column {NO_LABELS}")
        values = np.array([value if columns.classes.by_name else int(value)])
        return np.repeat(columns.classes.numbers(values, path, first_row), batch.num_rows)
    column = batch.column(columns.label)
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise DataError(f"{path}, row {row} has no label: add it, or give --label-column {NO_LABELS}")
    kind = _kind(column.type)
    if kind == "one-hot":
        rows = _one_hot(column)
        assert rows is not None, "checked when the column was chosen"
        return columns.classes.numbers(rows, path, first_row)
    plain = _plain(column).cast(pa.int64()) if kind == "fractions" else _plain(column)
    values = np.array(plain.to_pylist()) if kind in ("text", "categories") else plain.to_numpy(zero_copy_only=False)
    return columns.classes.numbers(values, path, first_row)
