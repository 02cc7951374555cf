"""The variational bound on the likelihood of images, in bits per dimension, and its rate-distortion curve.

Use averaged weights in eval mode, no flips, every image, and x0 clipped as Ho et al. did (`clip_x0=True`).
`estimate_bound` and `simple_losses` measure a model in a few network calls an image, while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model, ReverseStep
from ddpm.gaussian import discretized_log_likelihood, normal_kl
from ddpm.noise import Generators, check_generators, normal_noise
from ddpm.respacing import kept_timesteps
from ddpm.schedule import BetaSchedule


@dataclass(frozen=True)
class BitsPerDim:
    """The bound for each image, in bits per dimension, taken apart: total = prior + terms.sum(1).

    `terms[:, 0]` is the decoder, `terms[:, i]` the divergence at `timesteps[i]`; `x0_mse[:, i]` the squared error of
    the x0 predicted there, in [-1, 1] units. Tensors [B] and [B, steps].
    """

    prior: Tensor
    terms: Tensor
    x0_mse: Tensor
    timesteps: tuple[int, ...]

    @property
    def total(self) -> Tensor:
        """The negative variational bound [B], Ho et al. 2020, eq. 5."""
        return self.prior + self.terms.sum(1)

    @property
    def decoder(self) -> Tensor:
        """L_0 [B]: the discretised likelihood of the image given x_1."""
        return self.terms[:, 0]

    def rate_distortion(self) -> tuple[Tensor, Tensor]:
        """(rate, distortion) [steps], means over images: what x_t costs in bits/dim, and how well x0 is known from it.

        The rate at index i is L_T plus the divergences of the later steps; the distortion the root mean squared error
        on the scale of 0 .. 255 (Ho et al. 2020, section 4.3).
        """
        return rate_distortion(self.prior.mean(0), self.terms.mean(0), self.x0_mse.mean(0))


def rate_distortion(prior: Tensor, terms: Tensor, x0_mse: Tensor) -> tuple[Tensor, Tensor]:
    """`BitsPerDim.rate_distortion` from means over images: prior [], terms [steps], x0_mse [steps]."""
    later = terms.flip(0).cumsum(0).flip(0) - terms
    return prior + later, 127.5 * x0_mse.sqrt()


def vlb_term(diffusion: GaussianDiffusion, x0: Tensor, x_t: Tensor, t: Tensor, p: ReverseStep) -> Tensor:
    """One term of the bound per example [B], bits/dim: L_0 where t = 0, else L_{t-1}, Ho et al. 2020, eqs. 5, 8."""
    divergence = divergence_bits(diffusion, x0, x_t, t, p)
    if (
        t.device.type != "cpu"
    ):  # to ask an accelerator whether a t is 0 would be to wait for it, and its float64 is fast
        decoder = decoder_bits(x0, p)
        return torch.where(t == 0, decoder, divergence.to(decoder.dtype))
    # On a CPU the decoder costs more than a small network, and one example in T needs it.
    first = (t == 0).nonzero().flatten()
    terms = divergence.double()
    if len(first) == 0:
        return terms
    return terms.index_copy(0, first, decoder_bits(x0[first], ReverseStep(*(part[first] for part in p))))


def decoder_bits(x0: Tensor, p: ReverseStep) -> Tensor:
    """L_0 per example [B], bits/dim: -log p(x_0 | x_1), eq. 13."""
    return -discretized_log_likelihood(x0, p.mean, p.log_variance).flatten(1).mean(1) / math.log(2)


def divergence_bits(diffusion: GaussianDiffusion, x0: Tensor, x_t: Tensor, t: Tensor, p: ReverseStep) -> Tensor:
    """L_{t-1} per example [B], bits/dim: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t > 0."""
    q = diffusion.q_posterior(x0, x_t, t)
    return normal_kl(q.mean, q.log_variance, p.mean, p.log_variance).flatten(1).mean(1) / math.log(2)


def prior_bits(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """L_T per example [B], bits/dim: KL(q(x_T | x_0) || N(0, I)); large where the chain stops short of the prior."""
    abar = float(diffusion.schedule.alphas_cumprod[-1])
    log_variance = torch.full_like(x0, math.log1p(-abar))
    zero = torch.zeros_like(x0)
    return normal_kl(math.sqrt(abar) * x0, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    model: Model,
    x0: Tensor,
    *,
    generator: Generators,
    timesteps: Sequence[int] | None = None,
) -> BitsPerDim:
    """The variational bound of images x0 [B,C,H,W] on the 256 levels of [-1, 1], one network call a step.

    Over ascending `timesteps` it is the bound of the respaced chain. `generator` is one, or one per image: then an
    image's result depends on no other image (but for the network's own rounding). ValueError for images that are off
    the levels.
    """
    _require_levels(x0)
    check_generators(generator, len(x0))
    kept = kept_timesteps(diffusion.schedule, timesteps)
    chain = replace(diffusion, schedule=diffusion.schedule.respaced(kept))
    exact = _exact(x0)
    terms, errors = [], []
    for i, at in enumerate(kept):
        index, t = (torch.full((len(x0),), n, dtype=torch.int64, device=x0.device) for n in (i, at))
        x_t = chain.q_sample(exact, index, normal_noise(x0.shape, generator, x0.device).to(exact.dtype))
        denoised = diffusion.interpret_output(model(x_t.to(x0.dtype), t).to(exact.dtype), x_t, t)
        p = chain.reverse_step(denoised, x_t, index)
        terms.append(decoder_bits(exact, p) if i == 0 else divergence_bits(chain, exact, x_t, index, p))
        errors.append(((denoised.x0 - exact) ** 2).flatten(1).mean(1))
    return BitsPerDim(prior_bits(chain, exact), torch.stack(terms, 1), torch.stack(errors, 1), kept)


@dataclass(frozen=True)
class BoundEstimate:
    """An unbiased estimate of the bound for each image, in bits per dimension, taken apart; tensors [B].

    `prior` (L_T) and `decoder` (L_0) are as in `BitsPerDim`; `divergences` estimates the sum of the terms between.
    """

    prior: Tensor
    divergences: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The estimated bound [B], whose expectation is that of `BitsPerDim.total`."""
        return self.prior + self.divergences + self.decoder


