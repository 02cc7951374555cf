"""What judges generated images of a dataset: an extractor, and the reference that it has of real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.experiment import EvaluationConfig
from pipeline.data.image_set import Progress
from pipeline.data.shards import Dataset
from pipeline.metrics import scoring
from pipeline.metrics.features import FeatureExtractor
from pipeline.metrics.metric_identity import TRAIN
from pipeline.metrics.reference import Reference
from pipeline.storage.home import features_dir
from pipeline.training.chunks import Runner, as_it_stands


@dataclass(frozen=True)
class Scorer:
    """What images of a model of a dataset are judged by; the reference may be of another split than that."""

    dataset: Dataset
    extractor: FeatureExtractor
    reference: Reference


def scorer_of(
    dataset: Dataset,
    asked: EvaluationConfig,
    home: Path,
    *,
    split: str = TRAIN,
    against: Dataset | None = None,
    download: bool = True,
    device: torch.device | None = None,
    computed_on: torch.device | None = None,
    runner: Runner = as_it_stands,
    progress: Progress | None = None,
) -> Scorer:
    """Return what an evaluation judges by; what it takes of real images is kept in `home`, and nearly free after the first time.

    The real images are those of `dataset`, for which the extractor is chosen, or `against`: in either case `split` of their source.
    `device` is this process's, `computed_on` that of `runner`, by default the same.

    Raises:
        RefusedError, DataError: nothing can judge this dataset as asked.
    """
    cache = features_dir(home)
    extractor = scoring.choose_extractor(
        dataset,
        cache,
        kind=asked.extractor,
        inception_weights=asked.inception_weights,
        download=download,
        device=device,
        progress=progress,
    )
    reference = scoring.prepare_reference(
        against or dataset,
        extractor,
        asked.num_images,
        cache,
        split=split,
        computed_on=computed_on or device,
        runner=runner,
        progress=progress,
    )
    return Scorer(dataset, extractor, reference)
