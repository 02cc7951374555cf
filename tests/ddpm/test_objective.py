"""Objectives: L_simple against its definition, per example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, l_simple
from tests.ddpm.closed_forms import as_output, ignorant, normal_data, randn


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_l_simple_is_the_squared_error_on_the_target(prediction: str) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 100), prediction)
    x0, eps, t = randn(6, 2, 4, 4), randn(6, 2, 4, 4, seed=1), torch.tensor([0, 1, 20, 50, 98, 99])
    model = ignorant(2)
    loss = l_simple(diffusion, model, x0, t, eps)
    abar = diffusion.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    error = model(x_t, t) - as_output(diffusion, x0, eps, x_t, t)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, (error**2).mean((1, 2, 3)), rtol=1e-9, atol=1e-12)


def test_l_simple_of_the_optimal_network_on_normal_data_is_abar() -> None:
    """eps given x_t has variance abar where x0 ~ N(0, 1): the loss at t that no network can beat."""
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", 50))
    t = torch.arange(50)
    x0, eps = randn(50, 1, 200, 200), randn(50, 1, 200, 200, seed=1)
    loss = l_simple(diffusion, normal_data(diffusion), x0, t, eps)
    # the mean of 40,000 squares has standard deviation abar sqrt(2 / 40,000) = 0.7 % of abar
    torch.testing.assert_close(loss, diffusion.schedule.alphas_cumprod, rtol=0.035, atol=1e-9)


def test_x0_clipping_does_not_touch_the_training_target() -> None:
    x0, eps, t = 3 * randn(4, 1, 4, 4), randn(4, 1, 4, 4, seed=1), torch.tensor([0, 10, 50, 99])
    schedule = BetaSchedule.named("linear", 100)
    one, two = (l_simple(GaussianDiffusion(schedule, clip_x0=clip), ignorant(), x0, t, eps) for clip in (True, False))
    assert torch.equal(one, two)


def test_gradients_reach_the_network() -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * weight

    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 100))
    loss = l_simple(diffusion, model, randn(2, 1, 4, 4), torch.tensor([3, 90]), randn(2, 1, 4, 4, seed=1)).mean()
    assert float(torch.autograd.grad(loss, weight)[0]) != 0
