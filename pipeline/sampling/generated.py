"""Generated images and their features: made over the workers of a profile, by canonical chunk, and kept under what they are.

    features/<hash>/chunk-000000.safetensors ...    in the run's folder: of each way of generating and extractor
    generated/<hash>/ ...                           images, until they are written where they were asked for

What was made once is never made again: neither by the next evaluation, nor after a stop half-way.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.cluster_profile import Profile
from pipeline.console import Bar, Console
from pipeline.data.image_set import Images
from pipeline.metrics.features import Extracted, FeatureExtractor, concatenate
from pipeline.sampling.generation import ImageGenerator
from pipeline.storage.tensor_file import Arrays
from pipeline.training.chunks import ChunkStore, Runner, Task, compute
from pipeline.training.device import Compute, arithmetic_of
from pipeline.training.threads import THREADS

PREVIEW_IMAGES = 100

_FORMAT = 3


class GenerateTask(Task):
    """The first `num_kept` images and, given an extractor, the features of all: one chunk at a time, in any worker."""

    def __init__(self, generator: ImageGenerator, num_kept: int, extractor: FeatureExtractor | None) -> None:
        self._generator, self._num_kept, self._extractor = generator, num_kept, extractor

    def start(self, here: Compute) -> None:
        """Move the networks to this worker's device."""
        self._generator = self._generator.on(here)
        if self._extractor is not None:
            self._extractor.to(here.device)

    def split_threads(self, num_chunks: int) -> tuple[int, int]:
        return self._generator.split_threads(num_chunks)

    def __call__(self, indices: range) -> Arrays:
        """Return `images` uint8 [k, C, H, W], and `features` and `logits` if there is an extractor."""
        images = self._generator.images(indices).numpy()
        arrays: Arrays = {"images": images[: max(0, self._num_kept - indices.start)]}
        if self._extractor is not None:
            # always a whole chunk: the last bits of features may depend on how many images are looked at together
            padding = np.repeat(images[:1], self._generator.chunk_size - len(images), axis=0)
            found = self._extractor(np.concatenate([images, padding])).part(slice(len(images)))
            arrays |= found.to_arrays()
        return arrays


@dataclass(frozen=True)
class SampleCache:
    """Where and how a run's images are generated: its folder, its model by `digest`, the profile and what shares the chunks out."""

    folder: Path
    model: str
    weights: str
    profile: Profile
    runner: Runner
    console: Console

    def features(
        self, generator: ImageGenerator, extractor: FeatureExtractor, num_images: int
    ) -> tuple[Extracted, Images]:
        """Return the features of images 0 .. num_images - 1, and the first images, uint8 [at most PREVIEW_IMAGES, C, H, W].

        What is stored is read, the others are generated now.
        """
        store = ChunkStore(
            self.folder / "features", self._identity(generator, [extractor.name, extractor.sha256, THREADS])
        )
        task = GenerateTask(generator, PREVIEW_IMAGES, extractor)
        parts = self._computed(task, generator, num_images, store)
        found = concatenate([Extracted.from_arrays(part) for part in parts], extractor)
        return found, np.concatenate([part["images"] for part in parts])

    def images(self, generator: ImageGenerator, num_images: int) -> tuple[Images, ChunkStore]:
        """Return images 0 .. num_images - 1, and what keeps them until it is cleared."""
        store = ChunkStore(self.folder / "generated", self._identity(generator, None))
        parts = self._computed(GenerateTask(generator, num_images, None), generator, num_images, store)
        return np.concatenate([part["images"] for part in parts]), store

    def _computed(
        self, task: GenerateTask, generator: ImageGenerator, num_images: int, store: ChunkStore
    ) -> list[Arrays]:
        rate = Bar(self.console, "sampling", num_images)
        return list(compute(task, num_images, generator.chunk_size, store, self.runner, rate))

    def _identity(self, generator: ImageGenerator, extractor: list[Any] | None) -> dict[str, Any]:
        """Return all that the bytes depend on: the model, how it generates, what looks at the images, and the arithmetic."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "generation": asdict(generator.identity(self.weights)),
            "extractor": extractor,
            **arithmetic_of(self.profile),
        }


def digest(model: nn.Module, about: Any = None) -> str:
    """Return the sha256 of a model's tensors, by name and content, and of what else decides its images (plain data)."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
