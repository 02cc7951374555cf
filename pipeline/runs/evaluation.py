"""What a model was found to be, as tables, files and figures of the tracking store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.image_set import Images, ImageSet
from pipeline.metrics.bound_report import Measured, write_measured
from pipeline.metrics.neighbours import Neighbours, write_neighbours
from pipeline.metrics.scores import Scores, write_scores
from pipeline.pictures.pictures import save_grid
from pipeline.tracking.text import YARDSTICK
from pipeline.tracking.tracker import Tracker


@dataclass(frozen=True)
class Scored:
    """Scores of generated images, and the first of these.

    `label` says how they were made and judged where that is not as the run samples and is judged: such figures cannot be
    compared with the run's own, and are tracked under names that end in it.
    """

    scores: Scores
    preview: Images
    label: str = ""


@dataclass(frozen=True)
class Sheet:
    """Generated images' closest training images, and the set that holds them."""

    neighbours: Neighbours
    dataset: ImageSet


@dataclass(frozen=True)
class Evaluation:
    """What a run's model at a step was found to be: scores of its samples, bits/dim of real images, each where asked for."""

    run: str
    step: int
    scored: Scored | None = None
    measured: Measured | None = None
    sheet: Sheet | None = None
    arithmetic: dict[str, Any] = field(default_factory=dict)  # of the images and bits/dim: device, threads, torch

    def to_json(self) -> dict[str, Any]:
        """Return all figures with their identities as plain data."""
        parts: list[dict[str, Any]] = []
        if self.measured is not None:
            parts.append(self.measured.to_json())
        if self.scored is not None:
            parts.append(self.scored.scores.to_json())
        joint: dict[str, Any] = self.about
        for part in parts:
            merged = {name: {**joint.get(name, {}), **part[name]} for name in ("values", "identities", "spreads")}
            joint |= {**part, **merged}
        if self.sheet is not None:
            joint["memorised_share"] = self.sheet.neighbours.memorised
        return joint

    @property
    def model(self) -> dict[str, Any]:
        """What is judged."""
        return {"run": self.run, "step": self.step}

    @property
    def about(self) -> dict[str, Any]:
        """What the files say of all figures: the model, and how it was computed."""
        return {"model": self.model, "arithmetic": self.arithmetic}


def write_evaluation(found: Evaluation, root: Path) -> list[Path]:
    """Write what was found, each part into a folder that is named by its identity and the model's step; return the files."""
    written: list[Path] = []
    if found.scored is not None:
        scores = found.scored.scores
        key, generation = next(iter(scores.identities)), next(iter(scores.identities.values())).generation
        # all of them: an evaluation by fewer metrics leaves the file of one by more as it is
        identities = [identity.to_json() for _, identity in sorted(scores.identities.items())]
        folder = root / f"{key}-{generation.sampler}{generation.steps}-{_digest(found.model, *identities)}"
        written += write_scores(scores, folder, found.about)
        save_grid(found.scored.preview, folder / "grid.png")
        written.append(folder / "grid.png")
        if found.sheet is not None:
            written += write_neighbours(found.sheet.neighbours, found.scored.preview, found.sheet.dataset, folder)
    if found.measured is not None:
        bound = found.measured.identity
        folder = root / f"{bound.key}-{_digest(found.model, bound.to_json())}"
        written += write_measured(found.measured, folder, found.about)
    return written


def record(tracker: Tracker, found: Evaluation, written: list[Path]) -> dict[str, float]:
    """Send figures to the tracking store, with the folders that hold them, and return the figures by their names.

    Yardsticks become tags: they are figures of the images, and do not change while a model is trained.
    """
    figures: dict[str, float] = {}
    if found.scored is not None:
        scores = found.scored.scores
        sides = {"generated": "confident", **{side: f"{YARDSTICK}{side}_confident" for side in scores.yardsticks}}
        confident = {sides[side]: share for side, share in scores.confident.items()}
        figures |= _labelled(scores.flat() | confident, found.scored.label)
    if found.measured is not None:
        figures |= _labelled(found.measured.flat(), found.measured.label)
    yardsticks = {name: str(value) for name, value in figures.items() if name.startswith(YARDSTICK)}
    tracker.metrics(found.step, {name: value for name, value in figures.items() if name not in yardsticks}, "score")
    if yardsticks:
        tracker.tags(yardsticks)
    for folder in dict.fromkeys(path.parent for path in written):
        tracker.artifact(folder, f"evaluations/{folder.name}")
    return figures


def _labelled(figures: dict[str, float], label: str) -> dict[str, float]:
    return {f"{name}/{label}" if label else name: value for name, value in figures.items()}


def _digest(*parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
