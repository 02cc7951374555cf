"""Class labels: the classes of a dataset, and the class of each generated image.

A class is named by its name, which is text; if labels are numbers, the number is the name. Words that begin with `#` are keywords of this
program: `#balanced`, `#none`, and `#3` for class number 3, counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.image_set import ImageSet, Rows
from pipeline.errors import DataError, UsageError, listing, nearest

MARK = "#"
BALANCED, NONE = "#balanced", "#none"
MAX_UNNAMED = 1 << 20


class ClassNames(tuple[str, ...]):
    """Names of a model's classes by number; `untrained` are the numbers of classes without training images.

    The network has an embedding for every class. Sampling, balancing and scoring use the trained ones.
    """

    untrained: frozenset[int]

    def __new__(cls, names: Iterable[str] = (), untrained: Iterable[int] = ()) -> Self:
        """Take names in the order of class numbers, and the numbers of untrained classes."""
        self = super().__new__(cls, names)
        self.untrained = frozenset(untrained)
        return self

    @property
    def trained(self) -> list[int]:
        """Numbers of the trained classes, ascending."""
        return [number for number in range(len(self)) if number not in self.untrained]

    def to_state(self) -> dict[str, Any]:
        """Return plain data for `from_state`."""
        return {"class_names": list(self), "untrained_classes": sorted(self.untrained)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClassNames:
        """Read a model's state; without classes in it, return an empty tuple."""
        return cls(state.get("class_names", ()), state.get("untrained_classes", ()))


NO_CLASSES = ClassNames()


def class_names(dataset: ImageSet) -> tuple[str, ...]:
    """Return one name per class of a labelled dataset: its own names, or its labels as numbers."""
    manifest = dataset.manifest
    if manifest.class_names is not None:
        return manifest.class_names
    highest = int(_labels(dataset).max())
    if highest >= MAX_UNNAMED:
        raise DataError(f"dataset {manifest.name!r}: got label {highest}, expected numbers of classes; ingest it again")
    return tuple(map(str, range(highest + 1)))


def class_counts(dataset: ImageSet) -> npt.NDArray[np.int64]:
    """Return the number of images per class of a labelled dataset, int64 [classes]."""
    labels = _labels(dataset)
    return np.bincount(labels[labels >= 0], minlength=len(class_names(dataset)))


def class_names_of(dataset: ImageSet) -> ClassNames:
    """Return the classes of a model trained on this dataset; UsageError if some images have no label."""
    name = dataset.manifest.name
    if not dataset.manifest.has_labels:
        raise UsageError(
            f"model.class_conditional: the images of {name} have no labels; ingest them with labels (sub-folders, or "
            "--label-column), or use -s model.class_conditional=false"
        )
    labels = _labels(dataset)
    if int(labels.min()) < 0:
        raise UsageError(
            f"model.class_conditional: {int((labels < 0).sum())} of the {len(labels)} images of {name} have no label; "
            "leave them out, or use -s model.class_conditional=false"
        )
    names = class_names(dataset)
    if int(labels.max()) >= len(names):
        raise DataError(
            f"dataset {name!r}: label {int(labels.max())}, but only {len(names)} classes; ingest the dataset again"
        )
    return ClassNames(names, np.flatnonzero(class_counts(dataset) == 0).tolist())


def model_labels(dataset: ImageSet, rows: Rows, names: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return the model's class number for each row, int64 [n]; classes are matched by name, since numbers differ between datasets.

    UsageError if an image has no label, or a class that the model was not trained on.
    """
    known = _as_names(names)
    name, labels = dataset.manifest.name, dataset.labels(rows)
    if labels is None or (labels < 0).any():
        missing = "have no labels" if labels is None else f"lack a label in {int((labels < 0).sum())} cases"
        raise UsageError(
            f"the images of {name} {missing}, and this model is class-conditional. Give labelled images of its {len(known)} classes"
        )
    theirs = class_names(dataset)
    there = {theirs[label] for label in np.unique(labels).tolist()}
    learned = [known[number] for number in known.trained]
    if unknown := sorted(there - set(learned)):
        raise UsageError(
            f"the images of {name} are of class {unknown[0]!r}{nearest(unknown[0], learned)}, which this model does not know; give "
            f"images of its {len(learned)} classes: {listing(learned)}"
        )
    number = {name: i for i, name in enumerate(known)}
    return np.array([number.get(name, -1) for name in theirs], np.int64)[labels]


def own_word(labels: str, names: Iterable[str]) -> str | None:
    """Return BALANCED or NONE if `labels` means it, else None. A word without the mark is a keyword only if no class has that name."""
    marked = labels if labels.startswith(MARK) else MARK + labels
    return marked if marked in (BALANCED, NONE) and (marked == labels or labels not in names) else None


def class_name(labels: str | int, names: Iterable[str]) -> str:
    """Return the canonical form of `labels`: BALANCED, NONE, or a class name; UsageError if there is no such class.

    A class name that begins with the mark gets a second mark.
    """
    known = _as_names(names)
    if word := own_word(str(labels), known):
        return word
    name = known[_number(str(labels), known)]
    return MARK + name if name.startswith(MARK) else name


def labels_of(indices: range, labels: str | int, names: Iterable[str]) -> Tensor:
    """Return the labels of generated images, int64 [len(indices)], which depend on (image index, `labels`) alone.

    BALANCED cycles through the trained classes; NONE is the null class, whose number follows the last class; anything else is one class
    for all images: its name, or `#` and its number.
    """
    known = _as_names(names)
    word = own_word(str(labels), known)
    if word == BALANCED:
        return torch.tensor(known.trained)[torch.arange(indices.start, indices.stop) % len(known.trained)]
    number = len(known) if word == NONE else _number(str(labels), known)
    return torch.full((len(indices),), number, dtype=torch.int64)


def _number(label: str, names: ClassNames) -> int:
    """Return the class number of a name, or of `#` and a number."""
    if label.startswith(MARK * 2):
        name = label[1:]
        number = names.index(name) if name in names else -1
    elif label.startswith(MARK):
        number = int(label[1:]) if label[1:].isdecimal() and label[1:].isascii() else -1
    else:
        number = names.index(label) if label in names else -1
    if number in names.untrained:
        raise UsageError(
            f"labels: class {names[number]!r} has no training images. Give one of: "
            f"{listing([names[n] for n in names.trained])}"
        )
    if 0 <= number < len(names):
        return number
    raise UsageError(
        f"labels: no class {label!r}{nearest(label, [*names, BALANCED, NONE])}; give {BALANCED!r}, {NONE!r}, or one of the {len(names)} "
        f"classes by name or number, such as '{MARK}0': {listing(names)}"
    )


def _labels(dataset: ImageSet) -> npt.NDArray[np.int64]:
    labels = dataset.labels(np.arange(dataset.manifest.num_rows))
    assert labels is not None, "callers check that the dataset is labelled"
    return labels


def _as_names(names: Iterable[str]) -> ClassNames:
    return names if isinstance(names, ClassNames) else ClassNames(names)
