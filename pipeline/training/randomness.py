"""Random numbers as pure functions: of (seed, step, stream) in training, of (seed, image index) in sampling.

Nothing random is ever saved or restored: the state at any step is recomputed from its coordinates, so that a resumed run, another
number of workers and another batch size see the same numbers. Coordinates are mixed through SHA-256, not added, so that no two of
them share a stream of numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor


def seed_of(purpose: str, *coordinates: int) -> int:
    """Return a 63-bit seed that is a function of the purpose and its integer coordinates."""
    text = ":".join([purpose, *(str(int(c)) for c in coordinates)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(purpose: str, *coordinates: int) -> torch.Generator:
    """Return a CPU generator at the start of the stream that belongs to the coordinates."""
    return torch.Generator().manual_seed(seed_of(purpose, *coordinates))


@dataclass(frozen=True)
class Draws:
    """What chance decides about `b` training images at one step.

    `u_t`, `u_flip` and `u_label` are uniform float64 [b] in [0, 1): the timestep, the flip and the dropping of the label are read
    off them by whoever needs them, so that switching one on never changes another. `eps` is standard normal float32 [b, C, H, W].
    `keys` are 64 random bits each, int64 [b], of which a U-Net's dropout masks are a function.
    """

    u_t: Tensor
    u_flip: Tensor
    u_label: Tensor
    eps: Tensor
    keys: Tensor


def training_draws(seed: int, step: int, stream: int, count: int, shape: tuple[int, int, int]) -> Draws:
    """Draw for the `count` images of one stream at one step (ARCHITECTURE.md, row 6); `shape` is (C, H, W)."""
    generator = rng_for("train", seed, step, stream)
    uniform = torch.rand(3, count, generator=generator, dtype=torch.float64)
    eps = torch.randn(count, *shape, generator=generator)
    keys = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return Draws(uniform[0], uniform[1], uniform[2], eps, keys)


def concatenate(draws: list[Draws]) -> Draws:
    """Join the draws of several streams in the order given."""
    return Draws(*(torch.cat([getattr(d, f.name) for d in draws]) for f in fields(Draws)))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Set the global generators, which only the dropout of users' own networks reads, for one step of one worker.

    Dropout has no generator argument in torch. Its masks therefore repeat for an equal worker count and micro-batch only.
    """
    torch.manual_seed(seed_of("dropout", seed, step, rank))


def image_generators(seed: int, indices: range, purpose: str = "sample") -> list[torch.Generator]:
    """Return one generator per generated image; each image's noise is a function of (seed, its index) alone."""
    return [rng_for(purpose, seed, index) for index in indices]
