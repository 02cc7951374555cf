"""Convert the values of a column or array to classes: numbers, booleans, text and one-hot rows.

A class is named by its name; if labels are numbers, the number is the name. Numbers 0 .. K - 1 need no list of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

NO_LABELS = "none"  # value of --label-column: ingest without labels
BOOLEANS = ("false", "true")

_MANY_ROWS = 10
_ROW_NAME = re.compile(
    r"(?:.*_)?(?:id|idx|index|uid|uuid|key|row|number|no)|__index_level_\d+__|unnamed.*", re.IGNORECASE
)
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_LABEL_NAME = re.compile(
    r"labels?|class(?:es)?|targets?|categor(?:y|ies)|(?:category|class|label)_(?:id|idx|index)", re.IGNORECASE
)


@dataclass(frozen=True)
class Classes:
    """The classes of a column.

    Attributes:
        names: one name per class; None for labels 0 .. K - 1 without names.
        by_name: whether the labels are the names; if not, they are the numbers of the classes.
    """

    names: tuple[str, ...] | None
    by_name: bool = False

    def numbers(self, values: npt.NDArray[Any], where: str, first_row: int = 0) -> npt.NDArray[np.int64]:
        """Return class numbers, int64 [n], of integers, text or one-hot rows [n, K]; DataError names the first row without a class."""
        if values.ndim == 2 and values.shape[1] > 1:
            one_hot: npt.NDArray[np.int64] = values.argmax(axis=1)
            return one_hot
        labels = values.reshape(len(values))
        if self.by_name and self.names is not None:
            number_of = {name: number for number, name in enumerate(self.names)}
            numbers = np.array([number_of.get(str(label), -1) for label in labels.tolist()], dtype=np.int64)
            wrong, expected = numbers < 0, f"one of its {len(number_of)} classes"
        else:
            numbers = labels.astype(np.int64)
            wrong, expected = numbers < 0, "0 or more"
            if self.names is not None:
                wrong, expected = wrong | (numbers >= len(self.names)), f"0..{len(self.names) - 1}"
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{where}, row {first_row + row}: "
                f"label {labels.tolist()[row]!r}, expected {expected}: correct it, or give --label-column {NO_LABELS}"
            )
        return numbers


def classes_of(distinct: Iterable[Any]) -> Classes:
    """Return the classes of integers, booleans or text; `distinct` has each value at least once."""
    values = np.unique(np.asarray(list(distinct)))
    if values.dtype.kind == "b":
        return Classes(BOOLEANS)
    if values.dtype.kind in "iu":
        values = values[values >= 0]  # negative labels are refused later, with their row
        if np.array_equal(values, np.arange(len(values))):
            return Classes(None)
    return Classes(tuple(map(str, values)), by_name=True)


def is_one_hot(rows: npt.NDArray[Any]) -> bool:
    """Whether each of the rows [n, K] has a single 1 and is 0 elsewhere."""
    return (
        rows.ndim == 2
        and rows.shape[1] > 1
        and bool(((rows == 0) | (rows == 1)).all() and (np.count_nonzero(rows, axis=1) == 1).all())
    )


def names_rows(column: str, num_distinct: int, num_rows: int) -> bool:
    """Whether a column identifies rows, such as image_id, instead of labelling them: no value occurs twice.

    With few rows, the name of the column must look like an id, too.
    """
    return num_rows > 1 and num_distinct == num_rows and (num_rows >= _MANY_ROWS or bool(_ROW_NAME.fullmatch(column)))


def is_pandas_index(column: str) -> bool:
    """Whether a column is the index that pandas adds."""
    return bool(_PANDAS_INDEX.fullmatch(column))


def called_labels(columns: Iterable[str]) -> list[str]:
    """Return the columns with a typical name for labels: label, class, target, category, category_id, ..."""
    return [column for column in columns if _LABEL_NAME.fullmatch(column)]
