"""Scores of generated images, each with its identity and beside what real images and noise get by the same code.

scorer = scorer_of(dataset, asked, home)
images = ...                                            # scorer.reference.num_images of them
scores = score(scorer.extractor(images), scorer, Generation("ddim", steps=50))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.config.experiment import EXTRACTORS, EvaluationConfig, Experiment, OnnxConfig
from pipeline.data.image_set import Images, ImageSet, Progress
from pipeline.data.labels import class_counts, class_names
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, RefusedError
from pipeline.metrics.classifier import CONFIDENT, Classifier, decide
from pipeline.metrics.classifier_store import MAX_SIZE, classifier_for
from pipeline.metrics.features import Extracted, FeatureExtractor, extract, in_batches
from pipeline.metrics.fid import Moments, kid_with_error
from pipeline.metrics.inception import Inception
from pipeline.metrics.metric_identity import TRAIN, Generation, MetricIdentity, recorded_split
from pipeline.metrics.onnx_extractor import OnnxExtractor
from pipeline.metrics.reference import Reference, prepare_reference
from pipeline.metrics.registry import METRICS, Pair, require_enough
from pipeline.metrics.scores import Figures, Scores, Spread
from pipeline.storage.home import features_dir
from pipeline.training.chunks import Runner, as_it_stands
from pipeline.training.device import Compute

USUAL = EvaluationConfig()

_BATCH = 1000
_EARLY_REAL = 1000  # real images that a score while training compares with, or as many as are generated


def choose_extractor(
    dataset: ImageSet,
    cache_dir: Path,
    *,
    kind: str = "auto",
    inception_weights: str | None = None,
    onnx: OnnxConfig | None = None,
    download: bool = True,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> FeatureExtractor:
    """Return the extractor of this kind: "classifier", "inception", "auto", or the path of an ONNX file, used as `onnx` says.

    `auto` is the classifier for small gray images of two classes or more, on which Inception means nothing. For all others it is
    Inception, or the classifier if Inception's weights are not available and the dataset allows one. Classifiers are cached in
    `cache_dir`.

    Raises:
        RefusedError: no classifier can judge this dataset.
        DataError: Inception's weights are missing and may not or cannot be downloaded, or the named file is another one.
    """
    if kind not in EXTRACTORS:
        return OnnxExtractor(Path(kind), onnx or OnnxConfig())
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

    dataset: ImageSet
    extractor: FeatureExtractor
    reference: Reference

    def identity(self, metric: str, settings: str, generation: Generation, num_images: int) -> MetricIdentity:
        """Return everything that a value of a metric of `num_images` generated images depends on besides the model."""
        reference = self.reference
        count = reference.moments.count if metric == "fid" else len(reference.real.features)
        rule = reference.rule if count == reference.moments.count else f"first {count} by content of {reference.rule}"
        return MetricIdentity(
            metric=metric,
            settings=settings,
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize_rule(self.dataset.manifest.shape),
            num_images=num_images,
            num_reference=count,
            reference=rule,
            dataset=reference.dataset,
            generation=generation,
            split=reference.split,
        )


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
        onnx=asked.onnx,
        download=download,
        device=device,
        progress=progress,
    )
    if "is" in asked.metrics and not extractor.num_classes:
        raise RefusedError(
            f"evaluation.metrics: got is, which needs logits, but {extractor.name} has none; leave it out"
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
    found: Extracted,
    scorer: Scorer,
    generation: Generation,
    *,
    metrics: Sequence[str] = ("fid", "kid"),
    settings: EvaluationConfig = USUAL,
) -> Scores:
    """Score `reference.num_images` generated images by their features; `metrics` are names of METRICS.

    Raises:
        RefusedError: another number of images than the reference is for, or settings that need more of them.
    """
    reference = scorer.reference
    n = reference.num_images
    require_enough(metrics, settings, num_real=len(reference.real.features), num_judged=n)
    if len(found.features) != n:
        raise RefusedError(f"got {len(found.features)} generated images, expected {n}, as many as the reference is for")
    generated = _pair(found, reference)
    real = reference.real.part(slice(reference.rest.count))  # none of the first ones by content is in `other`
    yardsticks = {
        "real_half": Pair(real, reference.other, reference.rest, Moments.of(reference.other.features)),
        "uniform_noise": _pair(reference.noise, reference),
    }
    confident, shares, unjudged = _judgement({"generated": generated, **yardsticks}, scorer)
    return Scores(
        *_figures(generated, scorer, generation, metrics, settings),
        {side: _values(pair, metrics, settings) for side, pair in yardsticks.items()},
        confident,
        shares,
        generated.judged_moments,
        reference.moments,
        unjudged,
    )


def early_scorer(
    experiment: Experiment,
    dataset: Dataset,
    home: Path,
    num_images: int,
    compute: Compute,
    held_out: Dataset | None = None,
) -> Scorer:
    """Return what scores a few images while a model trains: against the images that validate, if there are enough, else those trained on.

    A training reference rewards memorising. Features of real images are cached in `home`, as those of the evaluation.

    Raises:
        RefusedError, DataError: as the evaluation at the end; RefusedError if the best checkpoints cannot be chosen by so few images.
    """
    against = partial(scorer_of, dataset, experiment.evaluation, home, download=False, device=compute.device)
    split, validation = recorded_split(experiment.data.split), experiment.validation.split
    scorer = None
    if held_out is not None:
        with suppress(RefusedError):  # too few
            scorer = against(
                split=recorded_split(validation) if validation else f"held out of {split}", against=held_out
            )
    scorer = scorer or against(split=split)
    best, least = experiment.checkpoint.keep_best, scorer.extractor.min_images
    if best is not None and best.metric == "fid" and num_images < least:
        raise RefusedError(
            f"checkpoint.keep_best.metric: got fid, which needs {least} images, and {num_images} are scored while training; "
            "take kid, or more evaluation.early_images"
        )
    few = scorer.reference.real.part(slice(max(num_images, _EARLY_REAL)))
    return replace(scorer, reference=replace(scorer.reference, real=few))


def early_score(scorer: Scorer, images: Images, generation: Generation) -> Figures:
    """Return the KID of a few images, uint8 [n, C, H, W], with its standard error, and their FID if n is enough for the extractor.

    This KID is unbiased for any number of images, so it shows early whether a model learns, and whether a trial is hopeless.
    """
    found = extract(scorer.extractor, in_batches(images, _BATCH))
    pair = _pair(found, scorer.reference)
    value, error = kid_with_error(pair.real.features, pair.judged.features)
    kid = scorer.identity("kid", "all pairs", generation, len(images))
    values, identities = {kid.key: value}, {kid.key: kid}
    if len(images) >= scorer.extractor.min_images:
        (fid, distance), *_ = METRICS["fid"](pair, USUAL).values.items()
        named = scorer.identity(fid, "", generation, len(images))
        values[named.key], identities[named.key] = distance, named
    spread = Spread(error, "images left out one by one (jackknife)", standard_error=error)
    return Figures(values, identities, {kid.key: spread})


def _pair(found: Extracted, reference: Reference) -> Pair:
    return Pair(reference.real, found, reference.moments, Moments.of(found.features))


def _figures(
    pair: Pair, scorer: Scorer, generation: Generation, metrics: Sequence[str], settings: EvaluationConfig
) -> tuple[dict[str, float], dict[str, MetricIdentity], dict[str, Spread]]:
    """Return values, identities and spreads by the values' names."""
    identities: dict[str, MetricIdentity] = {}
    values: dict[str, float] = {}
    spreads: dict[str, Spread] = {}
    for metric in metrics:
        outcome = METRICS[metric](pair, settings)
        identity = scorer.identity(metric, outcome.settings, generation, len(pair.judged.features))
        for name, value in outcome.values.items():
            named = identity.named(name)
            identities[named.key], values[named.key] = named, value
            if name in outcome.spreads:
                spreads[named.key] = Spread(outcome.spreads[name], outcome.over)
    return values, identities, spreads


def _values(pair: Pair, metrics: Sequence[str], settings: EvaluationConfig) -> dict[str, float]:
    return {name: value for metric in metrics for name, value in METRICS[metric](pair, settings).values.items()}


def _judgement(pairs: Mapping[str, Pair], scorer: Scorer) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Return the share of confident decisions on each side, the share of each class among the generated images, and the classes of the
    dataset that the classifier does not know."""
    dataset, extractor = scorer.dataset, scorer.extractor
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
