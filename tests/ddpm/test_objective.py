"""Objectives: each against its definition, the weights' equivalence, what trains what, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, Objective, bits_per_dim, normal_noise
from ddpm.gaussian import discretized_log_likelihood
from tests.kit.closed_forms import as_output, ignorant, images, normal_data, randn, seeded


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_l_simple_is_the_squared_error_on_the_target(prediction: str) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 100), prediction)
    x0, eps, t = randn(6, 2, 4, 4), randn(6, 2, 4, 4, seed=1), torch.tensor([0, 1, 20, 50, 98, 99])
    model = ignorant(2)
    loss = Objective(diffusion)(model, x0, t, eps)
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
    loss = Objective(diffusion)(normal_data(diffusion), x0, t, eps)
    # the mean of 40,000 squares has standard deviation abar sqrt(2 / 40,000) = 0.7 % of abar
    torch.testing.assert_close(loss, diffusion.schedule.alphas_cumprod, rtol=0.035, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "variance"), [("simple", "fixed_small"), ("vlb", "fixed_large"), ("hybrid", "learned_range")]
)
def test_x0_clipping_does_not_touch_training(kind: str, variance: str) -> None:
    x0, eps, t = images(4), randn(4, 1, 4, 4, seed=1), torch.tensor([0, 10, 50, 99])
    schedule, model = BetaSchedule.named("linear", 100), ignorant(1, 2 if variance == "learned_range" else 1)
    one, two = (
        Objective(GaussianDiffusion(schedule, "eps", variance, c), kind)(model, x0, t, eps) for c in (True, False)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_vlb_at_every_step_averages_to_the_bound(prediction: str, variance: str) -> None:
    T = 40
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", T), prediction, variance, clip_x0=False)
    x0, model = images(1), ignorant(1, 2 if variance == "learned_range" else 1)
    whole = bits_per_dim(diffusion, model, x0, generator=seeded())
    g = seeded()
    eps = torch.cat([normal_noise(x0.shape, g) for _ in range(T)]).double()
    losses = Objective(diffusion, "vlb")(model, x0.expand(T, -1, -1, -1), torch.arange(T), eps)
    torch.testing.assert_close(losses / T, whole.terms[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses.mean() + whole.prior[0], whole.total[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_min_snr_weighs_the_error_of_x0_alike_in_every_parameterisation(schedule: str) -> None:
    s, t = BetaSchedule.named(schedule, 200), torch.arange(200)
    x0, eps = randn(200, 1, 3, 3), randn(200, 1, 3, 3, seed=1)
    x_t = GaussianDiffusion(s).q_sample(x0, t, eps)
    wrong_x0 = x0 + 0.1 * randn(200, 1, 3, 3, seed=2)
    abar = s.alphas_cumprod.view(-1, 1, 1, 1)
    wrong_eps = (x_t - abar.sqrt() * wrong_x0) / (1 - abar).sqrt()
    snr = (abar / (1 - abar)).flatten()
    for gamma in (1.0, 5.0):
        expected = torch.minimum(snr, torch.tensor(gamma)) * ((wrong_x0 - x0) ** 2).mean((1, 2, 3))
        for prediction in ("eps", "x0", "v"):
            diffusion = GaussianDiffusion(s, prediction)
            output = as_output(diffusion, wrong_x0, wrong_eps, x_t, t)
            loss = Objective(diffusion, "min_snr", gamma=gamma)(lambda *_, out=output: out, x0, t, eps)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


def test_min_snr_tends_to_one_where_float32_has_no_such_snr() -> None:
    """linear_raw at T = 11000 ends at abar = 1e-48: the weight on eps is min(1, gamma / snr), and 0 / 0 is not that."""
    s, t = BetaSchedule.named("linear_raw", 11_000), torch.tensor([0, 5_000, 10_998, 10_999])
    abar = s.alphas_cumprod[t]
    assert 1e-70 < float(abar[-1]) < 1e-45
    for prediction, scale in (("eps", abar / (1 - abar)), ("x0", torch.ones(4)), ("v", 1 / (1 - abar))):
        expected = torch.minimum(abar / (1 - abar), torch.tensor(5.0)) / scale
        weight = Objective(GaussianDiffusion(s, prediction), "min_snr").weight(t, torch.zeros(4))
        torch.testing.assert_close(weight.double(), expected.double(), rtol=1e-6, atol=1e-37)


def test_hybrid_adds_the_bound_of_the_variance_alone() -> None:
    """Value: simple + 0.001 T times the term; gradients: the mean's from simple alone, the variance's from the bound alone."""
    T = 50
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", T), "eps", "learned_range")
    x0, eps, t = images(6), randn(6, 1, 4, 4, seed=1), torch.tensor([0, 1, 10, 25, 48, 49])
    output = ignorant(1, 2)(GaussianDiffusion(diffusion.schedule).q_sample(x0, t, eps), t).requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), output, retain_graph=True)[0]

    hybrid, vlb = (Objective(diffusion, kind)(lambda *_: output, x0, t, eps) for kind in ("hybrid", "vlb"))
    simple = ((output[:, :1] - eps) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(hybrid, simple + 0.001 * vlb, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(hybrid)[:, :1], gradient(simple)[:, :1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient(hybrid)[:, 1:], 0.001 * gradient(vlb)[:, 1:], rtol=1e-12, atol=1e-15)
    assert bool((gradient(vlb)[:, 1:] != 0).all())


def test_the_best_learned_variance_of_normal_data_is_beta() -> None:
    """Of the optimal network on N(0, 1) the bound is least at v = 1, the upper end (Ho et al. 2020, section 3.2)."""
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50), "eps", "learned_range", clip_x0=False)
    t = torch.full((4,), 7)
    signs = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]).double().T.reshape(2, 4, 1, 1, 1)
    position = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    eps_of = normal_data(GaussianDiffusion(diffusion.schedule))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([eps_of(x, t), position.expand(4, 1, 1, 1)], 1)

    loss = Objective(diffusion, "vlb")(model, signs[0], t, signs[1]).mean()
    slope = torch.autograd.grad(loss, position)[0]
    assert abs(float(slope)) < 1e-9


def test_float32_losses_agree_with_float64() -> None:
    T = 100
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", T), "eps", "learned_range")
    x0, eps, t = images(T), randn(T, 1, 4, 4, seed=1), torch.arange(T)
    model = ignorant(1, 2)
    for kind in ("vlb", "hybrid"):
        wide, narrow = (
            Objective(diffusion, kind)(model, x0.to(d), t, eps.to(d)) for d in (torch.float64, torch.float32)
        )
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=2e-4)


def test_the_decoder_term_is_the_discretised_likelihood() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50), "x0", "fixed_small")
    x0, t = images(2), torch.tensor([0, 0])
    mean = (x0 + 0.01).clamp(-1, 1)
    loss = Objective(diffusion, "vlb")(lambda *_: mean, x0, t, torch.zeros_like(x0))
    log_variance = torch.full_like(x0, float(diffusion.schedule.posterior_variance[1].log()))
    expected = -discretized_log_likelihood(x0, mean, log_variance).mean((1, 2, 3)) / math.log(2) * 50
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "objective", "says"),
    [
        ({}, "mse", "objective='mse', expected one of simple, vlb, hybrid, min_snr"),
        ({}, "hybrid", "none is learned; use variance 'learned_range'"),
        ({"variance": "learned_range"}, "simple", "nothing would train the variance; use objective 'hybrid' or 'vlb'"),
        ({"variance": "learned_range"}, "min_snr", "nothing would train the variance"),
        ({"prediction": "x_prev"}, "min_snr", "not defined for prediction='x_prev'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(arguments: dict[str, Any], objective: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Objective(GaussianDiffusion(BetaSchedule.named("linear", 50), **arguments), objective)


def test_min_snr_is_refused_without_signal_at_the_end_and_for_a_senseless_gamma() -> None:
    for prediction in ("v", "x0"):
        with pytest.raises(ValueError, match="the last step has SNR 0"):
            Objective(GaussianDiffusion(BetaSchedule.named("jsd", 50), prediction), "min_snr")
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            Objective(GaussianDiffusion(BetaSchedule.named("linear", 50)), "min_snr", gamma=gamma)
