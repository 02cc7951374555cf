"""Bits per dimension: oracles 6 and 12 of MATHS, closed forms, and a second derivation of the whole bound."""

from __future__ import annotations

import itertools
import math

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from ddpm import (
    BetaSchedule,
    BitsPerDim,
    GaussianDiffusion,
    bits_per_dim,
    estimate_bound,
    normal_noise,
    range_midpoints,
    simple_losses,
    term_probabilities,
)
from ddpm.gaussian import discretized_log_likelihood, log_phi, normal_kl
from ddpm.likelihood import decoder_bits, divergence_bits, prior_bits, vlb_term
from tests.kit.closed_forms import ignorant, images, normal_data, point_mass, randn, seeded

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.oracle(12)
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.30101, 0.0, 0.9, 1.0, 2.0])
def test_oracle_12_256_probabilities_sum_to_1(mean: float, std: float) -> None:
    log_variance = torch.full_like(LEVELS, 2 * math.log(std))
    mass = discretized_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_variance).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.oracle(12)
@pytest.mark.parametrize("std", [0.004, 0.01, 0.3, 50.0])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.7, 1.4])
def test_oracle_12_level_by_level_in_50_digits(mean: float, std: float) -> None:
    """Deep in the tails too, where the tanh approximation is off by whole nats."""
    ours = discretized_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), torch.full_like(LEVELS, 2 * math.log(std)))
    with mpmath.workdps(50):
        half, deviation = mpmath.mpf(1) / 255, mpmath.mpf(std)
        for level in (0, 1, 2, 30, 89, 90, 127, 128, 200, 216, 217, 253, 254, 255):
            x = mpmath.mpf(2 * level) / 255 - 1 - mpmath.mpf(mean)
            upper = mpmath.ncdf((x + half) / deviation) if level < 255 else mpmath.mpf(1)
            lower = mpmath.ncdf((x - half) / deviation) if level > 0 else mpmath.mpf(0)
            if x > 0 and level < 255:  # mirrored: 1 minus something below 1e-50 has no digits left
                lower, upper = mpmath.ncdf(-(x + half) / deviation), mpmath.ncdf(-(x - half) / deviation)
            if level == 255:
                lower, upper = mpmath.mpf(0), mpmath.ncdf(-(x - half) / deviation)
            assert float(ours[level]) == pytest.approx(float(mpmath.log(upper - lower)), rel=1e-9, abs=1e-9)


