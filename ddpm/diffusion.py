"""The diffusion process of Ho et al. 2020: q is the known forward process, p the model that reverses it.

Images are [B,C,H,W] (any trailing shape does), steps `t` are [B] int64 code indices 0 .. T-1. Arithmetic is float32 at
least, whatever the dtype of the image or the network: in half precision 1 - abar is exactly 0 at the first steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ddpm.schedule import BetaSchedule

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], t [B] int64) -> prediction [B,C,H,W], or [B,2C,H,W] with a learned variance."""


class Prediction(StrEnum):
    """What the network's output is read as."""

    EPS = "eps"  # the noise in x_t
    X0 = "x0"  # the clean image
    V = "v"  # sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022)
    X_PREV = "x_prev"  # the mean of q(x_{t-1} | x_t, x_0)


class Variance(StrEnum):
    """The variance of p(x_{t-1} | x_t); at t = 0, the decoder, both fixed ones are beta tilde of t = 1."""

    FIXED_SMALL = "fixed_small"  # beta tilde, optimal for a point mass (Ho et al., section 3.2)
    FIXED_LARGE = "fixed_large"  # beta, optimal for N(0, 1) data
    LEARNED_RANGE = "learned_range"  # between the two in the log domain (Nichol & Dhariwal 2021, eq. 15)


class Gaussian(NamedTuple):
    """A diagonal Gaussian; `variance` and `log_variance` broadcast to `mean`."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Denoised(NamedTuple):
    """What the network says about x_t: x0 and eps that agree, and where a learned variance lies between its ends."""

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t), with the x0 and eps that its mean was built from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor
    eps: Tensor


E = TypeVar("E", bound=StrEnum)


def choice(kind: type[E], value: str, field: str) -> E:
    """The member of `kind` called `value`; ValueError names the field and every choice."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{field}={value!r}, expected one of {', '.join(kind)}") from None


