"""Folders of image files, and their layout: splits, classes, or one set of images; and the files in it that are skipped.

docs/data.md has the rules. `--layout flat`, `classes` or `splits` overrides what the folder names suggest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import DataError, UsageError, listing
from pipeline.ingest.choice import ALL_SPLITS, choose_split, split_of
from pipeline.ingest.rows import Item
from pipeline.ingest.sources import Source, content_key, short_name

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# besides names that begin with a dot: files of operating systems, NAS devices and this program
_LITTER = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "@eadir",
    "@tmp",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "network trash folder",
    "temporary items",
    "__pycache__",
    "samples.json",
}
# suffixes of files that describe images: a folder with only these is not a class
_ANNOTATIONS = re.compile(r"\.(jsonl?|xml|txt|csv|tsv|md|ya?ml|mat|pdf|html|py|sh)", re.IGNORECASE)
SPLIT_KEYS = ("split", "subset", "partition", "set")  # Hive keys with splits as values
_KEY = re.compile(r"([A-Za-z_][\w-]*)=(.*)")
# words that may accompany a split in a folder name: training_set, seg_train, val_images_256
_FILLER = re.compile(
    r"images?|imgs?|pictures|photos|files|data|set|dataset|split|seg|the|raw|jpe?g|png|cropped|resized"
)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name was created by a system, not by the user."""
    return name.startswith(".") or name.lower() in _LITTER or name.lower().endswith("@synoeastream")


def hive_key(name: str) -> tuple[str, str] | None:
    """Return (key, value) of a folder name in the style of Hive, Spark and pyarrow, such as label=3; else None."""
    match = _KEY.fullmatch(name)
    return None if match is None else (match[1], unquote(match[2]))


@dataclass
class Folder:
    """A folder: image files, other files and sub-folders, sorted by name."""

    path: Path
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_images(self) -> int:
        """Number of images in the folder and below."""
        return len(self.images) + sum(folder.num_images for folder in self.folders)

    def all_others(self) -> Iterator[Path]:
        """Yield the files in the folder and below that are not images."""
        yield from self.others
        for folder in self.folders:
            yield from folder.all_others()

    @property
    def is_annotations(self) -> bool:
        """Whether it has files that describe images, and no images."""
        others = list(self.all_others())
        return not self.num_images and bool(others) and all(_ANNOTATIONS.fullmatch(o.suffix) for o in others)

    def files(self) -> list[Path]:
        """Return the images in the folder and below, sorted by path; DataError names any other file."""
        found: list[Path] = []
        entries: list[Path | Folder] = [*self.images, *self.others, *self.folders]
        for entry in sorted(entries, key=lambda entry: entry.name):
            if isinstance(entry, Folder):
                found += entry.files()
            elif entry.suffix.lower() in IMAGE_SUFFIXES:
                found.append(entry)
            else:
                raise _not_an_image(entry)
        return found


def _not_an_image(file: Path) -> DataError:
    return DataError(f"{file} has another suffix than PNG and JPEG images ({', '.join(IMAGE_SUFFIXES)}): move it away")


def image_folder(root: Path, split: str | None = None, layout: str | None = None) -> Source:
    """Return the PNG and JPEG files below `root` after determining its layout: splits, of which one is chosen, classes, or images alone.

    Raises:
        DataError: no images, other files among them, or images both beside and inside class folders.
        UsageError: the requested split does not exist, or splits and classes cannot be distinguished.
        OSError: a file or folder cannot be read.
    """
    ignored: Counter[str] = Counter()
    search = _Search(_read(root, ignored), split, layout, ignored)
    search.go()
    node, classes = search.node, search.classes
    files, labels = _of_classes(node, classes, ignored) if classes else (node.files(), [])
    if not files:
        raise DataError(f"{node.path} has no images ({', '.join(IMAGE_SUFFIXES)}): give a folder that has")
    class_names = tuple(_class_names(classes)) or None
    lines = list(search.lines)
    if not classes:
        lines.append("classes: none" + ("" if node.folders else " (no sub-folders)"))
    if ignored:
        listed = [f"{name} ({count} file{'s' if count != 1 else ''})" for name, count in sorted(ignored.items())]
        lines.append(f"ignored: {listing(listed)}")

    def key() -> str:
        content = content_key((file.relative_to(node.path).as_posix(), file) for file in files)
        return f"{content} {layout} {class_names}"

    return Source(
        name=short_name(root),
        origin=str(node.path.absolute()),
        items=lambda: (Item(str(file), file, label) for file, label in zip(files, labels or repeat(0), strict=False)),
        key=key,
        class_names=class_names,
        has_labels=class_names is not None,
        num_rows=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        note=search.note,
        lines=tuple(lines),
    )