def test_the_decoder_has_finite_gradients_everywhere() -> None:
    x = LEVELS.float().repeat(5, 1)
    mean = torch.tensor([-40.0, -1.0, 0.0, 0.5, 40.0]).view(-1, 1).expand_as(x).clone().requires_grad_()
    log_variance = torch.tensor([-40.0, -11.0, -9.0, 0.0, 40.0]).view(-1, 1).expand_as(x).clone().requires_grad_()
    log = discretized_log_likelihood(x, mean, log_variance)
    assert bool(torch.isfinite(log).all())
    for gradient in torch.autograd.grad(log.sum(), (mean, log_variance)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("z", [-1.5e5, -1.000001e5, -0.999999e5, -40.0, 0.0, 9.0])
def test_log_phi_and_its_gradient_in_50_digits(z: float) -> None:
    """On both sides of where the far tail begins: the gradient is phi(z) / Phi(z)."""
    at = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    value = log_phi(at)
    (gradient,) = torch.autograd.grad(value, at)
    with mpmath.workdps(50):
        mass = mpmath.erfc(-mpmath.mpf(z) / mpmath.sqrt(2)) / 2
        assert float(value.detach()) == pytest.approx(float(mpmath.log(mass)), rel=1e-9, abs=1e-18)
        assert float(gradient) == pytest.approx(float(mpmath.npdf(z) / mass), rel=1e-5)


def test_kl_equals_torchs() -> None:
    a, b, c, d = (randn(50, seed=i) for i in range(4))
    one, two = torch.distributions.Normal(a, (b / 2).exp()), torch.distributions.Normal(c, (d / 2).exp())
    torch.testing.assert_close(
        normal_kl(a, b, c, d), torch.distributions.kl_divergence(one, two), rtol=1e-12, atol=1e-12
    )


def expected_terms(diffusion: GaussianDiffusion, decoder_variance: float) -> tuple[float, float]:
    """(prior, sum of KLs + continuous decoder), in nats, of the optimal network where x0 ~ N(0, 1).

    Every term is quadratic in (x0, eps) without linear part: its expectation is its mean over the four signs.
    """
    T = diffusion.num_timesteps
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    x0, eps = signs[:, 0].view(4, 1, 1, 1), signs[:, 1].view(4, 1, 1, 1)
    model, total = normal_data(diffusion), 0.0
    for step in range(T):
        t = torch.full((4,), step)
        x_t = diffusion.q_sample(x0, t, eps)
        p = diffusion.p_mean_variance(model, x_t, t)
        if step > 0:
            total += float(vlb_term(diffusion, x0, x_t, t, p).mean()) * math.log(2)
        else:
            squares = float(((x0 - p.mean) ** 2).mean())
            total += 0.5 * (math.log(2 * math.pi * decoder_variance) + squares / decoder_variance)
    return float(prior_bits(diffusion, x0).mean()) * math.log(2), total


@pytest.mark.oracle(6)
@pytest.mark.parametrize(
    ("variance", "decoder", "nats"),
    [
        ("fixed_large", "beta_0", 1.41894),
        ("fixed_large", "posterior_1", 1.53264),
        ("fixed_small", "posterior_1", 1.99753),
    ],
)
def test_oracle_6_the_bound_of_the_optimal_network_on_normal_data(variance: str, decoder: str, nats: float) -> None:
    schedule = BetaSchedule.named("linear", 1000)
    diffusion = GaussianDiffusion(schedule, variance=variance, clip_x0=False)
    decoder_variance = float(schedule.betas[0] if decoder == "beta_0" else schedule.posterior_variance[1])
    prior, rest = expected_terms(diffusion, decoder_variance)
    assert prior + rest == pytest.approx(nats, abs=6e-6)
    if decoder == "beta_0":
        assert prior + rest == pytest.approx(
            0.5 * math.log(2 * math.pi * math.e), abs=1e-9
        )  # the entropy: the bound is tight


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(("prediction", "clip"), [("eps", True), ("v", False), ("x_prev", True)])
@pytest.mark.parametrize("kept", [None, (0, 5, 6, 20, 29)])
def test_the_whole_bound_by_a_second_derivation(
    variance: str, prediction: str, clip: bool, kept: tuple[int, ...] | None
) -> None:
    """Each term again with torch's distributions, on the noise the generator gives, without our q_posterior or KL."""
    T, normal, phi = 30, torch.distributions.Normal, torch.special.ndtr
    schedule = BetaSchedule.named("linear", T)
    diffusion = GaussianDiffusion(schedule, prediction, variance, clip)
    x0, model = images(3), ignorant(1, 2 if variance == "learned_range" else 1)
    result = bits_per_dim(diffusion, model, x0, generator=seeded(4), timesteps=kept)
    steps = kept or tuple(range(T))
    assert result.timesteps == steps
    abar = [1.0] + [math.prod((1 - schedule.betas[: t + 1]).tolist()) for t in steps]
    g = seeded(4)
    for i, t in enumerate(steps):
        now, before = abar[i + 1], abar[i]
        beta = 1 - now / before
        x_t = math.sqrt(now) * x0 + math.sqrt(1 - now) * normal_noise(x0.shape, g).double()
        denoised = diffusion.denoise(model, x_t, torch.full((3,), t))
        coef1, coef2 = beta * math.sqrt(before) / (1 - now), (1 - before) * math.sqrt(1 - beta) / (1 - now)
        small = beta * (1 - before) / (1 - now)
        if i == 0:
            beta1 = 1 - abar[2] / now
            small = beta1 * (1 - now) / (1 - abar[2])
        large = beta if i > 0 or variance == "learned_range" else small
        fraction = {"fixed_small": 0.0, "fixed_large": 1.0}.get(variance, denoised.variance_fraction)
        std = torch.exp(
            0.5 * (torch.as_tensor(fraction) * math.log(large) + (1 - torch.as_tensor(fraction)) * math.log(small))
        )
        p = normal(coef1 * denoised.x0 + coef2 * x_t, std.double())
        if i > 0:
            q = normal(coef1 * x0 + coef2 * x_t, torch.tensor(math.sqrt(small), dtype=torch.float64))
            term = torch.distributions.kl_divergence(q, p)
        else:
            upper = torch.where(x0 > 0.999, 1.0, phi((x0 + 1 / 255 - p.mean) / p.stddev))
            term = -torch.log(upper - torch.where(x0 < -0.999, 0.0, phi((x0 - 1 / 255 - p.mean) / p.stddev)))
            fine = torch.exp(-term) > 1e-6  # differences of plain Phi have too few digits beyond
            assert bool(fine.any())
            ours = -discretized_log_likelihood(x0, p.mean, 2 * p.stddev.log())
            torch.testing.assert_close(ours[fine], term[fine], rtol=1e-5, atol=1e-5)
            term = ours
        bits = term.mean((1, 2, 3)) / math.log(2)
        torch.testing.assert_close(result.terms[:, i], bits, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result.x0_mse[:, i], ((denoised.x0 - x0) ** 2).mean((1, 2, 3)))
    last = normal(math.sqrt(abar[-1]) * x0, math.sqrt(1 - abar[-1]))
    prior = torch.distributions.kl_divergence(last, normal(torch.zeros_like(x0), 1.0)).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(result.prior, prior, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result.total, prior + result.terms.sum(1), rtol=1e-9, atol=1e-9)


def test_a_known_image_costs_its_decoder_and_the_prior() -> None:
    """Point mass, fixed_small: q and p are the same at every step, so that nothing is left but L_T and L_0."""
    mu, s = 25 / 127.5 - 1, BetaSchedule.named("cosine", 40)
    diffusion = GaussianDiffusion(s, variance="fixed_small")
    x0 = torch.full((2, 1, 3, 3), mu, dtype=torch.float64)
    result = bits_per_dim(diffusion, point_mass(diffusion, mu), x0, generator=seeded())
    assert float(result.terms[:, 1:].abs().max()) < 1e-9
    mass = math.erf(1 / 255 / math.sqrt(2 * float(s.posterior_variance[1])))  # the bin is centred on the mean
    torch.testing.assert_close(
        result.decoder, torch.full((2,), -math.log2(mass), dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    rate, rmse = result.rate_distortion()
    torch.testing.assert_close(rate, result.prior.mean().expand(40), rtol=0, atol=1e-9)
    assert float(rmse.max()) < 1e-6


def test_rate_and_distortion_by_hand() -> None:
    result = BitsPerDim(
        prior=torch.tensor([0.5, 1.5]),
        terms=torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 8.0]]),
        x0_mse=torch.tensor([[0.0, 1.0, 4.0], [2.0, 7.0, 4.0]]),
        timesteps=(0, 1, 2),
    )
    rate, rmse = result.rate_distortion()
    torch.testing.assert_close(rate, torch.tensor([11.0, 7.0, 1.0]))  # 1 + (4 + 6), 1 + 6, 1
    torch.testing.assert_close(rmse, 127.5 * torch.tensor([1.0, 2.0, 2.0]))
    assert result.total.tolist() == [7.5, 18.5]


