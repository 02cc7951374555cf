"""The process: oracles 1 and 7 of MATHS, clipping that works, precision, and the traps that concern q and p."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion
from tests.kit.closed_forms import as_output, ignorant, randn

PREDICTIONS = ("eps", "x0", "v", "x_prev")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def all_steps(T: int) -> Tensor:
    return torch.arange(T)


@pytest.mark.oracle(1)
@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid"])
def test_oracle_1_posterior_is_bayes_product(name: str) -> None:
    T = 200
    s = BetaSchedule.named(name, T)
    x0, x_t = randn(T, 1, 1, 1), randn(T, 1, 1, 1, seed=1)
    q = GaussianDiffusion(s).q_posterior(x0, x_t, all_steps(T))
    for t in range(1, T):
        beta = float(s.betas[t])
        before = math.prod((1 - s.betas[:t]).tolist())  # abar_{t-1}
        # q(x_t | x_{t-1}) as a Gaussian in x_{t-1}, times q(x_{t-1} | x_0): precisions add, means weigh by precision
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (
            math.sqrt(1 - beta) * float(x_t[t]) / beta + math.sqrt(before) * float(x0[t]) / (1 - before)
        ) / precision
        assert float(q.mean[t]) == pytest.approx(mean, abs=1e-12)
        assert float(q.variance[t]) == pytest.approx(1 / precision, abs=1e-12)
    assert float(q.variance[0]) == 0
    assert float(q.mean[0]) == pytest.approx(float(x0[0]), abs=1e-12)


def test_q_sample_is_t_plus_1_steps_of_the_chain() -> None:
    """Eq. 2 iterated: each step scales what is there by sqrt(1 - beta) and adds variance beta."""
    T = 50
    s = BetaSchedule.named("cosine", T)
    diffusion = GaussianDiffusion(s)
    signal, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t, beta in enumerate(s.betas.tolist()):
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        at = torch.tensor([t])
        assert float(diffusion.q_sample(one, at, zero)) == pytest.approx(signal, rel=1e-12)
        assert float(diffusion.q_sample(zero, at, one)) ** 2 == pytest.approx(variance, rel=1e-9)


def test_trap_3_the_first_step_is_noised() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 1000))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(diffusion.q_sample(zero, torch.tensor([0]), one)) == pytest.approx(0.01, rel=1e-5)  # sqrt(beta_0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q_sample_is_float32_for_half_images(dtype: torch.dtype) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 1000))
    x0, eps = randn(8, 1, 4, 4).to(dtype), randn(8, 1, 4, 4, seed=1).to(dtype)
    t = torch.tensor([0, 1, 2, 5, 9, 10, 500, 999])
    x_t = diffusion.q_sample(x0, t, eps)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, diffusion.q_sample(x0.double(), t, eps.double()).float(), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(diffusion.q_sample(x0, t, eps), x_t)


@pytest.mark.oracle(7)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_oracle_7_four_readings_of_one_denoiser_give_the_same_x0(name: str) -> None:
    T = 1000
    s = BetaSchedule.named(name, T)
    t = all_steps(T)
    x0, eps = randn(T, 2, 3, 3), randn(T, 2, 3, 3, seed=1)
    x_t = GaussianDiffusion(s).q_sample(x0, t, eps)
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(s, prediction=prediction, clip_x0=False)
        output = as_output(diffusion, x0, eps, x_t, t)
        torch.testing.assert_close(diffusion.target(x0, x_t, t, eps), output, rtol=0, atol=1e-9)
        p = diffusion.p_mean_variance(lambda *_, out=output: out, x_t, t)
        # x_prev divides by coef1, about 1e-4 at the end of the linear schedule and smaller at that of the cosine
        atol = 1e-6 if prediction == "x_prev" else 1e-9
        torch.testing.assert_close(p.x0, x0, rtol=0, atol=atol)
        torch.testing.assert_close(p.eps, eps, rtol=0, atol=atol)
        torch.testing.assert_close(p.mean, diffusion.q_posterior(x0, x_t, t).mean, rtol=0, atol=1e-9)


def test_the_mean_of_unclipped_eps_is_equation_11() -> None:
    T = 300
    s = BetaSchedule.named("linear", T)
    t, x_t, model = all_steps(T), randn(T, 1, 4, 4), ignorant()
    p = GaussianDiffusion(s, clip_x0=False).p_mean_variance(model, x_t, t)
    abar = torch.tensor([math.prod((1 - s.betas[: i + 1]).tolist()) for i in range(T)]).double().view(-1, 1, 1, 1)
    beta = s.betas.view(-1, 1, 1, 1)
    expected = (x_t - beta / (1 - abar).sqrt() * model(x_t, t)) / (1 - beta).sqrt()
    torch.testing.assert_close(p.mean, expected, rtol=0, atol=1e-6)  # abar above is rounded to float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_trap_2_clipping_reaches_the_mean_and_eps(prediction: str) -> None:
    T = 100
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", T), prediction=prediction)
    t = all_steps(T)
    x_t = 3 * randn(T, 1, 4, 4)
    x0, eps = 4 * randn(T, 1, 4, 4, seed=1), torch.zeros(T, 1, 4, 4, dtype=torch.float64)
    x_t = diffusion.q_sample(x0, t, eps)
    p = diffusion.p_mean_variance(lambda *_: as_output(diffusion, x0, eps, x_t, t), x_t, t)
    assert bool((x0.abs() > 1).any())
    torch.testing.assert_close(p.x0, x0.clamp(-1, 1), rtol=0, atol=1e-8)
    torch.testing.assert_close(p.mean, diffusion.q_posterior(x0.clamp(-1, 1), x_t, t).mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(diffusion.q_sample(p.x0, t, p.eps), x_t, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_trap_9_every_variance_is_finite_and_between_its_ends(name: str, variance: str) -> None:
    T = 100
    s = BetaSchedule.named(name, T)
    t, x_t = all_steps(T), randn(T, 1, 4, 4).float()
    outputs = 2 if variance == "learned_range" else 1
    diffusion = GaussianDiffusion(s, variance=variance)
    p = diffusion.p_mean_variance(lambda x, _: torch.zeros(len(x), outputs, 4, 4), x_t, t)
    assert bool(torch.isfinite(p.log_variance).all())
    torch.testing.assert_close(p.variance, p.log_variance.exp())
    small = s.posterior_variance.clone()
    small[0] = small[1]  # the decoder: both fixed variances take this one at t = 0 (MATHS, "Process")
    large = torch.cat([small[:1], s.betas[1:]])
    middle = torch.sqrt(small * s.betas)  # an output of 0 lies half-way in the logarithm
    expected = {"fixed_small": small, "fixed_large": large, "learned_range": middle}[variance]
    torch.testing.assert_close(p.variance.amax((1, 2, 3)).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(p.variance.amin((1, 2, 3)).double(), expected, rtol=1e-5, atol=0)


def test_a_learned_variance_spans_the_two_fixed_ones_and_is_not_clamped() -> None:
    s = BetaSchedule.named("linear", 50)
    diffusion = GaussianDiffusion(s, variance="learned_range")
    t, x_t = all_steps(50)[1:], randn(49, 1, 2, 2)
    for output, weight in ((1.0, 1.0), (-1.0, 0.0), (3.0, 2.0)):
        out = torch.cat([torch.zeros(49, 1, 2, 2), torch.full((49, 1, 2, 2), output)], 1).double()
        log = diffusion.p_mean_variance(lambda *_, out=out: out, x_t, t).log_variance[:, 0, 0, 0]
        expected = weight * s.betas[1:].log() + (1 - weight) * s.posterior_variance[1:].log()
        torch.testing.assert_close(log, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_outputs_are_widened_before_the_arithmetic() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", 4000), clip_x0=False)
    x_t = randn(1, 1, 4, 4).float()
    p = diffusion.p_mean_variance(lambda x, t: (0.9 * x).half(), x_t, torch.tensor([3999]))
    assert p.mean.dtype == torch.float32
    assert bool(torch.isfinite(p.x0).all())  # 1/sqrt(abar) is 81,165 there, beyond float16


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prediction": "noise"}, "prediction='noise', expected one of eps, x0, v, x_prev"),
        ({"variance": "learned"}, "variance='learned', expected one of fixed_small, fixed_large, learned_range"),
    ],
)
def test_refused_choices(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GaussianDiffusion(BetaSchedule.named("linear", 50), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("variance", "channels"), [("learned_range", 1), ("fixed_small", 2), ("fixed_large", 3)])
def test_an_output_of_the_wrong_shape_is_refused(variance: str, channels: int) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50), variance=variance)
    says = rf"returned shape \(2, {channels}, 4, 4\) for x_t of shape \(2, 1, 4, 4\)"
    with pytest.raises(ValueError, match=says) as error:
        diffusion.p_mean_variance(
            lambda x, t: torch.zeros(2, channels, 4, 4), torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])
        )
    assert ("(prediction and variance)" in str(error.value)) == (variance == "learned_range")


def test_a_learned_variance_is_the_second_half_of_the_channels() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50), variance="learned_range")
    output = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction, position = diffusion.split(output, torch.zeros(2, 3, 4, 4))
    assert position is not None
    torch.testing.assert_close(prediction, output[:, :3].to(prediction.dtype), rtol=0, atol=0)
    torch.testing.assert_close(position, (output[:, 3:].to(position.dtype) + 1) / 2, rtol=0, atol=0)


def test_noise_of_another_shape_is_refused_not_broadcast() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 50))
    with pytest.raises(ValueError, match="eps has shape"):
        diffusion.q_sample(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), torch.zeros(2, 1, 4, 4))
