"""Step by step against diffusers' schedulers, fed with our tables in float64 so that only the arithmetic is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion, ancestral, ddim, normal_noise, timestep_subset
from tests.ddpm.closed_forms import ignorant, randn, seeded

NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def exact(peer: Any, schedule: BetaSchedule) -> Any:
    """The peer with float64 tables: its own are float32 and would decide the tolerance."""
    peer.betas = torch.from_numpy(schedule.betas.numpy().copy())
    peer.alphas = 1 - peer.betas
    peer.alphas_cumprod = torch.from_numpy(np.cumprod(1 - schedule.betas.numpy()))
    peer.one = torch.tensor(1.0, dtype=torch.float64)
    peer.final_alpha_cumprod = peer.one
    return peer


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
@pytest.mark.parametrize(("T", "steps", "rule"), [(1000, 50, "trailing"), (60, 12, "leading"), (4000, 20, "trailing")])
def test_ddim_equals_ddim_scheduler(T: int, steps: int, rule: str, prediction: str, eta: float, clip: bool) -> None:
    from diffusers import DDIMScheduler

    schedule = BetaSchedule.named("cosine" if T == 4000 else "linear", T)
    diffusion = GaussianDiffusion(schedule, prediction, clip_x0=clip)
    peer = exact(
        DDIMScheduler(
            T, prediction_type=NAMES[prediction], clip_sample=clip, timestep_spacing=rule, set_alpha_to_one=True
        ),
        schedule,
    )
    peer.set_timesteps(steps)
    x, model = 1.5 * randn(2, 2, 4, 4), ignorant(2)
    noise = SameNoise(tuple(x.shape))
    kept = timestep_subset(T, steps, rule)
    run = ddim(diffusion, model, x, generator=seeded(), timesteps=kept, eta=eta)
    for i, ((t, ours), at) in enumerate(zip(run, peer.timesteps, strict=True)):
        assert t == int(at)
        drawn = noise.draw() if eta > 0 and i < steps - 1 else torch.zeros_like(x)
        out = peer.step(model(x, at.expand(2)), int(at), x, eta, use_clipped_model_output=clip, variance_noise=drawn)
        torch.testing.assert_close(ours, out.prev_sample, rtol=1e-7, atol=1e-9)
        x = ours