def test_a_degenerate_schedule_pays_in_the_prior() -> None:
    x0 = images(4)
    good, bad = (GaussianDiffusion(BetaSchedule.named(n, 50)) for n in ("linear", "linear_raw"))
    assert float(prior_bits(good, x0).max()) < 1e-4
    assert float(prior_bits(bad, x0).min()) > 0.01
    zero = GaussianDiffusion(BetaSchedule.named("jsd", 50), "v")
    assert float(prior_bits(zero, x0).max()) == 0


def test_an_images_bits_do_not_depend_on_its_batch() -> None:
    diffusion, x0 = GaussianDiffusion(BetaSchedule.named("linear", 25)), images(5)
    model = point_mass(diffusion, 0.25)  # element-wise arithmetic: the same in any batch
    together = bits_per_dim(diffusion, model, x0, generator=[seeded(i) for i in range(5)])
    parts = [
        bits_per_dim(diffusion, model, x0[a:b], generator=[seeded(i) for i in range(a, b)]) for a, b in ((0, 2), (2, 5))
    ]
    for name in ("prior", "terms", "x0_mse"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(together, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.5001, 1.01, float("nan")])
def test_images_off_the_levels_are_refused(value: float) -> None:
    x0 = images(2)
    x0[0, 0, 0, 0] = value
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 25))
    with pytest.raises(ValueError, match="off the 256 levels"):
        bits_per_dim(diffusion, ignorant(), x0, generator=seeded())


