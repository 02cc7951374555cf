"""A KID of few images, taken while a model trains: unbiased at any count, so that it can tell early which trial is hopeless."""

from __future__ import annotations

from pathlib import Path

from pipeline import scoring
from pipeline.config import Experiment
from pipeline.device import Compute
from pipeline.features import extract, in_batches
from pipeline.fid import Moments
from pipeline.home import datasets_dir
from pipeline.image_set import Images
from pipeline.metrics import METRICS, Pair
from pipeline.shards import Dataset

_BATCH = 1000


def early_kid(
    experiment: Experiment, dataset: Dataset, home: Path, images: Images, compute: Compute
) -> tuple[str, float]:
    """Return the KID of uint8 images [n, C, H, W] against the experiment's reference, and the name it is recorded under.

    Extractor and real features are those of the evaluation; they are kept in `home`, and are nearly free after the first time.

    Raises:
        RefusedError, DataError: as the evaluation at the end would.
    """
    asked = experiment.evaluation
    cache = datasets_dir(home) / "features"
    extractor = scoring.choose_extractor(
        dataset,
        cache,
        kind=asked.extractor,
        inception_weights=asked.inception_weights,
        download=False,
        device=compute.device,
    )
    reference = scoring.prepare_reference(dataset, extractor, asked.num_images, cache)
    found = extract(extractor, in_batches(images, _BATCH))
    pair = Pair(reference.real, found, reference.moments, Moments.of(found.features))
    return f"kid_{extractor.name}_n{len(images)}", METRICS["kid"](pair, 0).values["kid"]
