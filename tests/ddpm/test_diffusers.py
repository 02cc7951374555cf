"""Step by step against diffusers' schedulers, fed with our tables in float64 so that only the arithmetic is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, ancestral, ddim, dpm_solver, normal_noise, timestep_subset
from tests.kit.closed_forms import exact, ignorant, randn, seeded

NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class SameNoise:
    """Replays, to a peer that asks for `randn_tensor`, the draws our sampler makes from the same seed."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.generator, self.shape = seeded(), shape

    def draw(self) -> Tensor:
        return normal_noise(self.shape, self.generator).double()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("T", "steps"), [(60, 60), (1000, 25)])
def test_ancestral_equals_ddpm_scheduler(
    T: int, steps: int, prediction: str, variance: str, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    schedule = BetaSchedule.named("cosine" if T == 60 else "linear", T)
    diffusion = GaussianDiffusion(schedule, prediction, variance, clip)
    peer = exact(
        DDPMScheduler(
            T, prediction_type=NAMES[prediction], variance_type=variance, clip_sample=clip, timestep_spacing="leading"
        ),
        schedule,
    )
    peer.set_timesteps(steps)
    x, model = 1.5 * randn(2, 2, 4, 4), ignorant(2, 4 if variance == "learned_range" else 2)
    noise = SameNoise(tuple(x.shape))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.draw())
    kept = timestep_subset(T, steps, "leading")  # theirs draws noise at its last step unless that is t = 0
    clipped = 0
    for (t, ours), at in zip(
        ancestral(diffusion, model, x, generator=seeded(), timesteps=kept), peer.timesteps, strict=True
    ):
        assert t == int(at)
        out = peer.step(model(x, at.expand(2)), int(at), x)
        clipped += int((out.pred_original_sample.abs() == 1).sum())
        torch.testing.assert_close(ours, out.prev_sample, rtol=1e-6, atol=1e-8)
        x = ours
    assert (clipped > 100) is clip


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("T", "steps", "spacing"), [(1000, 50, "trailing"), (60, 12, "leading"), (4000, 20, "trailing")]
)
def test_ddim_equals_ddim_scheduler(T: int, steps: int, spacing: str, prediction: str, eta: float, clip: bool) -> None:
    from diffusers import DDIMScheduler

    schedule = BetaSchedule.named("cosine" if T == 4000 else "linear", T)
    diffusion = GaussianDiffusion(schedule, prediction, clip_x0=clip)
    peer = exact(
        DDIMScheduler(
            T, prediction_type=NAMES[prediction], clip_sample=clip, timestep_spacing=spacing, set_alpha_to_one=True
        ),
        schedule,
    )
    peer.set_timesteps(steps)
    x, model = 1.5 * randn(2, 2, 4, 4), ignorant(2)
    noise = SameNoise(tuple(x.shape))
    kept = timestep_subset(T, steps, spacing)
    run = ddim(diffusion, model, x, generator=seeded(), timesteps=kept, eta=eta)
    for i, ((t, ours), at) in enumerate(zip(run, peer.timesteps, strict=True)):
        assert t == int(at)
        drawn = noise.draw() if eta > 0 and i < steps - 1 else torch.zeros_like(x)
        out = peer.step(model(x, at.expand(2)), int(at), x, eta, use_clipped_model_output=clip, variance_noise=drawn)
        torch.testing.assert_close(ours, out.prev_sample, rtol=1e-7, atol=1e-9)
        x = ours


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in their set_timesteps
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("T", "steps", "spacing"),
    [(1000, 20, "trailing"), (1000, 50, "linspace"), (60, 8, "trailing"), (1000, 2, "trailing")],
)
def test_dpm_solver_equals_dpmsolver_multistep(T: int, steps: int, spacing: str, prediction: str, clip: bool) -> None:
    from diffusers import DPMSolverMultistepScheduler

    schedule = BetaSchedule.named("linear", T)
    diffusion = GaussianDiffusion(schedule, prediction, clip_x0=clip)
    # theirs has no static clipping, but its dynamic thresholding with a maximum of 1 is that
    peer = exact(
        DPMSolverMultistepScheduler(
            T, prediction_type=NAMES[prediction], algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
            final_sigmas_type="zero", thresholding=clip, sample_max_value=1.0,
        ),
        schedule,
    )  # fmt: skip
    kept = timestep_subset(T, steps, spacing)
    peer.set_timesteps(timesteps=list(reversed(kept)))
    abar = peer.alphas_cumprod[peer.timesteps]
    peer.sigmas = torch.cat([((1 - abar) / abar) ** 0.5, torch.zeros(1)])  # float64, as ours
    x, model = 1.5 * randn(2, 2, 4, 4), ignorant(2)
    for (t, ours), at in zip(dpm_solver(diffusion, model, x, timesteps=kept), peer.timesteps, strict=True):
        assert t == int(at)
        theirs = peer.step(model(x, at.expand(2)), at, x).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        x = ours


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_equals_the_peers(prediction: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    T, steps = 1000, 20
    schedule = BetaSchedule.named("linear", T).with_zero_terminal_snr()
    diffusion = GaussianDiffusion(schedule, prediction, "fixed_small", clip)
    x_T, model, kept = randn(2, 2, 4, 4), ignorant(2), timestep_subset(T, steps)
    arguments = {"prediction_type": NAMES[prediction], "clip_sample": clip, "timestep_spacing": "trailing"}
    one = exact(DDIMScheduler(T, set_alpha_to_one=True, rescale_betas_zero_snr=True, **arguments), schedule)
    two = exact(DDPMScheduler(T, variance_type="fixed_small", rescale_betas_zero_snr=True, **arguments), schedule)
    noise = SameNoise(tuple(x_T.shape))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.draw())
    runs: tuple[Any, ...] = (
        (one, ddim(diffusion, model, x_T, timesteps=kept), {"use_clipped_model_output": clip}),
        (two, ancestral(diffusion, model, x_T, generator=seeded(), timesteps=kept), {}),
    )
    for peer, run, options in runs:
        peer.set_timesteps(steps)
        x = x_T
        for (t, ours), at in zip(run, peer.timesteps, strict=True):
            assert t == int(at)
            theirs = peer.step(model(x, at.expand(2)), int(at), x, **options).prev_sample
            # their last step adds noise of variance 1e-20
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
            x = ours


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_add_noise_and_velocity_equal_the_peers(prediction: str) -> None:
    from diffusers import DDPMScheduler

    schedule = BetaSchedule.named("cosine", 300)
    diffusion, peer = GaussianDiffusion(schedule, prediction), exact(DDPMScheduler(300), schedule)
    x0, eps, t = randn(5, 1, 3, 3), randn(5, 1, 3, 3, seed=1), torch.tensor([0, 1, 150, 298, 299])
    x_t = diffusion.q_sample(x0, t, eps)
    torch.testing.assert_close(x_t, peer.add_noise(x0, eps, t), rtol=1e-10, atol=1e-12)
    expected = {"eps": eps, "x0": x0, "v": peer.get_velocity(x0, eps, t)}[prediction]
    torch.testing.assert_close(diffusion.target(x0, x_t, t, eps), expected, rtol=1e-10, atol=1e-12)
