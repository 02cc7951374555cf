"""The identity of a score: what it is a score of. Two numbers compare only if everything but the model is the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.ingest.choice import split_of
from pipeline.storage.retention import LAST

TRAIN = "train"  # the split of images whose source names none


def recorded_split(asked: str | None) -> str:
    """Return the recorded name of a split: "validation" for "val"."""
    return TRAIN if asked is None else split_of(asked) or asked


@dataclass(frozen=True)
class Generation:
    """How the generated images were made.

    Attributes:
        sampler: "ddim", "ancestral", ...
        steps: sampling steps.
        spacing: which timesteps they are; "quad_of_200" if some of 200 fell on one index.
        eta: of DDIM.
        weights: "ema", "ema:0.999", "raw", "posthoc:0.1" (pipeline/training/averages.py).
        seed: of the images' noise.
        chunk: images per network call.
        num_seeds: values are means over this many seeds, of which `seed` is the first.
        guidance_scale: of classifier-free guidance, s = 1 + w; 1 is none, and other scales call the network twice a step.
        labels: "#balanced", "#none" or a class's name; "" for a model that knows no classes.
        precision: of the network, "bf16" or "fp32".
        compile: whether the network was compiled.
        selection: how the checkpoint was chosen: LAST, or "best of 12 by kid_classifier_n256", which is biased by its choice.
    """

    sampler: str
    steps: int
    spacing: str = "trailing"
    eta: float = 0.0
    weights: str = "ema"
    seed: int = 0
    chunk: int = 32
    num_seeds: int = 1
    guidance_scale: float = 1.0
    labels: str = ""
    precision: str = "fp32"
    compile: bool = False
    selection: str = LAST

    @property
    def nfe(self) -> int:
        """Network calls for one image."""
        return self.steps * (1 if self.guidance_scale == 1 else 2)


@dataclass(frozen=True)
class MetricIdentity:
    """Everything that a value of a sample metric depends on besides the model.

    Attributes:
        metric: "fid", "kid", ...
        settings: of the metric itself, such as KID's subsets; "" if it has none.
        extractor, extractor_sha256: the network whose features are compared.
        resize: how images are resized for that network.
        num_images: generated images.
        num_reference: real images they are compared with.
        reference: which real images those are.
        dataset: fingerprint of the dataset they come from.
        generation: how the generated images were made.
        split: which part of their source the real images are, in words.
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
    split: str = TRAIN

    @property
    def key(self) -> str:
        """Name under which the value is logged: metric, extractor and count, as in `fid_classifier_n559`.

        A mean over several seeds has them in its name: `fid_classifier_n559_seeds3`.
        """
        seeds = self.generation.num_seeds
        return f"{self.metric}_{self.extractor}_n{self.num_images}" + (f"_seeds{seeds}" if seeds > 1 else "")

    def named(self, metric: str) -> MetricIdentity:
        """Return the identity of a value that comes with this one, such as a standard deviation."""
        return replace(self, metric=metric)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BoundIdentity:
    """Everything that a bound depends on besides the model; its bits compare across schedules, T and parameterisations.

    Attributes:
        metric: "bits_per_dim", or a part of it.
        dataset: fingerprint of the images.
        split: which part of the source they are, in words.
        num_images: images that were measured.
        of_images: images that there are; more than `num_images` only if a limit was asked for.
        weights: "ema" or "raw".
        process: of the model: T, and whether x0 was clipped.
        seed: of the noise.
        chunk: images per network call.
        labels: "of the images" if the network gets each image's class, which makes it a bound on p(x | y); else "".
        selection: how the checkpoint was chosen, as of generated images.
    """

    metric: str
    dataset: str
    split: str
    num_images: int
    of_images: int
    weights: str
    process: str
    seed: int
    chunk: int
    labels: str = ""
    selection: str = LAST

    @property
    def key(self) -> str:
        """Name under which the bound is logged: `bits_per_dim_train_n1797`."""
        return f"{self.metric}_{self.split}_n{self.num_images}"

    def named(self, metric: str) -> BoundIdentity:
        """Return the identity of a value that comes with this one, such as a part of it."""
        return replace(self, metric=metric)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; without `labels` for a model that knows no classes, and `selection` for a checkpoint that was not chosen."""
        usual = {"labels": "", "selection": LAST}
        return {name: value for name, value in asdict(self).items() if value != usual.get(name)}


LUCK = frozenset({"generation.seed", "generation.num_seeds", "generation.chunk", "seed", "chunk"})
"""Fields that change a value by chance alone: the noise, and how images are batched. Values that differ in them are comparable."""

OF_THE_MODEL = frozenset({"process"})
"""Fields that describe the model itself: values are compared to compare models."""


def differing(a: Mapping[str, Any], b: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Return a line "field: a's value, b's value" for each field that differs between two identities, except those named `but`.

    Identities are given as `to_json` returns them.
    """
    left, right = flat_identity(a), flat_identity(b)
    names = [name for name in {**left, **right} if name not in but]
    return [f"{name}: {left.get(name)}, {right.get(name)}" for name in names if left.get(name) != right.get(name)]


def flat_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity, as `to_json` gives it, as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
