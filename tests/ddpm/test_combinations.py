"""Random combinations of everything: each trains, samples and is scored, twice alike, or is refused, and exactly where it should be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm import (
    SCHEDULES,
    TIMESTEP_SPACINGS,
    BetaSchedule,
    ExponentialMovingAverage,
    GaussianDiffusion,
    LossAwareTimesteps,
    Model,
    Objective,
    UniformTimesteps,
    ancestral,
    bits_per_dim,
    ddim,
    dpm_solver,
    normal_noise,
    timestep_subset,
)
from tests.kit.closed_forms import images, seeded


@dataclass(frozen=True)
class Choice:
    schedule: str
    T: int
    zero_terminal_snr: bool
    prediction: str
    variance: str
    clip: bool
    objective: str
    loss_aware: bool
    sampler: str
    eta: float
    spacing: str
    steps: int
    seed: int

    @property
    def ends_without_signal(self) -> bool:
        return self.zero_terminal_snr or self.schedule == "jsd"

    @property
    def refused_by(self) -> str | None:
        """Who refuses, by MATHS, written independently of the code."""
        if self.ends_without_signal and self.prediction in ("eps", "x_prev"):
            return "diffusion"
        learned = self.variance == "learned_range"
        if self.objective == "hybrid" and not learned:
            return "objective"
        if self.objective in ("simple", "min_snr") and learned:
            return "objective"
        if self.objective == "min_snr" and (self.prediction == "x_prev" or self.ends_without_signal):
            return "objective"
        misses_the_end = timestep_subset(self.T, self.steps, self.spacing)[-1] != self.T - 1
        return "sampler" if self.ends_without_signal and misses_the_end else None


CHOICES = st.builds(
    Choice,
    schedule=st.sampled_from(SCHEDULES),
    T=st.one_of(st.integers(21, 40), st.integers(21, 40), st.sampled_from([1000, 4000])),
    zero_terminal_snr=st.sampled_from([False, False, False, True]),
    prediction=st.sampled_from(["eps", "x0", "v", "x_prev"]),
    variance=st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    clip=st.booleans(),
    objective=st.sampled_from(["simple", "vlb", "hybrid", "min_snr"]),
    loss_aware=st.booleans(),
    sampler=st.sampled_from(["ancestral", "ddim", "dpm_solver"]),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    spacing=st.sampled_from(TIMESTEP_SPACINGS),
    steps=st.integers(1, 21),
    seed=st.integers(0, 99),
)


class Tiny(nn.Module):
    """A network of a few numbers that knows the time."""

    def __init__(self, channels: int, outputs: int, T: int) -> None:
        super().__init__()
        self.T = T
        self.one, self.two = nn.Conv2d(channels + 1, 8, 3, padding=1), nn.Conv2d(8, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t.float() / self.T).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        out: Tensor = self.two(torch.tanh(self.one(torch.cat([x, time], 1))))
        return out


def sample(choice: Choice, diffusion: GaussianDiffusion, model: Model) -> list[Tensor]:
    kept = timestep_subset(choice.T, choice.steps, choice.spacing)
    generators = [seeded(i) for i in range(2)]
    x_T = normal_noise((2, 1, 4, 4), generators)
    if choice.sampler == "ancestral":
        run = ancestral(diffusion, model, x_T, generator=generators, timesteps=kept)
    elif choice.sampler == "ddim":
        run = ddim(diffusion, model, x_T, generator=generators, timesteps=kept, eta=choice.eta)
    else:
        run = dpm_solver(diffusion, model, x_T, timesteps=kept)
    return [x for _, x in run]


def train_sample_and_score(choice: Choice) -> list[Tensor]:
    """Everything that came out, in order."""
    schedule = BetaSchedule.named(choice.schedule, choice.T)
    if choice.zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    diffusion = GaussianDiffusion(schedule, choice.prediction, choice.variance, choice.clip)
    objective = Objective(diffusion, choice.objective)
    torch.manual_seed(choice.seed)
    model = Tiny(1, diffusion.output_channels(1), choice.T)
    optimizer, ema = torch.optim.Adam(model.parameters(), 1e-3), ExponentialMovingAverage(model, 0.9)
    steps = LossAwareTimesteps(choice.T) if choice.loss_aware else UniformTimesteps(choice.T)
    out = []
    for step in range(4):
        g = seeded(1000 + step)
        x0, (t, weight) = images(16, seed=step).float(), steps.draw(torch.rand(16, generator=g, dtype=torch.float64))
        losses = objective(model, x0, t, normal_noise(x0.shape, g))
        assert losses.shape == (16,)
        assert losses.dtype == torch.float32
        optimizer.zero_grad()
        torch.autograd.backward((losses * weight).mean())
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()
        ema.update()
        steps.update(t, losses)
        out.append(losses.detach())
    ema.copy_to(model)
    trajectory = sample(choice, diffusion, model.eval())
    assert len(trajectory) == len(timestep_subset(choice.T, choice.steps, choice.spacing))
    assert trajectory[-1].shape == (2, 1, 4, 4)
    return [*out, *trajectory, score(diffusion, model)]


def score(diffusion: GaussianDiffusion, model: Model) -> Tensor:
    T = diffusion.num_timesteps
    steps = timestep_subset(T, min(T, 40), "linspace")  # of a long chain the bound over some of its steps
    result = bits_per_dim(diffusion, model, images(2).float(), generator=seeded(7), timesteps=steps)
    assert result.terms.shape == (2, len(steps))
    assert bool((result.terms > -1e-6).all())  # each is a divergence, or minus the log of a probability
    return result.total


@pytest.mark.slow
@settings(max_examples=150)
@given(CHOICES)
def test_every_combination_works_or_is_refused_where_it_should_be(choice: Choice) -> None:
    if choice.refused_by is None:
        one, two = train_sample_and_score(choice), train_sample_and_score(choice)
        assert all(bool(torch.isfinite(x).all()) for x in one)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        return
    with pytest.raises(ValueError, match=r"use |expected ") as error:
        train_sample_and_score(choice)
    assert "\n" not in str(error.value)
    # pytest's last entry is the line that raised
    files = {"diffusion": {"diffusion.py"}, "objective": {"objective.py"}, "sampler": {"respacing.py"}}
    assert error.traceback[-1].path.name in files[choice.refused_by]  # type: ignore[union-attr]
