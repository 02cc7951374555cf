"""Figures with their identities and spreads; the scores of one set of generated images, and the files that hold them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.metrics.fid import Moments
from pipeline.metrics.metric_identity import LUCK, BoundIdentity, MetricIdentity, differing
from pipeline.storage.durable import write_atomically, write_json
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import pack

SCORES_FILE = "scores.json"
MOMENTS_FILE = "moments.safetensors"

_FORMAT = 2


@dataclass(frozen=True)
class Spread:
    """How far a value scatters: a standard deviation over `over`, such as "3 seeds" or "100 subsets of 279".

    Over seeds it is the sample's (ddof 1), and `parts` are the values; over subsets and splits it follows the metric's definition (ddof
    0); for a mean over images `value` is its standard error. `standard_error` is that of the mean, if known: subsets and splits share
    images, so their deviations give none.
    """

    value: float
    over: str
    parts: tuple[float, ...] = ()
    standard_error: float | None = None

    @property
    def suffix(self) -> str:
        """The end of the value's name: `se` if it is itself the standard error of a mean, else `std`."""
        return "se" if self.standard_error is not None and not self.parts else "std"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spread:
        return cls(**{**data, "parts": tuple(data["parts"])})


@dataclass(frozen=True)
class Figures:
    """Values by the name that tells them apart (`MetricIdentity.key`), their identities, and the spreads of those that have one."""

    values: dict[str, float]
    identities: Mapping[str, MetricIdentity | BoundIdentity]
    spreads: dict[str, Spread]

    def flat(self) -> dict[str, float]:
        """Return all numbers by the names that a tracking server gets."""
        numbers = dict(self.values)
        for key, spread in self.spreads.items():
            identity = self.identities[key]
            numbers[identity.named(f"{identity.metric}_{spread.suffix}").key] = spread.value
        return numbers

    def to_json(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "identities": {key: identity.to_json() for key, identity in self.identities.items()},
            "spreads": {key: asdict(spread) for key, spread in self.spreads.items()},
        }


@dataclass(frozen=True)
class Scores(Figures):
    """The scores of one set of generated images.

    Attributes:
        yardsticks: "real_half" (real images against other real ones) and "uniform_noise", each {metric: value}.
        confident: share of images with a classifier confidence above 0.9: "generated", "real_half", "uniform_noise";
            empty for an extractor that does not know the dataset's classes.
        class_shares: share of the generated images per class, by the classifier's first choice; empty likewise.
        generated, reference: moments that FID compared; of several seeds those of the first.
        unjudged: classes of the dataset that the classifier was not fitted on, and cannot recognise.
    """

    identities: dict[str, MetricIdentity]
    yardsticks: dict[str, dict[str, float]]
    confident: dict[str, float]
    class_shares: dict[str, float]
    generated: Moments
    reference: Moments
    unjudged: tuple[str, ...] = ()

    def flat(self) -> dict[str, float]:
        """Return all numbers by the names that a tracking server gets, yardsticks as `yardstick_real_half_fid_classifier_n559`."""
        numbers = super().flat()
        by_metric = {identity.metric: key for key, identity in self.identities.items()}
        for name, values in self.yardsticks.items():
            numbers |= {f"yardstick_{name}_{by_metric[metric]}": value for metric, value in values.items()}
        return numbers

    def to_json(self) -> dict[str, Any]:
        """Return everything but the moments as plain data."""
        return {
            "format": _FORMAT,
            **super().to_json(),
            "yardsticks": self.yardsticks,
            "confident": self.confident,
            "class_shares": self.class_shares,
            "unjudged_classes": list(self.unjudged),
        }


def over_seeds(each: Sequence[Scores]) -> Scores:
    """Return the mean of the scores of several seeds, otherwise alike, with the deviation over them.

    Scores of one seed are returned as they are. ValueError if more than the seed differs.
    """
    first, count = each[0], len(each)
    if count == 1:
        return first
    seeds = [next(iter(scores.identities.values())).generation.seed for scores in each]
    if seeds != list(range(seeds[0], seeds[0] + count)):
        raise ValueError(f"scores of seeds {seeds}, expected consecutive ones")
    values, identities, spreads = {}, {}, {}
    for key, identity in first.identities.items():
        if any(differing(identity.to_json(), scores.identities[key].to_json(), LUCK) for scores in each):
            raise ValueError(f"{key}: more than the seed differs")
        joint = replace(identity, generation=replace(identity.generation, num_seeds=count))
        parts = tuple(scores.values[key] for scores in each)
        values[joint.key], identities[joint.key] = statistics.fmean(parts), joint
        deviation = statistics.stdev(parts)
        spreads[joint.key] = Spread(deviation, f"{count} seeds", parts, deviation / math.sqrt(count))
    return replace(
        first,
        values=values,
        identities=identities,
        spreads=spreads,
        confident=_means([scores.confident for scores in each]),
        class_shares=_means([scores.class_shares for scores in each]),
    )


def _means(each: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(shares[name] for shares in each) for name in each[0]}


def write_scores(scores: Scores, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write `scores.json`, with `about` as further keys, and `moments.safetensors` to a folder; return their paths."""
    make_folder(folder)
    plain = scores.to_json()
    arrays = scores.generated.to_arrays("generated") | scores.reference.to_arrays("reference")
    write_json(folder / SCORES_FILE, {**about, **plain})
    write_atomically(folder / MOMENTS_FILE, pack(arrays, {"identities": plain["identities"]}))
    return [folder / SCORES_FILE, folder / MOMENTS_FILE]
