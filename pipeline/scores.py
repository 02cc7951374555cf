"""The scores of one set of generated images, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.durable import write_atomically
from pipeline.errors import DataError
from pipeline.fid import Moments
from pipeline.home import make_folder
from pipeline.metric_identity import MetricIdentity
from pipeline.tensor_file import pack, unpack

SCORES_FILE = "scores.json"
MOMENTS_FILE = "moments.safetensors"

_FORMAT = 1


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


def write_scores(scores: Scores, folder: Path) -> list[Path]:
    """Write `scores.json` and `moments.safetensors` to a folder, and return their paths."""
    make_folder(folder)
    identities = {key: identity.to_json() for key, identity in scores.identities.items()}
    arrays = scores.generated.to_arrays("generated") | scores.reference.to_arrays("reference")
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
        generated, reference = (Moments.from_arrays(arrays, name) for name in ("generated", "reference"))
        return Scores.from_json(data, generated, reference)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: no scores that can be read ({str(error).splitlines()[0]}); evaluate again"
        ) from None
