"""What judges the images of a run: its dataset, an extractor, and the reference."""

from __future__ import annotations

import torch

from pipeline.console import Console, Rate
from pipeline.data.image_set import Progress
from pipeline.data.shards import Dataset
from pipeline.errors import DataError
from pipeline.metrics.judge import Judge, judge_of
from pipeline.settings.config import EvaluationConfig
from pipeline.storage.chunks import Runner, as_it_stands
from pipeline.storage.runs import Run
from pipeline.training.trained import profile_of


def find_judge(
    run: Run,
    asked: EvaluationConfig,
    device: torch.device,
    console: Console,
    *,
    download: bool,
    runner: Runner = as_it_stands,
) -> Judge:
    """Return extractor and reference for a run's dataset; DataError or RefusedError says why there is none."""
    return judge_of(
        open_images(run, "to compare with"),
        asked,
        run.folder.parent.parent,
        download=download,
        device=device,
        runner=runner,
        progress=progress_on(console),
    )


def open_images(run: Run, purpose: str) -> Dataset:
    """Open the images that a run was trained on; DataError, naming what they are wanted for, where it was imported without any."""
    path = run.record.dataset["path"]
    if not path:
        raise DataError(
            f"run {run.id} was imported without images {purpose}; import it again with: "
            f"ddpm-pipe import {run.record.imported_from} --data SOURCE"
        )
    return Dataset.open(path, profile_of(run, None).cache)


def progress_on(console: Console) -> Progress:
    """Return a callback that shows a progress line for each thing that is done."""
    rates: dict[str, Rate] = {}

    def show(what: str, done: int, total: int) -> None:
        rates.setdefault(what, Rate(console, what, total))(done)

    return show
