"""Ingest: from a source of images to a dataset of verified shards, once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from pipeline.errors import DataError, UsageError
from pipeline.images import MAX_PIXELS
from pipeline.ingest_rows import Treatment, in_chunks, make_rows
from pipeline.ingest_sources import Source, digits
from pipeline.ingest_write import ShardWriter, new_folder
from pipeline.manifest import MANIFEST_FILE, Manifest
from pipeline.shards import Dataset

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class IngestOptions:
    """What decides the content of a dataset besides its source."""

    image_size: int | tuple[int, int] | None = None
    mode: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    max_pixels: int = MAX_PIXELS


def ingest(
    source: str,
    dest: Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write `source` as a dataset into the new folder `dest`.

    Raises:
        UsageError, DataError, StorageError: nothing is left behind then.
    """
    options = IngestOptions(image_size, mode, image_column, label_column, split, max_pixels)
    return _write(resolve_source(source, options), dest, options, rows_per_shard, progress)


def resolve_source(source: str, options: IngestOptions) -> Source:
    """Find out what `source` names."""
    if source == "digits":
        return digits()
    raise DataError(f"{source} is no source of images")


def source_key(source: str, options: IngestOptions) -> str:
    """Key of what ingesting `source` with `options` would give: hex, equal for equal content."""
    content = resolve_source(source, options).key()
    return hashlib.sha256(repr((content, astuple(options))).encode()).hexdigest()


def ensure_ingested(
    source: str, options: IngestOptions, datasets_dir: Path, say: Callable[[str], None] = lambda _: None
) -> Dataset:
    """Open `source` if it is a dataset already, else its cached dataset under `datasets_dir`, else ingest it there."""
    if (Path(source) / MANIFEST_FILE).is_file():
        return Dataset.open(source)
    found = resolve_source(source, options)
    dest = datasets_dir / f"{found.name}-{source_key(source, options)[:12]}"
    if not dest.exists():
        say(f"ingesting {source} into {dest}")
        _write(found, dest, options, None, None)
    return Dataset.open(dest)


def _write(
    source: Source, dest: Path, options: IngestOptions, rows_per_shard: int | None, progress: Progress | None
) -> Manifest:
    if dest.exists():
        raise UsageError(f"{dest} exists: give a new folder, or remove it first")
    size = (options.image_size, options.image_size) if isinstance(options.image_size, int) else options.image_size
    treatment = Treatment(options.mode, size, options.max_pixels)
    writer, first, done = None, None, 0
    with new_folder(dest) as folder:
        for items in in_chunks(source.items()):
            rows = make_rows(items, treatment, first)
            first = first or (items[0].where, rows.shape)
            writer = writer or ShardWriter(folder, rows.shape, source.has_labels, rows_per_shard)
            writer.add(rows)
            done += len(items)
            if progress:
                progress(done, source.num_rows)
        if writer is None:
            raise DataError(f"{source.origin} has no images")
        return writer.finish(source.name, source.origin, source.class_names)
