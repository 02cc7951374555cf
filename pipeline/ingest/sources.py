"""Where images come from: a source gives its items in one fixed order, and a key of its content.

Here are the built-in digits and image folders; other modules named ingest_* have the rest.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, UsageError
from pipeline.ingest.choice import ALL_SPLITS, choose_split, split_of
from pipeline.ingest.rows import Item

FloatArray = NDArray[np.float64]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # with dot files: what systems leave beside images


@dataclass(frozen=True)
class Source:
    """Images to ingest.

    Attributes:
        name: short name for people and folders.
        origin: where they come from, for the manifest; without credentials.
        items: yields the images in their fixed order.
        key: gives a text that changes when the content does; may read all of the source.
        class_names: one name per class, or None.
        has_labels: whether items carry labels.
        num_rows: images, where known beforehand.
        shape: (C, H, W) of every image as it is, where known beforehand.
        num_bytes: bytes of encoded images to decode; 0 where pixels come as arrays.
        note: something the user did not say that was chosen, to be told; "" if nothing.
        download: what must be fetched before, for people; "" if everything is here.
    """

    name: str
    origin: str
    items: Callable[[], Iterator[Item]]
    key: Callable[[], str]
    class_names: tuple[str, ...] | None = None
    has_labels: bool = False
    num_rows: int | None = None
    shape: tuple[int, int, int] | None = None
    num_bytes: int = 0
    note: str = ""
    download: str = ""


def digits(split: str | None = None) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels in 17 grey levels.

    Level v of 0..16 becomes round(255 v / 16), so that 0 is black, 16 is white and the levels can be told again.
    """
    if split not in (None, ALL_SPLITS):
        raise UsageError(f"digits has no split {split!r}: leave out --split")

    def items() -> Iterator[Item]:
        table = _digits_table()
        images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        for row, (image, label) in enumerate(zip(images, table[:, -1], strict=True)):
            yield Item(f"digits, row {row}", image, int(label))

    names = tuple(str(digit) for digit in range(10))
    return Source("digits", "digits (scikit-learn)", items, lambda: "digits 1", names, True, 1797)


def _digits_table() -> FloatArray:
    """Read the file that scikit-learn's `load_digits` reads: a row per image, 64 levels and the label.

    Importing scikit-learn for it would take longer than anything else that an ingest of the digits does.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError("scikit-learn, which ships the digits, is not installed: pip install scikit-learn")
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, delimiter=",")


def image_folder(root: Path, split: str | None = None) -> Source:
    """PNG and JPEG files below `root`, sorted by path; its sub-folders, where there are any, are classes.

    Where every sub-folder is named for a split (train, val, test, ...), they are splits, and one is taken.

    Raises:
        DataError: no images, another kind of file among them, or images both beside and inside class folders.
        UsageError: the split asked for is not there.
    """
    taken, note = _split_folder(root, split)
    files = _image_files(taken)
    if not files:
        raise DataError(f"{taken} holds no images ({', '.join(IMAGE_SUFFIXES)}): give a folder that does")
    folders = _folders(taken)
    labels = _folder_labels(taken, folders, files) if folders else [0] * len(files)

    def items() -> Iterator[Item]:
        for file, label in zip(files, labels, strict=True):
            yield Item(str(file), file, label)

    return Source(
        name=short_name(root),
        origin=str(taken.absolute()),
        items=items,
        key=lambda: content_key((file.relative_to(taken).as_posix(), file) for file in files),
        class_names=tuple(folders) or None,
        has_labels=bool(folders),
        num_rows=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        note=note,
    )


def content_key(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of files' names, as the source knows them, and of their bytes."""
    total = hashlib.sha256()
    for name, file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): make it readable") from None
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def short_name(path: Path | str) -> str:
    """The last part of a path as a name that is safe in paths and run names."""
    stem = Path(path).resolve().stem if isinstance(path, Path) else path.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"


def visible(folder: Path) -> list[Path]:
    """Entries of a folder sorted by name, without dot files and what systems leave there."""
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _LITTER)
    return sorted(found, key=lambda path: path.name)


def _folders(folder: Path) -> list[str]:
    return [path.name for path in visible(folder) if path.is_dir()]


def _split_folder(root: Path, asked: str | None) -> tuple[Path, str]:
    """The folder of the split to take, `root` itself where its sub-folders are not splits; and what to tell."""
    folders = _folders(root)
    if not folders or any(split_of(f) is None or not f.isalpha() for f in folders):
        if asked not in (None, ALL_SPLITS):
            raise UsageError(f"{root} has no split {asked!r}: its sub-folders are {', '.join(folders) or 'none'}")
        return root, ""
    if asked == ALL_SPLITS:
        raise UsageError(f"{root} has the splits {', '.join(folders)}: name one, folders cannot be taken together")
    name, note = choose_split(folders, asked, str(root))
    return next(root / folder for folder in folders if split_of(folder) == name), note


def _image_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for path in visible(folder):
        if path.is_dir():
            files += _image_files(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            files.append(path)
        else:
            raise DataError(
                f"{path} is not a PNG or JPEG image by its name ({', '.join(IMAGE_SUFFIXES)}): move it away"
            )
    return files


def _folder_labels(root: Path, folders: list[str], files: list[Path]) -> list[int]:
    tops = [file.relative_to(root).parts for file in files]
    if any(len(parts) == 1 for parts in tops):
        raise DataError(f"{root} holds images both beside and inside sub-folders: put all into class folders, or none")
    empty = sorted(set(folders) - {parts[0] for parts in tops})
    if empty:
        raise DataError(f"{root / empty[0]} holds no image: remove it, or put the images of its class there")
    label = {name: i for i, name in enumerate(folders)}
    return [label[parts[0]] for parts in tops]
