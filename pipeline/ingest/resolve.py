"""Resolve the source of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.experiment import DataConfig
from pipeline.data.manifest import MANIFEST_FILE
from pipeline.errors import DataError, UsageError, nearest
from pipeline.ingest.files import without_credentials
from pipeline.ingest.layout import IMAGE_SUFFIXES, image_folder, is_litter
from pipeline.ingest.npz import npz
from pipeline.ingest.parquet import parquet
from pipeline.ingest.remote import has_dataset
from pipeline.ingest.sets import SETS, torchvision_set
from pipeline.ingest.sources import Source, digits
from pipeline.storage.home import datasets_dir, home
from pipeline.storage.remote import RemoteFolder, is_remote

BUILT_IN = ("digits", *SETS)
# what presets name and nobody may ship: where the images are to be had
TO_FETCH = {
    "data/celebahq-256": "CelebA-HQ is made as https://github.com/tkarras/progressive_growing_of_gans describes",
    "data/lsun-church-256": "LSUN is downloaded and unpacked by the scripts of https://github.com/fyu/lsun",
}


def absolute_source(source: str) -> str:
    """Return a source typed in this folder as another folder can use it: a file or folder here by its absolute path."""
    path = Path(source).expanduser()
    return str(path.absolute()) if source not in BUILT_IN and path.exists() else source


def how_to_fetch(data: DataConfig) -> str:
    """Return how to come by the images of one of `TO_FETCH`."""
    size = "" if data.size is None else f" --image-size {data.size[0]}"
    mode = "" if data.mode is None else f" --mode {data.mode}"
    return f"{TO_FETCH[data.source]}; then: ddpm-pipe ingest FOLDER {data.source}{size}{mode}, or give the folder with --data"


def is_dataset(folder: str | Path) -> bool:
    """Whether `folder`, local or in an object store, is an ingested dataset; the name of a built-in set means that set."""
    if folder in BUILT_IN:
        return False
    if isinstance(folder, str) and is_remote(folder):
        return not any(c in folder for c in "*[") and has_dataset(RemoteFolder(folder))
    return (Path(folder) / MANIFEST_FILE).is_file()


def resolve_source(
    data: DataConfig,
    *,
    downloads: Path | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """Resolve the source of `data`: a built-in set, a URI or glob of Parquet files, or a local file or folder.

    A built-in name is that set; `./mnist` is a folder of that name.

    Raises:
        DataError: it does not exist, or has nothing that can be ingested.
        UsageError: an option does not apply to it.
    """
    source = data.source
    is_folder = "://" not in source and source not in BUILT_IN and Path(source).is_dir()
    if data.layout is not None and not is_folder:
        raise UsageError(f"--layout is for folders of image files, got {without_credentials(source)}: leave it out")
    if source == "digits":
        return digits(data.split)
    if source in SETS:
        return torchvision_set(source, data.split, downloads or datasets_dir(home()) / "downloads", offline, say)
    path = Path(source)
    columns = (data.image_column, data.label_column, data.split)
    if "://" in source or path.suffix == ".parquet" or (not path.exists() and any(c in source for c in "*[")):
        return parquet(source, *columns)
    if not path.exists() and source in TO_FETCH:
        raise DataError(f"{source} is not here: {how_to_fetch(data)}")
    if not path.exists():
        raise DataError(
            f"{source} does not exist: give a file, a folder, a URI, or one of {', '.join(BUILT_IN)}"
            f"{nearest(source, list(BUILT_IN))}"
        )
    if path.is_dir():
        return _folder(path, data)
    if path.suffix == ".npz":
        return npz(path, *columns)
    raise DataError(
        f"{source} is not a source of images: give an image folder, .parquet or .npz files, or one of {', '.join(BUILT_IN)}"
    )


def _folder(path: Path, data: DataConfig) -> Source:
    if is_dataset(path):
        raise UsageError(f"{path} is already an ingested dataset: use it directly")
    try:
        suffixes = {file.suffix.lower() for file in _walk(path)}
        has_parquet = ".parquet" in suffixes
        if has_parquet and suffixes & set(IMAGE_SUFFIXES):
            raise DataError(f"{path} has both Parquet files and image files: give a folder, or a glob, of one kind")
        if has_parquet and data.layout is not None:
            raise UsageError(f"--layout is for folders of image files, {path} has Parquet files: leave it out")
        if has_parquet:
            return parquet(str(path), data.image_column, data.label_column, data.split)
        if data.image_column is not None or data.label_column is not None:
            raise UsageError(
                f"{path} is a folder of image files, which have no columns: leave out --image-column and --label-column"
            )
        return image_folder(path, data.split, data.layout)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read ({error.strerror}): make it readable") from None


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without those that systems create."""
    for entry in folder.iterdir():
        if is_litter(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry
