"""Samplers: oracles 2-5 of MATHS by exact linear response, step subsets, noise per image, gradients."""

from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm import (
    BetaSchedule,
    GaussianDiffusion,
    ancestral,
    ddim,
    few_steps_warning,
    late_start_warning,
    normal_noise,
    timestep_subset,
)
from ddpm.noise import drawn_ahead, noise_for_steps
from tests.kit.closed_forms import ignorant, linear_response, normal_data, point_mass, randn, seeded


def linear(T: int = 1000, **kwargs: object) -> GaussianDiffusion:
    return GaussianDiffusion(BetaSchedule.named("linear", T), clip_x0=False, **kwargs)  # type: ignore[arg-type]


@pytest.mark.oracle(2)
@pytest.mark.parametrize(
    ("variance", "steps", "end"),
    [
        ("fixed_large", 1000, 0.9999),
        ("fixed_small", 1000, 0.99107),
        ("fixed_small", 50, 0.8551),
        ("fixed_small", 10, 0.5208),
    ],
)
def test_oracle_2_variance_on_normal_data(variance: str, steps: int, end: float) -> None:
    diffusion = linear(variance=variance)
    kept = timestep_subset(1000, steps, "linspace")
    response = linear_response(
        lambda x, g: ancestral(diffusion, normal_data(diffusion), x, generator=g, timesteps=kept), steps - 1
    )
    variances = [float((weights**2).sum()) for _, weights in response]
    assert variances[-1] == pytest.approx(end, abs=6e-5)
    if variance == "fixed_large":
        assert variances[:-1] == pytest.approx(
            [1.0] * (steps - 1), abs=1e-5
        )  # log-variances pass through float64 tables


@pytest.mark.oracle(2)
@pytest.mark.parametrize(("steps", "spacing"), [(50, "linspace"), (50, "trailing"), (10, "leading"), (7, "quad")])
def test_oracle_2_fixed_large_ends_at_abar_of_the_first_kept_step(steps: int, spacing: str) -> None:
    diffusion = linear()
    kept = timestep_subset(1000, steps, spacing)
    response = linear_response(
        lambda x, g: ancestral(diffusion, normal_data(diffusion), x, generator=g, timesteps=kept), len(kept) - 1
    )
    variances = [float((weights**2).sum()) for _, weights in response]
    assert variances[:-1] == pytest.approx([1.0] * (len(kept) - 1), abs=1e-6)
    assert variances[-1] == pytest.approx(float(diffusion.schedule.alphas_cumprod[kept[0]]), abs=1e-6)


@pytest.mark.oracle(3)
@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_oracle_3_a_point_mass_is_followed_at_every_step(prediction: str, eta: float | None) -> None:
    """Ancestral (eta None) with fixed_small, and DDIM, both from q(x_T | x0 = mu)."""
    mu, T = 0.6, 60
    diffusion = linear(T, variance="fixed_small", prediction=prediction)
    abar = diffusion.schedule.alphas_cumprod.tolist()
    model = point_mass(diffusion, mu)
    x_T = math.sqrt(abar[-1]) * mu + math.sqrt(1 - abar[-1]) * randn(1, 1, 1, T + 9 if eta != 0 else 10, seed=5)

    def sampler(x: Tensor, g: torch.Generator) -> object:
        if eta is None:
            return ancestral(diffusion, model, x, generator=g)
        return ddim(diffusion, model, x, generator=g, eta=eta)

    response = linear_response(sampler, 0 if eta == 0 else T - 1, x_T=x_T)  # type: ignore[arg-type]
    for t, (mean, weights) in zip(reversed(range(T)), response, strict=True):
        before = abar[t - 1] if t > 0 else 1.0
        assert float(mean) == pytest.approx(math.sqrt(before) * mu, abs=1e-6)
        assert float((weights**2).sum()) == pytest.approx(1 - before, abs=1e-6)


@pytest.mark.oracle(3)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_oracle_3_from_the_prior_the_end_point_holds(sampler: str) -> None:
    diffusion = linear(60, variance="fixed_small")
    model, x = point_mass(diffusion, -0.3), randn(2, 1, 4, 4)
    if sampler == "ancestral":
        *_, (_t, x) = ancestral(diffusion, model, x, generator=seeded())
    else:
        *_, (_t, x) = ddim(diffusion, model, x, timesteps=timestep_subset(60, 7))
    torch.testing.assert_close(x, torch.full_like(x, -0.3), rtol=0, atol=1e-9)