def test_float32_images_of_a_loader_are_on_the_levels_and_keep_their_dtype() -> None:
    x0 = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).float() / 127.5 - 1
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        assert not torch.is_grad_enabled()
        return torch.zeros_like(x)

    result = bits_per_dim(GaussianDiffusion(BetaSchedule.named("linear", 25)), model, x0, generator=seeded())
    assert seen == {torch.float32}
    assert result.total.dtype == torch.float64


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("at", [[0, 3, 0, 19, 1], [0, 0, 0, 0, 0], [1, 2, 3, 4, 19]])
def test_the_decoder_of_those_that_need_it_is_the_decoder_of_all(variance: str, at: list[int]) -> None:
    """Terms and gradients, bit for bit: which of the others share the batch changes nothing."""
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", 20), "eps", variance, clip_x0=False)
    x0, t = images(5, side=8).float(), torch.tensor(at)
    x_t = diffusion.q_sample(x0, t, randn(5, 1, 8, 8, seed=2).float())
    output = randn(5, diffusion.output_channels(1), 8, 8, seed=3).float()

    def terms(of: Tensor, whole: bool) -> Tensor:
        p = diffusion.reverse_step(diffusion.interpret_output(of, x_t, t), x_t, t)
        if not whole:
            return vlb_term(diffusion, x0, x_t, t, p)
        return torch.where(t == 0, decoder_bits(x0, p), divergence_bits(diffusion, x0, x_t, t, p).double())

    found = []
    for whole in (False, True):
        of = output.clone().requires_grad_()
        bits = terms(of, whole)
        (gradient,) = torch.autograd.grad(bits.sum(), of)
        found.append((bits.detach(), gradient))
    for some, everyone in zip(*found, strict=True):
        assert torch.equal(some, everyone)


def test_terms_are_drawn_as_the_optimal_network_on_normal_data_needs_them() -> None:
    """Half of the chances are the closed form's: the KL of each step, whose mean over the four signs is exact."""
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 40), clip_x0=False)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    x0, eps, model = signs[:, 0].view(4, 1, 1, 1), signs[:, 1].view(4, 1, 1, 1), normal_data(diffusion)
    terms = []
    for step in range(1, 40):
        t = torch.full((4,), step)
        x_t = diffusion.q_sample(x0, t, eps)
        terms.append(float(divergence_bits(diffusion, x0, x_t, t, diffusion.p_mean_variance(model, x_t, t)).mean()))
    optimal, p = torch.tensor(terms, dtype=torch.float64), term_probabilities(diffusion.schedule)
    torch.testing.assert_close(2 * p - 1 / 39, optimal / optimal.sum(), rtol=1e-9, atol=1e-12)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("num_terms", [1, 4])
