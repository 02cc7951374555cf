"""Ingest: from a source of images to a dataset of verified shards, once; `ddpm-pipe ingest` and `train --data`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, UsageError, nearest
from pipeline.home import datasets_dir, home
from pipeline.images import MAX_PIXELS, MODES, PILLOW_MAX_PIXELS
from pipeline.ingest_npz import npz
from pipeline.ingest_parquet import parquet
from pipeline.ingest_pool import all_rows, default_num_workers
from pipeline.ingest_rows import Treatment
from pipeline.ingest_sets import SETS, torchvision_set
from pipeline.ingest_sources import Source, digits, image_folder, visible
from pipeline.ingest_write import ShardWriter, new_folder, sole_writer
from pipeline.manifest import MANIFEST_FILE, Manifest
from pipeline.shards import Dataset

BUILT_IN = ("digits", *SETS)
Progress = Callable[[int, int | None], None]  # images done, images in all where known
Say = Callable[[str], None]


@dataclass(frozen=True)
class IngestOptions:
    """What decides the content of a dataset besides its source; nothing is resized, recoloured or left out unless asked.

    Attributes:
        image_size: height and width, or one number for both: a centred crop of that aspect, resized with antialiasing.
        mode: "L" or "RGB": convert images to grey or colour, also those that are refused otherwise.
        image_column, label_column: of Parquet or .npz; label column "none" leaves labels out.
        split: "train", "validation", "test" or "all", where the source has splits.
        max_pixels: of one image; larger ones are refused before they are decoded.

    Raises:
        UsageError: a value out of range.
    """

    image_size: int | tuple[int, int] | None = None
    mode: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(
                f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}{nearest(self.mode, list(MODES))}"
            )
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise UsageError(f"max_pixels = {self.max_pixels} is outside 1..{PILLOW_MAX_PIXELS}")
        size = self.size
        if size is not None and not (min(size) >= 1 and size[0] * size[1] <= self.max_pixels):
            raise UsageError(f"image size {size[0]}x{size[1]} is outside 1x1 to {self.max_pixels} pixels")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width asked for."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True)
class Availability:
    """Where a source stands: `state` is "ingested", "cached", "here" or "download"; `text` says it to people.

    `manifest` is there for the first two.
    """

    state: str
    text: str
    manifest: Manifest | None = None


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
    downloads: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Manifest:
    """Write `source` as a dataset into the new folder `dest`; see `IngestOptions`.

    Args:
        num_workers: processes that decode; by default one for small sources, else one per core.
        rows_per_shard: rows of one file; neither this nor `num_workers` changes the fingerprint.
        downloads: folder of downloaded sets, `<home>/datasets/downloads` by default.
        offline: download nothing.
        progress: is told the images done.
        say: is told what was chosen, such as a split.

    Raises:
        UsageError, DataError, StorageError: nothing is left behind then.
    """
    options = IngestOptions(image_size, mode, image_column, label_column, split, max_pixels)
    _check_dest(source, dest)
    found = resolve_source(source, options, downloads=downloads, offline=offline, say=say)
    if found.note:
        say(found.note)
    with sole_writer(dest):
        return _write(found, dest, options, num_workers, rows_per_shard, progress)


def ensure_ingested(
    source: str,
    options: IngestOptions,
    datasets: Path,
    say: Say = lambda _: None,
    *,
    offline: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Open `source` if it is a dataset, else the one made of it before under `datasets`, else make that now.

    Raises:
        UsageError, DataError, StorageError: as `ingest` and `Dataset.open`.
    """
    if is_dataset(source):
        dataset = Dataset.open(source)
        _refuse_options(source, options, dataset.manifest)
        return dataset
    found = resolve_source(source, options, downloads=datasets / "downloads", offline=offline, say=say)
    if found.note:
        say(found.note)
    dest = cache_folder(found, options, datasets)
    ready = _open_cached(dest, say)
    if ready is not None:
        return ready
    with sole_writer(dest, lambda: say(f"waiting for another process that ingests {source}")):
        ready = _open_cached(dest, say)
        if ready is not None:
            return ready
        shutil.rmtree(dest, ignore_errors=True)
        say(f"ingesting {source} into {dest}, once")
        _write(found, dest, options, num_workers, None, progress)
    return Dataset.open(dest)


def availability(source: str, options: IngestOptions, datasets: Path) -> Availability:
    """Whether `source` is ready, needs ingesting or needs a download; does neither.

    Raises:
        UsageError, DataError: it is none of the built-in names and not here.
    """
    if is_dataset(source):
        manifest = Manifest.load(Path(source))
        _refuse_options(source, options, manifest)
        return Availability("ingested", f"{source} is ingested", manifest)
    found = resolve_source(source, options, downloads=datasets / "downloads", offline=True)
    dest = cache_folder(found, options, datasets)
    if is_dataset(dest):
        return Availability("cached", f"{source} is ingested in {dest}", Manifest.load(dest))
    if found.download:
        return Availability("download", f"{source} is not here: it will be downloaded ({found.download}) and ingested")
    return Availability("here", f"{source} will be ingested into {dest}")


