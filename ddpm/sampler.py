"""Samplers: generators of (t, x), from noise at the last kept step to an image.

Each yields after every step: `t` is the code index just denoised, `x` the state after it; the last x is the image. What
to log, save or stop is the caller's `for` body. They run without gradients, and leave the caller's gradient mode alone.
Put the network into eval mode first. Nothing is clipped but x0, and that only with `clip_x0`.

Noise comes from `generator`: one torch.Generator for the batch, or one per image. With one per image an image's noise
does not depend on the batch it is computed in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model, Variance
from ddpm.noise import Generators, check_generators, noise_for_steps
from ddpm.respacing import kept_timesteps


class Step(NamedTuple):
    """The state of a sampler after it has denoised code index `t`."""

    t: int
    x: Tensor


def ancestral(
    diffusion: GaussianDiffusion,
    model: Model,
    x_T: Tensor,
    *,
    generator: Generators,
    timesteps: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Algorithm 2 of Ho et al. 2020, over all steps or a subset of them (ascending code indices).

    On a subset the betas are recomputed from the kept abar, while the network still gets the original t. The last step
    returns the mean, without noise.
    """
    check_generators(generator, len(x_T))
    kept = kept_timesteps(diffusion.schedule, timesteps)
    chain = replace(diffusion, schedule=diffusion.schedule.respaced(kept))
    return _ancestral(diffusion, chain, model, x_T, generator, kept)


@torch.no_grad()
def _ancestral(
    diffusion: GaussianDiffusion,
    chain: GaussianDiffusion,
    model: Model,
    x: Tensor,
    generator: Generators,
    kept: tuple[int, ...],
) -> Iterator[Step]:
    noise = noise_for_steps(x.shape, generator, x.device, len(kept) - 1)
    for i in reversed(range(len(kept))):
        denoised = diffusion.denoise(model, x, _filled(kept[i], x))
        p = chain.reverse_step(denoised, x, _filled(i, x))
        x = p.mean
        if i > 0:
            x = x + (p.log_variance / 2).exp() * next(noise).to(x.dtype)
        yield Step(kept[i], x)


def ddim(
    diffusion: GaussianDiffusion,
    model: Model,
    x_T: Tensor,
    *,
    generator: Generators | None = None,
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (Song, Meng & Ermon 2021, eqs. 12, 16) over ascending code indices `timesteps`; the last step lands on x0.

    eta 0 is deterministic; eta 1 is `ancestral` with fixed_small. A generator is needed above 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}, expected 0 (deterministic) .. 1 (ancestral)")
    if eta > 0 and generator is None:
        raise ValueError(f"eta={eta} draws noise, and no generator was given; pass generator=..., or eta=0")
    check_generators(generator, len(x_T))
    return _ddim(diffusion, model, x_T, generator, kept_timesteps(diffusion.schedule, timesteps), eta)


@torch.no_grad()
def _ddim(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    generator: Generators | None,
    kept: tuple[int, ...],
    eta: float,
) -> Iterator[Step]:
    abar = [1.0, *diffusion.schedule.alphas_cumprod[list(kept)].tolist()]
    sigmas = [eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5 for before, now in itertools.pairwise(abar)]
    noise = iter(()) if generator is None else noise_for_steps(x.shape, generator, x.device, sum(s > 0 for s in sigmas))
    for i in reversed(range(len(kept))):
        denoised = diffusion.denoise(model, x, _filled(kept[i], x))
        before, sigma = abar[i], sigmas[i]
        x = before**0.5 * denoised.x0 + max(1 - before - sigma**2, 0.0) ** 0.5 * denoised.eps
        if sigma > 0:
            x = x + sigma * next(noise).to(x.dtype)
        yield Step(kept[i], x)