@dataclass(frozen=True)
class GaussianDiffusion:
    """A schedule and the reading of a network: what it predicts, which variance is sampled, whether x0 is clipped.

    Raises ValueError for a choice that does not exist, and for a schedule whose last beta is 1 with a prediction that
    is undefined there: eps divides by abar = 0, x_prev by a weight of about 0.
    """

    schedule: BetaSchedule
    prediction: Prediction = Prediction.EPS
    variance: Variance = Variance.FIXED_LARGE
    clip_x0: bool = True

    def __init__(
        self,
        schedule: BetaSchedule,
        prediction: Prediction | str = Prediction.EPS,
        variance: Variance | str = Variance.FIXED_LARGE,
        clip_x0: bool = True,
    ) -> None:
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "prediction", choice(Prediction, prediction, "prediction"))
        object.__setattr__(self, "variance", choice(Variance, variance, "variance"))
        object.__setattr__(self, "clip_x0", clip_x0)
        if schedule.has_zero_terminal_snr and self.prediction in (Prediction.EPS, Prediction.X_PREV):
            raise ValueError(
                f"prediction={self.prediction.value!r} with schedule {schedule.name!r}: its last step holds no signal, "
                "so that x0 cannot be recovered there; use prediction 'v' or 'x0', or a schedule that keeps some signal"
            )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

    def output_channels(self, channels: int) -> int:
        """Channels the network must return for images of `channels`: twice as many with a learned variance."""
        return 2 * channels if self.variance is Variance.LEARNED_RANGE else channels

    # The forward process q: known, nothing learned.

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, Ho et al. eq. 4; float32 at least."""
        x0, eps = _wide(x0), _wide(eps)
        if x0.shape != eps.shape:
            raise ValueError(f"eps has shape {tuple(eps.shape)}, expected that of x0, {tuple(x0.shape)}")
        return self._abar_root(t, x0) * x0 + self._noise_scale(t, x0) * eps

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0), Ho et al. eqs. 6-7; variance 0 at t = 0, but log_variance there that of t = 1."""
        x0, x_t = _wide(x0), _wide(x_t)
        look = self.schedule.lookup
        mean = look("posterior_mean_coef1", t, x_t) * x0 + look("posterior_mean_coef2", t, x_t) * x_t
        return Gaussian(mean, look("posterior_variance", t, x_t), look("posterior_log_variance_clipped", t, x_t))

    # The three readings of one denoiser (Salimans & Ho 2022, appendix D), and the posterior mean.

    def target(self, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should return for x_t, under this parameterisation."""
        if self.prediction is Prediction.EPS:
            return _wide(eps)
        if self.prediction is Prediction.X0:
            return _wide(x0)
        if self.prediction is Prediction.V:
            return self._abar_root(t, x_t) * _wide(eps) - self._noise_scale(t, x_t) * _wide(x0)
        return self.q_posterior(x0, x_t, t).mean

    def predict_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 from the network's output [B,C,H,W], unclipped: the inverse of `target`."""
        output, x_t = _wide(output), _wide(x_t)
        if self.prediction is Prediction.EPS:
            return (x_t - self._noise_scale(t, x_t) * output) / self._abar_root(t, x_t)
        if self.prediction is Prediction.X0:
            return output
        if self.prediction is Prediction.V:
            return self._abar_root(t, x_t) * x_t - self._noise_scale(t, x_t) * output
        look = self.schedule.lookup
        return (output - look("posterior_mean_coef2", t, x_t) * x_t) / look("posterior_mean_coef1", t, x_t)

    def predict_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that turns x0 into x_t."""
        x0, x_t = _wide(x0), _wide(x_t)
        return (x_t - self._abar_root(t, x_t) * x0) / self._noise_scale(t, x_t)

    # The reverse process p.

    def denoise(self, model: Model, x_t: Tensor, t: Tensor) -> Denoised:
        """x0 and eps according to `model`; where x0 is clipped to [-1, 1], eps is re-derived from the clipped x0."""
        return self.interpret_output(model(x_t, t), x_t, t)

    def interpret_output(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """`denoise` for an output of the network that is there already."""
        x_t = _wide(x_t)
        output, fraction = self.split(output, x_t)
        x0 = self.predict_x0(output, x_t, t)
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
        elif self.prediction is Prediction.EPS:
            return Denoised(x0, output, fraction)
        elif self.prediction is Prediction.V:  # exact also where 1 - abar is small: eps = sigma x_t + alpha v
            return Denoised(x0, self._noise_scale(t, x_t) * x_t + self._abar_root(t, x_t) * output, fraction)
        return Denoised(x0, self.predict_eps(x0, x_t, t), fraction)

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction in the network's output, and the variance's position (output + 1) / 2 where it is learned."""
        expected = (x_t.shape[0], self.output_channels(x_t.shape[1]), *x_t.shape[2:])
        if output.shape != expected:
            learned = " (prediction and variance)" if self.variance is Variance.LEARNED_RANGE else ""
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for x_t of shape {tuple(x_t.shape)}, expected "
                f"{expected}{learned} with variance={self.variance.value!r}"
            )
        output = _wide(output)
        if self.variance is not Variance.LEARNED_RANGE:
            return output, None
        prediction, position = output.chunk(2, dim=1)
        return prediction, (position + 1) / 2

    def p_mean_variance(self, model: Model, x_t: Tensor, t: Tensor) -> ReverseStep:
        """p(x_{t-1} | x_t): predict x0, clip it, THEN form the posterior mean from it (Ho et al. eqs. 11-12)."""
        return self.reverse_step(self.denoise(model, x_t, t), x_t, t)

    def reverse_step(self, denoised: Denoised, x_t: Tensor, t: Tensor) -> ReverseStep:
        """`p_mean_variance` for a network that has been asked already."""
        mean = self.q_posterior(denoised.x0, x_t, t).mean
        log_variance = self._log_variance(denoised.variance_fraction, t, mean)
        return ReverseStep(mean, log_variance.exp(), log_variance, denoised.x0, denoised.eps)

    def _log_variance(self, fraction: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        small = self.schedule.lookup("posterior_log_variance_clipped", t, like)
        if self.variance is Variance.FIXED_SMALL:
            return small
        if fraction is None:
            return self.schedule.lookup("fixed_large_log_variance", t, like)
        return fraction * self.schedule.lookup("log_betas", t, like) + (1 - fraction) * small

    def _abar_root(self, t: Tensor, like: Tensor) -> Tensor:
        return self.schedule.lookup("sqrt_alphas_cumprod", t, like)

    def _noise_scale(self, t: Tensor, like: Tensor) -> Tensor:
        return self.schedule.lookup("sqrt_one_minus_alphas_cumprod", t, like)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