def source_key(source: str, options: IngestOptions, datasets: Path | None = None) -> str:
    """Key of the dataset that `source` gives with `options`: hex, equal for equal content of the source."""
    downloads = None if datasets is None else datasets / "downloads"
    return _key(resolve_source(source, options, downloads=downloads, offline=True), options)


def cache_folder(source: Source, options: IngestOptions, datasets: Path) -> Path:
    """Where `ensure_ingested` keeps the dataset made of `source`; reads the source's bytes to tell."""
    return datasets / f"{source.name}-{_key(source, options)[:12]}"


def is_dataset(folder: str | Path) -> bool:
    """Whether `folder` was written by ingest."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def resolve_source(
    source: str,
    options: IngestOptions,
    *,
    downloads: Path | None = None,
    offline: bool = False,
    say: Say = lambda _: None,
) -> Source:
    """Find out what `source` names: a built-in set, a URI or glob of Parquet files, or a file or folder here.

    A built-in name is that set; `./mnist` is a folder of that name.

    Raises:
        DataError: nothing of that name, or nothing in it that can be ingested.
        UsageError: an option that does not go with it.
    """
    if source == "digits":
        return digits(options.split)
    if source in SETS:
        return torchvision_set(source, options.split, downloads or datasets_dir(home()) / "downloads", offline, say)
    path = Path(source)
    columns = (options.image_column, options.label_column, options.split)
    if "://" in source or path.suffix == ".parquet" or (not path.exists() and any(c in source for c in "*[")):
        return parquet(source, *columns)
    if not path.exists():
        raise DataError(
            f"{source} does not exist: give a file, a folder, a URI, or one of {', '.join(BUILT_IN)}"
            f"{nearest(source, list(BUILT_IN))}"
        )
    if path.is_dir():
        return _folder(path, *columns)
    if path.suffix == ".npz":
        return npz(path, *columns)
    raise DataError(
        f"{source} is no source of images: give an image folder, .parquet or .npz files, or one of {', '.join(BUILT_IN)}"
    )


def _folder(path: Path, image_column: str | None, label_column: str | None, split: str | None) -> Source:
    if is_dataset(path):
        raise UsageError(f"{path} is an ingested dataset already: use it as it is")
    try:
        entries = visible(path)
        has_parquet = any(entry.suffix == ".parquet" for entry in entries) or any(
            next(entry.rglob("*.parquet"), None) for entry in entries if entry.is_dir()
        )
        if has_parquet:
            return parquet(str(path), image_column, label_column, split)
        if image_column is not None or label_column is not None:
            raise UsageError(
                f"{path} is a folder of image files, which have no columns: leave out --image-column and --label-column"
            )
        return image_folder(path, split)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable") from None


def _key(source: Source, options: IngestOptions) -> str:
    return hashlib.sha256(repr(("ingest 1", source.key(), options.size, options.mode)).encode()).hexdigest()


def _check_dest(source: str, dest: Path) -> None:
    if dest.exists() or dest.is_symlink():
        raise UsageError(f"{dest} exists: give a new folder, or remove it first")
    here = Path(source)
    if source not in BUILT_IN and here.is_dir() and dest.resolve().is_relative_to(here.resolve()):
        raise UsageError(f"{dest} lies inside the source {source}: give a folder elsewhere")


def _refuse_options(source: str, options: IngestOptions, manifest: Manifest) -> None:
    """Refuse options that an ingested dataset can no longer follow; those that it has followed are no harm."""
    channels = {None: manifest.shape[0], "L": 1, "RGB": 3}[options.mode]
    if (channels, options.size or manifest.shape[1:]) != (manifest.shape[0], manifest.shape[1:]):
        raise UsageError(
            f"{source} is an ingested dataset of {manifest.shape[1]}x{manifest.shape[2]} with {manifest.shape[0]} channels, "
            "other image size or mode was asked for: ingest its source again, or leave them out"
        )
    asked = [name for name in ("image_column", "label_column", "split") if getattr(options, name) is not None]
    if asked:
        raise UsageError(f"{source} is an ingested dataset, {', '.join(asked)} cannot be chosen any more: leave it out")


def _open_cached(dest: Path, say: Say) -> Dataset | None:
    if not dest.exists():
        return None
    try:
        return Dataset.open(dest)
    except DataError as error:
        say(f"the cached dataset is made again, for {error}")
        return None


def _write(
    source: Source,
    dest: Path,
    options: IngestOptions,
    num_workers: int | None,
    rows_per_shard: int | None,
    progress: Progress | None,
) -> Manifest:
    treatment = Treatment(options.mode, options.size, options.max_pixels)
    workers = default_num_workers(source.num_bytes) if num_workers is None else num_workers
    done = 0
    with new_folder(dest) as folder, ShardWriter(folder, source.has_labels, rows_per_shard) as writer:
        for rows in all_rows(source.items(), treatment, workers):
            writer.add(rows)
            done += len(rows.images)
            if progress:
                progress(done, source.num_rows)
        return writer.finish(source.name, source.origin, source.class_names)
