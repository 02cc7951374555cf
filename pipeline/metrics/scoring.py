"""Scores of generated images, each with its identity and beside what real images and noise get by the same code.

extractor, reference = scorer.extractor, scorer.reference          # scorer = scorer_of(dataset, asked, home)
images = ...                                            # reference.num_images of them
scores = score(images, dataset, extractor, reference, Generation("ddim", steps=50))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config.experiment import EvaluationConfig
from pipeline.data.image_set import Images, ImageSet, Progress
from pipeline.data.labels import class_counts, class_names
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, RefusedError
from pipeline.metrics.classifier import CONFIDENT, Classifier, decide
from pipeline.metrics.classifier_store import MAX_SIZE, classifier_for
from pipeline.metrics.features import Extracted, FeatureExtractor, extract, in_batches
from pipeline.metrics.fid import Moments
from pipeline.metrics.inception import Inception
from pipeline.metrics.metric_identity import TRAIN, Generation, MetricIdentity
from pipeline.metrics.reference import Reference, prepare_reference
from pipeline.metrics.registry import METRICS, USUAL, MetricSettings, Pair, require_enough
from pipeline.metrics.scores import Scores, Spread
from pipeline.storage.home import features_dir
from pipeline.training.chunks import Runner, as_it_stands

YARDSTICKS = ("real_half", "uniform_noise")

_BATCH = 1000


def choose_extractor(
    dataset: ImageSet,
    cache_dir: Path,
    *,
    kind: str = "auto",
    inception_weights: str | None = None,
    download: bool = True,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> FeatureExtractor:
    """Return the extractor of this kind: "classifier", "inception", or "auto".

    `auto` is the classifier for small gray images of two classes or more, on which Inception means nothing. For all others it is
    Inception, or the classifier if Inception's weights are not available and the dataset allows one. Classifiers are cached in
    `cache_dir`.

    Raises:
        RefusedError: no classifier can judge this dataset.
        DataError: Inception's weights are missing and may not or cannot be downloaded, or the named file is another one.
    """
    manifest = dataset.manifest
    channels, height, width = manifest.shape
    small = manifest.has_labels and max(height, width) <= MAX_SIZE and np.count_nonzero(class_counts(dataset)) > 1
    if kind == "inception" or (kind == "auto" and not (small and channels == 1)):
        try:
            return Inception.load(inception_weights, download=download, device=device)
        except DataError:
            if kind == "inception" or inception_weights is not None or not small:
                raise
    return classifier_for(dataset, cache_dir, device=device, progress=progress)


@dataclass(frozen=True)
class Scorer:
    """The dataset of a model, the extractor for it, and the reference, which may be of another split."""

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
    """Return what an evaluation scores with; features of real images are cached in `home`, and cost almost nothing after the first time.

    The real images are those of `dataset`, for which the extractor is chosen, or of `against`: in either case `split` of their source.
    `device` is this process's, `computed_on` that of `runner`, by default the same.

    Raises:
        RefusedError, DataError: no extractor can judge this dataset as asked.
    """
    cache = features_dir(home)
    extractor = choose_extractor(
        dataset,
        cache,
        kind=asked.extractor,
        inception_weights=asked.inception_weights,
        download=download,
        device=device,
        progress=progress,
    )
    reference = prepare_reference(
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


def score(
    generated: Images | Extracted,
    dataset: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference,
    generation: Generation,
    *,
    metrics: Sequence[str] = ("fid", "kid"),
    settings: MetricSettings = USUAL,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score `reference.num_images` generated images, uint8 [n, C, H, W] or their features.

    `dataset` is the one that the extractor was chosen for, whose classes it may know; the reference may be of another split. `metrics`
    are names of METRICS; `seed` draws KID's subsets and the Inception Score's splits.

    Raises:
        RefusedError: another number of images than the reference is for, settings that need more of them, or a metric that this extractor
            cannot give.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise RefusedError(f"metric {unknown[0]!r} is not known, expected some of {', '.join(METRICS)}")
    n = reference.num_images
    require_enough(metrics, settings, num_real=len(reference.real.features), num_judged=n)
    found = generated if isinstance(generated, Extracted) else _extract(generated, extractor, progress)
    if len(found.features) != n:
        raise RefusedError(f"got {len(found.features)} generated images, expected {n}, as many as the reference is for")
    pairs = _pairs(found, reference)
    outcomes = {side: {name: METRICS[name](pair, seed, settings) for name in metrics} for side, pair in pairs.items()}
    identities: dict[str, MetricIdentity] = {}
    values: dict[str, float] = {}
    spreads: dict[str, Spread] = {}
    for name, outcome in outcomes["generated"].items():
        identity = identity_of(name, outcome.settings, dataset, extractor, reference, generation, num_images=n)
        for value_name, value in outcome.values.items():
            named = identity.named(value_name)
            identities[named.key], values[named.key] = named, value
            if value_name in outcome.spreads:
                spreads[named.key] = Spread(outcome.spreads[value_name], outcome.over)
    yardsticks = {
        side: {k: v for outcome in outcomes[side].values() for k, v in outcome.values.items()} for side in YARDSTICKS
    }
    confident, shares, unjudged = _judgement(pairs, dataset, extractor)
    return Scores(
        values,
        identities,
        spreads,
        yardsticks,
        confident,
        shares,
        pairs["generated"].judged_moments,
        reference.moments,
        unjudged,
    )


def _extract(images: Images, extractor: FeatureExtractor, progress: Progress | None) -> Extracted:
    total = len(images)
    report = None if progress is None else lambda done: progress("features of generated images", done, total)
    return extract(extractor, in_batches(images, _BATCH), report)


def _pairs(found: Extracted, reference: Reference) -> dict[str, Pair]:
    """Return the sets that are compared: the generated images, and the yardsticks."""
    real = reference.real.part(slice(reference.rest.count))  # none of the first ones by content is in `other`
    return {
        "generated": Pair(reference.real, found, reference.moments, Moments.of(found.features)),
        "real_half": Pair(real, reference.other, reference.rest, Moments.of(reference.other.features)),
        "uniform_noise": Pair(reference.real, reference.noise, reference.moments, Moments.of(reference.noise.features)),
    }


def identity_of(
    metric: str,
    settings: str,
    dataset: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference,
    generation: Generation,
    *,
    num_images: int,
) -> MetricIdentity:
    """Return everything that a value of a metric of `num_images` generated images depends on besides the model."""
    count = reference.moments.count if metric == "fid" else len(reference.real.features)
    rule = reference.rule if count == reference.moments.count else f"first {count} by content of {reference.rule}"
    return MetricIdentity(
        metric=metric,
        settings=settings,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize_rule(dataset.manifest.shape),
        num_images=num_images,
        num_reference=count,
        reference=rule,
        dataset=reference.dataset,
        generation=generation,
        split=reference.split,
    )


def _judgement(
    pairs: Mapping[str, Pair], dataset: ImageSet, extractor: FeatureExtractor
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Return the share of confident decisions on each side and the share of each class among the generated images, and the classes
    of the dataset that cannot be seen."""
    if not isinstance(extractor, Classifier):  # its classes are not the dataset's
        return {}, {}, ()
    decisions = {side: decide(pair.judged) for side, pair in pairs.items()}
    names = extractor.card.class_names
    choice, _ = decisions["generated"]
    shares = np.bincount(choice, minlength=len(names)) / len(choice)
    confident = {side: float((confidence > CONFIDENT).mean()) for side, (_, confidence) in decisions.items()}
    there = [name for name, count in zip(class_names(dataset), class_counts(dataset), strict=True) if count]
    unjudged = tuple(name for name in there if name not in names)
    return confident, dict(zip(names, shares.tolist(), strict=True)), unjudged