def _of_classes(node: Folder, classes: list[Folder], ignored: Counter[str]) -> tuple[list[Path], list[int]]:
    """Return the images in class folders and their class numbers."""
    if node.images:
        raise DataError(
            f"{node.path} has images both beside and inside sub-folders: put all into class folders, or none; --layout flat ingests "
            "all without classes"
        )
    for other in node.others:
        if not _ANNOTATIONS.fullmatch(other.suffix):
            raise _not_an_image(other)
        ignored[other.name] += 1
    files: list[Path] = []
    labels: list[int] = []
    for number, folder in enumerate(classes):
        inside = folder.files()
        if not inside:
            raise DataError(f"{folder.path} has no images: remove it, or put the images of its class there")
        files += inside
        labels += [number] * len(inside)
    return files, labels


def _class_names(classes: list[Folder]) -> list[str]:
    """Return the class names: the folder names, or the values of a common Hive key."""
    keys = [hive_key(folder.name) for folder in classes]
    named = [key for key in keys if key is not None]
    if len(named) == len(classes) == len(set(named)) and len({key for key, _ in named}) == 1:
        return [value for _, value in named]
    return [folder.name for folder in classes]


class _Search:
    """Descends from the given folder to the one with the images, through wrapper folders and a split."""

    def __init__(self, tree: Folder, split: str | None, layout: str | None, ignored: Counter[str]) -> None:
        self.node, self._asked, self._layout, self._ignored = tree, split, layout, ignored
        self.classes: list[Folder] = []
        self.taken: str | None = None
        self.note = ""
        self.lines: list[str] = []

    def go(self) -> None:
        """Find the folder with the images, and its classes."""
        if self._layout in ("flat", "classes"):
            if self._asked not in (None, ALL_SPLITS):
                raise UsageError(f"--split {self._asked} goes with --layout splits, got {self._layout}: leave one out")
            self.classes = self.node.folders if self._layout == "classes" else []
            return
        while True:
            self._leave_out_annotations()
            subs = self.node.folders
            if self._layout == "splits" and self.taken is None and subs:
                self._take_split(subs, {sub.name: split_of(_word(sub.name)) or sub.name for sub in subs})
            elif self.taken is None and not self.node.images and (splits := _splits(subs)):
                self._take_split(subs, splits)
            elif self.taken is None and not self.node.images and (inner := _splits_of_classes(subs)):
                self._take_inner_split(subs, inner)
                break
            elif len(subs) == 1 and not self.node.images and subs[0].num_images:
                self.lines.append(
                    f"images: those in {subs[0].path}, the only folder there; --layout classes makes it a class"
                )
                self._skip(self.node.others)
                self.node = subs[0]
            else:
                self.classes = subs
                break
        if self._asked not in (None, ALL_SPLITS) and self.taken is None:
            names = ", ".join(folder.name for folder in self.node.folders) or "none"
            raise UsageError(f"{self.node.path} has no split {self._asked!r}: its sub-folders are {names}")

    def _leave_out_annotations(self) -> None:
        left_out = [folder for folder in self.node.folders if folder.is_annotations]
        for folder in left_out:
            self._ignored[folder.name] += len(list(folder.all_others()))
        self.node.folders = [folder for folder in self.node.folders if folder not in left_out]

    def _skip(self, files: list[Path]) -> None:
        self._ignored.update(file.name for file in files)

    def _take_split(self, subs: list[Folder], splits: dict[str, str]) -> None:
        where, by_split = str(self.node.path), Counter(splits.values())
        if self._asked == ALL_SPLITS:
            raise UsageError(
                f"{where} has the splits {', '.join(splits)}: name one, folders cannot be combined (--layout flat ingests all images "
                "without classes)"
            )
        if self._asked in splits:  # by folder name
            chosen, name = next(sub for sub in subs if sub.name == self._asked), splits[self._asked]
        else:
            found, self.note = choose_split(list(by_split), self._asked, where)
            name = found or next(iter(by_split))
            several = [sub for sub in subs if splits[sub.name] == name]
            if len(several) > 1:
                folders = ", ".join(sub.name for sub in several)
                raise UsageError(f"{where} has several folders of split {name!r} ({folders}): name one with --split")
            chosen = several[0]
        self.taken = name
        self._describe_split("splits", chosen.name, {sub.name: sub.num_images for sub in subs})
        self._skip(self.node.others)
        self.node = chosen

    def _take_inner_split(self, subs: list[Folder], splits: list[str]) -> None:
        """Choose one split of each class: bee/train, bee/test, cat/train, ..."""
        if self._asked == ALL_SPLITS:
            self.classes = subs
            return
        name, self.note = choose_split(splits, self._asked, str(self.node.path))
        counts: Counter[str] = Counter()
        self.classes = []
        for sub in subs:
            parts = [part for part in sub.folders if split_of(_word(part.name)) == name]
            for part in sub.folders:
                counts[split_of(_word(part.name)) or part.name] += part.num_images
            self.classes.append(Folder(sub.path, folders=parts))
        self.taken = name
        self._describe_split("splits, inside each class", name or "", counts)

    def _describe_split(self, what: str, taken: str, num_images: Mapping[str, int]) -> None:
        others = ", ".join(f"{name} {count:,}" for name, count in num_images.items() if name != taken)
        not_taken = f"; not taken: {others}" if others else ""
        self.lines.append(f"{what}: {taken} taken ({num_images[taken]:,} images){not_taken}")


