"""Choose the part of a source to ingest: splits by name, columns by type, unless the user names them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.errors import DataError, UsageError
from pipeline.ingest.label_values import NO_LABELS, called_labels

ALL_SPLITS = "all"
SPLITS = ("train", "validation", "test", "unlabeled")
_SPLIT_WORD = re.compile(
    r"(?:^|[_./=-])(?:(train|training)|(val|valid|validation|dev)|(test|testing)|(unlabell?ed))(?:\d{2,4})?(?=[_./-]|$)"
)


def split_of(name: str) -> str | None:
    """Return the split in the name of a file, folder or array, such as train-00000, val2017 or x_test: one of SPLITS, or None."""
    words = _SPLIT_WORD.search(name.lower())
    return None if words is None else next(s for s, word in zip(SPLITS, words.groups(), strict=True) if word)


def choose_split(names: Iterable[str], asked: str | None, where: str) -> tuple[str | None, str]:
    """Return the split to ingest and a note for the user: the requested one, else train, else the only one; None means everything.

    Raises:
        UsageError: the requested split does not exist, or none was requested and the choice is ambiguous.
    """
    found = {split_of(name) for name in names}
    there = [split for split in SPLITS if split in found]
    if asked is not None:
        if asked == ALL_SPLITS:
            return None, ""
        if split_of(asked) not in there:
            raise UsageError(f"{where} has no split {asked!r}: give one of {', '.join([*there, ALL_SPLITS])}")
        return split_of(asked), ""
    if not there:
        return None, ""
    if None in found or (len(there) > 1 and "train" not in there):
        more = " and more" if None in found else ""
        raise UsageError(f"{where} holds {', '.join(there)}{more}: name a split with --split, or --split {ALL_SPLITS}")
    taken = "train" if "train" in there else there[0]
    others = ", ".join(split for split in there if split != taken)
    return taken, f"taking split {taken!r} of {where} (also there: {others})" if others else ""


def pick_column(what: str, named: str | None, candidates: list[str], there: dict[str, str], where: str) -> str:
    """Return the column (or array) of `what`, "image" or "label": the named one, else the only candidate.

    `there` is the type of every column, in words.

    Raises:
        UsageError: several candidates and none is named, or the named one is not a candidate.
        DataError: there is no candidate.
    """
    listing = ", ".join(candidates) or "none"
    if named is not None and named not in candidates:
        problem = f"has no {what}s ({there[named]})" if named in there else "does not exist"
        raise UsageError(f"{where}: column {named!r} {problem}: columns of {what}s are {listing}")
    if named is not None:
        return named
    if not candidates:
        columns = ", ".join(f"{name} ({kind})" for name, kind in there.items()) or "none"
        raise DataError(f"{where} has no column of {what}s, its columns are {columns}: check the source")
    if len(candidates) > 1:
        raise UsageError(f"{where} has several columns of {what}s ({listing}): name one with --{what}-column")
    return candidates[0]


def pick_label(named: str | None, candidates: list[str], there: dict[str, str], where: str) -> str | None:
    """Return the label column as in `pick_column`, preferring a typical name; None without labels, or if they are not wanted."""
    if named == NO_LABELS or (named is None and not candidates):
        return None
    called = called_labels(candidates) if named is None else []
    return pick_column("label", named, called if len(called) == 1 else candidates, there, where)
