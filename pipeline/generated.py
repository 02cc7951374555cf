"""Generated images as the metrics need them: features, extracted where the images are made, and kept under what they are.

    features/<hash>.safetensors     in the run's folder: one file for each way of generating, extractor and count

A set that was generated and looked at once is never generated again: neither by the next evaluation, nor at a point of
a grid that was stopped half-way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.console import Console, Rate
from pipeline.durable import write_atomically
from pipeline.features import Extracted, FeatureExtractor, concatenate
from pipeline.home import make_folder
from pipeline.image_set import Images
from pipeline.metric_identity import Generation
from pipeline.tensor_file import Arrays, pack, unpack

PREVIEW_IMAGES = 100

_FORMAT = 1


class ImageGenerator(Protocol):
    """Something that generates images by canonical chunk: `pipeline.generation.Denoiser`, or another trained model."""

    def generate(self, num_images: int) -> Iterator[Tensor]:
        """Yield images 0 .. num_images - 1 as uint8 [n, C, H, W] on the CPU, a chunk at a time, whose bytes depend on their index alone."""

    def identity(self, weights: str) -> Generation:
        """Return what, with the model, makes the images these."""


@dataclass(frozen=True)
class Generated:
    """What generated images are judged by, and the first of them to look at."""

    found: Extracted
    preview: Images  # uint8 [at most PREVIEW_IMAGES, C, H, W]


def features_of_generated(
    generator: ImageGenerator,
    extractor: FeatureExtractor,
    num_images: int,
    *,
    model: str,
    weights: str,
    folder: Path,
    console: Console,
) -> Generated:
    """Return the features of images 0 .. num_images - 1, from the file in `folder` that holds exactly them, or from making them now.

    `model` is the `digest` of what generates; with the generator's identity it says which images these are.
    """
    key = {
        "format": _FORMAT,
        "model": model,
        "generation": asdict(generator.identity(weights)),
        "extractor": [extractor.name, extractor.sha256],
        "num_images": num_images,
    }
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.safetensors"
    kept = _kept(path, key)
    if kept is not None:
        return kept
    made = _make(generator, extractor, num_images, console)
    make_folder(folder)
    write_atomically(path, pack(_arrays(made), key))
    return made


def digest(model: nn.Module, about: Any = None) -> str:
    """Return the sha256 of a model's tensors, by name and content, and of what else decides its images (plain data)."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _make(generator: ImageGenerator, extractor: FeatureExtractor, num_images: int, console: Console) -> Generated:
    rate, parts, preview, done = Rate(console, "sampling", num_images), [], [], 0
    for chunk in generator.generate(num_images):
        images = chunk.numpy()
        parts.append(extractor(images))
        preview.append(images[: max(0, PREVIEW_IMAGES - done)])
        done += len(images)
        rate(done)
    return Generated(concatenate(parts, extractor), np.concatenate(preview))


def _kept(path: Path, key: dict[str, Any]) -> Generated | None:
    """Return what a file holds under exactly this key; None where there is nothing, or nothing whole."""
    try:
        found, arrays = unpack(path.read_bytes())
    except (OSError, ValueError):
        return None
    if found != key:
        return None
    return Generated(Extracted(arrays["features"], arrays.get("logits")), arrays["preview"])


def _arrays(made: Generated) -> Arrays:
    arrays: Arrays = {"features": made.found.features, "preview": made.preview}
    return arrays if made.found.logits is None else arrays | {"logits": made.found.logits}
