"""DPM-Solver++(2M), DDIM inversion and interpolation: closed forms on data whose flow is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, Model, Step, ddim, ddim_invert, dpm_solver, slerp, timestep_subset
from tests.kit.closed_forms import abar_at, ignorant, normal_data, point_mass, randn


def linear(T: int = 1000, prediction: str = "eps") -> GaussianDiffusion:
    return GaussianDiffusion(BetaSchedule.named("linear", T), prediction, clip_x0=False)


@pytest.mark.parametrize(
    ("steps", "spacing", "gain"), [(20, "trailing", 1.00133), (50, "linspace", 1.01835), (20, "linspace", 1.115)]
)
def test_dpm_solver_on_normal_data(steps: int, spacing: str, gain: float) -> None:
    """x stays put under the exact flow of N(0, 1), so that 1 is right; the numbers are those of MATHS."""
    diffusion = linear()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    *_, (t, x) = dpm_solver(diffusion, normal_data(diffusion), one, timesteps=timestep_subset(1000, steps, spacing))
    assert t == timestep_subset(1000, steps, spacing)[0]
    assert float(x) == pytest.approx(gain, abs=6e-4 if gain == 1.115 else 6e-6)


def two_points(diffusion: GaussianDiffusion, a: float = 0.5) -> Model:
    """The optimal network where x0 is -a or a, each half the time: E[x0 | x_t] = a tanh(sqrt(abar) a x_t / (1 - abar))."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        abar = abar_at(diffusion.schedule, t, x_t)
        x0 = a * torch.tanh(abar.sqrt() * a * x_t / (1 - abar))
        return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()

    return model


def test_dpm_solver_is_of_second_order_and_ddim_of_first() -> None:
    """The error against the flow at T = 8000 steps, where steps are equal in the log-SNR and end before clean data."""
    T = 8000
    schedule = BetaSchedule.named("cosine", T)
    diffusion = GaussianDiffusion(schedule, clip_x0=False)
    model, x_T = two_points(diffusion), torch.linspace(-2, 2, 41, dtype=torch.float64).view(41, 1, 1, 1)
    log_snr = schedule.snr.log()

    def subset(steps: int) -> list[int]:
        lams = torch.linspace(float(log_snr[7200]), float(log_snr[1500]), steps + 1, dtype=torch.float64)
        return sorted({int((log_snr - lam).abs().argmin()) for lam in lams})

    def before_the_last(run: Iterable[Step]) -> Tensor:
        return [x for _, x in run][-2]  # the state at the lowest kept step

    truth = before_the_last(ddim(diffusion, model, x_T, timesteps=range(1500, 7201, 2)))
    errors: dict[str, list[float]] = {"ddim": [], "dpm": []}
    for steps in (16, 32, 64):
        kept = subset(steps)
        assert kept[0] == 1500
        assert kept[-1] == 7200
        errors["ddim"].append(float((before_the_last(ddim(diffusion, model, x_T, timesteps=kept)) - truth).abs().max()))
        errors["dpm"].append(
            float((before_the_last(dpm_solver(diffusion, model, x_T, timesteps=kept)) - truth).abs().max())
        )
    for name, order in (("ddim", 1), ("dpm", 2)):
        rates = [math.log2(a / b) for a, b in pairwise(errors[name])]
        assert rates == pytest.approx([order] * 2, abs=0.45), (name, errors[name])


def test_dpm_solver_of_one_step_is_ddim() -> None:
    diffusion, model, x = linear(60), ignorant(), randn(2, 1, 4, 4)
    for kept in ([59], [30]):
        ((_, a),), ((_, b),) = (
            dpm_solver(diffusion, model, x, timesteps=kept),
            ddim(diffusion, model, x, timesteps=kept),
        )
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dpm_solver_takes_its_first_step_as_ddim_does() -> None:
    diffusion, model, x = linear(60), ignorant(), randn(2, 1, 4, 4)
    kept = timestep_subset(60, 10)
    first_dpm, first_ddim = (next(iter(s(diffusion, model, x, timesteps=kept))).x for s in (dpm_solver, ddim))
    torch.testing.assert_close(first_dpm, first_ddim, rtol=1e-9, atol=1e-12)


def test_dpm_solver_from_no_signal_at_all_is_finite() -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 100).with_zero_terminal_snr(), "v")
    for steps in (1, 2, 3, 20):
        *_, (_, x) = dpm_solver(diffusion, ignorant(), randn(2, 1, 4, 4), timesteps=timestep_subset(100, steps))
        assert bool(torch.isfinite(x).all())
    mass = point_mass(diffusion, 0.4)
    *_, (_, x) = dpm_solver(diffusion, mass, randn(2, 1, 4, 4), timesteps=timestep_subset(100, 7))
    torch.testing.assert_close(x, torch.full_like(x, 0.4), rtol=0, atol=1e-9)


def test_inversion_of_normal_data_multiplies_by_cosines() -> None:
    diffusion, kept = linear(), timestep_subset(1000, 50, "linspace")
    phi = [math.acos(math.sqrt(diffusion.schedule.alphas_cumprod[t])) for t in kept]
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    steps = list(ddim_invert(diffusion, normal_data(diffusion), one, timesteps=kept))
    assert [t for t, _ in steps] == list(kept)
    # the first step knows x0 = x: sqrt(abar) + (1 - abar); each later one turns by an angle, as sampling does
    gain = math.cos(phi[0]) + math.sin(phi[0]) ** 2
    for i, (_, x) in enumerate(steps):
        gain *= math.cos(phi[i] - phi[i - 1]) if i > 0 else 1.0
        assert float(x) == pytest.approx(gain, abs=1e-9)


def test_inversion_then_sampling_returns_the_image_more_closely_with_more_steps() -> None:
    diffusion = linear()
    x0 = 0.3 * randn(3, 1, 4, 4)

    def model(x_t: Tensor, t: Tensor) -> Tensor:  # optimal where x0 ~ N(0, 0.3^2)
        abar = abar_at(diffusion.schedule, t, x_t)
        return (1 - abar).sqrt() * x_t / (0.09 * abar + 1 - abar)

    errors = []
    for steps in (50, 200, 800):
        kept = timestep_subset(1000, steps, "linspace")
        *_, (_, x_T) = ddim_invert(diffusion, model, x0, timesteps=kept)
        *_, (_, again) = ddim(diffusion, model, x_T, timesteps=kept)
        errors.append(float((again - x0).abs().mean()))
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5
    assert errors[2] < 0.05


def test_inversion_does_not_clip() -> None:
    model, x0 = ignorant(), 0.9 * randn(2, 1, 4, 4)
    clipping = GaussianDiffusion(BetaSchedule.named("linear", 60))
    one, two = (list(ddim_invert(d, model, x0))[-1].x for d in (clipping, linear(60)))
    assert torch.equal(one, two)


def test_slerp_keeps_the_length_and_the_ends() -> None:
    x, y = randn(4, 2, 8, 8), randn(4, 2, 8, 8, seed=1)
    x, y = (z / z.flatten(1).norm(dim=1).view(4, 1, 1, 1) for z in (x, y))
    torch.testing.assert_close(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)
    for weight in (0.2, 0.5, 0.9):
        z = slerp(x, y, weight).flatten(1)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(4, dtype=torch.float64))
        whole = (x * y).flatten(1).sum(1).acos()
        torch.testing.assert_close((z * x.flatten(1)).sum(1).acos(), weight * whole)
    torch.testing.assert_close(slerp(x, x, 0.3), x)
