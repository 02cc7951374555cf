"""Class labels: which classes a dataset has, and of which class each generated image is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.image_set import ImageSet, Rows
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError, nearest
from pipeline.metrics.classifier_store import class_names

BALANCED, NONE = "balanced", "none"
ClassNames = tuple[str, ...]


def class_names_of(dataset: Dataset) -> ClassNames:
    """Return the names of a dataset's classes, in the order of their labels; UsageError where its images have none."""
    name, labels = dataset.manifest.name, dataset.labels()
    if labels is None:
        raise UsageError(
            f"model.class_conditional: the images of {name} have no labels; ingest them with labels (sub-folders, or "
            "--label-column), or use -s model.class_conditional=false"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise UsageError(
            f"model.class_conditional: {int((labels < 0).sum())} of the {len(labels)} images of {name} have no label; "
            "leave them out, or use -s model.class_conditional=false"
        )
    names = class_names(dataset)
    if highest >= len(names):
        raise DataError(f"{dataset.location}: label {highest}, but only {len(names)} classes; ingest the dataset again")
    return names


def told_labels(dataset: ImageSet, rows: Rows, names: ClassNames) -> npt.NDArray[np.int64]:
    """Return the class of each of some rows, int64 [n], as a model knows it: its own number of the class of that name.

    UsageError where an image has no label, or one of a class that the model does not know: the numbers of classes are each dataset's own.
    """
    name, labels = dataset.manifest.name, dataset.labels(rows)
    if labels is None or (labels < 0).any():
        missing = "have no labels" if labels is None else f"are without a label in {int((labels < 0).sum())} cases"
        raise UsageError(
            f"the images of {name} {missing}, and this model is told the class of each image; give labelled images of its "
            f"{len(names)} classes"
        )
    theirs = class_names(dataset)
    there = {theirs[label] for label in np.unique(labels).tolist()}
    if unknown := sorted(there - set(names)):
        raise UsageError(
            f"the images of {name} are of class {unknown[0]!r}{nearest(unknown[0], list(names))}, which this model does not know; give "
            f"images of its {len(names)} classes: {_shown(names)}"
        )
    numbers = np.array([names.index(name) if name in names else -1 for name in theirs], np.int64)
    return numbers[labels]


def class_name(labels: str | int, names: ClassNames) -> str:
    """Return the one name of how images are labelled: "balanced", "none", or a class's; UsageError where it names no class."""
    if labels in (BALANCED, NONE):
        return str(labels)
    return names[_index(labels, names)]


def labels_of(indices: range, labels: str | int, names: ClassNames) -> Tensor:
    """Return the labels of generated images, int64 [len(indices)]: functions of (image index, `labels`) alone.

    `labels` is "balanced" (index modulo the number of classes), "none" (the null class, which has the number after the last
    class's), or one class: its name, or its number where no class has that name.
    """
    if labels == BALANCED:
        return torch.arange(indices.start, indices.stop, dtype=torch.int64) % len(names)
    return torch.full((len(indices),), _index(labels, names), dtype=torch.int64)


def _index(label: str | int, names: ClassNames) -> int:
    if label == NONE:
        return len(names)
    if str(label) in names:  # a number is a name first: typed `2` and a file's 2 are one class
        return names.index(str(label))
    number = int(label) if str(label).isdecimal() else -1
    if 0 <= number < len(names):
        return number
    raise UsageError(
        f"labels: no class {str(label)!r}{nearest(str(label), list(names))}; give {BALANCED!r}, {NONE!r}, or one of "
        f"the {len(names)} classes by name or number: {_shown(names)}"
    )


def _shown(names: ClassNames) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
