"""Convert a source of images to a dataset of verified shards, once: `ddpm-pipe ingest` and `train --data`."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Cache
from pipeline.config.experiment import DataConfig
from pipeline.config.yaml_files import validate
from pipeline.data.images import CHANNELS
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.data.shards_files import manifest_of
from pipeline.errors import DataError, UsageError, listing
from pipeline.ingest.pool import all_rows, default_num_workers
from pipeline.ingest.remote import contents, has_dataset, new_remote_folder, sole_remote_writer
from pipeline.ingest.resolve import BUILT_IN, TO_FETCH, how_to_fetch, is_dataset, resolve_source
from pipeline.ingest.rows import Treatment, make_rows
from pipeline.ingest.sources import Source, ingested
from pipeline.ingest.write import ShardWriter, new_folder, sole_writer
from pipeline.storage.home import datasets_dir, home
from pipeline.storage.remote import RemoteFolder, is_remote

HELD_OUT = "-holdout"  # ends the name of the dataset of images held out of another one
MAX_LISTED = 20  # damaged images in one message
_LAST_CLAUSE = re.compile(r"(, expected a PNG or JPEG image)?: [^:]*$")  # the remedy for a single damaged image

Progress = Callable[[int, int | None], None]  # (images done, total or None)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Availability:
    """State of a source: `state` is "ingested", "cached", "here", "download" or "missing"; `text` describes it.

    `num_rows`, `shape` (C, H, W), `num_classes` and `fingerprint` are those of the resulting dataset; None if unknown before ingest.
    """

    state: str
    text: str
    num_rows: int | None = None
    shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    fingerprint: str | None = None


def ingest(
    source: str,
    dest: Path | str,
    *,
    num_workers: int | None = None,
    rows_per_shard: int | None = None,
    downloads: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
    summary: Say = lambda _: None,
    **settings: Any,
) -> Manifest:
    """Write `source` as a dataset into the new folder `dest`, local or in an object store (s3://...).

    Args:
        num_workers: number of decoding processes; default: one for small sources, else one per core.
        rows_per_shard: rows per file; neither this nor `num_workers` changes the fingerprint.
        downloads: folder of downloaded sets, `<home>/datasets/downloads` by default.
        offline: download nothing.
        progress: called with the number of images done.
        say: called with notes on automatic choices, such as a split.
        summary: called at the end with lines on the interpretation of the source: splits, classes, skipped and damaged files.
        settings: further fields of `DataConfig`, such as image_size and split.

    Raises:
        UsageError, DataError, StorageError: nothing is left behind.
    """
    data = validate(DataConfig, {"source": source, **settings}, "ingest")
    place = RemoteFolder(dest) if isinstance(dest, str) and is_remote(dest) else Path(dest)
    _check_dest(data.source, place)
    found = resolve_source(data, downloads=downloads, offline=offline, say=say)
    if found.note:
        say(found.note)
    with sole_remote_writer(place) if isinstance(place, RemoteFolder) else sole_writer(place):
        return _write(
            found, place, data, Treatment(data.mode, data.size), num_workers, rows_per_shard, progress, summary
        )


def ensure_ingested(
    data: DataConfig,
    datasets: Path | str,
    say: Say = lambda _: None,
    *,
    holdout: float = 0.0,
    offline: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Dataset:
    """Open the source of `data` if it is a dataset, else its cached dataset under `datasets`, which is created if missing.

    Args:
        datasets: a folder, or the address of one in an object store.
        holdout: share of the images that is left out; a dataset of them is made at `held_out_location`.
        cache: as in `Dataset.open`.

    Raises:
        UsageError, DataError, StorageError: as in `ingest` and `Dataset.open`.
    """
    if is_dataset(data.source):
        if not holdout:
            dataset = Dataset.open(data.source, cache)
            _refuse_settings(data, dataset.manifest)
            return dataset
        found = ingested(data.source, cache)
        _refuse_settings(data, manifest_of(data.source))
    else:
        found = resolve_source(data, downloads=_downloads(datasets), offline=offline, say=say)
    if found.note:
        say(found.note)
    dest = dataset_folder(found, data, datasets, holdout)
    treatment = Treatment(data.mode, data.size, holdout)
    if holdout:
        held_out = held_out_location(str(_place(dest)))
        beside = RemoteFolder(held_out) if is_remote(held_out) else Path(held_out)
        named = replace(found, name=f"{found.name}{HELD_OUT}")
        _ensure(named, beside, data, replace(treatment, held_out=True), num_workers, progress, say, cache)
    return _ensure(found, dest, data, treatment, num_workers, progress, say, cache)


def _ensure(
    found: Source,
    dest: Path | RemoteFolder,
    data: DataConfig,
    treatment: Treatment,
    num_workers: int | None,
    progress: Progress | None,
    say: Say,
    cache: Cache | None,
) -> Dataset:
    """Open the cached dataset in `dest`, which is created if missing."""
    source = data.source
    ready = _open_cached(dest, say, cache)
    if ready is not None:
        return ready

    def waiting() -> None:
        say(f"waiting for another process that ingests {source}")

    with sole_remote_writer(dest, waiting) if isinstance(dest, RemoteFolder) else sole_writer(dest, waiting):
        ready = _open_cached(dest, say, cache)
        if ready is not None:
            return ready
        if isinstance(dest, Path):
            shutil.rmtree(dest, ignore_errors=True)
        say(f"ingesting {source} into {dest}, once")
        _write(found, dest, data, treatment, num_workers, None, progress, say)
    return Dataset.open(_place(dest), cache)


def held_out_location(location: str) -> str:
    """Return where the images held out of a dataset that `ensure_ingested` made are, from the dataset's own path or address."""
    folder, mark, options = location.partition("?") if is_remote(location) else (location, "", "")
    return f"{folder}{HELD_OUT}{mark}{options}"


def availability(data: DataConfig, datasets: Path | str, holdout: float = 0.0) -> Availability:
    """Return whether the source of `data` is ready, needs ingest or needs a download, without doing either.

    With a `holdout` the number of rows is an estimate until the images are ingested.

    Raises:
        UsageError, DataError: it is not a built-in name and does not exist.
    """
    source = data.source
    if is_dataset(source):
        manifest = manifest_of(source)
        _refuse_settings(data, manifest)
        if not holdout:
            return _there("ingested", f"{source} is ingested", manifest)
        found = ingested(source, None)
    elif source in TO_FETCH and not Path(source).exists():
        shape = (CHANNELS[data.mode], *data.size) if data.mode and data.size else None
        return Availability("missing", f"{source} is not here: {how_to_fetch(data)}", shape=shape)
    else:
        found = resolve_source(data, downloads=_downloads(datasets), offline=True)
    dest = dataset_folder(found, data, datasets, holdout)
    if is_dataset(_place(dest)):
        manifest = manifest_of(_place(dest))
        return _there("cached", f"{source} is ingested in {dest}", manifest)
    num_rows = None if found.num_rows is None else found.num_rows - round(holdout * found.num_rows)
    if found.download:
        text = f"{source} is not here: it will be downloaded ({found.download}) and ingested"
        return Availability("download", text, num_rows, _shape_to_be(found, data))
    text = f"{source} will be ingested into {dest}"
    return Availability("here", text, num_rows, _shape_to_be(found, data))


def _there(state: str, text: str, manifest: Manifest) -> Availability:
    classes = None if manifest.class_names is None else len(manifest.class_names)
    return Availability(state, text, manifest.num_rows, manifest.shape, classes, manifest.fingerprint)


def _shape_to_be(source: Source, data: DataConfig) -> tuple[int, int, int] | None:
    """Return the shape of the images after ingest, from the first image if the source does not declare it; None before a download."""
    if source.shape is None and source.download:
        return None
    if source.shape is None:
        shapes = (make_rows([item], Treatment(data.mode, data.size), None).shape for item in source.items())
        return next((shape for shape in shapes if shape is not None), None)
    channels = CHANNELS[data.mode] if data.mode else source.shape[0]
    return (channels, *(data.size or source.shape[1:]))


def dataset_folder(source: Source, data: DataConfig, datasets: Path | str, holdout: float = 0.0) -> Path | RemoteFolder:
    """Return the folder of the cached dataset of `source`; reads the source to compute its key."""
    name = f"{source.name}-{_key(source, data, holdout)[:12]}"
    return datasets / name if isinstance(datasets, Path) else RemoteFolder(datasets).child(name)


def _downloads(datasets: Path | str) -> Path:
    return (datasets if isinstance(datasets, Path) else datasets_dir(home())) / "downloads"


def _place(folder: Path | RemoteFolder) -> Path | str:
    return folder.uri if isinstance(folder, RemoteFolder) else folder


def _key(source: Source, data: DataConfig, holdout: float) -> str:
    parts = ("ingest 2", source.key(), data.size, data.mode, *([holdout] if holdout else []))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_dest(source: str, dest: Path | RemoteFolder) -> None:
    if isinstance(dest, RemoteFolder):
        if has_dataset(dest) or contents(dest):
            raise UsageError(f"{dest} is not empty: give a new folder, or empty it first")
        return
    if dest.exists() or dest.is_symlink():
        raise UsageError(f"{dest} exists: give a new folder, or remove it first")
    here = Path(source)
    if source not in BUILT_IN and here.is_dir() and dest.resolve().is_relative_to(here.resolve()):
        raise UsageError(f"{dest} lies inside the source {source}: give a folder elsewhere")


def _refuse_settings(data: DataConfig, manifest: Manifest) -> None:
    """Raise UsageError for settings that differ from those of an ingested dataset."""
    source, (channels, *size) = data.source, manifest.shape
    if (data.mode and CHANNELS[data.mode] != channels) or (data.size and data.size != tuple(size)):
        raise UsageError(
            f"{source} is an ingested dataset of {size[0]}x{size[1]} with {channels} channels, "
            "got another image size or mode: ingest its source again, or leave them out"
        )
    given = [name for name in ("image_column", "label_column", "split", "layout") if getattr(data, name) is not None]
    if given:
        raise UsageError(f"{source} is an ingested dataset, {', '.join(given)} can no longer be chosen: leave it out")


def _open_cached(dest: Path | RemoteFolder, say: Say, cache: Cache | None) -> Dataset | None:
    if not (has_dataset(dest) if isinstance(dest, RemoteFolder) else dest.exists()):
        return None
    try:
        return Dataset.open(_place(dest), cache)
    except DataError as error:
        say(f"rebuilding the cached dataset: {error}")
        return None


def _write(
    source: Source,
    dest: Path | RemoteFolder,
    data: DataConfig,
    treatment: Treatment,
    num_workers: int | None,
    rows_per_shard: int | None,
    progress: Progress | None,
    summary: Say,
) -> Manifest:
    workers = default_num_workers(source.num_bytes) if num_workers is None else num_workers
    done, damaged, counts = 0, list[str](), Counter[int]()
    with (
        new_remote_folder(dest) if isinstance(dest, RemoteFolder) else new_folder(dest) as (folder, sent),
        ShardWriter(folder, source.has_labels, rows_per_shard, sent) as writer,
    ):
        for rows in all_rows(source.items(), treatment, workers):
            damaged += rows.damaged
            if len(damaged) <= data.skip_damaged:
                writer.add(rows)
                counts.update(rows.labels.tolist())
            done += rows.num_read
            if progress:
                progress(done, source.num_rows)
        if len(damaged) > data.skip_damaged:
            raise DataError(_too_damaged(damaged, done, data.skip_damaged))
        if treatment.holdout and not counts:
            raise UsageError(
                f"validation.holdout: got {treatment.holdout}, of which {done} images leave none to "
                f"{'validate' if treatment.held_out else 'train on'}; choose another share, or give more images"
            )
        manifest = writer.finish(source.name, source.origin, source.class_names, tuple(map(_short, damaged)))
    for line in (*source.lines, *_class_lines(manifest, counts), *_skipped_lines(damaged)):
        summary(line)
    return manifest


def _too_damaged(damaged: list[str], num_images: int, allowed: int) -> str:
    """Return the error message: in full for one damaged image, a list for several."""
    if len(damaged) == 1:
        return f"{damaged[0]} (--skip-damaged 1 leaves it out)"
    listed = "; ".join(map(_short, damaged[:MAX_LISTED]))
    more = f"; and {len(damaged) - MAX_LISTED} more" if len(damaged) > MAX_LISTED else ""
    limit = f", more than the {allowed} of --skip-damaged" if allowed else ""
    return (
        f"{len(damaged)} of {num_images} images are damaged{limit}: {listed}{more}: replace them, or leave them out with "
        f"--skip-damaged {len(damaged)}"
    )


def _short(damaged: str) -> str:
    """Return the message for one image without its remedy."""
    return _LAST_CLAUSE.sub("", damaged)


def _class_lines(manifest: Manifest, counts: Counter[int]) -> list[str]:
    if not manifest.has_labels:
        return []
    names = manifest.class_names or tuple(map(str, range(max(counts) + 1)))
    each = [f"{name} {counts[number]:,}" for number, name in enumerate(names) if counts[number]]
    absent = [name for number, name in enumerate(names) if not counts[number]]
    without = [f"classes without images: {len(absent)} ({listing(absent)})"] if absent else []
    return [f"classes: {len(each)} ({listing(each)})", *without]


def _skipped_lines(damaged: list[str]) -> list[str]:
    if not damaged:
        return []
    more = [f"  and {len(damaged) - MAX_LISTED} more, in the manifest"] if len(damaged) > MAX_LISTED else []
    return [
        f"left out: {len(damaged)} damaged images",
        *(f"  {_short(line)}" for line in damaged[:MAX_LISTED]),
        *more,
    ]