def dpm_solver(
    diffusion: GaussianDiffusion, model: Model, x_T: Tensor, *, timesteps: Sequence[int] | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, over ascending code indices `timesteps`; deterministic.

    First order at the first step, and at the last, which lands on x0: the log-SNR of clean data is infinite.
    """
    return _dpm_solver(diffusion, model, x_T, kept_timesteps(diffusion.schedule, timesteps))


@torch.no_grad()
def _dpm_solver(diffusion: GaussianDiffusion, model: Model, x: Tensor, kept: tuple[int, ...]) -> Iterator[Step]:
    abar = [1.0, *diffusion.schedule.alphas_cumprod[list(kept)].tolist()]
    x0_last, h_last = x, math.inf
    for i in reversed(range(len(kept))):
        x0 = diffusion.denoise(model, x, _filled(kept[i], x)).x0
        now, after = abar[i + 1], abar[i]
        h = _log_snr_half(after) - _log_snr_half(now)
        # D = (1 + 1/(2r)) x0 - x0_last/(2r) with 1/r = h/h_last, which is 0 after a first step from no signal at all
        step_ratio = h / h_last if 0 < i < len(kept) - 1 else 0.0
        d = x0 + step_ratio / 2 * (x0 - x0_last)
        x = ((1 - after) / (1 - now)) ** 0.5 * x - after**0.5 * math.expm1(-h) * d
        x0_last, h_last = x0, h
        yield Step(kept[i], x)


def _log_snr_half(abar: float) -> float:
    """lambda = ln(sqrt(abar) / sqrt(1 - abar))."""
    if abar <= 0 or abar >= 1:
        return -math.inf if abar <= 0 else math.inf
    return 0.5 * (math.log(abar) - math.log1p(-abar))


def ddim_invert(
    diffusion: GaussianDiffusion, model: Model, x0: Tensor, *, timesteps: Sequence[int] | None = None
) -> Iterator[Step]:
    """DDIM run backwards, from images to the noise that makes them (Song, Meng & Ermon 2021, section 4.3).

    Yields (t, x_t) for ascending `timesteps`; the last x is the noise. Exact in the limit of many steps. x0 is not
    clipped, whatever `clip_x0` says: a clipped pixel could not be undone.
    """
    return _ddim_invert(replace(diffusion, clip_x0=False), model, x0, kept_timesteps(diffusion.schedule, timesteps))


@torch.no_grad()
def _ddim_invert(diffusion: GaussianDiffusion, model: Model, x: Tensor, kept: tuple[int, ...]) -> Iterator[Step]:
    # The network knows no clean images (t = 0 is one step of noise): its eps at the first kept step stands in.
    x0, eps = x, diffusion.denoise(model, x, _filled(kept[0], x)).eps
    for i, t in enumerate(kept):
        if i > 0:
            x0, eps, _ = diffusion.denoise(model, x, _filled(kept[i - 1], x))
        x = diffusion.q_sample(x0, _filled(t, x), eps)
        yield Step(t, x)


def slerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """From noise x (weight 0) to noise y (1) along the sphere, per image (Song, Meng & Ermon 2021, section 5.3)."""
    a, b = _direction(x), _direction(y)
    angle = (a * b).sum(1).clamp(-1, 1).acos().view(-1, *[1] * (x.dim() - 1))
    # Of (nearly) parallel noises the arc is a line.
    straight = angle.sin() < 1e-6
    divisor = torch.where(straight, torch.ones_like(angle), angle.sin())
    from_x = torch.where(straight, torch.full_like(angle, 1 - weight), ((1 - weight) * angle).sin() / divisor)
    from_y = torch.where(straight, torch.full_like(angle, weight), (weight * angle).sin() / divisor)
    return from_x * x + from_y * y


def _direction(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.flatten(1), dim=1)


def few_steps_warning(diffusion: GaussianDiffusion, steps: int) -> str | None:
    """Why an ancestral sample of few steps would disappoint, or None.

    With fixed_large the CIFAR-10 model of Ho et al. has FID 367 at 10 steps and 3.17 at 1000 (Song, Meng & Ermon 2021,
    table 1).
    """
    if diffusion.variance is not Variance.FIXED_LARGE or 4 * steps > diffusion.num_timesteps:
        return None
    return (
        f"ancestral sampling with fixed_large over {steps} of {diffusion.num_timesteps} steps leaves noise in images; "
        "use ddim, or variance fixed_small"
    )


def _filled(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
