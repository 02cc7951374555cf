"""Generated images: noise a function of (seed, image index), computed in canonical chunks (ARCHITECTURE.md, row 12)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddpm import GaussianDiffusion, ancestral, ddim, timestep_subset
from pipeline.config import SamplingConfig
from pipeline.device import Compute
from pipeline.images import to_uint8
from pipeline.randomness import image_generators

Shape = tuple[int, int, int]


def chunks_of(num_images: int, size: int) -> list[range]:
    """Return the canonical chunks that hold images 0 .. num_images - 1: whole ones, the last one padded with further indices."""
    return [range(begin, begin + size) for begin in range(0, num_images, size)]


def denoise(
    diffusion: GaussianDiffusion,
    model: nn.Module,
    shape: Shape,
    indices: range,
    sampling: SamplingConfig,
    seed: int,
    compute: Compute,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (t, x) along the way from noise to the images of the given indices; x is float32 [len(indices), C, H, W]."""
    generators = image_generators(seed, indices)
    x_T = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    total = diffusion.num_timesteps
    steps = min(sampling.steps or total, total)
    timesteps = timestep_subset(total, steps, sampling.spacing)
    x_T = compute.send(x_T)
    if sampling.sampler == "ancestral":
        yield from ancestral(diffusion, model, x_T, generator=generators, timesteps=timesteps)
    else:
        yield from ddim(diffusion, model, x_T, generator=generators, timesteps=timesteps, eta=sampling.eta)


def generate(
    diffusion: GaussianDiffusion,
    model: nn.Module,
    shape: Shape,
    num_images: int,
    sampling: SamplingConfig,
    seed: int,
    compute: Compute,
) -> Iterator[Tensor]:
    """Yield images 0 .. num_images - 1 as uint8 [n, C, H, W] on the CPU, a canonical chunk at a time.

    The network sees whole chunks only, so that image i is the same bytes however many are asked for.
    """
    model.eval()
    for indices in chunks_of(num_images, sampling.batch_size):
        x = torch.empty(0)
        for _, x in denoise(diffusion, model, shape, indices, sampling, seed, compute):  # noqa: B007 - the last x is the image
            pass
        yield to_uint8(x).cpu()[: num_images - indices.start]


def trajectory(
    diffusion: GaussianDiffusion,
    model: nn.Module,
    shape: Shape,
    num_images: int,
    sampling: SamplingConfig,
    seed: int,
    compute: Compute,
    num_frames: int = 10,
) -> tuple[list[Tensor], list[str]]:
    """Return about `num_frames` uint8 frames [n, C, H, W] from noise to image, equally spaced over the steps, and their labels."""
    model.eval()
    steps = list(denoise(diffusion, model, shape, range(num_images), sampling, seed, compute))
    picks = sorted({round(i * (len(steps) - 1) / (num_frames - 1)) for i in range(num_frames)})
    return [to_uint8(steps[i][1]).cpu() for i in picks], [f"t = {steps[i][0]}" for i in picks]
