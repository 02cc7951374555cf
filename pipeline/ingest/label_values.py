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
        values: the value of each class, in the order of `names`; None if the values are the class numbers.
    """

    names: tuple[str, ...] | None
    values: npt.NDArray[Any] | None = None

    def numbers(self, values: npt.NDArray[Any], where: str, first_row: int = 0) -> npt.NDArray[np.int64]:
        """Return class numbers, int64 [n], of integers, text or one-hot rows [n, K]; DataError names the first row without a class."""
        if values.ndim == 2 and values.shape[1] > 1:
            one_hot: npt.NDArray[np.int64] = values.argmax(axis=1)
            return one_hot
        if values.dtype.kind in "OUT":
            return self._of_text(values, where, first_row)
        numbers = values.reshape(len(values)).astype(np.int64)
        end = len(self.names) if self.values is None and self.names else np.inf
        wrong = np.flatnonzero((numbers < 0) | (numbers >= end))
        if len(wrong):
            expected = "0 or more" if end == np.inf else f"0..{end - 1}"
            raise DataError(
                f"{where}, row {first_row + int(wrong[0])}: label {numbers[wrong[0]]}, expected {expected}: "
                f"correct it, or give --label-column {NO_LABELS}"
            )
        return numbers if self.values is None else np.searchsorted(self.values, numbers).astype(np.int64)

    def _of_text(self, values: npt.NDArray[Any], where: str, first_row: int) -> npt.NDArray[np.int64]:
        index = {name: number for number, name in enumerate(self.names or ())}
        numbers = np.array([index.get(str(name), -1) for name in values.tolist()], dtype=np.int64)
        if (numbers < 0).any():
            row = int(np.flatnonzero(numbers < 0)[0])
            raise DataError(
                f"{where}, row {first_row + row}: label {str(values[row])!r}, expected one of its {len(index)} classes: correct it, or "
                f"give --label-column {NO_LABELS}"
            )
        return numbers


def classes_of(distinct: Iterable[Any]) -> Classes:
    """Return the classes of integers, booleans or text; `distinct` has each value at least once."""
    values = np.unique(np.asarray(list(distinct)))
    if values.dtype.kind == "b":
        return Classes(BOOLEANS)
    if values.dtype.kind not in "iu":
        return Classes(tuple(str(value) for value in values))
    values = values[values >= 0].astype(np.int64)  # negative labels are refused later, with their row
    if np.array_equal(values, np.arange(len(values))):
        return Classes(None)
    return Classes(tuple(str(value) for value in values), values)


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
