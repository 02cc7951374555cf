"""Denoisers that are optimal for data we know, a network that knows nothing, and the exact response of a linear sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, Model, Prediction, Step

Sampler = Callable[[Tensor, torch.Generator], Iterable[Step]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Float64 normal noise of this seed."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def abar_at(schedule: BetaSchedule, t: Tensor, like: Tensor) -> Tensor:
    return torch.tensor(schedule.alphas_cumprod.tolist(), dtype=torch.float64)[t].view(-1, *[1] * (like.dim() - 1))


def normal_data(diffusion: GaussianDiffusion) -> Model:
    """The optimal network where x0 ~ N(0, 1): E[x0 | x_t] = sqrt(abar) x_t, E[eps | x_t] = sqrt(1 - abar) x_t."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        abar = abar_at(diffusion.schedule, t, x_t)
        return as_output(diffusion, abar.sqrt() * x_t, (1 - abar).sqrt() * x_t, x_t, t)

    return model


def point_mass(diffusion: GaussianDiffusion, mu: float) -> Model:
    """The optimal network where x0 = mu always."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        abar = abar_at(diffusion.schedule, t, x_t)
        x0 = torch.full_like(x_t, mu)
        return as_output(diffusion, x0, (x_t - abar.sqrt() * x0) / (1 - abar).sqrt(), x_t, t)

    return model


def as_output(diffusion: GaussianDiffusion, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """(x0, eps) in the parameterisation of `diffusion`, written out again from MATHS."""
    schedule = diffusion.schedule
    abar = abar_at(schedule, t, x_t)
    if diffusion.prediction is Prediction.EPS:
        return eps
    if diffusion.prediction is Prediction.X0:
        return x0
    if diffusion.prediction is Prediction.V:
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0
    beta = schedule.betas[t].view_as(abar)
    return (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # eq. 11


def ignorant(channels: int = 1, outputs: int | None = None, seed: int = 3) -> Model:
    """A smooth random function of (x_t, t) that mixes pixels and channels: 'any network'."""
    weight = randn(outputs or channels, channels, 3, 3, seed=seed) / 3

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        mixed = torch.nn.functional.conv2d(x_t.double(), weight, padding=1)
        return torch.sin(mixed + t.view(-1, 1, 1, 1) / 100).to(x_t.dtype) * 1.5

    return model


def linear_response(sampler: Sampler, num_draws: int, *, x_T: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """For each step of a sampler that is affine in its inputs: (constant, weights), solved for and not estimated.

    weights[0] belongs to x_T (or to the standard normal that `x_T` was made from), weights[i] to the i-th noise that was drawn. Every
    run is a "pixel": with more of them than unknowns the weights follow from least squares, and the residual says that it is affine.
    """
    runs = num_draws + 10
    g = seeded(17)
    start = randn(1, 1, 1, runs, seed=5)
    states = [x.flatten() for _, x in sampler(start if x_T is None else x_T, g)]
    g = seeded(17)
    draws = [torch.randn(1, 1, 1, runs, generator=g).double().flatten() for _ in range(num_draws)]
    inputs = torch.stack([torch.ones(runs, dtype=torch.float64), start.flatten(), *draws], 1)
    solution = torch.linalg.lstsq(inputs, torch.stack(states, 1), driver="gelsd").solution
    torch.testing.assert_close(inputs @ solution, torch.stack(states, 1), rtol=0, atol=1e-8)
    return [(column[0], column[1:]) for column in solution.T]


def images(B: int, C: int = 1, side: int = 4, seed: int = 0) -> Tensor:
    """Float64 images on the 256 levels."""
    levels = torch.randint(256, (B, C, side, side), generator=seeded(seed))
    return levels.double() / 127.5 - 1


def exact(peer: Any, schedule: BetaSchedule) -> Any:
    """The peer with float64 tables: its own are float32 and would decide the tolerance."""
    peer.betas = torch.from_numpy(schedule.betas.numpy().copy())
    peer.alphas = 1 - peer.betas
    peer.alphas_cumprod = torch.from_numpy(np.cumprod(1 - schedule.betas.numpy()))
    peer.one = torch.tensor(1.0, dtype=torch.float64)
    peer.final_alpha_cumprod = peer.one
    return peer