def term_probabilities(schedule: BetaSchedule) -> Tensor:
    """The chance [T - 1] float64 with which `estimate_bound` draws each t in 1 .. T - 1.

    Half of it is proportional to the term's size where the data is N(0, 1), the network optimal and the variance
    `fixed_large`: log(beta_t / beta tilde_t) / 2 = log((1 - abar_t) / (1 - abar_{t-1})) / 2 nats (Ho et al. 2020, eqs.
    7, 8). The other half is uniform, because a network that has learned little errs at large t as well.
    """
    size = (1 - schedule.alphas_cumprod).log().diff()
    return (size / size.sum() + 1 / len(size)) / 2


@torch.no_grad()
def estimate_bound(
    diffusion: GaussianDiffusion, model: Model, x0: Tensor, *, generator: Generators, num_terms: int
) -> BoundEstimate:
    """Estimate `bits_per_dim` of images x0 [B,C,H,W] in 1 + num_terms network calls.

    L_T and L_0 are computed for every image. Each image draws `num_terms` of the terms between, one from each of as many
    equally likely ranges of t, and weighs each by 1 / (num_terms p_t) (importance sampling, Nichol & Dhariwal 2021, eq.
    18, with the fixed p of `term_probabilities`). `generator` and ValueError are as for `bits_per_dim`.
    """
    _require_levels(x0)
    check_generators(generator, len(x0))
    exact = _exact(x0)
    first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    decoder = decoder_bits(exact, _reverse_step(diffusion, model, x0, first, generator)[1])
    divergences, p = torch.zeros_like(decoder), term_probabilities(diffusion.schedule)
    for term in range(num_terms):
        u = (term + _uniform(len(x0), generator)) / num_terms
        place = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        t = (place + 1).to(x0.device)
        x_t, step = _reverse_step(diffusion, model, x0, t, generator)
        weight = 1 / (num_terms * p[place])
        divergences += weight.to(exact) * divergence_bits(diffusion, exact, x_t, t, step)
    return BoundEstimate(prior_bits(diffusion, exact), divergences, decoder)


@torch.no_grad()
def simple_losses(
    diffusion: GaussianDiffusion, model: Model, x0: Tensor, timesteps: Sequence[int], *, generator: Generators
) -> Tensor:
    """L_simple of images x0 [B,C,H,W] at each of `timesteps` [B, len(timesteps)], Ho et al. 2020, eq. 14.

    It is the mean squared error of the noise, whatever the network predicts and was trained to minimise.
    """
    unclipped, exact = replace(diffusion, clip_x0=False), _exact(x0)
    losses = []
    for at in timesteps:
        t = torch.full((len(x0),), at, dtype=torch.int64, device=x0.device)
        eps = normal_noise(x0.shape, generator, x0.device).to(exact.dtype)
        x_t = diffusion.q_sample(exact, t, eps)
        denoised = unclipped.interpret_output(model(x_t.to(x0.dtype), t).to(exact.dtype), x_t, t)
        losses.append(((denoised.eps - eps) ** 2).flatten(1).mean(1))
    return torch.stack(losses, 1)


def range_midpoints(num_timesteps: int, num_ranges: int = 8) -> tuple[int, ...]:
    """The code indices in the middle of equal ranges of t, ascending; every t where there are fewer than ranges."""
    return tuple(sorted({(2 * i + 1) * num_timesteps // (2 * num_ranges) for i in range(num_ranges)}))


def _reverse_step(
    diffusion: GaussianDiffusion, model: Model, x0: Tensor, t: Tensor, generator: Generators
) -> tuple[Tensor, ReverseStep]:
    """x_t of fresh noise, and p(x_{t-1} | x_t), in float64 where the device has it."""
    exact = _exact(x0)
    x_t = diffusion.q_sample(exact, t, normal_noise(x0.shape, generator, x0.device).to(exact.dtype))
    denoised = diffusion.interpret_output(model(x_t.to(x0.dtype), t).to(exact.dtype), x_t, t)
    return x_t, diffusion.reverse_step(denoised, x_t, t)


def _uniform(count: int, generator: Generators) -> Tensor:
    """Numbers [count] in [0, 1), float64 on the CPU; of a sequence of generators one from each."""
    if isinstance(generator, torch.Generator):
        return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    return torch.cat([torch.rand(1, generator=g, device=g.device, dtype=torch.float64).cpu() for g in generator])


def _exact(x0: Tensor) -> Tensor:
    """Images in float64, since a thousand small terms are added up; MPS has none."""
    return x0 if x0.device.type == "mps" else x0.double()


def _require_levels(x0: Tensor) -> None:
    levels = (x0.double().cpu() + 1) * 127.5
    if not bool((levels - levels.round()).abs().max() < 1e-3) or not bool(x0.abs().max() < 1 + 1e-6):  # NaN is off too
        raise ValueError(
            "x0 holds values off the 256 levels of [-1, 1]; bits/dim are defined for x / 127.5 - 1 of uint8 images"
        )
