"""Training objectives: what is minimised at a drawn step, one number per example.

The caller weighs, averages and bins by t: every function here returns [B].
"""

from __future__ import annotations

from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model


def l_simple(diffusion: GaussianDiffusion, model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The squared error of the network on its target, mean over pixels: Ho et al. 2020, eq. 14, per example [B].

    `x0` in [-1, 1] and `eps` ~ N(0, I) are [B,C,H,W], `t` is [B].
    """
    x_t = diffusion.q_sample(x0, t, eps)
    prediction, _ = diffusion.split(model(x_t, t), x_t)
    return mean_per_example((prediction - diffusion.target(x0, x_t, t, eps)) ** 2)


def mean_per_example(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.flatten(1).mean(1)
