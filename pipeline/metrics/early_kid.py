"""A KID of few images, taken while a model trains: unbiased at any count, so that it can tell early which trial is hopeless."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.image_set import Images
from pipeline.data.shards import Dataset
from pipeline.metrics.features import extract, in_batches
from pipeline.metrics.fid import Moments
from pipeline.metrics.judge import judge_of
from pipeline.metrics.registry import METRICS, Pair
from pipeline.settings.config import Experiment
from pipeline.training.device import Compute

_BATCH = 1000


def early_kid(
    experiment: Experiment, dataset: Dataset, home: Path, images: Images, compute: Compute
) -> tuple[str, float]:
    """Return the KID of uint8 images [n, C, H, W] against the experiment's reference, and the name it is recorded under.

    Extractor and real features are those of the evaluation; they are kept in `home`, and are nearly free after the first time.

    Raises:
        RefusedError, DataError: as the evaluation at the end would.
    """
    judge = judge_of(dataset, experiment.evaluation, home, download=False, device=compute.device)
    extractor, reference = judge.extractor, judge.reference
    found = extract(extractor, in_batches(images, _BATCH))
    pair = Pair(reference.real, found, reference.moments, Moments.of(found.features))
    return f"kid_{extractor.name}_n{len(images)}", METRICS["kid"](pair, 0).values["kid"]
