"""Standard normal noise that a seed alone decides, whatever the batch and the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each image of it."""


def normal_noise(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 [B,C,H,W]; with a sequence of generators image i is drawn from the i-th alone.

    Drawn where the generator lives and then moved, so that a CPU generator gives one noise on every device.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
    check_generators(generator, shape[0])
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]).to(device)


def check_generators(generator: Generators | None, images: int) -> None:
    """ValueError for a sequence of generators of another length than the batch."""
    if isinstance(generator, Sequence) and len(generator) != images:
        raise ValueError(
            f"{len(generator)} generators for a batch of {images} images, expected one per image, or a single one"
        )