@pytest.mark.oracle(4)
@pytest.mark.parametrize(("spacing", "gain"), [("linspace", 0.96338), ("trailing", 0.96355)])
def test_oracle_4_ddim_on_normal_data_multiplies_by_cosines(spacing: str, gain: float) -> None:
    diffusion = linear()
    kept = timestep_subset(1000, 50, spacing)
    *_, (_, x) = ddim(diffusion, normal_data(diffusion), torch.ones(1, 1, 1, 1).double(), timesteps=kept)
    phi = [0.0, *(math.acos(math.sqrt(diffusion.schedule.alphas_cumprod[t])) for t in kept)]
    product = math.prod(math.cos(b - a) for a, b in itertools.pairwise(phi))
    assert float(x) == pytest.approx(product, abs=1e-9)
    assert float(x) == pytest.approx(gain, abs=6e-6)


@pytest.mark.oracle(5)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [40, 13, 1])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev"])
def test_oracle_5_ddim_eta_1_is_ancestral_fixed_small(prediction: str, steps: int, clip: bool) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 40), prediction, "fixed_small", clip)
    kept, model, x_T = timestep_subset(40, steps), ignorant(), randn(2, 1, 5, 5)
    one = list(ancestral(diffusion, model, x_T, generator=seeded(), timesteps=kept))
    two = list(ddim(diffusion, model, x_T, generator=seeded(), timesteps=kept, eta=1.0))
    assert [t for t, _ in one] == [t for t, _ in two] == list(reversed(kept))
    # x_prev divides by a small weight of x0, which magnifies rounding
    for (_, a), (_, b) in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_network_gets_the_original_steps_when_respaced() -> None:
    diffusion, seen = linear(100), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.append(t.tolist())
        return torch.zeros_like(x)

    kept = timestep_subset(100, 4)
    yielded = [t for t, _ in ancestral(diffusion, model, randn(2, 1, 2, 2), generator=seeded(), timesteps=kept)]
    assert yielded == [99, 74, 49, 24]
    assert seen == [[t, t] for t in yielded]


@pytest.mark.parametrize(
    ("T", "S"), [(10, 2), (1000, 10), (1000, 50), (1000, 400), (1000, 999), (1000, 1000), (50, 7), (50, 1), (100, 30)]
)
def test_subsets_equal_a_peers_and_the_formula(T: int, S: int) -> None:
    from diffusers import DDIMScheduler

    for spacing in ("trailing", "linspace", "leading"):
        peer = DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
        peer.set_timesteps(S)
        expected = peer.timesteps.flip(0).tolist()
        if (spacing, S) == ("linspace", 1):
            expected = [T - 1]  # theirs is [0]: a single step must start from noise
        assert list(timestep_subset(T, S, spacing)) == expected, spacing
    quad = np.floor(np.linspace(0, math.sqrt(0.8 * T), S) ** 2 + 1e-9).astype(int) if S > 1 else np.array([0])
    assert list(timestep_subset(T, S, "quad")) == sorted(set(quad.tolist()))


@pytest.mark.parametrize(
    ("S", "spacing", "says"),
    [
        (0, "trailing", "steps=0, expected 1 .. 10"),
        (11, "trailing", "steps=11"),
        (5, "even", "spacing='even', expected one of"),
    ],
)
def test_subsets_that_do_not_exist(S: int, spacing: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        timestep_subset(10, S, spacing)


def test_zero_terminal_snr_starts_at_the_last_step() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 100).with_zero_terminal_snr(), "v", "fixed_small")
    x, model = randn(1, 1, 4, 4), ignorant()
    for start in (ancestral, ddim):
        with pytest.raises(ValueError, match="timesteps end at 80, expected 99"):
            start(diffusion, model, x, generator=seeded(), timesteps=timestep_subset(100, 5, "leading"))
        *_, (_, image) = start(diffusion, model, x, generator=seeded(), timesteps=timestep_subset(100, 5))
        assert bool(torch.isfinite(image).all())


def test_mistakes_are_told_at_the_call_not_at_the_first_step() -> None:
    diffusion, model, x = linear(50), ignorant(), randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="eta=2"):
        ddim(diffusion, model, x, eta=2.0)
    with pytest.raises(ValueError, match=r"eta=0.5 draws noise, and no generator was given"):
        ddim(diffusion, model, x, eta=0.5)
    with pytest.raises(ValueError, match="strictly ascending"):
        ancestral(diffusion, model, x, generator=seeded(), timesteps=[10, 5])
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        ancestral(diffusion, model, x, generator=[seeded(i) for i in range(3)])


