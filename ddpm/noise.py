"""Standard normal noise that a seed alone decides, whatever the batch and the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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


def noise_for_steps(
    shape: Sequence[int], generator: Generators, device: torch.device, num_steps: int
) -> Iterator[Tensor]:
    """`normal_noise` for each of `num_steps` steps. What a CPU generator draws for a GPU is drawn ahead, while that computes."""
    on_gpu = isinstance(generator, torch.Generator) and generator.device.type == "cuda"
    if device.type != "cuda" or on_gpu:
        for _ in range(num_steps):
            yield normal_noise(shape, generator, device)
        return
    for noise in drawn_ahead(lambda: normal_noise(shape, generator).pin_memory(), num_steps):
        yield noise.to(device, non_blocking=True)


def drawn_ahead(draw: Callable[[], Tensor], count: int, ahead: int = 2) -> Iterator[Tensor]:
    """What `count` calls of `draw` return, in order, made by a thread that is up to `ahead` calls ahead of the caller."""
    with ThreadPoolExecutor(1, "noise") as thread:
        waiting = deque(thread.submit(draw) for _ in range(min(ahead, count)))
        for drawn in range(count):
            noise = waiting.popleft().result()
            if drawn + ahead < count:
                waiting.append(thread.submit(draw))
            yield noise


def check_generators(generator: Generators | None, images: int) -> None:
    """ValueError for a sequence of generators of another length than the batch."""
    if isinstance(generator, Sequence) and len(generator) != images:
        raise ValueError(
            f"{len(generator)} generators for a batch of {images} images, expected one per image, or a single one"
        )
