"""A small convolutional network fitted on a dataset's own labels: the feature extractor for images on which Inception means nothing.

The network, the file that holds it, and its use as a `FeatureExtractor`; `pipeline.metrics.classifier_fit` fits one and
`pipeline.metrics.classifier_store` finds the right one for a dataset.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.data.images import to_float
from pipeline.errors import DataError, RefusedError
from pipeline.metrics.features import Extracted, FeatureExtractor
from pipeline.metrics.fit_rule import SALT, FitRule
from pipeline.storage.durable import write_atomically
from pipeline.storage.tensor_file import pack, unpack

MIN_ACCURACY = 0.95
CONFIDENT = 0.9
MIN_PER_FEATURE = 4
"""Fewest images per feature on each side of a comparison: below, FID is mostly the bias of two estimated covariances."""

_FORMAT = 1

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Card:
    """The header of a classifier's safetensors file.

    Attributes:
        shape: (C, H, W) of the images it judges.
        class_names: the classes that it was fitted on, in the order of its logits.
        width: number of features.
        rule: which images it was fitted on, by content.
        fitted_on: name of that dataset.
        fingerprint: of that dataset.
        num_fitted: images fitted on.
        num_held_out: images that `accuracy` was measured on, none of them fitted on.
        accuracy: share of those whose label is its first choice.
        confident: share of those with a confidence above 0.9.
        sketch: the smallest content hashes of the images fitted on; a dataset with those images is recognised by them.
        seed: of initialisation, order and augmentation.
        command: that made the file.
        torch: version that fitted it.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    width: int
    rule: FitRule
    fitted_on: str
    fingerprint: str
    num_fitted: int
    num_held_out: int
    accuracy: float
    confident: float
    sketch: tuple[int, ...]
    seed: int
    command: str
    torch: str


class SmallNetwork(nn.Module):
    """3x3 convolutions with halvings down to at most 4x4, then a layer of `width` features, then logits."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        channels, *grid = shape
        layers: list[nn.Module] = []
        out = 16 if max(grid) > 16 else 32
        while max(grid) > 4:
            kernel = tuple(2 if size > 4 else 1 for size in grid)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
            layers += [nn.MaxPool2d(kernel, ceil_mode=True)]
            grid = [math.ceil(size / step) for size, step in zip(grid, kernel, strict=True)]
            channels, out = out, min(2 * out, 64)
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU(), nn.Flatten()]
        # Features are normalised per image, which keeps KID's cubic kernel in range, and not yet rectified, which keeps
        # what distinguishes images of one class.
        norm = nn.LayerNorm(width, elementwise_affine=False)
        self.body = nn.Sequential(*layers, nn.Linear(out * grid[0] * grid[1], width), norm)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [n, width] and logits [n, classes] of uint8 images [n, C, H, W]."""
        features = self.body(to_float(images))
        return features, self.head(features)


class Classifier(FeatureExtractor):
    """A fitted network as a feature extractor: features are its last layer but one."""

    name = "classifier"
    batch_size = 128

    def __init__(self, network: SmallNetwork, card: Card, sha256: str, device: torch.device | None = None) -> None:
        super().__init__(network, sha256, device)
        self.card = card
        self.width = card.width
        self.num_classes = len(card.class_names)
        self.min_images = MIN_PER_FEATURE * card.width
        self.fit_rule = card.rule

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return "none": images are judged as they are; RefusedError for a shape that it was not fitted on."""
        if shape != self.card.shape:
            raise RefusedError(
                f"the classifier was fitted on images of shape {self.card.shape}, got {shape}; evaluate with a dataset of that shape"
            )
        return "none"

    @classmethod
    def load(cls, path: Path, *, sha256: str | None = None, device: torch.device | None = None) -> Classifier:
        """Read a file that `save` wrote; DataError if it is missing or damaged, or has another hash."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"classifier {path}: cannot be read ({error.strerror}); fit it again") from None
        got = hashlib.sha256(data).hexdigest()
        if sha256 is not None and got != sha256:
            raise DataError(
                f"classifier {path}: sha256 is {got[:16]}, expected {sha256[:16]}; remove it and fit it again"
            )
        try:
            content, arrays = unpack(data)
            card = _card(content)
            network = SmallNetwork(card.shape, len(card.class_names), card.width)
            network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"classifier {path}: not one of this release ({reason}); remove it and fit it again"
            ) from None
        return cls(network, card, got, device)


def save(network: SmallNetwork, card: Card, path: Path) -> str:
    """Write weights and card to one safetensors file atomically, and return its sha256."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    data = pack(arrays, {"format": _FORMAT, **asdict(card)})
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def _card(content: dict[str, Any]) -> Card:
    content["rule"] = FitRule(**content["rule"])
    if content.pop("format") != _FORMAT or content["rule"].salt != SALT:
        raise ValueError("another format")
    for key in ("shape", "class_names", "sketch"):
        content[key] = tuple(content[key])
    return Card(**content)


def decide(found: Extracted) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Return each image's most likely class, int64 [n], and its probability, float64 [n]."""
    logits = found.logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logits.argmax(axis=1), odds.max(axis=1) / odds.sum(axis=1)
