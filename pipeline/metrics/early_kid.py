"""KID of a few images, measured while a model trains: unbiased for any number of images, so it can show early that a trial is hopeless."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.data.image_set import Images
from pipeline.data.shards import Dataset
from pipeline.metrics.features import extract, in_batches
from pipeline.metrics.fid import Moments
from pipeline.metrics.metric_identity import Generation, MetricIdentity, recorded_split
from pipeline.metrics.registry import METRICS, Pair
from pipeline.metrics.scoring import identity_of, scorer_of
from pipeline.training.device import Compute

_BATCH = 1000


@dataclass(frozen=True)
class EarlyKid:
    """A KID, the standard deviation over its subsets (they share images, so it gives no standard error), and its identity."""

    value: float
    std: float
    over: str
    identity: MetricIdentity

    def flat(self) -> dict[str, float]:
        """Return both figures by their recorded names, such as `kid_classifier_n256`."""
        return {self.identity.key: self.value, self.identity.named("kid_std").key: self.std}

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.identity.key,
            "value": self.value,
            "std": self.std,
            "std_over": self.over,
            "identity": self.identity.to_json(),
        }


def early_kid(
    experiment: Experiment, dataset: Dataset, home: Path, images: Images, generation: Generation, compute: Compute
) -> EarlyKid:
    """Return the KID of uint8 images [n, C, H, W], which were made by `generation`, against the experiment's reference.

    Extractor and real features are those of the evaluation; they are cached in `home`, and cost almost nothing after the first time.

    Raises:
        RefusedError, DataError: as the evaluation at the end.
    """
    split = recorded_split(experiment.data.split)
    scorer = scorer_of(dataset, experiment.evaluation, home, split=split, download=False, device=compute.device)
    extractor, reference = scorer.extractor, scorer.reference
    found = extract(extractor, in_batches(images, _BATCH))
    pair = Pair(reference.real, found, reference.moments, Moments.of(found.features))
    outcome = METRICS["kid"](pair, 0)
    identity = identity_of("kid", outcome.settings, dataset, extractor, reference, generation, num_images=len(images))
    return EarlyKid(outcome.values["kid"], outcome.spreads["kid"], outcome.over, identity)
