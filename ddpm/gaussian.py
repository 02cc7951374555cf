"""Divergence and discretised likelihood of Gaussians, in nats, element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255  # half the distance of two neighbouring levels of a uint8 image scaled to [-1, 1]
END = 0.999  # beyond it lies level 0 or 255, whose bin reaches to infinity
FAR_TAIL = -1e5
LEAST_LOG_RATIO = -1e-15  # a bin much narrower than the Gaussian has log Phi(upper) - log Phi(lower) = 0 in float64


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2))."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass of N(mean, variance) in the bin of x, one of 256 levels of [-1, 1]: Ho et al. 2020, eq. 13.

    Exact in both tails: differences of log Phi are taken on the side where both edges are below the mean. float64
    wherever the device has it, so that no unlikely pixel turns a gradient into NaN.
    """
    dtype = x.dtype if x.device.type == "mps" else torch.float64
    centred, scale = x.to(dtype) - mean.to(dtype), (-0.5 * log_variance.to(dtype)).exp()
    # Mirrored where x lies above the mean: Phi(b) - Phi(a) = Phi(-a) - Phi(-b), and the second keeps its digits.
    below = -centred.abs()
    upper, lower = (below + HALF_BIN) * scale, (below - HALF_BIN) * scale
    log_upper = log_phi(upper)
    log_ratio = (log_phi(lower) - log_upper).clamp(max=LEAST_LOG_RATIO)
    inside = log_upper + torch.log(-torch.expm1(log_ratio))
    first = log_phi((centred + HALF_BIN) * scale)
    last = log_phi((HALF_BIN - centred) * scale)
    return torch.where(x < -END, first, torch.where(x > END, last, inside))


def log_phi(z: Tensor) -> Tensor:
    """log of the normal distribution function, with finite gradients: torch's overflow in the far tail."""
    far = z.clamp(max=FAR_TAIL)
    asymptotic = -0.5 * far**2 - torch.log(-far) - 0.5 * math.log(2 * math.pi)  # relative error 1 / z^2
    return torch.where(z < FAR_TAIL, asymptotic, torch.special.log_ndtr(z.clamp(min=FAR_TAIL)))
