"""Samplers: generators of (t, x), from noise at the last kept step to an image.

Each yields after every step: `t` is the code index just denoised, `x` the state after it; the last x is the image. What
to log, save or stop is the caller's `for` body. They run without gradients, and leave the caller's gradient mode alone.
Put the network into eval mode first. Nothing is clipped but x0, and that only with `clip_x0`.

Noise comes from `generator`: one torch.Generator for the batch, or one per image. With one per image an image's noise
does not depend on the batch it is computed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model, Variance

Generators = torch.Generator | Sequence[torch.Generator]
RULES = ("trailing", "linspace", "leading", "quad")


class Step(NamedTuple):
    """The state of a sampler after it has denoised code index `t`."""

    t: int
    x: Tensor


def timestep_subset(num_timesteps: int, steps: int, rule: str = "trailing") -> tuple[int, ...]:
    """`steps` code indices out of 0 .. T-1, ascending.

    trailing  round(arange(T, 0, -T/S)) - 1, reaches T-1 linspace  round(linspace(0, T-1, S)), reaches T-1 leading
    arange(S) * (T // S), misses T-1 unless S = T quad      floor(linspace(0, sqrt(0.8 T), S)^2), DDIM's choice on
    CIFAR-10; ends near 0.8 T. Steps that fall on one index are taken
              once (a step from an index to itself changes nothing), so that there can be fewer than S
    """
    T, S = num_timesteps, steps
    if not 1 <= S <= T:
        raise ValueError(f"steps={S}, expected 1 .. {T}, the number of steps the schedule has")
    if rule == "trailing":
        return tuple(round(T - i * T / S) - 1 for i in reversed(range(S)))
    if rule == "linspace":
        return tuple(round(i * (T - 1) / (S - 1)) for i in range(S)) if S > 1 else (T - 1,)
    if rule == "leading":
        return tuple(i * (T // S) for i in range(S))
    if rule == "quad":
        # 4/5 T (i / (S-1))^2 in integers: in floats an exact square may come out just below itself.
        return tuple(sorted({4 * T * i * i // (5 * max(S - 1, 1) ** 2) for i in range(S)}))
    raise ValueError(f"rule={rule!r}, expected one of {', '.join(RULES)}")


def normal_noise(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 [B,C,H,W]; with a sequence of generators image i is drawn from the i-th alone.

    Drawn where the generator lives and then moved, so that a CPU generator gives one noise on every device.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
    _check_generators(generator, shape[0])
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]).to(device)


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
    _check_generators(generator, len(x_T))
    kept = _kept(diffusion, timesteps)
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
    for i in reversed(range(len(kept))):
        denoised = diffusion.denoise(model, x, _filled(kept[i], x))
        p = chain.p_from(denoised, x, _filled(i, x))
        x = p.mean
        if i > 0:
            x = x + (p.log_variance / 2).exp() * _noise_for(x, generator)
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
    _check_generators(generator, len(x_T))
    return _ddim(diffusion, model, x_T, generator, _kept(diffusion, timesteps), eta)


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
    for i in reversed(range(len(kept))):
        denoised = diffusion.denoise(model, x, _filled(kept[i], x))
        now, before = abar[i + 1], abar[i]
        sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
        x = before**0.5 * denoised.x0 + max(1 - before - sigma**2, 0.0) ** 0.5 * denoised.eps
        if sigma > 0 and generator is not None:
            x = x + sigma * _noise_for(x, generator)
        yield Step(kept[i], x)


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


def _kept(diffusion: GaussianDiffusion, timesteps: Sequence[int] | None) -> tuple[int, ...]:
    """The checked code indices to visit, ascending; all of them by default."""
    if timesteps is None:
        return tuple(range(diffusion.num_timesteps))
    kept = tuple(int(t) for t in timesteps)
    diffusion.schedule.respaced(kept)  # checks the indices
    if diffusion.schedule.has_zero_terminal_snr and kept[-1] != diffusion.num_timesteps - 1:
        raise ValueError(
            f"timesteps end at {kept[-1]}, expected {diffusion.num_timesteps - 1}: with zero terminal SNR only the "
            "last step is pure "
            "noise; use the rule 'trailing' or 'linspace'"
        )
    return kept


def _check_generators(generator: Generators | None, images: int) -> None:
    if isinstance(generator, Sequence) and len(generator) != images:
        raise ValueError(
            f"{len(generator)} generators for a batch of {images} images, expected one per image, or a single one"
        )


def _noise_for(x: Tensor, generator: Generators) -> Tensor:
    return normal_noise(x.shape, generator, x.device).to(x.dtype)


def _filled(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