def test_the_estimate_of_the_bound_has_the_mean_of_the_closed_form(num_terms: int) -> None:
    """The terms between are quadratic in the noise, without a linear part in its mean over signs: that mean is exact."""
    diffusion, T, seeds = GaussianDiffusion(BetaSchedule.named("linear", 50), clip_x0=False), 50, 4000
    x0, model = images(1, side=4), normal_data(diffusion)
    exact = 0.0
    for step in range(1, T):
        t, pair = torch.full((2,), step), x0.expand(2, -1, -1, -1)
        x_t = diffusion.q_sample(
            pair, t, torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand_as(pair)
        )
        exact += float(divergence_bits(diffusion, pair, x_t, t, diffusion.p_mean_variance(model, x_t, t)).mean())
    many = x0.expand(seeds, -1, -1, -1)
    found = estimate_bound(diffusion, model, many, generator=seeded(1), num_terms=num_terms)
    error = float(found.divergences.std()) / math.sqrt(seeds)
    assert float(found.divergences.mean()) == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact  # an estimate that says nothing would agree with anything
    assert torch.equal(found.prior, prior_bits(diffusion, many))
    torch.testing.assert_close(found.total, found.prior + found.divergences + found.decoder)


@pytest.mark.parametrize(
    ("schedule", "prediction", "variance", "clip"),
    [
        (BetaSchedule.named("linear", 25), "eps", "learned_range", True),
        (BetaSchedule.named("cosine", 25), "x_prev", "fixed_small", True),
        (BetaSchedule.named("cosine", 25).with_zero_terminal_snr(), "v", "fixed_large", False),
        (BetaSchedule.from_betas([0.3, 0.6]), "x0", "fixed_small", False),
    ],
)
def test_the_estimate_of_the_bound_is_unbiased(
    schedule: BetaSchedule, prediction: str, variance: str, clip: bool
) -> None:
    """Beside the whole bound of a network that knows nothing, both over many seeds; a chain of two steps too."""
    diffusion, seeds = GaussianDiffusion(schedule, prediction, variance, clip), 3000
    model = ignorant(1, 2 if variance == "learned_range" else 1)
    x0 = images(1, side=4).expand(seeds, -1, -1, -1)
    whole = bits_per_dim(diffusion, model, x0, generator=seeded(1)).total
    found = estimate_bound(diffusion, model, x0, generator=seeded(2), num_terms=3).total
    assert bool(torch.isfinite(found).all())
    error = math.sqrt((float(whole.var()) + float(found.var())) / seeds)
    assert float(found.mean()) == pytest.approx(float(whole.mean()), abs=4 * error)
    assert error < 0.05 * float(whole.mean())


def test_the_simple_loss_is_the_error_of_the_noise_whatever_is_predicted() -> None:
    """Networks that all say x0 = mu: the error of the noise is (abar / (1 - abar)) (x0 - mu)^2, for any noise."""
    schedule, x0, timesteps = BetaSchedule.named("cosine", 40), images(3), (0, 7, 38)
    abar = schedule.alphas_cumprod[list(timesteps)]
    expected = abar / (1 - abar) * ((x0 - 0.25) ** 2).mean((1, 2, 3))[:, None]
    for prediction in ("eps", "x0", "v", "x_prev"):
        diffusion = GaussianDiffusion(schedule, prediction)
        found = simple_losses(diffusion, point_mass(diffusion, 0.25), x0, timesteps, generator=seeded(3))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_an_images_estimates_do_not_depend_on_its_batch() -> None:
    diffusion, x0 = GaussianDiffusion(BetaSchedule.named("linear", 25)), images(5)
    model = point_mass(diffusion, 0.25)
    batches = [(0, 5), (0, 2), (2, 5)]
    bound, loss = (
        [ask(x0[a:b], [seeded(i) for i in range(a, b)]) for a, b in batches]
        for ask in (
            lambda x, g: estimate_bound(diffusion, model, x, generator=g, num_terms=4).total,
            lambda x, g: simple_losses(diffusion, model, x, (3, 20), generator=g),
        )
    )
    for together, *parts in (bound, loss):
        torch.testing.assert_close(torch.cat(parts), together, rtol=1e-12, atol=1e-12)


def test_the_midpoints_of_eight_ranges_of_t() -> None:
    assert range_midpoints(1000) == (62, 187, 312, 437, 562, 687, 812, 937)
    assert range_midpoints(8) == tuple(range(8))
    assert range_midpoints(3) == (0, 1, 2)
    assert range_midpoints(1) == (0,)
