"""What a score is a score of. Two numbers may be compared only where everything but the model is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Generation:
    """How the generated images came about.

    Attributes:
        sampler: "ddim", "ancestral", ...
        steps: network calls per image.
        spacing: which timesteps they are.
        eta: of DDIM.
        weights: "ema" or "raw".
        seed: of the images' noise.
        chunk: images per network call.
    """

    sampler: str
    steps: int
    spacing: str = "trailing"
    eta: float = 0.0
    weights: str = "ema"
    seed: int = 0
    chunk: int = 100


@dataclass(frozen=True)
class MetricIdentity:
    """Everything that a value of a sample metric depends on besides the model.

    Attributes:
        metric: "fid", "kid", ...
        settings: of the metric itself, such as KID's subsets; "" where it has none.
        extractor, extractor_sha256: the network whose features are compared.
        resize: what is done to an image before that network.
        num_images: generated images.
        num_reference: real images they are compared with.
        reference: which real images those are.
        dataset: fingerprint of the dataset they come from.
        generation: how the generated images came about.
    """

    metric: str
    settings: str
    extractor: str
    extractor_sha256: str
    resize: str
    num_images: int
    num_reference: int
    reference: str
    dataset: str
    generation: Generation

    @property
    def key(self) -> str:
        """Name under which the value is logged: metric, extractor and count, as in `fid_classifier_n559`."""
        return f"{self.metric}_{self.extractor}_n{self.num_images}"

    def named(self, metric: str) -> MetricIdentity:
        """Return the identity of a value that comes with this one, such as a standard deviation."""
        return replace(self, metric=metric)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads back to an equal identity."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MetricIdentity:
        """Read what `to_json` gave; TypeError where a field is missing or unknown."""
        return cls(**{**data, "generation": Generation(**data["generation"])})


def differences(a: MetricIdentity, b: MetricIdentity) -> list[str]:
    """Return one line "field: a's value, b's value" per field that differs; values of the two compare only if it is empty."""
    left, right = _flat(a), _flat(b)
    return [f"{name}: {left[name]}, {right[name]}" for name in left if left[name] != right[name]]


def _flat(identity: MetricIdentity) -> dict[str, Any]:
    generation = {f"generation.{f.name}": getattr(identity.generation, f.name) for f in fields(Generation)}
    return {f.name: getattr(identity, f.name) for f in fields(MetricIdentity) if f.name != "generation"} | generation