def _splits(folders: list[Folder]) -> dict[str, str] | None:
    """Return the split of each folder if all folder names are splits, else None.

    UsageError if the names begin with a split and continue with something else, such as trainA, trainB, testA.
    """
    found: dict[str, str] = {}
    rests = set()
    for folder in folders:
        split, rest = _split_and_rest(folder.name)
        if split is not None:
            found[folder.name] = split
            rests.add(rest)
    if folders and len(found) == len(folders) and (rests == {""} or (len(rests) == 1 and len(set(found.values())) > 1)):
        return found
    starts = [re.match(r"(train|val|test)", folder.name.lower()) for folder in folders]
    if len({start[0] for start in starts if start}) > 1 and all(starts):
        names = ", ".join(folder.name for folder in folders)
        raise UsageError(
            f"{folders[0].path.parent} has folders that may be splits of several sets, or classes ({names}): give one of them, or "
            "--layout classes"
        )
    return None


def _splits_of_classes(folders: list[Folder]) -> list[str] | None:
    """Return the splits inside class folders if every class folder consists of splits, at least two in all; else None."""
    inside = [_splits(folder.folders) if not folder.images and folder.folders else None for folder in folders]
    names = {split for splits in inside if splits for split in splits.values()}
    return sorted(names) if len(folders) > 1 and all(inside) and len(names) > 1 else None


def _word(name: str) -> str:
    """Return the part of a folder name that may be a split: the value of a Hive key such as split=, else the name."""
    key = hive_key(name)
    return key[1] if key is not None and key[0].lower() in SPLIT_KEYS else name


def _split_and_rest(name: str) -> tuple[str | None, str]:
    """Return the split in a folder name, and the other words of the name."""
    word = _word(name)
    if "=" in word:
        return None, name
    words = [w for w in re.split(r"[\W_]+|\d+", re.sub(r"(set|images|data)$", r"_\1", word.lower())) if w]
    splits = [w for w in words if split_of(w) is not None]
    rest = "_".join(w for w in words if w not in splits and not _FILLER.fullmatch(w))
    return (split_of(splits[0]) if len(splits) == 1 else None), rest


def _read(path: Path, ignored: Counter[str]) -> Folder:
    folder = Folder(path)
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
        if is_litter(entry.name):
            ignored[entry.name] += _num_files(entry)
        elif entry.is_dir():
            folder.folders.append(_read(entry, ignored))
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            folder.images.append(entry)
        else:
            folder.others.append(entry)
    return folder


def _num_files(path: Path) -> int:
    """Return the number of files in the folder and below, as far as they can be listed."""
    with suppress(OSError):
        return sum(1 for entry in path.rglob("*") if not entry.is_dir()) if path.is_dir() else 1
    return 0