def test_noise_per_image_does_not_depend_on_the_batch() -> None:
    shape = (5, 3, 7, 7)
    together = normal_noise(shape, [seeded(i) for i in range(5)])
    for i in range(5):
        assert torch.equal(together[i : i + 1], normal_noise((1, *shape[1:]), [seeded(i)]))
    pair = normal_noise((2, *shape[1:]), [seeded(3), seeded(4)])
    assert torch.equal(together[3:], pair)
    assert together.dtype == torch.float32
    with pytest.raises(ValueError, match="2 generators for a batch of 5 images"):
        normal_noise(shape, [seeded(0), seeded(1)])


@pytest.mark.parametrize("eta", [None, 0.7])
def test_a_samplers_noise_per_image_does_not_depend_on_the_batch(eta: float | None) -> None:
    """With a network that is exact arithmetic (zero), whole trajectories are bit-equal in any batch."""
    diffusion = linear(30)

    def run(images: list[int]) -> Tensor:
        generators = [seeded(i) for i in images]
        x = normal_noise((len(images), 1, 4, 4), generators)
        zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
        if eta is None:
            return [x for _, x in ancestral(diffusion, zero, x, generator=generators)][-1]
        return [x for _, x in ddim(diffusion, zero, x, generator=generators, eta=eta)][-1]

    together = run([0, 1, 2, 3])
    assert torch.equal(together[2:], run([2, 3]))
    assert torch.equal(together[1:2], run([1]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_mode_does_not_leak(grad: bool) -> None:
    diffusion = linear(30)
    weight = torch.ones(1, requires_grad=True)
    inside = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return x * weight

    with torch.set_grad_enabled(grad):
        for sampler in (
            ancestral(diffusion, model, randn(1, 1, 2, 2), generator=seeded()),
            ddim(diffusion, model, randn(1, 1, 2, 2)),
        ):
            for _, x in sampler:
                assert torch.is_grad_enabled() is grad
                assert not x.requires_grad
                break  # a sampler left half-way restores it too
            assert torch.is_grad_enabled() is grad
    assert inside == [False, False]


def test_a_late_start_is_warned_about() -> None:
    """Where abar at the last kept step is above 0.01, unless the schedule itself never gets below."""
    schedule = BetaSchedule.from_betas([0.5, 0.96, 0.6, 0.5])  # abar 0.5, 0.02, 0.008, 0.004
    warning = late_start_warning(schedule, (0, 1)) or ""
    assert "the 2 steps start at t=1 of 0 .. 3, where abar = 0.02 is above 0.01" in warning
    assert late_start_warning(schedule, (0, 2)) is None
    assert late_start_warning(schedule, (1, 3)) is None
    assert late_start_warning(BetaSchedule.from_betas([0.5, 0.9]), (0,)) is None


def test_few_steps_of_fixed_large_are_warned_about() -> None:
    assert "use ddim, or variance fixed_small" in (few_steps_warning(linear(), 50) or "")
    assert few_steps_warning(linear(), 1000) is None
    assert few_steps_warning(linear(), 250) is not None
    assert few_steps_warning(linear(), 251) is None  # more than a quarter
    assert few_steps_warning(linear(variance="fixed_small"), 50) is None


def test_noise_drawn_ahead_is_the_same_noise_and_is_drawn_while_the_caller_works() -> None:
    shape, drawn = (3, 1, 4, 4), threading.Semaphore(0)

    def draw(generators: list[torch.Generator]) -> Tensor:
        noise = normal_noise(shape, generators)
        drawn.release()
        return noise

    ours = [seeded(seed) for seed in range(3)]
    given = []
    for step, noise in enumerate(drawn_ahead(lambda: draw(ours), 5)):
        given.append(noise)
        for _ in range(
            3 if step == 0 else 1 if step < 3 else 0
        ):  # this one, and two that the caller has not asked for yet
            assert drawn.acquire(timeout=60)
    generators = [seeded(seed) for seed in range(3)]
    expected = list(noise_for_steps(shape, generators, torch.device("cpu"), 5))
    assert all(map(torch.equal, given, expected))
    assert len(given) == len(expected) == 5
    for a, b in zip(ours, generators, strict=True):  # no more is drawn than is used
        assert torch.equal(a.get_state(), b.get_state())
    assert list(drawn_ahead(lambda: draw(ours), 0)) == []
