"""Class labels: which classes a dataset has, and of which class each generated image is.

A class is named by its name, which is text; where labels are numbers, the number is the name. What begins with `#` is this
program's own: `#balanced`, `#none`, and `#3` for the class of number 3, counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.image_set import ImageSet, Rows
from pipeline.errors import DataError, UsageError, nearest

MARK = "#"
BALANCED, NONE = "#balanced", "#none"
MAX_UNNAMED = 1 << 20


class ClassNames(tuple[str, ...]):
    """Names of a model's classes in the order of their numbers; `untrained` are the numbers of those that it saw no image of.

    The network has room for all of them; what is drawn, balanced and scored are the others.
    """

    untrained: frozenset[int]

    def __new__(cls, names: Iterable[str] = (), untrained: Iterable[int] = ()) -> Self:
        """Give names in the order of their classes' numbers, and the numbers of those without training images."""
        self = super().__new__(cls, names)
        self.untrained = frozenset(untrained)
        return self

    @property
    def trained(self) -> list[int]:
        """The numbers of the classes that were trained, ascending."""
        return [number for number in range(len(self)) if number not in self.untrained]

    def to_state(self) -> dict[str, Any]:
        """Return plain data, the part of a model's state that `from_state` reads."""
        return {"class_names": list(self), "untrained_classes": sorted(self.untrained)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClassNames:
        """Read what `to_state` gave, of a model without classes too."""
        return cls(state.get("class_names", ()), state.get("untrained_classes", ()))


NO_CLASSES = ClassNames()


def class_names(dataset: ImageSet) -> tuple[str, ...]:
    """Return one name per class of a labelled dataset: its own, or its labels as numbers."""
    manifest = dataset.manifest
    if manifest.class_names is not None:
        return manifest.class_names
    highest = int(_labels(dataset).max())
    if highest >= MAX_UNNAMED:
        raise DataError(f"dataset {manifest.name!r}: got label {highest}, expected numbers of classes; ingest it again")
    return tuple(map(str, range(highest + 1)))


def class_counts(dataset: ImageSet) -> npt.NDArray[np.int64]:
    """Return how many images each class of a labelled dataset has, int64 [classes]."""
    labels = _labels(dataset)
    return np.bincount(labels[labels >= 0], minlength=len(class_names(dataset)))


def class_names_of(dataset: ImageSet) -> ClassNames:
    """Return the classes that a model of a dataset's images knows; UsageError if the images have no labels."""
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


def told_labels(dataset: ImageSet, rows: Rows, names: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return the class of each of some rows, int64 [n], as a model knows it: its own number of the class of that name.

    UsageError if an image has no label, or one of a class that the model did not learn: the numbers of classes are each dataset's own.
    """
    known = _as_names(names)
    name, labels = dataset.manifest.name, dataset.labels(rows)
    if labels is None or (labels < 0).any():
        missing = "have no labels" if labels is None else f"are without a label in {int((labels < 0).sum())} cases"
        raise UsageError(
            f"the images of {name} {missing}, and this model is told the class of each image; give labelled images of its "
            f"{len(known)} classes"
        )
    theirs = class_names(dataset)
    there = {theirs[label] for label in np.unique(labels).tolist()}
    learned = [known[number] for number in known.trained]
    if unknown := sorted(there - set(learned)):
        raise UsageError(
            f"the images of {name} are of class {unknown[0]!r}{nearest(unknown[0], learned)}, which this model does not know; give "
            f"images of its {len(learned)} classes: {_shown(learned)}"
        )
    number = {name: i for i, name in enumerate(known)}
    return np.array([number.get(name, -1) for name in theirs], np.int64)[labels]


def own_word(labels: str, names: Iterable[str]) -> str | None:
    """Return BALANCED or NONE if `labels` means it, else None. Without its mark a word means that only where no class has the name."""
    marked = labels if labels.startswith(MARK) else MARK + labels
    return marked if marked in (BALANCED, NONE) and (marked == labels or labels not in names) else None


def class_name(labels: str | int, names: Iterable[str]) -> str:
    """Return the one way to write how images are labelled: BALANCED, NONE, or a class's name; UsageError if it names no class.

    A name that begins with the mark itself is written with one more.
    """
    known = _as_names(names)
    if word := own_word(str(labels), known):
        return word
    name = known[_number(str(labels), known)]
    return MARK + name if name.startswith(MARK) else name


def labels_of(indices: range, labels: str | int, names: Iterable[str]) -> Tensor:
    """Return the labels of generated images, int64 [len(indices)]: functions of (image index, `labels`) alone.

    BALANCED is the trained class of number index modulo how many there are; NONE is the null class, whose number follows the last
    class's; anything else is one class for all: its name, or `#` and its number.
    """
    known = _as_names(names)
    word = own_word(str(labels), known)
    if word == BALANCED:
        return torch.tensor(known.trained)[torch.arange(indices.start, indices.stop) % len(known.trained)]
    number = len(known) if word == NONE else _number(str(labels), known)
    return torch.full((len(indices),), number, dtype=torch.int64)


def _number(label: str, names: ClassNames) -> int:
    """Return the number of the class that a text names."""
    if label.startswith(MARK * 2):
        name = label[1:]
        number = names.index(name) if name in names else -1
    elif label.startswith(MARK):
        number = int(label[1:]) if label[1:].isdecimal() and label[1:].isascii() else -1
    else:
        number = names.index(label) if label in names else -1
    if number in names.untrained:
        raise UsageError(
            f"labels: class {names[number]!r} was never trained: the training images hold none of it; give one of: "
            f"{_shown([names[n] for n in names.trained])}"
        )
    if 0 <= number < len(names):
        return number
    raise UsageError(
        f"labels: no class {label!r}{nearest(label, [*names, BALANCED, NONE])}; give {BALANCED!r}, {NONE!r}, or one of the {len(names)} "
        f"classes by name or number, such as '{MARK}0': {_shown(names)}"
    )


def _labels(dataset: ImageSet) -> npt.NDArray[np.int64]:
    labels = dataset.labels(np.arange(dataset.manifest.num_rows))
    assert labels is not None, "asked of labelled datasets alone"
    return labels


def _as_names(names: Iterable[str]) -> ClassNames:
    return names if isinstance(names, ClassNames) else ClassNames(names)


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")
