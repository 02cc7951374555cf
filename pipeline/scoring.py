"""Scores of generated images, each with its identity and beside what real images and noise get by the same code.

extractor = choose_extractor(dataset, cache_dir)
reference = prepare_reference(dataset, extractor, num_images, cache_dir)
images = ...                                            # reference.num_images of them
scores = score(images, dataset, extractor, reference, Generation("ddim", steps=50))
write_scores(scores, folder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.classifier import CONFIDENT, decide
from pipeline.classifier_store import MAX_SIZE, class_names, classifier_for
from pipeline.durable import write_atomically
from pipeline.errors import DataError, RefusedError
from pipeline.features import Extracted, FeatureExtractor, extract, in_batches
from pipeline.fid import Moments
from pipeline.home import make_folder
from pipeline.image_set import Images, ImageSet, Progress
from pipeline.inception import Inception
from pipeline.metric_identity import Generation, MetricIdentity, differences
from pipeline.metrics import METRICS, Pair
from pipeline.reference import Reference, prepare_reference
from pipeline.tensor_file import pack, unpack

__all__ = [
    "METRICS",
    "YARDSTICKS",
    "Generation",
    "MetricIdentity",
    "Reference",
    "Scores",
    "choose_extractor",
    "differences",
    "prepare_reference",
    "read_scores",
    "score",
    "write_scores",
]

YARDSTICKS = ("real_half", "uniform_noise")

SCORES_FILE = "scores.json"
MOMENTS_FILE = "moments.safetensors"

_FORMAT = 1
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

    `auto` is the classifier for small gray images with labels, on which Inception means nothing; for all others
    Inception, or, where its weights cannot be had, the classifier if the dataset allows one. Classifiers are kept in
    `cache_dir`.

    Raises:
        RefusedError: no classifier can judge this dataset.
        DataError: Inception's weights are missing and may not or cannot be downloaded.
    """
    manifest = dataset.manifest
    channels, height, width = manifest.shape
    small = manifest.has_labels and max(height, width) <= MAX_SIZE
    if kind == "inception" or (kind == "auto" and not (small and channels == 1)):
        try:
            return Inception.load(inception_weights, download=download, device=device)
        except DataError:
            if kind == "inception" or not small:
                raise
    return classifier_for(dataset, cache_dir, device=device, progress=progress)


@dataclass(frozen=True)
class Scores:
    """The scores of one set of generated images.

    Attributes:
        values: by the name that tells them apart, `MetricIdentity.key`.
        identities: of each value, by the same name.
        yardsticks: "real_half" (real images against other real ones) and "uniform_noise", each {metric: value}.
        confident: share of images with a classifier confidence above 0.9: "generated", "real_half", "uniform_noise";
        empty
            for an extractor that does not know the dataset's classes.
        class_shares: share of the generated images per class, by the classifier's first choice; empty likewise.
        generated, reference: moments that FID compared.
    """

    values: dict[str, float]
    identities: dict[str, MetricIdentity]
    yardsticks: dict[str, dict[str, float]]
    confident: dict[str, float]
    class_shares: dict[str, float]
    generated: Moments
    reference: Moments

    def flat(self) -> dict[str, float]:
        """Return all numbers under names fit for a tracking server, yardsticks as `yardstick_real_half_fid_classifier_n559`."""
        numbers = dict(self.values)
        by_metric = {identity.metric: key for key, identity in self.identities.items()}
        for name, values in self.yardsticks.items():
            numbers |= {f"yardstick_{name}_{by_metric[metric]}": value for metric, value in values.items()}
        return numbers

    def to_json(self) -> dict[str, Any]:
        """Return everything but the moments as plain data."""
        return {
            "format": _FORMAT,
            "values": self.values,
            "identities": {key: identity.to_json() for key, identity in self.identities.items()},
            "yardsticks": self.yardsticks,
            "confident": self.confident,
            "class_shares": self.class_shares,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], generated: Moments, reference: Moments) -> Scores:
        """Read what `to_json` gave."""
        identities = {key: MetricIdentity.from_json(value) for key, value in data["identities"].items()}
        return cls(
            data["values"],
            identities,
            data["yardsticks"],
            data["confident"],
            data["class_shares"],
            generated,
            reference,
        )


