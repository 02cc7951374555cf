"""What judges the images of a run: its dataset, an extractor, and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.console import Console, Rate
from pipeline.data.image_set import Progress
from pipeline.data.shards import Dataset
from pipeline.errors import DataError
from pipeline.metrics import scoring
from pipeline.metrics.features import FeatureExtractor
from pipeline.metrics.reference import Reference
from pipeline.settings.config import EvaluationConfig
from pipeline.storage.chunks import Runner, as_it_stands
from pipeline.storage.home import datasets_dir
from pipeline.storage.runs import Run
from pipeline.training.trained import profile_of


@dataclass(frozen=True)
class Judge:
    """What images of a dataset are judged by."""

    dataset: Dataset
    extractor: FeatureExtractor
    reference: Reference


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
    path = run.record.dataset["path"]
    if not path:
        raise DataError(
            f"run {run.id} was imported without images to compare with; import it again with: "
            f"ddpm-pipe import {run.record.imported_from} --data SOURCE"
        )
    dataset = Dataset.open(path, profile_of(run, None).cache)
    cache = features_dir(run)
    progress = progress_on(console)
    extractor = scoring.choose_extractor(
        dataset,
        cache,
        kind=asked.extractor,
        inception_weights=asked.inception_weights,
        download=download,
        device=device,
        progress=progress,
    )
    reference = scoring.prepare_reference(dataset, extractor, asked.num_images, cache, runner=runner, progress=progress)
    return Judge(dataset, extractor, reference)


def features_dir(run: Run) -> Path:
    """Return the folder of what is known of real images: it serves all runs of a home."""
    return datasets_dir(run.folder.parent.parent) / "features"


def progress_on(console: Console) -> Progress:
    """Return a callback that shows a progress line for each thing that is done."""
    rates: dict[str, Rate] = {}

    def show(what: str, done: int, total: int) -> None:
        rates.setdefault(what, Rate(console, what, total))(done)

    return show
