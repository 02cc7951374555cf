"""The scores of a model while it trains: a line in a file of its run for each step that was scored, written before anything acts on it.

Which checkpoints are kept, which one is the best, and which trials of a sweep stop early, follows from this file alone, so that a kill
between any two writes changes none of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.durable import checked_line, read_line

FILE = "judgements.jsonl"


@dataclass(frozen=True)
class ScoredStep:
    """A value by its whole name, such as `kid_classifier_n256`, at a step; `checkpoint` is that step's, "" if none was saved."""

    step: int
    name: str
    value: float
    checkpoint: str


def note(run_folder: Path, judgement: dict[str, Any]) -> Path:
    """Add a judgement (`rung`, `step`, `checkpoint`, `values`, `identities`, `spreads`), and return the file."""
    path = run_folder / FILE
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # after a line that a kill cut short
        file.write(checked_line(judgement))
        file.flush()
        os.fsync(file.fileno())
    return path


def values_by_rung(run_folder: Path) -> dict[float, float]:
    """Return the newest KID at each rung of a sweep's trial."""
    found = {}
    for judgement in _read(run_folder):
        for _, value in _of_metric(judgement, "kid"):
            found[judgement["rung"]] = value
    found.pop(None, None)  # steps that are scored for the curve alone
    return found


def is_scored(run_folder: Path, checkpoint: str) -> bool:
    """Whether the model in a checkpoint, given by its name, has been scored."""
    return any(judgement["checkpoint"] == checkpoint for judgement in _read(run_folder))


def curve(run_folder: Path, metric: str) -> list[ScoredStep]:
    """Return the values of a metric, steps ascending: of each step the newest, and only those that are scored as the newest of all is."""
    kind: dict[str, Any] | None = None
    found: dict[int, ScoredStep] = {}
    for judgement in reversed(list(_read(run_folder))):
        for name, value in _of_metric(judgement, metric):
            identity = judgement["identities"][name]
            kind = kind or identity
            if identity == kind and math.isfinite(value):
                step = judgement["step"]
                found.setdefault(step, ScoredStep(step, name, value, judgement["checkpoint"]))
    return [found[step] for step in sorted(found)]


def best_first(run_folder: Path, metric: str) -> list[ScoredStep]:
    """Return the steps of the curve by their value, the best first; of equal values the earlier."""
    return sorted(curve(run_folder, metric), key=lambda scored: (scored.value, scored.step))


def _of_metric(judgement: dict[str, Any], metric: str) -> Iterator[tuple[str, float]]:
    for name, identity in judgement["identities"].items():
        if identity["metric"] == metric:
            yield name, judgement["values"][name]


def _read(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the judgements, oldest first; a line that is damaged, or that a kill cut short, is skipped."""
    path = run_folder / FILE
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            judgement = read_line(line)
        except ValueError:
            continue
        yield judgement