def score(
    generated: Images | Extracted,
    dataset: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference,
    generation: Generation,
    *,
    metrics: Sequence[str] = ("fid", "kid"),
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score `reference.num_images` generated images, uint8 [n, C, H, W] or their features.

    `metrics` are names of METRICS; `seed` draws KID's subsets and the Inception Score's splits.

    Raises:
        RefusedError: another number of images than the reference is for, or a metric that this extractor cannot give.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise RefusedError(f"metric {unknown[0]!r} is not known, expected some of {', '.join(METRICS)}")
    found = generated if isinstance(generated, Extracted) else _extract(generated, extractor, progress)
    n = reference.num_images
    if len(found.features) != n:
        raise RefusedError(f"got {len(found.features)} generated images, expected {n}, as many as the reference is for")
    pairs = _pairs(found, reference)
    outcomes = {side: {name: METRICS[name](pair, seed) for name in metrics} for side, pair in pairs.items()}
    identities: dict[str, MetricIdentity] = {}
    values: dict[str, float] = {}
    for name, outcome in outcomes["generated"].items():
        identity = _identity(name, outcome.settings, dataset, extractor, reference, generation)
        for value_name, value in outcome.values.items():
            named = identity.named(value_name)
            identities[named.key], values[named.key] = named, value
    yardsticks = {
        side: {k: v for outcome in outcomes[side].values() for k, v in outcome.values.items()} for side in YARDSTICKS
    }
    confident, shares = _judgement(pairs, dataset, extractor)
    return Scores(
        values, identities, yardsticks, confident, shares, pairs["generated"].judged_moments, reference.moments
    )


def write_scores(scores: Scores, folder: Path) -> list[Path]:
    """Write `scores.json` and `moments.safetensors` to a folder, and return their paths."""
    make_folder(folder)
    identities = {key: identity.to_json() for key, identity in scores.identities.items()}
    arrays = {
        f"{name}.{field}": np.asarray(getattr(moments, field))
        for name, moments in (("generated", scores.generated), ("reference", scores.reference))
        for field in ("count", "mean", "scatter")
    }
    files = {
        SCORES_FILE: (json.dumps(scores.to_json(), indent=1) + "\n").encode(),
        MOMENTS_FILE: pack(arrays, {"identities": identities}),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def read_scores(folder: Path) -> Scores:
    """Read what `write_scores` wrote; DataError where it is missing or damaged."""
    try:
        data = json.loads((folder / SCORES_FILE).read_bytes())
        _, arrays = unpack((folder / MOMENTS_FILE).read_bytes())
        generated, reference = (
            Moments(int(arrays[f"{name}.count"]), arrays[f"{name}.mean"], arrays[f"{name}.scatter"])
            for name in ("generated", "reference")
        )
        return Scores.from_json(data, generated, reference)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: no scores that can be read ({str(error).splitlines()[0]}); evaluate again"
        ) from None


def _extract(images: Images, extractor: FeatureExtractor, progress: Progress | None) -> Extracted:
    total = len(images)
    report = None if progress is None else lambda done: progress("features of generated images", done, total)
    return extract(extractor, in_batches(images, _BATCH), report)


def _pairs(found: Extracted, reference: Reference) -> dict[str, Pair]:
    """Return what is compared with what: the generated images, and the yardsticks."""
    real = reference.real.part(slice(reference.rest.count))  # none of the first ones by content is in `other`
    return {
        "generated": Pair(reference.real, found, reference.moments, Moments.of(found.features)),
        "real_half": Pair(real, reference.other, reference.rest, Moments.of(reference.other.features)),
        "uniform_noise": Pair(reference.real, reference.noise, reference.moments, Moments.of(reference.noise.features)),
    }


def _identity(
    metric: str,
    settings: str,
    dataset: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference,
    generation: Generation,
) -> MetricIdentity:
    count = reference.moments.count if metric == "fid" else len(reference.real.features)
    rule = reference.rule if count == reference.moments.count else f"first {count} by content of {reference.rule}"
    return MetricIdentity(
        metric=metric,
        settings=settings,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize_rule(dataset.manifest.shape),
        num_images=reference.num_images,
        num_reference=count,
        reference=rule,
        dataset=dataset.manifest.fingerprint,
        generation=generation,
    )


def _judgement(
    pairs: Mapping[str, Pair], dataset: ImageSet, extractor: FeatureExtractor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the share of confident decisions on each side and the share of each class among the generated images."""
    if extractor.fit_rule is None:  # its classes are not the dataset's
        return {}, {}
    decisions = {side: decide(pair.judged) for side, pair in pairs.items()}
    names = class_names(dataset)
    choice, _ = decisions["generated"]
    shares = np.bincount(choice, minlength=len(names)) / len(choice)
    confident = {side: float((confidence > CONFIDENT).mean()) for side, (_, confidence) in decisions.items()}
    return confident, dict(zip(names, shares.tolist(), strict=True))
